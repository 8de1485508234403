"""Rows of the table for what the commands themselves write and read: models, adapters, datasets, runs and caches.

Also here: images that are read as people see them, and replies of servers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from echo_ft.provenance import CHECKSUMS
from tests.conftest import ECHO_TINY, MAX_PIXELS, MIN_PIXELS, make_dataset, random_adapters
from tests.faults.fields import changed_line
from tests.faults.inputs import DEEP, Arguments, Fault, build, described, picture, pipe
from tests.support import folder_layouts
from tests.support.servers import FakeServer, completion

Change = Callable[[Path], object]

_kept = tempfile.TemporaryDirectory(prefix="echo_ft_faults")
"""Holds what many rows copy, until the process ends."""


def kept(name: str) -> Path:
    """A folder that many rows copy."""
    return Path(_kept.name) / name


@cache
def small_dataset() -> Path:
    return make_dataset(kept("data"), train=2, validation=1, test=1)


@cache
def four_adapters() -> Path:
    return random_adapters(kept("adapters"), small_dataset())


def evaluated(root: Path, model: Path = ECHO_TINY, data: Path | None = None, *more: object) -> Arguments:
    """The arguments of a run on echo-tiny."""
    options = {
        "config": "recipes/tiny/run.yaml", "dataset": data or small_dataset(), "output": root / "out",
        "model_name_or_path": model, "min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS, "max_new_tokens": 2,
    }  # fmt: skip
    flags = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    return ["evaluation.run", *flags, *map(str, more)]


def json_file(name: str, **changes: Any) -> Change:
    """Change keys of a JSON file in a folder."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        path.unlink()
        path.write_text(json.dumps({**content, **changes}))

    return change


def content(name: str, text: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)

    return change


def cut(name: str, share: float = 0.5) -> Change:
    def change(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        content(name, whole[: int(share * len(whole))])(folder)

    return change


def flipped(name: str) -> Change:
    def change(folder: Path) -> None:
        whole = bytearray((folder / name).read_bytes())
        whole[-7] ^= 64
        content(name, bytes(whole))(folder)

    return change


def gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def tensors(change: Callable[[dict[str, Any]], object]) -> Change:
    """Change the tensors of a model."""

    def change_tensors(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        weights = {name: weight.clone() for name, weight in load_file(folder / WEIGHTS).items()}
        (folder / WEIGHTS).unlink()
        change(weights)
        save_file(weights, folder / WEIGHTS, {"format": "pt"})

    return change_tensors


def without_six(weights: dict[str, Any]) -> None:
    for name in sorted(weights)[:6]:
        del weights[name]


# Models

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MODELS: dict[str, tuple[Change, str]] = {
    "code": (json_file(CONFIG, auto_map={"AutoConfig": "evil.Evil"}), "has the key 'auto_map', which loads code"),
    "code of the processor": (json_file("processor_config.json", auto_map={"AutoProcessor": "a.B"}), "'auto_map'"),
    "code of the tokenizer": (json_file("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B"]}), "'auto_map'"),
    "code of generation": (json_file("generation_config.json", custom_generate="a/b"), "'custom_generate'"),
    "code inside": (json_file(CONFIG, vision_config={"auto_map": {"AutoConfig": "a.B"}}), "'auto_map'"),
    "trusted": (json_file(CONFIG, trust_remote_code=True), "'trust_remote_code'"),
    "attention of the hub": (json_file(CONFIG, attn_implementation="kernels-community/flash"), "may load code"),
    "attention in private": (json_file(CONFIG, _attn_implementation="a/b"), "may load code"),
    "attention unknown": (json_file(CONFIG, attn_implementation=3), "may load code"),
    "a million layers": (json_file(CONFIG, num_hidden_layers=10**6), "sets num_hidden_layers to 1000000"),
    "no layers": (json_file(CONFIG, num_hidden_layers=0), "sets num_hidden_layers to 0"),
    "layers a text": (json_file(CONFIG, num_hidden_layers="2"), "sets num_hidden_layers to '2'"),
    "another type": (json_file(CONFIG, model_type="evil"), "model"),
    "config a list": (content(CONFIG, "[]"), r"no usable config\.json"),
    "config deep": (content(CONFIG, DEEP), r"no usable config\.json .it is nested too deeply"),
    "config half": (cut(CONFIG), r"no usable config\.json"),
    "config empty": (content(CONFIG, ""), r"no usable config\.json"),
    "config missing": (gone(CONFIG), r"config\.json"),
    "processor of noise": (json_file("processor_config.json", image_processor={"image_mean": ["x"]}), "processor"),
    "tokenizer half": (cut("tokenizer.json"), r"model could not be loaded \(Expecting"),
    "generation of noise": (json_file("generation_config.json", eos_token_id=["x"]), "generation_config|model"),
    "template reaches out": (content("chat_template.jinja", "{{ ''.__class__ }}"), "chat template"),
    "template broken": (content("chat_template.jinja", "{% if %}"), "chat template"),
    "weights cut": (cut(WEIGHTS), r"model\.safetensors is truncated or not"),
    "weights empty": (content(WEIGHTS, ""), r"model\.safetensors is truncated or not"),
    "weights a pickle": (content(WEIGHTS, b"\x80\x04\x95" + b"a" * 99), r"model\.safetensors is truncated or not"),
    "weights with a long header": (content(WEIGHTS, b"\xff" * 7 + b"\x7f{}"), r"model\.safetensors is truncated"),
    "tensors missing": (tensors(without_six), r"has \d+ missing tensors"),
    "a tensor too many": (tensors(lambda weights: weights.update(extra=weights[min(weights)].clone())), "1 unexpected"),
    "weights missing": (gone(WEIGHTS), "weights|safetensors"),
    "index of noise": (content("model.safetensors.index.json", "noise"), "does not list the weight files"),
    "index of another folder": (
        content("model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}'), "weight"
    ),
}  # fmt: skip


def models() -> Iterator[Fault]:
    def made(change: Change) -> Callable[[Path], Arguments]:
        def make(root: Path) -> Arguments:
            shutil.copytree(ECHO_TINY, root / "model", copy_function=os.link)
            for path in (root / "model").iterdir():
                if path.name != WEIGHTS:
                    copy = path.read_bytes()
                    path.unlink()
                    path.write_bytes(copy)
            change(root / "model")
            return evaluated(root, root / "model")

        return make

    for name, (change, says) in MODELS.items():
        yield Fault(f"model {name}", made(change), says)


# Adapters

CARD, PEFT, LORA = "echo_ft.json", "adapter_config.json", "adapter_model.safetensors"
ADAPTERS: dict[str, tuple[Change, str]] = {
    "flipped": (flipped(LORA), rf"{LORA} has changed since it was saved"),
    "cut": (cut(LORA), rf"{LORA} has changed since it was saved"),
    "gone": (gone(LORA), LORA),
    "config flipped": (json_file(PEFT, lora_alpha=9), rf"{PEFT} has changed since it was saved"),
    "card of another role": (json_file(CARD, role="knowledge_guide"), "decision_maker"),
}
UNSEALED: dict[str, tuple[Change, str]] = {
    "cut weights": (cut(LORA), "decision_maker"),
    "empty weights": (content(LORA, ""), "decision_maker"),
    "weights of text": (content(LORA, "x" * 99), "decision_maker"),
    "card a list": (content(CARD, "[]"), CARD),
    "card deep": (content(CARD, DEEP), CARD),
    "card half": (cut(CARD), CARD),
    "card role a number": (json_file(CARD, role=3), "role"),
    "card dataset a number": (json_file(CARD, dataset=3), CARD),
    "card extra": (json_file(CARD, extra=3), "extra"),
    "card budget a text": (json_file(CARD, min_pixels="3"), "min_pixels"),
    "card other prompt": (json_file(CARD, prompt_version="0"), "prompt"),
    "card other base": (json_file(CARD, base_fingerprint="0" * 16), "base"),
    "config a list": (content(PEFT, "[]"), "decision_maker"),
    "config deep": (content(PEFT, DEEP), "decision_maker"),
    "config half": (cut(PEFT), "decision_maker"),
    "config of evil": (json_file(PEFT, peft_type="EVIL"), "decision_maker"),
    "config of prompts": (json_file(PEFT, peft_type="PROMPT_TUNING"), "decision_maker"),
    "rank a text": (json_file(PEFT, r="4"), "decision_maker"),
    "rank zero": (json_file(PEFT, r=0), "decision_maker"),
    "rank other": (json_file(PEFT, r=8), "decision_maker"),
    "scale negative": (json_file(PEFT, lora_alpha=-32), r"has the scale .* is not between 0 and 1000"),
    "scale huge": (json_file(PEFT, lora_alpha=1e300), r"has the scale .* is not between 0 and 1000"),
    "scale a text": (json_file(PEFT, lora_alpha="x"), "decision_maker"),
    "targets a slow pattern": (json_file(PEFT, target_modules="(([a-z_.0-9])+)+$!"), "decision_maker"),
    "targets missing": (json_file(PEFT, target_modules=["nothing"]), "decision_maker"),
    "saves a head": (json_file(PEFT, modules_to_save=["lm_head"]), "decision_maker"),
}


def adapters() -> Iterator[Fault]:
    def made(change: Change, sealed: bool) -> Callable[[Path], Arguments]:
        def make(root: Path) -> Arguments:
            shutil.copytree(four_adapters(), root / "adapters")
            folder = root / "adapters" / "decision_maker"
            if not sealed:  # as older versions wrote it, or as someone who changes the checksums too
                (folder / CHECKSUMS).unlink()
            change(folder)
            return evaluated(root, ECHO_TINY, None, "--adapters", root / "adapters")

        return make

    for sealed, rows in ((True, ADAPTERS), (False, UNSEALED)):
        for name, (change, says) in rows.items():
            yield Fault(f"adapter {name}{' with checksums' if sealed else ''}", made(change, sealed), says)


# Datasets, in training and in runs

ROWS = "sft/decision_maker/train.jsonl"
TRAINED: dict[str, tuple[Change, str]] = {
    "rows half": (cut(ROWS), r"train\.jsonl"),
    "rows not UTF-8": (content(ROWS, b"\xff\n"), r"train\.jsonl"),
    "rows deep": (content(ROWS, DEEP), r"train\.jsonl"),
    "rows gone": (gone(ROWS), r"train\.jsonl|has no"),
    "rows empty": (content(ROWS, ""), r"train|rows"),
    "row of another role": (changed_line(ROWS, "role", "knowledge_guide"), "decision_maker|role"),
    "row without a completion": (
        changed_line(ROWS, "branches", [{"id": "1", "prompt": "?", "completion": None}]),
        "completion",
    ),
    "row context a number": (changed_line(ROWS, "context", 3), r"train\.jsonl:1 is not a Exchange row \(context"),
    "row images a text": (changed_line(ROWS, "images", "a.png"), r"train\.jsonl:1 is not a Exchange row \(images"),
    "row image out": (changed_line(ROWS, "images", ["../../a.png"]), r"train\.jsonl:1 is not a Exchange row \(images"),
    "row branches empty": (changed_line(ROWS, "branches", []), "branch"),
    "row prompt version": (changed_line(ROWS, "prompt_version", "0"), "prompt"),
    "image gone": (lambda folder: [path.unlink() for path in (folder / "images").iterdir()], "image"),
    "images are pipes": (
        lambda folder: [(path.unlink(), pipe(path)) for path in (folder / "images").iterdir()],
        "image",
    ),
}
OPTIONS = {
    "learning_rate": (".nan", "-1", "x"),
    "num_train_epochs": ("-3", ".inf"),
    "per_device_train_batch_size": ("0", "-1"),
    "lora_r": ("1000000000", "0"),
    "features_gib": (".nan", "-1"),
    "gradient_checkpointing_kwargs": ("x", "{use_reentrant: true}"),
    "deepspeed": ("c.yaml",),
    "max_pixels": ("0", "3"),
    "attn_implementation": ("kernels-community/flash", "flash_attention_2"),
    "trust_remote_code": ("true",),
    "seed": ("-1", "4294967296"),
    "mask_loss": (".nan", "-1"),
}


def trainings() -> Iterator[Fault]:
    def made(change: Change) -> Callable[[Path], Arguments]:
        def make(root: Path) -> Arguments:
            folder = root / "data"
            shutil.copytree(small_dataset(), folder)
            change(folder)
            return planned(root, folder)

        return make

    for name, (change, says) in TRAINED.items():
        yield Fault(f"training {name}", made(change), says)
    for name, values in OPTIONS.items():
        for value in values:
            yield Fault(f"training {name} {value}", _recipe(name, value), name)


def planned(root: Path, folder: Path, recipe: str = "recipes/tiny/decision_maker.yaml") -> Arguments:
    where = ["--config", recipe, "--dataset", str(folder), "--output_dir", str(root / "out")]
    return ["train.sft", *where, "--dry_run"]


def _recipe(name: str, value: str) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        lines = Path("recipes/tiny/decision_maker.yaml").read_text().splitlines()
        kept = [line for line in lines if not line.startswith(f"{name}:")]
        (root / "c.yaml").write_text("\n".join([*kept, f"{name}: {value}"]).replace("\n  ", "\n"))
        return planned(root, small_dataset(), str(root / "c.yaml"))

    return make


RUN_OPTIONS = {
    "batch_size": ("0", "-1", "x"),
    "max_new_tokens": ("0", "-1"),
    "server_timeout": ("nan", "-1"),
    "server_patience": ("nan", "-1"),
    "routing": ("x",),
    "split": ("nowhere",),
    "severity": ("9",),
    "corruption": ("x",),
    "min_pixels": ("-1", "99999999"),
    "dtype": ("float7",),
    "adapters": ("nowhere",),
    "dataset": ("nowhere",),
    "model_name_or_path": ("nowhere", "$(touch pwned)/x"),
    "server": ("ftp://127.0.0.1", "nowhere", "http://[::1", "http://127.0.0.1:9/v1\n", "http://127.0.0.1:99999/v1"),
}


def run_options() -> Iterator[Fault]:
    for name, values in RUN_OPTIONS.items():
        for value in values:

            def make(root: Path, name: str = name, value: str = value) -> Arguments:
                return [*evaluated(root), f"--{name}", value]

            yield Fault(f"run {name} {value}", make, name.replace("model_name_or_path", "nowhere|pwned|model"))


RUN_DATA: dict[str, tuple[Change, str]] = {
    "knowledge missing": (gone("knowledge.json"), r"knowledge\.json"),
    "knowledge deep": (content("knowledge.json", DEEP), r"knowledge\.json"),
    "knowledge a list": (content("knowledge.json", "[]"), r"knowledge\.json"),
    "references missing": (gone("references.jsonl"), r"references\.jsonl"),
    "questions missing": (gone("questions.jsonl"), r"questions\.jsonl"),
    "inspections missing": (gone("inspections.jsonl"), r"inspections\.jsonl"),
    "digests missing": (gone("digests.json"), r"digests\.json"),
    "digests deep": (content("digests.json", DEEP), r"digests\.json"),
    "manifest gone": (gone("manifest.json"), r"manifest\.json"),
    "images are pipes": (
        lambda folder: [(path.unlink(), pipe(path)) for path in (folder / "images").iterdir()],
        "image",
    ),
    "digests changed": (json_file("digests.json", extra="0" * 64), r"digests\.json|changed"),
}


def run_datasets() -> Iterator[Fault]:
    def made(change: Change) -> Callable[[Path], Arguments]:
        def make(root: Path) -> Arguments:
            shutil.copytree(small_dataset(), root / "data")
            change(root / "data")
            return evaluated(root, ECHO_TINY, root / "data")

        return make

    for name, (change, says) in RUN_DATA.items():
        yield Fault(f"run on {name}", made(change), says)


# Caches

CACHES: dict[str, Callable[[Path], object]] = {
    "flipped": lambda path: flipped(path.name)(path.parent),
    "cut": lambda path: cut(path.name)(path.parent),
    "empty": lambda path: path.write_bytes(b""),
    "of NaN": lambda path: vectors(path, lambda old: np.full_like(old, np.nan)),
    "of another width": lambda path: vectors(path, lambda old: old[:, :2]),
    "of fewer vectors": lambda path: vectors(path, lambda old: old[:1]),
    "of exchanged vectors": lambda path: vectors(path, lambda old: old[::-1]),
    "of objects": lambda path: vectors(path, lambda old: old.astype(object)),
}


def vectors(path: Path, change: Callable[[Any], Any]) -> None:
    """Change the vectors of a cache, and keep the hashes of their images."""
    with np.load(path) as file:
        arrays = dict(file)
    name = max(arrays, key=lambda one: arrays[one].nbytes if arrays[one].dtype == np.float32 else 0)
    np.savez(path, **{**arrays, name: change(arrays[name])})


def caches() -> Iterator[Fault]:
    def made(change: Callable[[Path], object]) -> Callable[[Path], Arguments]:
        def make(root: Path) -> Arguments:
            from data_prep.build import main

            folder_layouts.mvtec_ad(root)
            options = {"source": "folder", "root": root / "mvtec_anomaly_detection", "cache": root / "cache"}
            for seed, path in enumerate(options["root"].rglob("good/*.png")):
                picture(path, seed)
            main(build(root, **options)[1:])
            shutil.rmtree(root / "out")
            for path in (root / "cache").rglob("*.npz"):
                change(path)
            return build(root, **options)

        return make

    for name, change in CACHES.items():
        says = r"the descriptor cache .*\.npz (has changed since it was written|cannot be read \(\w+\)); delete it"
        yield Fault(f"cache {name}", made(change), says)


def _piped_knowledge(root: Path) -> Arguments:
    arguments = described("")(root)
    (root / "k.yaml").unlink()
    pipe(root / "k.yaml" / "x.yaml")
    return arguments


# Replies of servers


def replied(answer: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Arguments]:
    def make(root: Path) -> Arguments:
        served().answer = answer
        limits = ("--server_timeout", 5, "--server_patience", 0.1)
        return evaluated(root, ECHO_TINY, None, "--server", served().url, *limits)

    return make


@cache
def served() -> FakeServer:
    return FakeServer()


def with_choice(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    def answer(body: dict[str, Any]) -> Any:
        reply = completion(body)
        reply["choices"][0].update(changes)
        return reply

    return answer


def likely(*tokens: Any) -> dict[str, Any]:
    return {"logprobs": {"content": [{"token": "A", "logprob": -1.0, "bytes": None, "top_logprobs": list(tokens)}]}}


def token(letter: Any, value: Any) -> dict[str, Any]:
    return {"token": letter, "logprob": value, "bytes": None}


REPLIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    **{
        f"body {text[:9]!r}": (lambda _, text=text: text.encode()) for text in ("", "{", "[]", "3", "null", DEEP[:9000])
    },
    **{f"status {code}": (lambda _, code=code: (code, {})) for code in (400, 401, 403, 404, 429, 500, 503)},
    **{f"choices {value!r}": (lambda b, value=value: {**completion(b), "choices": value}) for value in ([], None, 3)},
    **{
        f"content {value!r}": with_choice(message={"role": "assistant", "content": value})
        for value in (["B"], 3, True, {"a": 1}, "\ud800")
    },
    **{f"usage {value!r}": (lambda b, value=value: {**completion(b), "usage": value}) for value in ([], "x", 3)},
    **{
        f"logprobs {value!r}": with_choice(logprobs=value)
        for value in ("x", 3, [1], {"content": "x"}, {"content": [{}]})
    },
    **{f"top {value!r}": with_choice(**likely(value)) for value in (1, "x", None, [])},
    **{
        f"logprob {value!r}": with_choice(**likely(token("A", value), token("B", -1.0)))
        for value in (math.nan, -math.inf, math.inf, "x", None, 2.0, [1], True)
    },
    "a letter twice": with_choice(**likely(token("A", -1.0), token("A", -2.0))),
    "retry after digits": lambda _: (429, {}, {"Retry-After": "9" * 5000}),
    "compressed": lambda _: (200, b"", {"Content-Encoding": "gzip"}),
    "redirected": lambda _: (307, b"", {"Location": "http://127.0.0.1:9/v1"}),
    "closed": lambda _: None,
    "byte by byte": lambda _: iter(lambda: time.sleep(0.5) or b" ", None),
}


def replies() -> Iterator[Fault]:
    for name, answer in REPLIES.items():
        yield Fault(f"reply {name}", replied(answer), r"error: .*http://127\.0\.0\.1:\d+/v1 ")


FOLDERS = [
    *models(), *adapters(), *trainings(), *run_options(), *run_datasets(), *caches(), *replies(),
    Fault("knowledge pipe in a folder", _piped_knowledge, "knowledge"),
]  # fmt: skip
"""Every row of this file."""
