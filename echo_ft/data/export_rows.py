"""Convert exchanges to rows for other trainers: one row per branch, with the same tokens as `echo_ft.model.rows`.

Images come first, followed by the context and the branch's prompt as a single string. This module depends only on the
records, because the benchmarks use it in the environments of those trainers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from echo_ft.data.text import CONTROL_TOKEN, without_box_tokens
from echo_ft.errors import EchoError
from echo_ft.records import Branch, Exchange

IMAGE_PLACEHOLDER = "<image>"
"""Stands for an image in LLaMA-Factory and ms-swift."""

TAGS = re.compile(r"<(?:image|video|audio|bbox|ref-object|cot-process|start-image)>")
"""Tags that LLaMA-Factory (0.9.5) or ms-swift (4.6) replaces."""

SHAREGPT: dict[str, Any] = {
    "formatting": "sharegpt",
    "columns": {"messages": "messages", "images": "images"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
}
"""Entry in LLaMA-Factory's dataset_info.json that describes the rows of `message_rows`, without their `file_name`."""


def prompt_completion_rows(exchange: Exchange, images: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield one row per branch for TRL (`images`, `prompt`, `completion`).

    `images` are the paths that replace those of the exchange. Raises EchoError if any of the text contains a control
    token.
    """
    for branch in exchange.branches:
        checked = replace(branch, completion=without_box_tokens(branch.completion or ""))
        _refuse(CONTROL_TOKEN, "a control token of the chat template", "", exchange, checked)
        yield {
            "images": list(images),
            "prompt": [{"role": "user", "content": exchange.context + branch.prompt}],
            "completion": [{"role": "assistant", "content": branch.completion}],
        }


def message_rows(exchange: Exchange, images: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the same rows for LLaMA-Factory and ms-swift (`images`, `messages`), with one `<image>` per image.

    Raises EchoError if any of the text contains a control token, `<image>` or another tag of these trainers.
    """
    for branch, row in zip(exchange.branches, prompt_completion_rows(exchange, images), strict=True):
        _refuse(TAGS, "a tag that LLaMA-Factory or ms-swift replaces", ", or convert to trl", exchange, branch)
        (user,), assistant = row["prompt"], row["completion"]
        user = {**user, "content": IMAGE_PLACEHOLDER * len(images) + user["content"]}
        yield {"images": row["images"], "messages": [user, *assistant]}


def _refuse(pattern: re.Pattern[str], what: str, remedy: str, exchange: Exchange, branch: Branch) -> None:
    for text in (exchange.context, branch.prompt, branch.completion or ""):
        found = pattern.search(text)
        if found:
            near = " ".join(text[max(0, found.start() - 30) : found.end() + 30].split())
            raise EchoError(
                f"case {exchange.case}: the text {near!r} contains {found.group()}, {what}; reword it in the knowledge "
                f"or the questions and rebuild the dataset{remedy}"
            )
