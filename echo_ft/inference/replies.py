"""Replies of a chat server. Their size is limited, and the types of their fields are checked."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import openai

from echo_ft.records import LETTERS

# openai 2 sends requests with httpx, and openai 3 (3.54) with its fork httpx2, which has different classes.
_HTTP: Any = sys.modules[openai.DefaultAsyncHttpxClient.__mro__[1].__module__]

MAX_REPLY_BYTES = 2**24
"""Size of the largest accepted reply. A thousand tokens with 20 alternatives each take 2 MB."""

MAX_LOGPROB = 1e-3
"""Largest accepted log-probability. Rounding may lift the value of a certain token above 0."""


LEAST_REST = 1e-6
"""Smallest probability that is left for all other tokens. Those of the likely ones are rounded and may add up to 1."""


@dataclass(frozen=True)
class Completion:
    """The answer of a server. The types of its fields were checked."""

    text: str
    letters: dict[str, float]
    """Log-probability of each option letter among the most likely first tokens."""
    has_logprobs: bool
    cut: bool
    """Whether the text ended at the token limit."""
    prompt_tokens: int | None
    bound: float = 0.0
    """Upper bound of the log-probability of each token that is not among the most likely ones."""

    @property
    def bounded_letters(self) -> dict[str, float]:
        """`letters`, with `bound` for those that are missing if A or B is there."""
        known = "A" in self.letters or "B" in self.letters
        return (dict.fromkeys(LETTERS, self.bound) if known else {}) | self.letters


class ReplyError(ValueError):
    """Raised for an unusable reply; the message says what is wrong with it."""


async def bound_reply(response: Any) -> None:
    """Limit the size of a reply. The HTTP package calls this before it reads the body."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise _HTTP.DecodingError("the reply is compressed, although that was not accepted", request=response.request)
    response.stream = _BoundedStream(response.stream)


class _BoundedStream(_HTTP.AsyncByteStream):  # type: ignore[misc]
    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        count = 0
        async for chunk in self.stream:
            count += len(chunk)
            if count > MAX_REPLY_BYTES:
                raise _HTTP.ReadError(f"the reply has more than {MAX_REPLY_BYTES:,} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self.stream.aclose()


def read_completion(reply: Any) -> Completion:
    """Return a chat completion, whose types the openai package (2.x) does not check.

    Raises ReplyError, or Python's own error for a missing field.
    """
    choice, usage = reply.choices[0], reply.usage
    text = "" if choice.message.content is None else choice.message.content
    _require(isinstance(text, str) and _is_unicode(text), f"content {text!r}")
    tokens = None if usage is None else usage.prompt_tokens
    _require(tokens is None or type(tokens) is int, f"prompt_tokens {tokens!r}")
    likely = _top_logprobs(choice.logprobs)
    letters = [(one.token, one.logprob) for one in likely if one.token in tuple(LETTERS)]
    for letter, logprob in letters:
        _require(type(logprob) in (int, float) and math.isfinite(logprob), f"logprob {logprob!r} of {letter}")
        _require(logprob <= MAX_LOGPROB, f"logprob {logprob!r} of {letter}")
    _require(len(dict(letters)) == len(letters), "a letter twice among the likely tokens")
    cut = choice.finish_reason == "length"
    return Completion(text, dict(letters), bool(likely), cut, tokens, _bound([one.logprob for one in likely]))


def _bound(likely: list[Any]) -> float:
    """Return the largest possible log-probability of the other tokens, given those of the most likely ones."""
    known = [one for one in likely if type(one) in (int, float) and one <= MAX_LOGPROB]
    rest = 1 - sum(math.exp(one) for one in known)
    return min(math.log(max(rest, LEAST_REST)), *known, 0.0)


def _top_logprobs(logprobs: Any) -> list[Any]:
    """Return the most likely tokens at the answer position with log-probabilities; empty if the server sends none."""
    content = None if logprobs is None else logprobs.content
    if content is None or content == []:
        return []
    _require(isinstance(content, list), f"logprobs {content!r}")
    _require(isinstance(getattr(content[0], "token", None), str), f"logprobs {content[0]!r}")
    likely = content[0].top_logprobs
    _require(likely is None or isinstance(likely, list), f"top_logprobs {likely!r}")
    return likely or []


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ReplyError(f"unusable {what[:80]}")


def _is_unicode(text: str) -> bool:
    return text.isascii() or text.encode(errors="replace").decode() == text
