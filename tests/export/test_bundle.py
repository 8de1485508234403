"""A bundle keeps the parts that work, and every tool that its README names can read its files."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import warnings

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoTokenizer

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig
from echo_ft.export import bundle as bundle_module
from echo_ft.export.bundle import Bundle, ExportPlan, export_bundle
from echo_ft.export.card import model_card
from echo_ft.export.published_form import publish_config
from echo_ft.export.vllm import serving_lines, vllm_refusal
from echo_ft.inference.bundle import read_bundle
from echo_ft.inference.decision import Calibration, describe_decision, measured_dtype, read_measurement
from echo_ft.inference.inspector import Inspector
from echo_ft.model.adapters import find_adapters, read_card
from echo_ft.model.loading import base_fingerprint, load_model
from echo_ft.provenance import seal_folder
from echo_ft.records import ROLES
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, ROOT, make_dataset, random_adapters
from tests.support.old_transformers import answer
from tests.support.runs import make_report
from train.export import main as export_main

LORA_NAMES = ["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"]


NO_IMAGES = ("--references", "none")
"""Options of an export from a dataset without normal images."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Four adapters; the decision maker's adapter also trains the output layer."""
    dataset = make_dataset(tmp_path_factory.mktemp("data"), train=1, validation=1, test=1)
    folder = random_adapters(tmp_path_factory.mktemp("adapters"), dataset)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that the output layer is tied
        tuned = get_peft_model(load_model(str(ECHO_TINY), dtype="float32"), config)
    head = tuned.base_model.model.lm_head.modules_to_save["default"].weight
    with torch.no_grad():
        head.add_(0.05 * torch.randn_like(head))
    tuned.save_pretrained(folder / "decision_maker")
    seal_folder(folder / "decision_maker")
    return folder


@pytest.fixture(scope="module")
def exported(adapters, tmp_path_factory):
    output = tmp_path_factory.mktemp("exported") / "bundle"
    export_main(
        [
            "--adapters",
            str(adapters),
            "--output",
            str(output),
            *NO_IMAGES,
            "--merge",
            "decision_maker",
            "knowledge_guide",
        ]
    )
    return output


def find(folder):
    return find_adapters(folder, str(ECHO_TINY), base_fingerprint(str(ECHO_TINY)), MIN_PIXELS, MAX_PIXELS)


def test_a_failed_merge_costs_the_merged_model_alone(adapters, tmp_path, monkeypatch):
    save, calls = bundle_module.save_model, []

    def fail_first(model, folder):
        calls.append(folder)
        if len(calls) == 1:
            (folder / "partial").mkdir(parents=True)
            raise OSError(errno.ENOSPC, "No space left on device")
        save(model, folder)

    monkeypatch.setattr(bundle_module, "save_model", fail_first)
    output = tmp_path / "bundle"
    with pytest.raises(EchoError, match=r"no merged model for decision_maker: OSError: .*No space left.*--merge none"):
        export_main(
            ["--adapters", str(adapters), "--output", str(output), *NO_IMAGES, "--merge", "decision_maker", ROLES[1]]
        )
    assert {role: one.fingerprint for role, one in find(output / "adapters").items()} == {
        role: one.fingerprint for role, one in find(adapters).items()
    }
    assert [path.name for path in (output / "merged").iterdir()] == [ROLES[1]]
    assert list(json.loads((output / "bundle.json").read_text())["not_merged"]) == ["decision_maker"]
    assert "`merged/decision_maker` is missing: " in (output / "README.md").read_text()


def test_an_adapter_that_is_not_reproduced_still_stops_the_export(adapters, tmp_path, monkeypatch):
    copyfile = shutil.copyfile

    def damage(source, target):
        copyfile(source, target)
        if target.name == "adapter_config.json" and target.parent.name == ROLES[1]:
            target.write_text(json.dumps(json.loads(target.read_text()) | {"lora_alpha": 99}))

    monkeypatch.setattr(bundle_module.shutil, "copyfile", damage)
    with pytest.raises(EchoError, match=f"adapters/{ROLES[1]} does not reproduce"):
        export_bundle(ExportPlan(find(adapters)), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_a_report_gives_the_bundle_its_options_calibration_and_results(adapters, tmp_path, capsys):
    """With a calibration, the bundle decides as the scored run did."""
    options = ["--adapters", str(adapters), "--output", str(tmp_path / "bundle"), *NO_IMAGES, "--merge", "none"]
    export_main([*options, "--report", str(make_report(tmp_path / "report.json", find(adapters)))])
    assert "decision: P(defect) at temperature 2, with a threshold of 0.4, which " in capsys.readouterr().out
    described = read_bundle(tmp_path / "bundle")
    assert described.pipeline == PipelineConfig(knowledge="all", reasoning="off", answer="logits")
    assert described.calibration == Calibration(2.0, 0.4)
    assert described.max_new_tokens == 48
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "answers to 70 questions of MMAD's types about 10 images" in card, "not 100, with other types and boxes"
    assert "| Anomaly Detection | 81.2 | 75.0 to 89.0 |" in card
    assert "| Average | 70.0 | too few parts |" in card
    assert "Object Analysis" not in card
    assert "| auroc | 0.912 | 0.850 to 0.950 |" in card
    assert "Warning: ten parts are few" in card
    assert "P(defect) at temperature 2, with a threshold of 0.4" in card
    header = yaml.safe_load(card.split("---")[1])
    assert header == {"library_name": "peft", "pipeline_tag": "image-text-to-text"}
    assert described.licences["base model"].startswith(f"{ECHO_TINY}: ")
    with pytest.raises(
        EchoError, match=r"was exported without normal images, so it cannot inspect; .*--references copy"
    ):
        Inspector.from_bundle(tmp_path / "bundle")


def test_the_model_card_names_the_verdict_on_its_threshold(exported, adapters, tmp_path):
    found, card = find(adapters), read_card(adapters / ROLES[0])
    sentence = "fail: more than 5% of good parts are flagged, with 95% confidence, flagging from P(defect) 0.635"
    gate = {"threshold": 0.635, "verdict": "fail", "sentence": sentence}
    measured = read_measurement(make_report(tmp_path / "report.json", found, gate=gate), found)
    threshold = "a threshold of 0.635 before the temperature, which a gate judged"
    shown = model_card(read_bundle(exported), measured, card, {}, 2, 1)
    assert f"- Decision: P(defect) at temperature 2, with {threshold}. Its verdict is {sentence}\n" in shown


def test_a_decision_says_where_its_threshold_comes_from(adapters, tmp_path):
    def described(**changes):
        return describe_decision(read_measurement(make_report(tmp_path / "report.json", found, **changes), found))

    found, half = find(adapters), "P(defect) as the model states it, with a threshold of 0.5, because"
    limited = {"temperature": 2.0, "thresholds": {"f1": {"threshold": 0.4}, "false_alarms": {"threshold": 0.7}}}
    assert described(calibration=limited).endswith(
        "a threshold of 0.7, which limits the false alarms on the validation run"
    )
    assert described().endswith("a threshold of 0.4, which has the best F1 on the validation run")
    assert described(calibration={}) == f"{half} the report has neither a calibration nor a gate"
    assert describe_decision(None) == f"{half} no report was given"


@pytest.mark.parametrize(
    ("dtype", "measured", "loaded", "warns"),
    [
        ("auto", "bfloat16", "bfloat16", False),
        ("auto", "auto", "auto", False),
        ("auto", None, "auto", False),
        ("float32", None, "float32", False),
        ("float32", "auto", "float32", False),
        ("float32", "bfloat16", "float32", True),
        ("bfloat16", "auto", "bfloat16", True),
    ],
)
def test_the_data_type_of_the_report_is_loaded(adapters, tmp_path, caplog, dtype, measured, loaded, warns):
    found = find(adapters)
    measurement = read_measurement(make_report(tmp_path / "report.json", found, {"dtype": measured}), found)
    assert measured_dtype(dtype, measurement, found[ROLES[0]].card) == loaded
    assert [f"but the model is loaded in {dtype}" in one.message for one in caplog.records] == [True] * warns


def test_a_report_gives_the_export_its_data_type(adapters, tmp_path, monkeypatch):
    plans = []
    monkeypatch.setattr(bundle_module, "export_bundle", lambda plan, _: plans.append(plan) or Bundle({}, {}))
    report = make_report(tmp_path / "report.json", find(adapters), {"dtype": "bfloat16"})
    export_main(["--adapters", str(adapters), "--output", str(tmp_path / "b"), *NO_IMAGES, "--report", str(report)])
    assert [plan.dtype for plan in plans] == ["bfloat16"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": 3}, r"is not a run's report .ValueError: its dtype is 3.; write it with"),
        ({"adapters": {}}, "measures a different reference_extractor adapter than .*; run and score these adapters"),
        ({"base_fingerprint": "0"}, r"measures a different base model .0.; run and score these adapters"),
        ({"corruption": "blur"}, "measures corrupted images, which an inspector does not use"),
        ({"reference": "random"}, "measures random references, which an inspector does not use"),
        ({"adapters": None}, r"is not a run's report .*; write it with python -m evaluation\.score RUN"),
    ],
)
def test_a_report_of_something_else_is_refused(adapters, tmp_path, changes, message):
    report = make_report(tmp_path / "report.json", find(adapters), changes)
    with pytest.raises(EchoError, match=message):
        read_measurement(report, find(adapters))


def test_a_report_without_a_threshold_gives_an_export_options_but_does_not_calibrate(adapters, tmp_path):
    report = make_report(tmp_path / "report.json", find(adapters), calibration={})
    assert read_measurement(report, find(adapters)).calibration is None
    with pytest.raises(EchoError, match="has neither a calibration nor a gate; write one with"):
        read_measurement(report, find(adapters), calibrated=True)


def test_a_missing_or_rebuilt_dataset_is_named_with_the_remedy(adapters, tmp_path):
    folder = tmp_path / "adapters"
    shutil.copytree(adapters, folder)
    for role in ROLES:
        card = json.loads((folder / role / "echo_ft.json").read_text())
        (folder / role / "echo_ft.json").write_text(json.dumps(card | {"dataset_fingerprint": "other"}))
        seal_folder(folder / role)
    options = ["--adapters", str(folder), "--output", str(tmp_path / "bundle")]
    with pytest.raises(EchoError, match=r"was rebuilt since the training .*other.; pass the folder as --dataset"):
        export_main(options)
    with pytest.raises(
        EchoError, match=r"there is no dataset gone; .*Pass its folder as --dataset, or use --references none"
    ):
        export_main([*options, "--dataset", "gone"])
    with pytest.raises(EchoError, match="has no normal image to compare with"):
        export_main([*options, "--dataset", json.loads((folder / ROLES[0] / "echo_ft.json").read_text())["dataset"]])
    assert not (tmp_path / "bundle").exists()


def test_a_full_disk_is_named(adapters, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(bundle_module.shutil, "copyfile", fail)
    with pytest.raises(EchoError, match=r"^no space left in .*; free some space and export again$"):
        export_bundle(ExportPlan(find(adapters)), tmp_path / "bundle")


@pytest.mark.parametrize(("role", "tied"), [("decision_maker", False), ("knowledge_guide", True)])
def test_a_merged_model_has_the_published_form(exported, role, tied):
    """transformers 4 and vLLM read this format. With a nested `text_config`, transformers 4 would use other
    frequencies."""
    folder = exported / "merged" / role
    config, base = (json.loads((path / "config.json").read_text()) for path in (folder, ECHO_TINY))
    text = base["text_config"]
    assert not {"text_config", "rope_parameters"} & config.keys()
    assert (config["model_type"], config["torch_dtype"]) == ("qwen2_vl", "float32")
    assert {key: config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers")}.items() <= text.items()
    assert config["rope_theta"] == text["rope_parameters"]["rope_theta"]
    assert config["rope_scaling"] == {"type": "mrope", "mrope_section": text["rope_parameters"]["mrope_section"]}
    assert config["tie_word_embeddings"] is tied
    loaded = load_model(str(folder))
    assert loaded.config.tie_word_embeddings is tied
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) is tied
    images = json.loads((folder / "preprocessor_config.json").read_text())
    assert (images["min_pixels"], images["max_pixels"]) == (MIN_PIXELS, MAX_PIXELS)
    assert images["image_processor_type"] == "Qwen2VLImageProcessor"
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in tokens, "transformers 4 expects a mapping there"
    assert "<|image_pad|>" in tokens["additional_special_tokens"]


def test_the_published_form_loads_as_the_same_config_and_tokenizer(exported):
    loaded = AutoConfig.from_pretrained(exported / "merged" / "knowledge_guide").to_dict()
    expected = AutoConfig.from_pretrained(ECHO_TINY).to_dict()
    assert loaded["text_config"]["rope_parameters"].pop("type") == "mrope"
    assert expected["text_config"].pop("tie_word_embeddings") is loaded["tie_word_embeddings"]
    for config in (loaded, expected):
        config.pop("_name_or_path")
    assert loaded == expected
    one, other = (AutoTokenizer.from_pretrained(path) for path in (exported / "merged" / "knowledge_guide", ECHO_TINY))
    assert one.all_special_tokens == other.all_special_tokens
    assert (
        one("<|im_start|>user\n<|image_pad|>Dent")["input_ids"]
        == other("<|im_start|>user\n<|image_pad|>Dent")["input_ids"]
    )


@pytest.mark.parametrize("role", ["decision_maker", "knowledge_guide"])
def test_transformers_4_gives_the_logits_of_transformers_5(exported, role):
    python = os.environ.get("ECHO_FT_TRANSFORMERS_4")
    if not python:
        pytest.skip("ECHO_FT_TRANSFORMERS_4 is not set; set it to the Python of an environment with transformers 4")
    model = str(exported / "merged" / role)
    done = subprocess.run(
        [python, "-m", "tests.support.old_transformers", model], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs, ours = json.loads(done.stdout.strip().splitlines()[-1]), answer(model)
    assert theirs["version"].startswith("4.") and ours["version"].startswith("5.")
    assert theirs["unfit"] == ours["unfit"] == []
    assert theirs["input_ids"] == ours["input_ids"]
    assert theirs["pixels"] == pytest.approx(ours["pixels"])
    assert theirs["logits"] == pytest.approx(ours["logits"], abs=1e-4)


def test_other_rotary_embeddings_keep_their_type():
    rope = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    published = publish_config(
        {"model_type": "qwen2_vl", "dtype": "bfloat16", "text_config": {"rope_parameters": rope}}
    )
    assert published["rope_scaling"] == {"type": "yarn", "factor": 2.0, "mrope_section": [16, 24, 24]}
    assert (published["rope_theta"], published["torch_dtype"]) == (1e6, "bfloat16")


def test_the_command_for_vllm_has_only_adapters_that_it_serves(exported):
    readme = (exported / "README.md").read_text()
    command = readme[readme.index("vllm serve") : readme.index("```\n", readme.index("vllm serve"))]
    assert "--max-loras 3 --max-lora-rank 8" in command
    assert "decision_maker" not in command
    assert all(f"{role}=adapters/{role}" in command for role in ROLES if role != "decision_maker")
    why = "vLLM does not serve the adapter of decision_maker, because it has fully trained modules (lm_head)"
    assert f"{why}; serve `merged/decision_maker`." in readme
    assert "vllm serve merged/decision_maker --served-model-name decision_maker" in readme


def test_a_base_model_that_vllm_does_not_load_is_named_with_the_correction(exported, adapters):
    card = read_card(adapters / ROLES[0])
    for size in (2, 3):
        text = " ".join(serving_lines({}, ["decision_maker"], card, size, 2))
        assert ("base model has 3 x 3" in text) == (size == 3)
        assert ("pass `spatial_merge_size=spatial_merge_size` to" in text) == (size == 3)
    size = json.loads((ECHO_TINY / "config.json").read_text())["vision_config"]["spatial_merge_size"]
    assert (f"base model has {size} x {size}" in (exported / "README.md").read_text()) == (size != 2)


@pytest.mark.parametrize(("references", "images"), [(2, 8), (7, 8), (8, 9), (30, 31)])
def test_the_command_for_vllm_allows_the_images_of_every_role(adapters, references, images):
    """The reference extractor sees all references and the query."""
    text = " ".join(serving_lines({}, ["decision_maker"], read_card(adapters / ROLES[0]), 2, references))
    assert f"--limit-mm-per-prompt '{{\"image\": {images}}}'" in text


@pytest.mark.parametrize(
    ("config", "names", "refusal"),
    [
        ({}, [], None),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 4}, "use_rslora": True}, [], None),
        ({"init_lora_weights": "gaussian"}, [], None),
        ({"bias": "none", "modules_to_save": None, "init_lora_weights": True}, [], None),
        ({"use_dora": True}, [], "DoRA"),
        ({"modules_to_save": ["lm_head"]}, [], r"lm_head"),
        ({"bias": "lora_only"}, [], "biases"),
        ({"lora_bias": True}, [], "biases"),
        ({"r": 512}, [], None),
        ({"r": 513}, [], "rank 513, above 512"),
        ({"rank_pattern": {"q_proj": 1024}}, [], "rank 1024, above 512"),
        ({"init_lora_weights": "pissa"}, [], "pissa"),
        ({}, ["base_model.model.lm_head.lora_A.weight"], "lm_head"),
        ({}, ["base_model.model.model.language_model.embed_tokens.lora_embedding_A"], "embed_tokens"),
    ],
)
def test_what_vllm_refuses_is_known_from_config_and_weights(config, names, refusal):
    found = vllm_refusal({"r": 8, **config}, LORA_NAMES + names)
    assert found is None if refusal is None else refusal in str(found)
