"""Adapters work in the pipeline, survive an export, and are rejected if they do not fit the run."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from peft import LoraModel
from safetensors.torch import load_file, save_file

from echo_ft.data.dataset import load_dataset
from echo_ft.errors import EchoError
from echo_ft.experts.option_order import PermutedPrediction
from echo_ft.files import read_jsonl
from echo_ft.inference.engine import Engine
from echo_ft.model.adapters import (
    Adapter,
    attach_adapters,
    find_adapters,
    make_card,
    read_card,
    write_card,
)
from echo_ft.model.loading import base_fingerprint, load_model
from echo_ft.model.training_overlap import describe_training_data
from echo_ft.provenance import seal_folder
from echo_ft.records import ROLES, Prediction, Trace
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, make_dataset, random_adapters
from tests.support.exchanges import exchanges_of
from tests.support.runs import run_evaluation
from train.export import main as export_main
from train.show import main as show_main

NO_IMAGES = ("--references", "none")
"""Options of an export from a dataset without normal images."""

TARGETS = {role: ["q_proj", "v_proj"] for role in ROLES} | {"reasoning_expert": ["q_proj", "attn.qkv"]}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("data"), train=1, validation=1, test=3)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, dataset):
    """Four adapters; the reasoning expert's adapter also changes the vision tower."""
    return random_adapters(tmp_path_factory.mktemp("adapters"), dataset, TARGETS)


def rows(folder, name, cls):
    return list(read_jsonl(folder / name, cls))


def test_a_run_answers_every_question_and_adapters_change_the_answers(dataset, adapters, tmp_path, capsys):
    run_evaluation(dataset, tmp_path / "base")
    run_evaluation(dataset, tmp_path / "tuned", "--adapters", adapters)
    cut = json.loads((tmp_path / "tuned" / "run.json").read_text())["cut"]
    assert cut["reasoning_expert"] > 0, "six tokens are too few"
    assert f"{cut['reasoning_expert']} from the reasoning_expert" in capsys.readouterr().err
    base, tuned = (rows(tmp_path / name, "predictions.jsonl", Prediction) for name in ("base", "tuned"))
    assert len({row.question for row in base}) == len(base) == len(tuned) == 21
    assert [row.probabilities for row in base] != [row.probabilities for row in tuned]
    assert {trace.role for trace in rows(tmp_path / "tuned", "traces.jsonl", Trace)} == set(ROLES)
    provenance = json.loads((tmp_path / "tuned" / "run.json").read_text())
    run_evaluation(dataset, tmp_path / "paper", "--adapters", adapters, "--routing", "paper")
    assert "trained with routing full, but this run uses paper" in capsys.readouterr().err
    assert provenance["complete"]
    assert set(provenance["adapters"]) == set(ROLES)
    for role, adapter in find(adapters).items():
        assert provenance["adapters"][role]["fingerprint"] == adapter.fingerprint
    imaging = {"torchvision", "pillow", "opencv-python-headless"}
    assert set(provenance["versions"]) == {"torch", "transformers", "peft", *imaging}
    assert {"python", "numpy", "scipy"} <= set(provenance["other_versions"])
    assert provenance["adapters_folder"] == str(adapters)


def test_a_run_does_not_resume_with_a_retrained_adapter(dataset, copied, tmp_path):
    run_evaluation(dataset, tmp_path / "tuned", "--adapters", copied)
    run_evaluation(dataset, tmp_path / "tuned", "--adapters", copied)  # the same adapters: it resumes
    before = find(copied)
    path = copied / "reasoning_expert" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: weight * 1.01 for name, weight in weights.items()}, path, metadata={"format": "pt"})
    seal_folder(path.parent)
    after = find(copied)
    changed = {role for role in ROLES if before[role] != after[role]}
    assert changed == {"reasoning_expert"}
    assert before["reasoning_expert"].card == after["reasoning_expert"].card
    with pytest.raises(EchoError, match=r"adapters\.reasoning_expert\.fingerprint is .*choose another --output"):
        run_evaluation(dataset, tmp_path / "tuned", "--adapters", copied)
    settings = copied / "knowledge_guide" / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora_alpha": 99}))
    seal_folder(settings.parent)
    assert find(copied)["knowledge_guide"].fingerprint != after["knowledge_guide"].fingerprint
    path.unlink()
    with pytest.raises(EchoError, match=r"adapter_model\.safetensors is missing since it was saved"):
        find(copied)


def copy_dataset(source, target, fingerprint):
    """Copy the dataset `source` and give it another fingerprint."""
    shutil.copytree(source, target)
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps({**manifest, "fingerprint": fingerprint}))
    return load_dataset(target)


def adapters_trained_on(dataset, roles=ROLES):
    return {
        role: Adapter(dataset.folder, make_card(role, str(ECHO_TINY), None, MIN_PIXELS, MAX_PIXELS, dataset), "f")
        for role in roles
    }


def test_test_images_that_were_trained_on_are_counted_by_content(dataset, tmp_path):
    """The first test image of the dataset is a copy of its train image under another name."""
    here = load_dataset(dataset)
    images = [f"test_{index}_2.png" for index in range(3)]
    (same,), warnings = describe_training_data(adapters_trained_on(here), here, "test", images)
    assert (same["photographs_trained_on"], same["of_photographs"]) == (1, 3)
    assert len(warnings) == 1
    assert "1 OF 3 IMAGES OF THE SPLIT test WERE TRAINED ON" in warnings[0]
    assert describe_training_data(adapters_trained_on(here), here, "test", images[1:])[1] == []

    other = copy_dataset(dataset, tmp_path / "other", "another")
    (found,), warnings = describe_training_data(adapters_trained_on(other), here, "test", images)
    assert found["photographs_trained_on"] == 1
    assert found["dataset_fingerprint"] == "another"
    assert "WERE TRAINED ON" in warnings[0]
    assert "differ from this run's dataset" in warnings[1]
    (found,), warnings = describe_training_data(adapters_trained_on(other), here, "test", images[1:])
    assert found["photographs_trained_on"] == 0
    assert "may have been trained on" in warnings[0]

    adapters = adapters_trained_on(other)
    for rebuilt in (True, False):  # first rebuild the training dataset, then remove it
        shutil.rmtree(tmp_path / "other")
        if rebuilt:
            copy_dataset(dataset, tmp_path / "other", "third")
        (found,), warnings = describe_training_data(adapters, here, "test", images)
        assert found["photographs_trained_on"] is None
        assert "may have been trained on; that dataset is missing" in warnings[0]


def test_a_missing_training_image_does_not_hide_that_others_were_trained_on(tmp_path):
    here = load_dataset(make_dataset(tmp_path / "data", train=2, validation=1, test=1))
    before = describe_training_data(adapters_trained_on(here), here, "test", ["test_0_2.png"])
    assert before[0][0]["photographs_trained_on"] == 1
    (here.root / "train_1_2.png").unlink()
    assert describe_training_data(adapters_trained_on(here), here, "test", ["test_0_2.png"]) == before


def test_a_run_warns_about_adapters_trained_on_different_datasets(dataset, tmp_path):
    here, other = load_dataset(dataset), copy_dataset(dataset, tmp_path / "other", "another")
    mixed = {**adapters_trained_on(here, ROLES[:3]), **adapters_trained_on(other, ROLES[3:])}
    found, warnings = describe_training_data(mixed, here, "test", ["test_1_2.png"])
    assert [one["roles"] for one in found] == [list(ROLES[:3]), ["decision_maker"]]
    assert "trained on 2 different datasets" in warnings[0]
    assert "training data of the adapters for decision_maker" in warnings[1]


@pytest.mark.parametrize("audited", ROLES)
def test_a_leak_in_the_card_of_any_role_is_reported(dataset, audited):
    """An audit may have been run after one role was trained and before another."""
    here = load_dataset(dataset)
    adapters = adapters_trained_on(here)
    card = dataclasses.replace(adapters[audited].card, leaks={here.fingerprint: "LEAK: 12 parts"})
    adapters[audited] = dataclasses.replace(adapters[audited], card=card)
    assert describe_training_data(adapters, here, "test", ["test_1_2.png"])[1] == ["LEAK: 12 parts"]


def test_a_run_warns_about_adapters_of_a_quantized_base(dataset):
    here = load_dataset(dataset)
    adapters = adapters_trained_on(here)
    card = dataclasses.replace(adapters["decision_maker"].card, quantization="4bit")
    adapters["decision_maker"] = dataclasses.replace(adapters["decision_maker"], card=card)
    (warning,) = describe_training_data(adapters, here, "test", ["test_1_2.png"])[1]
    assert (
        "the adapters for decision_maker were trained on a quantized base model but run on the unquantized" in warning
    )


def test_a_fully_tuned_base_model_is_checked_like_an_adapter(dataset, tmp_path, capsys):
    tuned = tmp_path / "tuned"
    shutil.copytree(ECHO_TINY, tuned)
    card = make_card("decision_maker", str(ECHO_TINY), None, MIN_PIXELS, MAX_PIXELS, load_dataset(dataset))
    write_card(tuned, card)
    run_evaluation(dataset, tmp_path / "run", "--model_name_or_path", tuned, "--split", "train", "--routing", "paper")
    warnings = capsys.readouterr().err
    assert "1 OF 1 IMAGES OF THE SPLIT train WERE TRAINED ON" in warnings
    assert "of the base model; scores on them" in warnings
    assert "weights were trained with routing full, but this run uses paper" in warnings
    (training,) = json.loads((tmp_path / "run" / "run.json").read_text())["trained_on"]
    assert training["roles"] == ["the base model"]
    assert training["photographs_trained_on"] == 1
    write_card(tuned, dataclasses.replace(card, max_pixels=99))
    with pytest.raises(EchoError, match=r"trained with max_pixels 99, but this run uses \d+; set max_pixels to"):
        run_evaluation(dataset, tmp_path / "other", "--model_name_or_path", tuned)


def test_a_run_warns_about_images_that_were_trained_on_and_records_them(dataset, adapters, tmp_path, capsys):
    for _ in range(2):  # the second time it resumes, because notes are not part of what must be equal
        run_evaluation(dataset, tmp_path / "tuned", "--adapters", adapters)
        assert "warning: 1 OF 3 IMAGES OF THE SPLIT test WERE TRAINED ON" in capsys.readouterr().err
    run = json.loads((tmp_path / "tuned" / "run.json").read_text())
    assert run["trained_on"][0]["photographs_trained_on"] == 1
    assert len(run["warnings"]) == 1


def test_a_resumed_run_ends_like_an_uninterrupted_one(dataset, tmp_path):
    run_evaluation(dataset, tmp_path / "complete")
    shutil.copytree(tmp_path / "complete", tmp_path / "resumed")
    # Traces are written before predictions, so a killed run has more traces.
    for name, kept in (("predictions.jsonl", 4000), ("traces.jsonl", -300)):
        path = tmp_path / "resumed" / name
        path.write_bytes(path.read_bytes()[:kept])
    run_evaluation(dataset, tmp_path / "resumed", "--batch_size", 1)
    for cls, name in ((Prediction, "predictions.jsonl"), (Trace, "traces.jsonl")):
        complete, resumed = (sorted(rows(tmp_path / folder, name, cls), key=str) for folder in ("complete", "resumed"))
        assert [(row.case, row.text) for row in complete] == [(row.case, row.text) for row in resumed]


def test_max_batch_tokens_splits_batches_without_changing_answers(dataset, tmp_path, monkeypatch):
    run_evaluation(dataset, tmp_path / "unlimited", "--batch_size", 3)
    find_boundaries, boundaries = Engine._batch_boundaries, []

    def record_boundaries(self, *arguments):
        boundaries.append(find_boundaries(self, *arguments))
        return boundaries[-1]

    monkeypatch.setattr(Engine, "_batch_boundaries", record_boundaries)
    run_evaluation(dataset, tmp_path / "limited", "--batch_size", 3, "--max_batch_tokens", 1000)
    assert max(map(len, boundaries)) > 2, "no batch was split"
    unlimited, limited = (rows(tmp_path / name, "predictions.jsonl", Prediction) for name in ("unlimited", "limited"))
    assert [(row.question, row.text) for row in unlimited] == [(row.question, row.text) for row in limited]


def test_cyclic_orders_are_all_asked_and_their_mean_can_decide(dataset, tmp_path):
    run_evaluation(dataset, tmp_path / "given")
    run_evaluation(dataset, tmp_path / "cyclic", "--option_order", "cyclic")
    run_evaluation(dataset, tmp_path / "mean", "--option_order", "cyclic", "--answer", "averaged")
    given, cyclic, mean = (
        rows(tmp_path / name, "predictions.jsonl", Prediction) for name in ("given", "cyclic", "mean")
    )
    orders = {name: rows(tmp_path / name, "permutations.jsonl", PermutedPrediction) for name in ("cyclic", "mean")}
    assert not (tmp_path / "given" / "permutations.jsonl").exists()
    assert len(orders["cyclic"]) == 3 * 17
    assert [row.text for row in given] == [row.text for row in cyclic]
    for row, one, averaged in zip(given, cyclic, mean, strict=True):
        assert one.probabilities == pytest.approx(row.probabilities, abs=1e-5)
        found = [each.probabilities for each in orders["mean"] if each.question == row.question]
        expected = {letter: sum(one[letter] for one in found) / len(found) for letter in row.options}
        assert averaged.probabilities == pytest.approx(expected)
        assert len(found) == len(row.options)
        assert averaged.parsed == max(expected, key=expected.__getitem__)


def test_switching_adapters_equals_loading_a_single_one(adapters, row_builder, case, tmp_path):
    all_adapters = attach_adapters(load_model(str(ECHO_TINY), dtype="float32"), {r: adapters / r for r in ROLES})
    engine = Engine(all_adapters, row_builder, tmp_path, max_new_tokens=3)
    exchanges = exchanges_of(case)[:1]
    for role in (*ROLES, *ROLES):  # the second time with cached image features
        single = attach_adapters(load_model(str(ECHO_TINY), dtype="float32"), {role: adapters / role})
        expected = Engine(single, row_builder, tmp_path, max_new_tokens=3).generate(role, exchanges)[0][0]
        found = engine.generate(role, exchanges)[0][0]
        assert found.text == expected.text
        assert found.letters == pytest.approx(expected.letters, abs=1e-4)


def test_an_exported_bundle_reproduces_the_adapters_and_runs(dataset, adapters, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    export_main(["--adapters", str(adapters), "--output", str(bundle), "--dtype", "float32", *NO_IMAGES])
    assert "merged/decision_maker: the reloaded logits are within" in capsys.readouterr().out
    described = json.loads((bundle / "bundle.json").read_text())
    assert max(described["largest_logit_difference"].values()) < 1e-3
    assert described["tower_is_adapted"]
    assert "--enable-tower-connector-lora" in (bundle / "README.md").read_text()
    run_evaluation(dataset, tmp_path / "original", "--adapters", adapters)
    run_evaluation(dataset, tmp_path / "exported", "--adapters", bundle / "adapters")
    first, second = (rows(tmp_path / name, "predictions.jsonl", Prediction) for name in ("original", "exported"))
    assert first == second
    merged = read_card(bundle / "merged" / "decision_maker")
    assert merged == read_card(adapters / "decision_maker"), "the card of a merged model describes its training"
    with pytest.raises(EchoError, match="already exists"):
        export_main(["--adapters", str(adapters), "--output", str(bundle), *NO_IMAGES])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_a_merge_that_loses_the_update_is_not_exported(copied, tmp_path, monkeypatch, dtype, scale):
    """This also holds for an update so small that it changes no logit by more than a bfloat16 merge is allowed to."""
    scale_adapter(copied, scale)
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self: self.unload())
    with pytest.raises(EchoError, match="merged/decision_maker does not reproduce"):
        export_main(["--adapters", str(copied), "--output", str(tmp_path / "bundle"), "--dtype", dtype, *NO_IMAGES])
    assert not (tmp_path / "bundle" / "merged" / "decision_maker").exists()


def test_an_export_in_bfloat16_reproduces_the_adapters_up_to_rounding(adapters, tmp_path):
    export_main(["--adapters", str(adapters), "--output", str(tmp_path / "bundle"), "--dtype", "bfloat16", *NO_IMAGES])
    described = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert 0 < described["share_of_the_update"]["merged/decision_maker"] < 0.25
    assert described["adapters"] == {role: adapter.fingerprint for role, adapter in find(adapters).items()}
    exported = find(tmp_path / "bundle" / "adapters")
    assert described["adapters"] == {role: adapter.fingerprint for role, adapter in exported.items()}


def scale_adapter(adapters, scale):
    path = adapters / "decision_maker" / "adapter_model.safetensors"
    save_file({name: scale * weight for name, weight in load_file(path).items()}, path, metadata={"format": "pt"})
    seal_folder(path.parent)


def test_an_update_too_small_for_bfloat16_is_exported_in_float32(copied, tmp_path):
    scale_adapter(copied, 0.1)
    with pytest.raises(EchoError, match=r"merged/decision_maker does not reproduce.*export with --dtype float32"):
        export_main(
            ["--adapters", str(copied), "--output", str(tmp_path / "bundle"), "--dtype", "bfloat16", *NO_IMAGES]
        )
    export_main(["--adapters", str(copied), "--output", str(tmp_path / "other"), "--dtype", "float32", *NO_IMAGES])


def test_an_adapter_without_effect_is_exported(copied, tmp_path):
    scale_adapter(copied, 0)
    export_main(["--adapters", str(copied), "--output", str(tmp_path / "bundle"), "--dtype", "bfloat16", *NO_IMAGES])
    described = json.loads((tmp_path / "bundle" / "bundle.json").read_text())
    assert described["largest_logit_difference"]["merged/decision_maker"] == 0


def find(folder, pixels=MAX_PIXELS, base=ECHO_TINY):
    return find_adapters(folder, str(base), base_fingerprint(str(base)), MIN_PIXELS, pixels)


@pytest.fixture
def copied(adapters, tmp_path):
    shutil.copytree(adapters, tmp_path / "copied")
    return tmp_path / "copied"


def test_an_adapter_for_another_role_is_refused(copied):
    shutil.rmtree(copied / "decision_maker")
    shutil.copytree(copied / "knowledge_guide", copied / "decision_maker")
    with pytest.raises(EchoError, match="holds an adapter for knowledge_guide, not decision_maker"):
        find(copied)


def test_an_adapter_for_another_base_model_is_refused(copied, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(ECHO_TINY, other)
    weights = load_file(other / "model.safetensors")
    first = next(iter(weights))
    weights[first] = weights[first] + 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EchoError, match=r"trained on a different base model.*with its own base model"):
        find(copied, base=other)


def test_a_different_pixel_budget_or_prompt_version_is_refused(copied):
    with pytest.raises(EchoError, match=f"max_pixels {MAX_PIXELS}, but this run uses 999999; set max_pixels"):
        find(copied, pixels=999999)
    card = json.loads((copied / "decision_maker" / "echo_ft.json").read_text())
    (copied / "decision_maker" / "echo_ft.json").write_text(json.dumps(card | {"prompt_version": "0"}))
    seal_folder(copied / "decision_maker")
    with pytest.raises(EchoError, match=r"prompt_version 0.*retrain it"):
        find(copied)


def test_a_missing_adapter_or_card_is_named(copied, tmp_path):
    (copied / "decision_maker" / "echo_ft.json").unlink()
    with pytest.raises(EchoError, match=r"no readable echo_ft\.json"):
        find(copied)
    shutil.rmtree(copied / "decision_maker")
    with pytest.raises(EchoError, match="no adapter for decision_maker"):
        find(copied)
    with pytest.raises(EchoError, match="there is no folder"):
        find(tmp_path / "nowhere")


def test_weights_that_do_not_fit_are_refused(copied):
    path = copied / "decision_maker" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(iter(weights))
    save_file({key.replace("layers.0", "layers.9") if key == name else key: w for key, w in weights.items()}, path)
    with pytest.raises(EchoError, match="does not fit the base model"):
        attach_adapters(load_model(str(ECHO_TINY), dtype="float32"), {"decision_maker": copied / "decision_maker"})


def test_adapters_that_act_after_the_prefix_run_here_but_not_on_a_server_or_from_a_bundle(dataset, tmp_path):
    folder = random_adapters(tmp_path / "adapters", dataset, adapt_from={"decision_maker": "answer"})
    late = ["--adapters", str(folder)]
    run_evaluation(dataset, tmp_path / "run", *late, "--max_new_tokens", "4")
    assert all(one.parsed or one.text for one in rows(tmp_path / "run", "predictions.jsonl", Prediction))
    refused = r"decision_maker acts only from the answer on .*train decision_maker with adapt_from: prefix, or use"
    with pytest.raises(EchoError, match=refused):
        run_evaluation(dataset, tmp_path / "served", *late, "--server", "http://127.0.0.1:9/v1")
    with pytest.raises(EchoError, match=refused):
        export_main([*late, "--output", str(tmp_path / "bundle"), "--references", "none", "--merge", "none"])
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch_size", "0"], "batch_size is 0"),
        (["--max_batch_tokens", "0"], "max_batch_tokens is 0"),
        (
            ["--max_batch_tokens", "9", "--server", "http://127.0.0.1:9/v1"],
            "a server forms its own batches; remove it",
        ),
        (["--attn_implementation", "eager"], "set it to sdpa"),
        (["--answer", "averaged"], "set option_order to cyclic"),
        (["--split", "tests"], "tests"),
        (["--dtype", "fp16"], "argument --dtype: invalid choice: 'fp16'.*float16"),
        (["--dataset", "nowhere"], "there is no dataset nowhere"),
        (["--routing", "paper", "--reasoning", "of"], "reasoning"),
    ],
)
def test_invalid_options_of_a_run_are_refused(dataset, tmp_path, options, message):
    with pytest.raises(EchoError, match=message):
        run_evaluation(dataset, tmp_path / "run", *options)


def test_show_prints_a_row_per_role_with_trained_tokens_marked(dataset, capsys):
    show_main(["--dataset", str(dataset), "--model_name_or_path", str(ECHO_TINY)])
    printed = capsys.readouterr().out
    assert all(f"=== {role}" in printed for role in ROLES)
    assert "[[stain: " in printed and "<image:" in printed
    with pytest.raises(EchoError, match="has no row 99"):
        show_main(["--dataset", str(dataset), "--model_name_or_path", str(ECHO_TINY), "--row", "99"])


def test_an_unsupported_dtype_is_refused_by_name(adapters, tmp_path):
    with pytest.raises(EchoError, match=r"dtype cannot be 'fp16'; choose from auto, float32, bfloat16, float16"):
        load_model(str(ECHO_TINY), dtype="fp16")
    with pytest.raises(EchoError, match=r"invalid choice: 'float64'.*float16"):
        export_main(
            ["--adapters", str(adapters), "--output", str(tmp_path / "bundle"), "--dtype", "float64", *NO_IMAGES]
        )


def test_cards_are_written_atomically(adapters, tmp_path, monkeypatch):
    card = read_card(adapters / "decision_maker")
    write_card(tmp_path, card)

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_card(tmp_path, dataclasses.replace(card, commit="another"))
    assert json.loads((tmp_path / "echo_ft.json").read_text()) == dataclasses.asdict(card)
