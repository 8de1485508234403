"""Exchanges as the rows of other trainers, one conversation a branch, with the tokens that `echo_ft.model.rows` gives it.

Images come first, then the context and the branch's prompt as one text. Nothing but the records is imported: the
benchmarks use this in the environments of those trainers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.records import Exchange

IMAGE_PLACEHOLDER = "<image>"
"""Where an image goes, for LLaMA-Factory and ms-swift."""

CONTROL_TOKEN = re.compile(r"<\|\w+\|>")
"""A chat template's control token. `echo_ft.model.rows` refuses those of its tokenizer; no tokenizer is known here."""

TAGS = re.compile(r"<(?:image|video|audio|bbox|ref-object|cot-process|start-image)>")
"""What LLaMA-Factory (0.9.5) or ms-swift (4.6) put something else in the place of."""

SHAREGPT: dict[str, Any] = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
"""How LLaMA-Factory's dataset_info.json describes the rows of `chats`, beside their `file_name`."""


def conversations(exchange: Exchange, images: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The branches as TRL takes them (`images`, `prompt`, `completion`); `images` are where the exchange's own lie.

    Raises EchoError where a text holds a control token.
    """
    for branch in exchange.branches:
        _refuse(CONTROL_TOKEN, exchange, branch.prompt, branch.completion or "")
        yield {
            "images": list(images),
            "prompt": [{"role": "user", "content": exchange.context + branch.prompt}],
            "completion": [{"role": "assistant", "content": branch.completion}],
        }


def chats(exchange: Exchange, images: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The same rows as LLaMA-Factory and ms-swift take them (`images`, `messages`), with `<image>` for each image.

    Raises EchoError also where a text holds that or another of their tags.
    """
    for branch, row in zip(exchange.branches, conversations(exchange, images), strict=True):
        _refuse(TAGS, exchange, branch.prompt, branch.completion or "")
        (asked,), answered = row["prompt"], row["completion"]
        asked = {**asked, "content": IMAGE_PLACEHOLDER * len(images) + asked["content"]}
        yield {"images": row["images"], "messages": [asked, *answered]}


def _refuse(pattern: re.Pattern[str], exchange: Exchange, prompt: str, completion: str) -> None:
    found = next(filter(None, map(pattern.search, (exchange.context, prompt, completion))), None)
    if found:
        raise EchoError(
            f"case {exchange.case}: a text holds {found.group()}, a token of trainers; take it out of the source"
        )
