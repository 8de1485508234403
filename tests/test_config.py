"""A typo in a config is an error that names the nearest key, and flags override the file."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

import pytest

from data_prep.config import BuildConfig
from echo_ft.config import parse, run_main
from echo_ft.errors import EchoError


@dataclass(frozen=True)
class Options:
    dataset: str = field(metadata={"help": "required"})
    learning_rate: float = 1e-3
    steps: int = 3
    kinds: list[str] = field(default_factory=lambda: ["a"])
    balance: bool = True
    reasoning: str = field(default="on", metadata={"choices": ["on", "off"]})
    limit: int | None = 5
    saved: str = field(default="steps", metadata={"choices": ["no", "steps"]})


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> list[str]:
        (tmp_path / "run.yaml").write_text(text)
        return ["--config", str(tmp_path / "run.yaml")]

    return write


def test_values_have_their_types_and_flags_win(write):
    argv = write("dataset: d\nlearning_rate: 2e-4\nkinds: [x, y]\nbalance: false\nreasoning: off\nlimit: null\n")
    (options,) = parse([Options], [*argv, "--steps", "7", "--dataset", "e"])
    assert options == Options("e", 2e-4, 7, ["x", "y"], False, "off", None)


def test_words_that_yaml_reads_as_booleans_are_choices(write):
    for word in ("no", "No", "'no'", "false"):
        assert parse([Options], write(f"dataset: d\nsaved: {word}\n"))[0].saved == "no"
    with pytest.raises(EchoError, match="saved cannot be 'True'; choose from no, steps"):
        parse([Options], write("dataset: d\nsaved: yes\n"))


def test_the_home_folder_is_expanded_in_files_and_flags(write, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = f"source: synthetic\noutput: ~/x/cap\nroot: ~/drawn\nannotations: {tmp_path}/~/a~/b.csv\n"
    (built,) = parse([BuildConfig], [*write(text), "--cache=~/c"])
    assert (built.output, built.root) == (tmp_path / "x" / "cap", tmp_path / "drawn")
    assert (built.annotations, built.cache) == (tmp_path / "~" / "a~" / "b.csv", tmp_path / "c")
    write("dataset: ~/d\nkinds: [~/k, x~/y]\n")
    (options,) = parse([Options], ["--config=~/run.yaml"])
    assert (options.dataset, options.kinds) == (f"{tmp_path}/d", [f"{tmp_path}/k", "x~/y"])


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("dataset: d\nlerning_rate: 1\n", [], "unknown key 'lerning_rate'; did you mean 'learning_rate'"),
        ("dataset: d\n", ["--step", "1"], "unknown option --step; did you mean 'steps'"),
        ("steps: 1\n", [], r"run\.yaml: the following arguments are required: --dataset"),
        ("dataset: d\nsteps: many\n", [], "steps cannot be 'many'"),
        ("dataset:\n", [], "dataset is empty; set a value"),
        ("dataset: d\nsteps:\n", [], "steps is empty; set a value or remove the line"),
        ("dataset: d\nreasoning: maybe\n", [], "choose from on, off"),
        ("dataset: d\nkinds: x\n", [], "kinds takes a list"),
        ("dataset: [d]\n", [], "dataset takes one value"),
        ("dataset: d\n", ["--steps", "x"], "^the command line: argument --steps: invalid int value: 'x'"),
        ("dataset: d\nsteps: 1\n", ["--reasoning", "maybe"], "^the command line: argument --reasoning"),
        ("- a\n- b\n", [], "a config must be a mapping"),
        ("dataset: d\nsteps: 1\nsteps: 2\n", [], "not valid YAML: duplicate key 'steps'"),
        ("a: [\n", [], "not valid YAML"),
    ],
)
def test_config_mistakes_are_named(write, text, flags, message):
    with pytest.raises(EchoError, match=message):
        parse([Options], [*write(text), *flags])


def test_help_explains_the_config_file_and_negated_flags(write, capsys):
    for argv in ([], write("dataset: d\nbalance: false\n")):
        with pytest.raises(SystemExit):
            parse([Options], [*argv, "--help"])
        printed = " ".join(capsys.readouterr().out.split())
        assert "--config FILE reads" in printed
        assert printed.count("Same as --balance false.") == 1
        assert "balance false (default" not in printed


def test_switch_is_turned_off_by_flag_or_file_and_on_again(write):
    off = write("dataset: d\nbalance: false\n")
    assert not parse([Options], off)[0].balance
    assert parse([Options], [*off, "--balance"])[0].balance
    assert not parse([Options], ["--dataset", "d", "--no_balance"])[0].balance
    assert parse([Options], ["--dataset", "d"])[0].balance


def test_missing_file_error_names_the_nearest_file(write, tmp_path):
    write("dataset: d\n")
    with pytest.raises(EchoError, match=r"no config file .*rum\.yaml; did you mean .*run\.yaml"):
        parse([Options], ["--config", str(tmp_path / "rum.yaml")])


def test_ctrl_c_says_how_to_resume(monkeypatch, capsys):
    def interrupted(argv: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["command"])
    for hint in ((), ("rerun the command to resume",)):
        with pytest.raises(SystemExit) as ended:
            run_main(interrupted, *hint)
        assert ended.value.code == 130
        assert capsys.readouterr().err == f"stopped by Ctrl-C; {(*hint, 'rerun the command to start again')[0]}\n"


def ended_by(error: BaseException | int, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of a command whose main function raises an error or returns a status."""

    def main(argv: list[str]) -> int:
        if isinstance(error, int):
            return error
        raise error

    monkeypatch.setattr("sys.argv", ["command", "--output", "a b"])
    with pytest.raises(SystemExit) as ended:
        run_main(main)
    return ended.value.code


def test_wandb_errors_are_one_line(monkeypatch, capsys):
    from wandb.errors import UsageError

    assert ended_by(UsageError("No API key configured."), monkeypatch) == 2
    assert "error: W&B: No API key configured.; run wandb login" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            ZeroDivisionError("by zero\nand more"),
            "error: ZeroDivisionError: by zero; check what the message mentions, or report",
        ),
        (MemoryError(), "error: out of memory (MemoryError); use smaller batches or images"),
        (FileNotFoundError(2, "No such file", "data/x"), "error: data/x: No such file; check the path"),
        (ValueError("\x1b[31mred"), "error: ValueError: \\x1b[31mred; check"),
    ],
)
def test_an_unexpected_error_is_one_sentence_that_names_the_file_with_its_traceback(
    error, message, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ended_by(error, monkeypatch) == 2, "1 means that an image was flagged"
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1 and "Traceback" not in said
    (file,) = tmp_path.iterdir()
    assert said.endswith(f"the traceback is in {file}\n")
    assert file.read_text().startswith("command --output 'a b'\n\nTraceback")
    assert f"in main\n    raise error\n{type(error).__name__}" in file.read_text()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "data/x"), "data/x: Permission denied; check the path, its"),
        (RuntimeError("Symlink loop from 'data/x'"), "Symlink loop from 'data/x'; remove the link"),
    ],
)
def test_an_unusable_path_needs_no_traceback(error, message, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ended_by(error, monkeypatch) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not [*tmp_path.iterdir()]


def test_warnings_of_pillow_about_an_image_are_not_printed(monkeypatch):
    import warnings

    def main(argv):
        for module in ("PIL.TiffImagePlugin", "elsewhere"):
            warnings.warn_explicit("odd metadata", UserWarning, "file.py", 1, module)

    monkeypatch.setattr("sys.argv", ["command"])
    with pytest.warns(UserWarning) as shown:
        run_main(main)
    assert len(shown) == 1


def test_without_room_for_the_file_the_traceback_is_printed(monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", full)
    assert ended_by(ZeroDivisionError(), monkeypatch) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_command_ends_with_the_status_that_it_returns(monkeypatch):
    assert ended_by(3, monkeypatch) == 3
    run_main(lambda argv: 0)
    run_main(lambda argv: None)


def test_ctrl_c_that_a_library_turns_into_an_error_is_ctrl_c(monkeypatch, capsys):
    def main(argv: list[str]) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise EchoError("the adapter does not fit") from None

    # A shell starts its background jobs with SIGINT ignored.
    given = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            run_main(main)
    finally:
        signal.signal(signal.SIGINT, given)  # run_main keeps its handler until the process ends
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped by Ctrl-C; rerun the command to start again\n"


def test_only_the_first_process_of_a_machine_tells_of_ctrl_c(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ended_by(KeyboardInterrupt(), monkeypatch) == 130
    assert capsys.readouterr().err == ""


@dataclass(frozen=True)
class Mapped:
    schedule: dict[str, float] | None = None
    lora_target_modules: list[str] | None = None
    rate: float = 1.0
    steps: int = 3


@pytest.mark.parametrize("value", ["1e-6", "{a: 1e-6, b: [2e+3, x1e3]}"])
def test_numbers_with_an_exponent_are_numbers_in_mappings_too(write, value):
    if value.startswith("{"):
        assert parse([Mapped], write(f"schedule: {value}\n"))[0].schedule == {"a": 1e-6, "b": [2e3, "x1e3"]}
        assert parse([Mapped], ["--schedule", '{"a": "1e-6"}'])[0].schedule == {"a": 1e-6}
    else:
        assert parse([Mapped], write(f"rate: {value}\n"))[0].rate == 1e-6


def test_a_text_is_a_list_of_one_only_for_options_that_peft_takes_as_text(write):
    assert parse([Mapped], write("lora_target_modules: all-linear\n"))[0].lora_target_modules == ["all-linear"]


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("rate: .nan\n", [], "rate cannot be nan"),
        ("rate: .inf\n", [], "rate cannot be inf"),
        ("", ["--rate", "nan"], "argument --rate: invalid float value: 'nan'"),
        ("steps: 2.5\n", [], r"steps cannot be 2\.5"),
        ("steps: 1.0e+300\n", [], r"steps cannot be 1e\+300"),
        ("rate: {a: 1}\n", [], "rate takes one value"),
        ("lora_target_modules: {a: 1}\n", [], "lora_target_modules takes a list"),
        ("schedule: linear\n", [], "schedule cannot be 'linear' .*neither a file nor a mapping"),
        ("", ["--schedule", "{a"], "argument --schedule: '{a' is not valid JSON"),
    ],
)
def test_values_that_no_option_takes_are_named(write, text, flags, message):
    with pytest.raises(EchoError, match=message):
        parse([Mapped], [*(write(text) if text else []), *flags])
    assert parse([Mapped], write("steps: 2.0\n"))[0].steps == 2


def test_a_name_that_is_not_near_is_no_hint(write):
    for far in ("patience", "warmth", "stop"):
        with pytest.raises(EchoError, match=f"unknown option --{far}; run with --help for the list"):
            parse([Options], ["--dataset", "d", f"--{far}", "1"])


@dataclass
class Checked:
    """Check its own values and report errors in its own words, as a class from another library does."""

    kind: str = "plain"
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.kind != "plain":
            raise KeyError(f"no such thing: {self.kind!r}")
        if self.share > 1:
            raise RuntimeError("share must not exceed the whole")


def test_errors_of_another_librarys_checks_name_the_option():
    for flags, message in (
        (["--kind", "odd"], "the command line: kind: .*'odd'"),
        (["--share", "2"], ": share must not"),
    ):
        with pytest.raises(EchoError, match=message):
            parse([Checked], flags)
