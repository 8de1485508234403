"""Options of a run, and their translation into the settings of the pipeline and the backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from echo_ft.data.splits import LEFT_OUT, SPLITS, UNLABELLED_SPLIT
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig
from echo_ft.images.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from echo_ft.inference.run_folder import RUN_DESCRIPTION
from echo_ft.inputs import read_json_object
from echo_ft.model.loading import DTYPES, checkpoint_dtype
from echo_ft.records import GROUNDING, MAX_NEW_TOKENS, Case

BATCH_OPTIONS = ("batch_size", "max_batch_tokens")
"""Options that change the shapes of batches: answers stay equal in float32, but may round differently in 16 bits."""


@dataclass(frozen=True)
class RunConfig:
    """Options of `python -m evaluation.run`."""

    dataset: str = field(metadata={"help": "Dataset folder, created by `python -m data_prep.build`."})
    model_name_or_path: str = field(metadata={"help": "Base model: a folder or a name on the Hugging Face Hub."})
    output: str = field(metadata={"help": "Run folder."})
    min_pixels: int = field(
        metadata={"help": "Smallest number of pixels per image. With adapters, use the value from their training."}
    )
    max_pixels: int = field(
        metadata={"help": "Largest number of pixels per image. With adapters, use the value from their training."}
    )
    adapters: str | None = field(
        default=None,
        metadata={
            "help": "Folder with one adapter per role. With a server: the adapters that it serves. Default: only the "
            "base model."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the Hub."})
    split: str = field(
        default="test", metadata={"help": "Split to run.", "choices": [*SPLITS, LEFT_OUT, UNLABELLED_SPLIT]}
    )
    routing: str = field(
        default="full", metadata={"help": "Experts to consult for each question type.", "choices": ["full", "paper"]}
    )
    reference: str = field(
        default="retrieved",
        metadata={"help": "Which normal references to show.", "choices": ["retrieved", "random", "none"]},
    )
    references: int | None = field(
        default=None,
        metadata={"help": "Number of references per case, best-ranked first. Default: all in the dataset."},
    )
    knowledge: str = field(
        default="guided",
        metadata={
            "help": "Product knowledge to show: what the guide selects, all of it, or none.",
            "choices": ["guided", "all", "none"],
        },
    )
    reasoning: str = field(
        default="on", metadata={"help": "Whether to consult the reasoning expert.", "choices": ["on", "off"]}
    )
    corruption: str | None = field(
        default=None,
        metadata={
            "help": "Corruption of every query image; references stay clean.",
            "choices": [*CORRUPTIONS],
        },
    )
    severity: int | None = field(
        default=None, metadata={"help": "Severity of the corruption.", "choices": list(SEVERITIES)}
    )
    answer: str = field(
        default="generate",
        metadata={
            "help": "How the decision maker decides. generate: by its text, parsed strictly; the probabilities of the "
            "options are recorded too. logits: by these probabilities. averaged: by their mean over the orders of the "
            "options, which needs option_order cyclic.",
            "choices": ["generate", "logits", "averaged"],
        },
    )
    option_order: str = field(
        default="given",
        metadata={
            "help": "Order of the options. cyclic: also ask in every cyclic permutation and write permutations.jsonl.",
            "choices": ["given", "cyclic"],
        },
    )
    batch_size: int = field(
        default=8, metadata={"help": "Cases per batch; with a server, the number of requests in flight."}
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Largest number of tokens in the key-value cache: branches x (prefix + branch + max_new_tokens), "
            "padded. Larger batches are split, which in 16 bits may change a few answers. Default: no limit besides "
            "batch_size."
        },
    )
    max_new_tokens: int = field(
        default=MAX_NEW_TOKENS, metadata={"help": "Largest number of tokens an expert may generate. MMAD uses 128."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "Data type of the weights. auto: as in the checkpoint.", "choices": list(DTYPES)},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation; only sdpa, the default, supports the branch mask."}
    )
    server: str | None = field(
        default=None,
        metadata={"help": "URL of an OpenAI-compatible server, http://HOST:PORT/v1. Default: run locally."},
    )
    server_model: str | None = field(
        default=None,
        metadata={
            "help": "Model name on the server; {role} is replaced by the role. Default: {role} with adapters, "
            "otherwise model_name_or_path."
        },
    )
    server_timeout: float = field(default=300.0, metadata={"help": "Timeout of a request in seconds."})
    server_patience: float = field(
        default=600.0, metadata={"help": "How long to retry a failing request, in seconds, before the run stops."}
    )


def check_config(config: RunConfig) -> None:
    """Raise EchoError for values out of range and for options that are mutually exclusive."""
    for name in ("batch_size", "max_batch_tokens", "max_new_tokens", "server_timeout", "server_patience"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise EchoError(f"{name} is {value}; set it to more than 0")
    if config.server is not None and config.max_batch_tokens is not None:
        raise EchoError(
            "max_batch_tokens applies only to a local model, because a server forms its own batches; remove it"
        )
    if config.attn_implementation not in (None, "sdpa"):
        raise EchoError(
            f"attn_implementation {config.attn_implementation} does not support the branch mask; set it to sdpa"
        )
    if config.answer == "averaged" and config.option_order == "given":
        raise EchoError("answer averaged needs several orders of the options; set option_order to cyclic")
    if config.reference == "none" and config.references is not None:
        raise EchoError(f"references is {config.references}, but reference is none; remove one of the two options")
    if (config.corruption is None) != (config.severity is None):
        given, lacking = ("corruption", "severity") if config.severity is None else ("severity", "corruption")
        raise EchoError(f"{given} is set but {lacking} is not; add --{lacking} or remove --{given}")
    if config.server is None and config.server_model is not None:
        raise EchoError("server_model needs a server; add --server URL or remove server_model")


def answer_options(config: RunConfig) -> dict[str, Any]:
    """Return the options that affect answers, apart from the dataset and the adapters."""
    options = asdict(config)
    excluded = (
        "output",
        "batch_size",
        "max_batch_tokens",
        "dataset",
        "adapters",
        "server",
        "server_timeout",
        "server_patience",
    )
    for name in excluded if config.server is None else (*excluded, "dtype", "attn_implementation"):
        options.pop(name)
    if config.server is not None:
        options["server_model"] = server_model(config)
    return options


def server_model(config: RunConfig) -> str:
    """Return the model name on the server, in which `{role}` stands for the name of a role."""
    return config.server_model or ("{role}" if config.adapters else config.model_name_or_path)


def pipeline_config(config: RunConfig) -> PipelineConfig:
    """Return the options that the pipeline needs."""
    return PipelineConfig(
        config.routing, config.reference, config.knowledge, config.reasoning, config.answer, config.option_order
    )


def corruption(config: RunConfig) -> Corruption | None:
    """Return the corruption of the queries, or None for clean queries."""
    if config.corruption is None or config.severity is None:
        return None
    return Corruption(config.corruption, config.severity)


def answer_tokens(config: RunConfig, cases: Sequence[Case]) -> int | None:
    """Return the token limit of the decision maker, or None if the limit of all roles applies.

    If probabilities decide, only the first token is needed, so the limit is 1. Boxes are always read from the text.
    """
    boxed = any(question.kind == GROUNDING for case in cases for question in case.seen.questions)
    return 1 if config.answer != "generate" and not boxed else None


def batch_warnings(config: RunConfig) -> list[str]:
    """Warn if a 16-bit run resumes with different batches, because the shape of a batch changes how answers round."""
    path = Path(config.output) / RUN_DESCRIPTION
    if config.server is not None or not path.is_file():
        return []
    try:
        earlier = read_json_object(path)
    except (OSError, ValueError):  # RunFolder reports the error
        return []
    changed = [
        f"{name} {getattr(config, name)} instead of {earlier[name]}"
        for name in BATCH_OPTIONS
        if name in earlier and earlier[name] != getattr(config, name)
    ]
    dtype = config.dtype
    if changed and dtype == "auto":
        dtype = checkpoint_dtype(config.model_name_or_path, config.model_revision)
    if not changed or dtype == "float32":
        return []
    return [f"the run resumes with {' and '.join(changed)}; in {dtype}, other batches may change a few answers"]
