"""train/sft.py trains every tiny recipe, plans in a dry run, and reports a mistake in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from echo_ft.errors import EchoError
from echo_ft.records import ROLES
from echo_ft.terminal import LOGGER
from tests.conftest import ECHO_TINY, ROOT, make_dataset
from tests.support.training import SAME_TRAINING, launch, losses, run_in_process, tiny_options

RECIPES = sorted(path for role in (*ROLES, "all_roles") for path in (ROOT / "recipes").glob(f"*/{role}.yaml"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def one_rank(dataset, tmp_path_factory):
    """The reasoning expert after three steps of four cases, with a checkpoint at every step."""
    output = tmp_path_factory.mktemp("one") / "reasoning_expert"
    steps = [*SAME_TRAINING, "--save_strategy", "steps", "--save_steps", "1"]
    launch(*tiny_options("reasoning_expert", dataset, output, *steps, "--per_device_train_batch_size", 4))
    return output


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_passes_the_config_check(recipe):
    from trl import ModelConfig, SFTConfig

    from echo_ft.config import parse
    from echo_ft.training.checks import check_options
    from echo_ft.training.config import EchoConfig

    # transformers checks bf16 against the hardware, and there may be no GPU.
    config, sft, model = parse([EchoConfig, SFTConfig, ModelConfig], ["--config", str(recipe), "--bf16", "false"])
    check_options(sft, model, config)
    together = recipe.stem == "all_roles"
    assert (config.role, Path(sft.output_dir).name) == (("all", "late_adapters") if together else (recipe.stem,) * 2)
    assert sft.max_length is None
    assert model.use_peft


def test_every_role_and_size_has_a_recipe():
    found = {(path.parent.name, path.stem) for path in RECIPES}
    assert found >= {(size, role) for size in ("tiny", "qwen2_vl_2b", "qwen2_vl_7b") for role in (*ROLES, "all_roles")}


OTHER_ROLES = [pytest.param(role, marks=pytest.mark.slow) for role in ("reference_extractor", "knowledge_guide")]


@pytest.mark.parametrize("role", ["decision_maker", *OTHER_ROLES])
def test_the_command_trains_a_tiny_recipe_for_two_steps(role, dataset, tmp_path):
    printed = launch(*tiny_options(role, dataset, tmp_path / role, "--max_steps", 2, "--eval_strategy", "no"))
    card = json.loads((tmp_path / role / "echo_ft.json").read_text())
    weights = load_file(tmp_path / role / "adapter_model.safetensors")
    assert card["role"] == role
    assert "0 rows rejected" in printed
    assert any("lora_B" in name and weight.any() for name, weight in weights.items())


def test_the_card_describes_the_adapter(one_rank, dataset):
    card = json.loads((one_rank / "echo_ft.json").read_text())
    recipe = yaml.safe_load((ROOT / "recipes/tiny/reasoning_expert.yaml").read_text())
    assert card["dataset_fingerprint"] == "0123456789abcdef"
    assert card["dataset"] == str(dataset)
    assert (card["min_pixels"], card["max_pixels"]) == (recipe["min_pixels"], recipe["max_pixels"])
    assert card["prompt_version"]
    assert len(card["base_fingerprint"]) == 33
    assert card["versions"]["trl"] != "absent"
    assert json.loads((one_rank / "checkpoint-1" / "echo_ft.json").read_text()) == card


def test_a_resumed_run_gives_the_adapter_of_an_uninterrupted_run(one_rank, dataset, tmp_path):
    output = tmp_path / "reasoning_expert"
    more = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 4]
    launch(
        *tiny_options("reasoning_expert", dataset, output, *more, "--resume_from_checkpoint", one_rank / "checkpoint-1")
    )
    expected = load_file(one_rank / "adapter_model.safetensors")
    for name, weight in load_file(output / "adapter_model.safetensors").items():
        assert torch.equal(weight, expected[name]), name


def test_stored_features_do_not_change_the_losses(dataset, tmp_path, capsys):
    language = ["--lora_target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = [*SAME_TRAINING, "--save_strategy", "no", "--per_device_train_batch_size", 2, *language]
    run_in_process(*tiny_options("reference_extractor", dataset, tmp_path / "computed", *options))
    stored = [*options, "--features", tmp_path / "features"]
    capsys.readouterr()
    run_in_process(*tiny_options("reference_extractor", dataset, tmp_path / "stored", *stored))
    assert "questions_per_second" in capsys.readouterr().out
    assert list((tmp_path / "features").glob("*/*.safetensors"))
    assert losses(tmp_path / "stored") == pytest.approx(losses(tmp_path / "computed"), rel=1e-5)


def test_a_dry_run_predicts_the_training_and_writes_nothing(dataset, tmp_path):
    output = tmp_path / "reference_extractor"
    schedule = ["--num_train_epochs", 2, "--per_device_train_batch_size", 3, "--eval_strategy", "no"]
    options = tiny_options("reference_extractor", dataset, output, *schedule, "--save_strategy", "no")
    printed = launch(*options, "--dry_run", "--bf16", "true")  # needs no GPU
    assert not output.exists()
    run_in_process(*options, "--logging_steps", 1)
    state = json.loads((output / "trainer_state.json").read_text())
    found = re.search(r"(\d+) cases, 3 per step .*: (\d+) steps per epoch, (\d+) in total", printed)
    assert found
    assert int(found[3]) == state["max_steps"] == 2 * int(found[2])
    tokens = int(re.search(r"per epoch: ([\d,]+) tokens", printed)[1].replace(",", ""))
    assert 2 * tokens == state["log_history"][-2]["num_tokens"]
    for expected in ("(3 x 1 processes x 1 accumulated)", "GiB per GPU", "[["):
        assert expected in printed
    assert all(entry["tflops_per_second"] > 0 for entry in state["log_history"] if "loss" in entry)


def test_a_typo_in_an_option_is_reported_in_one_sentence(dataset, tmp_path):
    printed = launch(*tiny_options("decision_maker", dataset, tmp_path / "x", "--lora_rr", "4"), fails=True)
    assert "error: unknown option --lora_rr; did you mean 'lora_r'?" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_length", 512], "max_length 512 would truncate rows"),
        (["--packing", "true"], "packing has no effect here"),
        (["--trust_remote_code", "true"], "trust_remote_code is not supported: Qwen2-VL is part of transformers"),
        (["--dataset", "nowhere"], "there is no dataset nowhere"),
        (["--model_name_or_path", "./nowhere"], "there is no model folder nowhere"),
        (["--model_name_or_path", "nobody/nothing"], "nobody/nothing could not be loaded"),
        (["--max_pixels", 10], "0 < min_pixels <= max_pixels"),
        (["--resume_from_checkpoint", "nowhere"], "there is no checkpoint nowhere"),
        (["--max_tokens", 10], "has no usable row.*more than max_tokens 10"),
        (["--role", "decider"], "decider"),
        (["--attn_implementation", "eager"], "does not separate the branches of a row"),
        (["--lora_target_modules", "q_proj", "nothing_proj"], "the model has no module nothing_proj"),
        (["--label_smoothing_factor", 0.1], "label_smoothing_factor is not supported"),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], "use_reentrant: true is incompatible with"),
        (
            ["--train_sampling_strategy", "group_by_length"],
            "group_by_length reduces padding, but packed rows have none",
        ),
        (
            ["--lora_target_modules", "q_proj", "--vision_learning_rate", 1e-5],
            "of the vision tower are trained",
        ),
        (["--lora_target_modules", "q_proj", "--merger_learning_rate", 1e-5], "of the merger are trained"),
    ],
)
def test_a_mistake_is_reported_with_its_remedy(dataset, tmp_path, options, message):
    with pytest.raises(EchoError, match=message):
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "out", *options))


def test_a_dry_run_needs_only_config_and_processor_of_the_model(dataset, tmp_path, capsys):
    model = tmp_path / "echo-tiny"
    shutil.copytree(ECHO_TINY, model)
    (model / "model.safetensors").unlink()
    options = tiny_options("decision_maker", dataset, tmp_path / "out", "--model_name_or_path", model)
    run_in_process(*options, "--dry_run")
    assert "GiB per GPU" in capsys.readouterr().out
    with pytest.raises(EchoError, match=r"echo-tiny has no model\.safetensors"):
        run_in_process(*options)


@pytest.mark.parametrize("spelling", ["--dry_run", "--dry-run=true", "--dry_run yes", "dry_run: true"])
def test_a_dry_run_needs_no_gpu_in_any_spelling(tmp_path, monkeypatch, spelling):
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "recipes/tiny/decision_maker.yaml").read_text())
    # The message about the dataset shows that the check of bf16 has passed.
    options = ["--config", recipe, "--bf16", "true", "--use_cpu", "false", "--dataset", "nowhere"]
    options += ["--output_dir", tmp_path / "out"]
    if spelling.startswith("--"):
        options += spelling.split()
    else:
        recipe.write_text(f"{recipe.read_text()}{spelling}\n")
    with pytest.raises(EchoError, match="there is no dataset nowhere"):
        run_in_process(*options)
    if not spelling.startswith("--"):
        with pytest.raises(EchoError, match="bf16 is set, but there is no GPU"):
            run_in_process(*options, "--dry_run", "false")


def test_a_row_below_zero_is_refused():
    from train.show import main

    with pytest.raises(EchoError, match="row is -1; rows are numbered from 0"):
        main(["--dataset", "nowhere", "--row", "-1"])


def test_a_dry_run_refuses_an_image_that_has_changed_since_the_build(tmp_path):
    dataset = make_dataset(tmp_path / "data", train=2, validation=1, test=1)
    options = tiny_options("decision_maker", dataset, tmp_path / "out", "--dry_run", "--eval_strategy", "no")
    run_in_process(*options)
    changed = dataset / "images" / "train_0_0.png"
    with Image.open(changed) as image:
        image.rotate(180).save(changed)
    with pytest.raises(EchoError, match=r"have changed since .* \(first: train_0_0\.png\)"):
        run_in_process(*options)


def test_features_of_a_trained_tower_are_not_stored(dataset, tmp_path):
    with pytest.raises(EchoError, match="features cannot be stored because the vision tower is trained"):
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "out", "--features", tmp_path / "features"))


def test_tower_and_merger_have_their_own_learning_rates(dataset, tmp_path):
    parts = ["--lora_target_modules", "q_proj", "attn.qkv", "merger.mlp.0"]
    rates = ["--vision_learning_rate", 0, "--merger_learning_rate", 1e-4]
    once = [
        "--max_steps",
        1,
        "--warmup_steps",
        0,
        "--eval_strategy",
        "no",
        "--learning_rate",
        1e-2,
        "--max_grad_norm",
        0,
    ]
    options = tiny_options("reference_extractor", dataset, tmp_path / "out", *parts, *rates, *once, "--weight_decay", 0)
    run_in_process(*options)
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # The first step of AdamW moves every weight with a gradient by the learning rate.
    moved = {name: weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name}
    assert {part for name in moved for part in ("q_proj", "attn.qkv", "merger") if part in name} == {
        "q_proj", "attn.qkv", "merger",
    }  # fmt: skip
    for name, most in moved.items():
        rate = 0 if "attn.qkv" in name else 1e-4 if "merger" in name else 1e-2
        assert most == pytest.approx(rate, rel=0.01), name


SHORT = ["--max_steps", 2, "--save_strategy", "no", "--eval_strategy", "no", "--lora_target_modules", "q_proj"]


def test_the_largest_batch_check_tells_its_memory_and_does_not_affect_training(dataset, tmp_path, monkeypatch, caplog):
    from echo_ft.training.costs import largest_batch

    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level("INFO")
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(largest_batch, "check_largest_batch", lambda trainer, cases: None)
        run_in_process(*tiny_options("reference_extractor", dataset, tmp_path / name, *SHORT, "--lora_dropout", 0.5))
    told = re.search(r"takes ([\d.]+) GiB with the optimizer's states and the pixels of a step: fits", caplog.text)
    assert told and float(told[1]) > 0.3  # the libraries alone
    expected = load_file(tmp_path / "without" / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "with" / "adapter_model.safetensors").items():
        assert torch.equal(weight, expected[name]), name
    tokens = [json.loads((tmp_path / name / "trainer_state.json").read_text()) for name in ("with", "without")]
    assert tokens[0]["log_history"][-1].get("num_tokens") == tokens[1]["log_history"][-1].get("num_tokens")


def test_a_larger_batch_of_an_evaluation_is_checked_before_step_1(dataset, tmp_path, monkeypatch):
    from echo_ft.training.costs import largest_batch
    from echo_ft.training.trainer import PrefixSharingTrainer

    options = [*SHORT, "--max_steps", 1, "--eval_strategy", "epoch", "--per_device_train_batch_size", 1]
    check, evaluated = largest_batch.check_evaluation_batch, []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(largest_batch, "check_evaluation_batch", lambda trainer, cases: None)
        run_in_process(*tiny_options("reference_extractor", dataset, tmp_path / name, *options))
        log = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        evaluated += [{key: entry[key] for key in entry if "_per_" not in key and "time" not in key} for entry in log]
    assert evaluated[: len(log)] == evaluated[len(log) :]

    ran: list[tuple[bool, int]] = []
    compute = PrefixSharingTrainer._label_loss

    def run_out(self, model, inputs, *others):
        ran.append((model.training, inputs["done"][0]))
        if not model.training and inputs["done"][0] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute(self, model, inputs, *others)

    monkeypatch.setattr(largest_batch, "check_evaluation_batch", check)
    monkeypatch.setattr(PrefixSharingTrainer, "_label_loss", run_out)
    says = r"the largest batch of an evaluation \(\d cases, .* not fit .*; set per_device_eval_batch_size: 1, as in tr"
    with pytest.raises(EchoError, match=says):
        run_in_process(*tiny_options("reference_extractor", dataset, tmp_path / "full", *options))
    assert [training for training, _ in ran] == [True, False], "no step has been taken"


def test_the_largest_batch_is_checked_with_offloaded_activations_if_training_offloads_them(
    dataset, tmp_path, monkeypatch
):
    packed: list[int] = []  # the tensors saved for the backward pass, for each time that offloading is switched on

    class CountsTensors(torch.autograd.graph.saved_tensors_hooks):  # TRL's own needs a GPU
        def __init__(self) -> None:
            super().__init__(self.pack, lambda tensor: tensor)

        def pack(self, tensor: torch.Tensor) -> torch.Tensor:
            packed[-1] += 1
            return tensor

        def __enter__(self) -> None:
            packed.append(0)
            return super().__enter__()

    monkeypatch.setattr("trl.trainer.sft_trainer.get_act_offloading_ctx_manager", lambda model: CountsTensors())
    options = [*SHORT, "--max_steps", 1, "--gradient_accumulation_steps", 1, "--activation_offloading", "true"]
    run_in_process(*tiny_options("reference_extractor", dataset, tmp_path / "out", *options))
    check, step = packed
    assert check > 10 and step > 10


def test_only_training_cases_of_incomplete_batches_are_dropped(tmp_path, capsys):
    dataset = make_dataset(tmp_path / "data", train=3, validation=3, test=1)
    options = ["--dataloader_drop_last", "true", "--per_device_train_batch_size", 2, "--num_train_epochs", 1]
    options += ["--eval_strategy", "epoch", "--save_strategy", "no", "--lora_target_modules", "q_proj"]
    losses = []
    for size in (2, 4):  # four are more than there are
        output, batch = tmp_path / f"of_{size}", ["--per_device_eval_batch_size", size]
        run_in_process(*tiny_options("reference_extractor", dataset, output, *options, *batch))
        state = json.loads((output / "trainer_state.json").read_text())
        losses += [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
        assert state["global_step"] == 1
    assert losses == [pytest.approx(losses[0], rel=1e-5)] * 2
    capsys.readouterr()
    run_in_process(*tiny_options("reference_extractor", dataset, tmp_path / "plan", *options, "--dry_run", "true"))
    assert "1 steps per epoch, 1 in total" in capsys.readouterr().out
    with pytest.raises(EchoError, match="drops all 3 training cases, because a batch of all processes has 4; set"):
        run_in_process(
            *tiny_options("reference_extractor", dataset, tmp_path / "none", *options),
            *["--per_device_train_batch_size", 4, "--dry_run", "true"],
        )


def test_training_starts_after_decoding_only_its_first_batches(tmp_path, monkeypatch):
    from echo_ft.images import decode

    folder = make_dataset(tmp_path / "dataset", train=40)
    rows = (folder / "sft" / "decision_maker" / "train.jsonl").read_text().splitlines()
    images = {row["case"]: set(row["images"]) for row in map(json.loads, rows)}
    decoded: set[str] = set()
    read = decode.decode
    monkeypatch.setattr(decode, "decode", lambda path, *how: decoded.add(path.name) or read(path, *how))
    one_step = ["--max_steps", 1, "--per_device_train_batch_size", 2, "--dataloader_num_workers", 0]
    run_in_process(*tiny_options("decision_maker", folder, tmp_path / "out", *SHORT, *one_step))
    seen = [case for case, names in images.items() if any(Path(name).name in decoded for name in names)]
    # These are the largest batch that is checked, the first batch, and the one that the loader prefetches after it.
    assert 2 <= len(seen) <= 6
    assert len(images) == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gradient_checkpointing", "false"], "set gradient_checkpointing: true"),
        (
            ["--gradient_checkpointing", "true", "--per_device_train_batch_size", 5],
            "largest batch .5 cases.* set per_device_train_batch_size: 1 and gradient_accumulation_steps: 5",
        ),
        (
            ["--gradient_checkpointing", "true", "--per_device_train_batch_size", 1],
            "largest batch .1 cases.* set max_pixels: 14112",
        ),
    ],
)
def test_a_batch_that_does_not_fit_names_the_option_to_change(dataset, tmp_path, monkeypatch, options, message):
    from echo_ft.training.trainer import PrefixSharingTrainer

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(PrefixSharingTrainer, "compute_loss", out_of_memory)
    with pytest.raises(EchoError, match=message):
        run_in_process(*tiny_options("reference_extractor", dataset, tmp_path / "out", *SHORT, *options))


def test_a_checkpoint_of_another_role_is_not_resumed(one_rank, dataset, tmp_path):
    options = ["--resume_from_checkpoint", one_rank / "checkpoint-1"]
    with pytest.raises(EchoError, match="trained with role reasoning_expert, not decision_maker"):
        run_in_process(*tiny_options("decision_maker", dataset, tmp_path / "out", *options))


def test_an_empty_validation_split_names_the_remedy(tmp_path):
    folder = make_dataset(tmp_path / "data", train=1, validation=0)
    with pytest.raises(EchoError, match=r"validation.jsonl is empty.*eval_strategy"):
        run_in_process(*tiny_options("decision_maker", folder, tmp_path / "out", "--eval_strategy", "epoch"))


def test_audited_leaks_are_reported_and_written_into_the_card(tmp_path, capsys):
    folder = make_dataset(tmp_path / "data")
    manifest = json.loads((folder / "manifest.json").read_text())
    verdicts = {"other": {"leak": True, "verdict": "LEAK: 3 of 9"}, "clean": {"leak": False, "verdict": "no leak"}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "audits": verdicts}))
    run_in_process(*tiny_options("decision_maker", folder, tmp_path / "out", *SHORT))
    assert "warning: LEAK: 3 of 9" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "echo_ft.json").read_text())["leaks"] == {"other": "LEAK: 3 of 9"}
