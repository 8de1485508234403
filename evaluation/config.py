"""The options of a run, and what they mean to the pipeline and to the backend that answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from echo_ft.data.splits import LEFT_OUT, SPLITS
from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import PipelineConfig
from echo_ft.images.corruptions import CORRUPTIONS, SEVERITIES, Corruption
from echo_ft.model.loading import DTYPES


@dataclass(frozen=True)
class RunConfig:
    """Options of `python -m evaluation.run`."""

    dataset: str = field(metadata={"help": "A dataset folder, made by `python -m data_prep.build`."})
    model_name_or_path: str = field(metadata={"help": "The base model: a folder or a hub name."})
    output: str = field(metadata={"help": "The run's folder."})
    min_pixels: int = field(metadata={"help": "Fewest pixels of an image; as the adapters were trained."})
    max_pixels: int = field(metadata={"help": "Most pixels of an image; as the adapters were trained."})
    adapters: str | None = field(
        default=None,
        metadata={"help": "Folder with an adapter a role; absent: the base. With a server: those that it serves."},
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of the base model on the hub."})
    split: str = field(default="test", metadata={"help": "Which cases.", "choices": [*SPLITS, LEFT_OUT]})
    routing: str = field(default="full", metadata={"help": "Experts by question kind.", "choices": ["full", "paper"]})
    reference: str = field(
        default="retrieved", metadata={"help": "Normal references.", "choices": ["retrieved", "random", "none"]}
    )
    references: int | None = field(
        default=None,
        metadata={"help": "How many of a case's references are shown, the best ranked; absent: all that it has."},
    )
    knowledge: str = field(default="guided", metadata={"help": "Knowledge.", "choices": ["guided", "all", "none"]})
    reasoning: str = field(default="on", metadata={"help": "The reasoning expert.", "choices": ["on", "off"]})
    corruption: str | None = field(
        default=None,
        metadata={
            "help": "How every query is degraded; the references stay good photographs.",
            "choices": [*CORRUPTIONS],
        },
    )
    severity: int | None = field(
        default=None, metadata={"help": "How much it is degraded (with corruption).", "choices": list(SEVERITIES)}
    )
    answer: str = field(
        default="generate",
        metadata={
            "help": "What decides: the text, read strictly, beside which the options' probabilities are kept; or these "
            "probabilities alone; or their mean over the orders of the options (with option_order cyclic).",
            "choices": ["generate", "logits", "averaged"],
        },
    )
    option_order: str = field(
        default="given",
        metadata={
            "help": "Order of the options; cyclic: every cyclic permutation of it too, kept in permutations.jsonl.",
            "choices": ["given", "cyclic"],
        },
    )
    batch_size: int = field(
        default=8, metadata={"help": "Cases that run through a role together; with a server, requests under way."}
    )
    max_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens in the cache: branches x (prefix + branch + max_new_tokens), padded; cases that need "
            "more go through a role in parts. Absent: batch_size alone decides. Memory, not answers, depends on it."
        },
    )
    max_new_tokens: int = field(default=128, metadata={"help": "Most tokens that an expert may say; MMAD's limit."})
    dtype: str = field(
        default="auto", metadata={"help": "Weights' type; auto: the checkpoint's.", "choices": list(DTYPES)}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, which is the default; others take no mask of branches."}
    )
    server: str | None = field(
        default=None,
        metadata={"help": "Address of an OpenAI-compatible server, http://HOST:PORT/v1; absent: the model runs here."},
    )
    server_model: str | None = field(
        default=None,
        metadata={
            "help": "The model's name on the server, {role} in it for the role's; absent: {role} with adapters, "
            "else model_name_or_path."
        },
    )
    server_timeout: float = field(default=300.0, metadata={"help": "Seconds that a request may take."})
    server_patience: float = field(
        default=600.0, metadata={"help": "Seconds that a request which fails is tried again before the run stops."}
    )


def check_config(config: RunConfig) -> None:
    """Raise EchoError for options that cannot be run."""
    for name in ("batch_size", "max_batch_tokens", "max_new_tokens", "server_timeout", "server_patience"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise EchoError(f"{name} is {value}; it must be more than 0")
    if config.server is not None and config.max_batch_tokens is not None:
        raise EchoError(
            "max_batch_tokens is of a model that runs here, and a server makes its own batches; take it out"
        )
    if config.attn_implementation not in (None, "sdpa"):
        raise EchoError(f"attn_implementation {config.attn_implementation} takes no mask of branches; set it to sdpa")
    if config.answer == "averaged" and config.option_order == "given":
        raise EchoError("answer averaged is over several orders of the options; set option_order to cyclic")
    if config.reference == "none" and config.references is not None:
        raise EchoError(
            f"references is {config.references}, and reference none shows none; take one of the two options out"
        )
    if (config.corruption is None) != (config.severity is None):
        given, lacking = ("corruption", "severity") if config.severity is None else ("severity", "corruption")
        raise EchoError(f"{given} is given and {lacking} is not; add --{lacking} or take --{given} out")
    if config.server is None and config.server_model is not None:
        raise EchoError("server_model names a model of a server; give --server its address, or take it out")


def answering(config: RunConfig) -> dict[str, Any]:
    """The options that the answers depend on, beside the dataset and the adapters."""
    options = asdict(config)
    passing = (
        "output",
        "batch_size",
        "max_batch_tokens",
        "dataset",
        "adapters",
        "server",
        "server_timeout",
        "server_patience",
    )
    for name in passing if config.server is None else (*passing, "dtype", "attn_implementation"):
        options.pop(name)
    if config.server is not None:
        options["server_model"] = server_model(config)
    return options


def server_model(config: RunConfig) -> str:
    """The name of the model on the server, `{role}` in it for the role's."""
    return config.server_model or ("{role}" if config.adapters else config.model_name_or_path)


def pipeline_settings(config: RunConfig) -> PipelineConfig:
    """What the pipeline needs to know of the options."""
    return PipelineConfig(
        config.routing, config.reference, config.knowledge, config.reasoning, config.answer, config.option_order
    )


def corruption(config: RunConfig) -> Corruption | None:
    """How the queries are degraded."""
    if config.corruption is None or config.severity is None:
        return None
    return Corruption(config.corruption, config.severity)


def answer_tokens(config: RunConfig) -> int | None:
    """Where probabilities decide, the decision maker's first token is all that is needed of its text."""
    return 1 if config.answer != "generate" else None
