"""Asking a server that speaks OpenAI's chat protocol (vLLM, `transformers serve`) what an `Engine` asks a model.

The prompts are the renderer's own, images first, then the shared context, then the branch, so that a server with a
prefix cache computes what branches share once. Images are brought to the pixel budget here, by the processor itself,
and travel without loss: what the server sees is what training saw, and the tokens it counts are held against ours.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import os
import random
import time
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError
from echo_ft.experts.roles import DECIDE_INSTRUCTION, PROMPT_VERSION
from echo_ft.images.corruptions import Corruption
from echo_ft.images.views import View, views
from echo_ft.model.rows import RowBuilder
from echo_ft.records import LETTERS, ROLES, Branch, Exchange, Generation

try:
    import openai
except ImportError as missing:
    raise EchoError(
        "a server is asked with the package openai; install it: pip install 'echo-ft[serving]'"
    ) from missing

TOP_LOGPROBS = 20
"""Tokens whose probabilities are asked for at the answer position: the most that OpenAI and vLLM give."""

FIRST_RETRY_WAIT, LONGEST_RETRY_WAIT = 0.5, 8.0
"""Seconds between two tries of a request; each wait is twice the one before."""

IMAGES_PER_REQUEST = 4
"""Images that are kept for each request under way: those of its case, for the roles that look at them next."""

RETRY_STATUSES = (408, 409, 429)
"""HTTP states, besides those from 500, in which the same request may be answered later."""

REJECTED_STATUSES = (400, 413, 422)
"""HTTP states of a server that does not take this one request."""

EncodedImage = tuple[str, tuple[int, int]]
"""An image as a data URL, and its (width, height) before it was brought to the pixel budget."""


class Server:
    """A model for each role behind one address; use it in an `async with` block, in one event loop."""

    def __init__(
        self,
        url: str,
        model: str,
        row_builder: RowBuilder,
        root: Path,
        max_new_tokens: int = 128,
        answer_tokens: int | None = None,
        max_concurrent: int = 8,
        timeout: float = 300.0,
        patience: float = 600.0,
        corruption: Corruption | None = None,
    ) -> None:
        """`model` is the name that the server knows, where `{role}` stands for the role's.

        At most `at_once` requests are under way. One that is not answered within `timeout` seconds, finds no server or
        an overloaded one, is tried again for `patience` seconds. `answer_tokens` and `corruption` are as in `Engine`.
        The key, where the server wants one, is the environment's OPENAI_API_KEY.
        """
        self.url = url
        self.models = {role: model.replace("{role}", role) for role in ROLES}
        self.row_builder = row_builder
        self.root = root
        self.max_new_tokens = max_new_tokens
        self.answer_tokens = answer_tokens or max_new_tokens
        self.timeout = timeout
        self.patience = patience
        self.corruption = corruption
        self.kept_images = IMAGES_PER_REQUEST * max_concurrent
        # Tries are counted in seconds here, not in times: a server that is started again takes minutes to load.
        self._client = openai.AsyncOpenAI(
            base_url=url, api_key=os.environ.get("OPENAI_API_KEY") or "none", timeout=timeout, max_retries=0
        )
        self._slots = asyncio.Semaphore(max_concurrent)
        self._images: OrderedDict[View, asyncio.Task[EncodedImage]] = OrderedDict()
        self._answered = -math.inf

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def check(self) -> bool:
        """Ask each role's model about two drawn images, the smallest and the largest of the pixel budget.

        Returns whether the replies tell the probabilities of tokens. Raises EchoError where the server cannot be
        reached, does not know a model, or counts other tokens than this project.
        """
        side = (
            math.isqrt(self.row_builder.image_processor.size["longest_edge"])
            + 2 * self.row_builder.image_processor.patch_size
        )
        drawn = [Image.new("RGB", size, "grey") for size in ((1, 1), (side, side))]
        shown = [(self._url(image), image.size) for image in drawn]
        branch = Branch("check", DECIDE_INSTRUCTION)
        exchange = Exchange("decision_maker", "check", ("small", "large"), "", (branch,), PROMPT_VERSION)
        known = True
        for model in dict.fromkeys(self.models.values()):
            (reply,) = await self._ask(model, exchange, shown, limit=1, logprobs=True)
            known = known and bool(_told(reply))
        return known

    async def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """What `role` says to every branch of every exchange, in order.

        `letters` holds those among the TOP_LOGPROBS tokens at the answer position, and is empty where the server does not tell
        probabilities. Raises EchoError where an image is broken or the server does not take a prompt, and BackendError
        where the server itself fails.
        """
        decides = role == "decision_maker"
        limit = self.answer_tokens if decides else self.max_new_tokens

        async def ask(exchange: Exchange) -> list[Generation]:
            shown = [await self._show(view) for view in views(exchange, self.root, self.corruption)]
            replies = await self._ask(self.models[role], exchange, shown, limit, logprobs=decides)
            return [Generation((reply.choices[0].message.content or "").strip(), _letters(reply)) for reply in replies]

        return await asyncio.gather(*(ask(exchange) for exchange in exchanges))

    async def _show(self, view: View) -> EncodedImage:
        """The image, read and resized once for all that ask for it, beside the event loop."""

        def read() -> EncodedImage:
            loaded = view.load()
            return self._url(loaded), loaded.size

        if view not in self._images:
            self._images[view] = asyncio.create_task(asyncio.to_thread(read))
        self._images.move_to_end(view)
        task = self._images[view]
        while len(self._images) > self.kept_images:
            self._images.popitem(last=False)
        return await task

    def _url(self, image: Image.Image) -> str:
        """The image at the size that the processor gives it, pixel by pixel, as a PNG in a data URL."""
        self.row_builder.grid(*image.size)  # refuses an extreme shape by a sentence
        processor, merge = self.row_builder.image_processor, self.row_builder.merge
        made = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
        (_, rows, columns), patch = made["image_grid_thw"][0], processor.patch_size
        patches = made["pixel_values"].reshape(rows // merge, columns // merge, merge, merge, 3, -1, patch, patch)
        values = patches[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
        buffer = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(buffer, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    async def _ask(
        self, model: str, exchange: Exchange, shown: Sequence[EncodedImage], limit: int, logprobs: bool
    ) -> list[Any]:
        """The server's chat completion for each branch, after at most `limit` tokens."""
        row = self.row_builder.row(exchange, [size for _, size in shown])
        shared, *own = np.bincount(row.segments, minlength=len(exchange.branches) + 1).tolist()
        lengths = [shared + length for length in own]
        images = [{"type": "image_url", "image_url": {"url": url}} for url, _ in shown]
        # `transformers serve` makes the repetition penalty of generation_config.json from frequency_penalty: 0 is none.
        options: dict[str, Any] = {"max_tokens": limit, "temperature": 0, "frequency_penalty": 0}
        if logprobs:
            options |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}

        async def ask(branch: Branch, tokens: int) -> Any:
            content = [*images, {"type": "text", "text": exchange.context + branch.prompt}]
            async with self._slots:
                reply = await self._patiently(
                    {"model": model, "messages": [{"role": "user", "content": content}], **options}
                )
            counted = reply.usage.prompt_tokens if reply.usage else tokens
            if counted != tokens:
                raise BackendError(
                    f"{self.url} makes {counted} tokens of a prompt that has {tokens} here: its "
                    f"tokenizer, chat template or pixel budget is another; start it with those of model_name_or_path "
                    f"and with {self._budget()}"
                )
            return reply

        return await asyncio.gather(*map(ask, exchange.branches, lengths))

    def _budget(self) -> str:
        size = self.row_builder.image_processor.size
        return f"min_pixels {size['shortest_edge']} and max_pixels {size['longest_edge']}"

    async def _patiently(self, request: Mapping[str, Any]) -> Any:
        """The reply to a request that is tried again, ever more slowly, while it may yet be answered."""
        failing_since: float | None = None
        wait = FIRST_RETRY_WAIT
        while True:
            try:
                reply: Any = await self._client.chat.completions.create(**request)
                _ = reply.choices[0].message.content
                self._answered = time.monotonic()
                return reply
            except openai.APITimeoutError:
                reason = (
                    f"no answer within {self.timeout:g} s; a longer --server_timeout or a smaller --batch_size helps"
                )
            except openai.APIConnectionError as error:
                reason = f"no connection: {error.__cause__ or error}"
            except openai.APIStatusError as error:
                reason = f"{error.status_code}: {error.message[:300]}"
                if error.status_code not in RETRY_STATUSES and error.status_code < 500:
                    fault: type[EchoError] = EchoError if error.status_code in REJECTED_STATUSES else BackendError
                    raise fault(
                        f"{self.url} refuses a request to the model {request['model']!r} ({reason}); check "
                        "--server, --server_model and the server's limits"
                    ) from error
                asked_to_wait = error.response.headers.get("retry-after", "")
                wait = max(wait, int(asked_to_wait)) if asked_to_wait.isdecimal() else wait
            except (openai.APIError, AttributeError, IndexError, TypeError, ValueError):
                reason = "what came back is no chat completion; the address ends in /v1 on most servers"
            now = time.monotonic()
            if failing_since is None:
                failing_since = now
                warnings.warn(f"{self.url}: {reason}; trying again for {self.patience:g} s", stacklevel=2)
            if now + wait > failing_since + self.patience:
                # Where the server has answered others meanwhile, this one request is at fault.
                fault = EchoError if self._answered > failing_since else BackendError
                raise fault(
                    f"{self.url} did not answer for {self.patience:g} s ({reason}); start the server and give the same "
                    "command again: the run goes on where it stopped"
                )
            await asyncio.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, LONGEST_RETRY_WAIT)


def _told(reply: Any) -> Sequence[Any]:
    """The TOP_LOGPROBS tokens at the answer position with their log-probabilities; empty where the server does not tell them."""
    told = reply.choices[0].logprobs
    return (told.content[0].top_logprobs or ()) if told is not None and told.content else ()


def _letters(reply: Any) -> dict[str, float]:
    return {one.token: one.logprob for one in _told(reply) if one.token in tuple(LETTERS)}
