"""Generate with an OpenAI-compatible server (vLLM, `transformers serve`) instead of a local `Engine`.

Requests contain the rendered prompts: images first, then the shared context, then the branch. A server with a prefix
cache therefore computes the shared part only once. The client resizes images to the pixel budget with the model's own
processor and sends them losslessly, so that the server receives the same pixels as in training. It also checks that the
server counts the expected number of prompt tokens.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import os
import random
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from echo_ft.errors import EchoError
from echo_ft.experts.pipeline import BackendError
from echo_ft.experts.roles import DECIDE_INSTRUCTION, PROMPT_VERSION
from echo_ft.images.corruptions import Corruption
from echo_ft.images.views import View, views
from echo_ft.model.rows import RowBuilder
from echo_ft.records import ROLES, Branch, Exchange, Generation

try:
    import openai
except ImportError as missing:
    raise EchoError("--server needs the package openai; run pip install 'transformers[serving]'") from missing

from echo_ft.inference.replies import Completion, ReplyError, bound_reply, read_completion
from echo_ft.inputs import is_web_address

TOP_LOGPROBS = 20
"""Number of most likely tokens to request at the answer position: the maximum of OpenAI and vLLM."""

FIRST_RETRY_WAIT, LONGEST_RETRY_WAIT = 0.5, 8.0
"""First and longest wait before a retry, in seconds; the wait doubles with each retry."""

IMAGES_PER_REQUEST = 4
"""Number of encoded images to keep per concurrent request, so that the next role of its case can reuse them."""

RETRY_STATUSES = (408, 409, 429)
"""HTTP status codes below 500 after which a request is retried."""

REJECTED_STATUSES = (400, 413, 422)
"""HTTP status codes of a server that rejects only this request."""

NO_REPETITION_PENALTY = {"repetition_penalty": 1.0}
"""Extra request field, not part of OpenAI's API, that makes vLLM ignore the penalty in generation_config.json."""

LONGEST_RETRY_AFTER = 86_400
"""Longest wait in seconds that a server may ask for."""

Reply = TypeVar("Reply")

EncodedImage = tuple[str, tuple[int, int]]
"""An image as a data URL, and its original (width, height) in pixels."""


class Server:
    """Generates with the models of a server. Use it in an `async with` block and in one event loop."""

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
        bounds_letters: bool = False,
    ) -> None:
        """Make a client for the server at `url`.

        `model` is the model's name on the server; `{role}` in it is replaced by the role. At most `max_concurrent`
        requests are sent at once. A request is retried for `patience` seconds if it takes more than `timeout` seconds,
        or if the server is unreachable or overloaded. `answer_tokens` and `corruption` work as in `Engine`. With
        `bounds_letters`, a letter that is not among the TOP_LOGPROBS most likely tokens has its largest possible
        probability if A or B is among them. If the server requires a key, set the environment variable OPENAI_API_KEY.
        """
        if not is_web_address(url):
            raise EchoError(f"the server address {url} is not one such as http://HOST:8000/v1; correct it")
        self.url = url
        self.models = {role: model.replace("{role}", role) for role in ROLES}
        self.row_builder = row_builder
        self.root = root
        self.max_new_tokens = max_new_tokens
        self.answer_tokens = answer_tokens or max_new_tokens
        self.timeout = timeout
        self.patience = patience
        self.corruption = corruption
        self.bounds_letters = bounds_letters
        self.max_images = IMAGES_PER_REQUEST * max_concurrent
        # `_request` retries instead, for a limited time: a restarting server needs minutes to load its model.
        # Without redirects, no other host receives the images. Uncompressed replies cannot grow when they are decoded.
        http = openai.DefaultAsyncHttpxClient(follow_redirects=False, event_hooks={"response": [bound_reply]})
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=timeout,
            max_retries=0,
            default_headers={"Accept-Encoding": "identity"},
            http_client=http,
        )
        self._slots = asyncio.Semaphore(max_concurrent)
        self._images: OrderedDict[View, asyncio.Task[EncodedImage]] = OrderedDict()
        self._last_reply = -math.inf
        self._extra: dict[str, Any] = {}

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def check(self) -> bool:
        """Send each model a request with two blank images: the smallest and the largest of the pixel budget.

        Returns whether all replies have token probabilities. If the server takes NO_REPETITION_PENALTY, later requests
        contain it; `transformers serve` (5.23) rejects unknown fields. Raises EchoError if the server is unreachable,
        lacks a model, or counts a different number of prompt tokens.
        """
        side = (
            math.isqrt(self.row_builder.image_processor.size["longest_edge"])
            + 2 * self.row_builder.image_processor.patch_size
        )
        images = [Image.new("RGB", size, "grey") for size in ((1, 1), (side, side))]
        encoded = [(self._data_url(image), image.size) for image in images]
        branch = Branch("check", DECIDE_INSTRUCTION)
        exchange = Exchange("decision_maker", "check", ("small", "large"), "", (branch,), PROMPT_VERSION)
        has_logprobs = True
        self._extra = NO_REPETITION_PENALTY
        for model in dict.fromkeys(self.models.values()):
            try:
                (reply,) = await self._complete(model, exchange, encoded, limit=1, logprobs=True)
            except EchoError as error:
                if isinstance(error, BackendError) or not self._extra:
                    raise
                self._extra = {}  # the server may have rejected the extra field, so try without it
                (reply,) = await self._complete(model, exchange, encoded, limit=1, logprobs=True)
            has_logprobs = has_logprobs and reply.has_logprobs
        return has_logprobs

    async def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """Generate the outputs of `role` for every branch of every exchange, in order.

        Without `bounds_letters`, `letters` contains only letters among the TOP_LOGPROBS most likely tokens. It is empty
        if the server returns no probabilities. Raises EchoError if an image is broken or the server rejects a prompt,
        and BackendError if the server itself fails.
        """
        decides = role == "decision_maker"
        limit = self.answer_tokens if decides else self.max_new_tokens

        async def complete(exchange: Exchange) -> list[Generation]:
            encoded = [await self._encode(view) for view in views(exchange, self.root, self.corruption)]
            replies = await self._complete(self.models[role], exchange, encoded, limit, logprobs=decides)
            return _generations(replies, self.bounds_letters)

        return await asyncio.gather(*(complete(exchange) for exchange in exchanges))

    async def answer_probe(self, model: str, probe: Exchange, limit: int) -> list[Generation]:
        """Return the answers to the probe of a server's model, or of the model of a role, in at most `limit` tokens."""
        encoded = [await self._encode(view) for view in views(probe, self.root)]
        return _generations(await self._complete(self.models.get(model, model), probe, encoded, limit, logprobs=True))

    async def _encode(self, view: View) -> EncodedImage:
        """Read and resize an image in a thread, once for all requests that use it."""

        def load() -> EncodedImage:
            image = view.load()
            return self._data_url(image), image.size

        if view not in self._images:
            self._images[view] = asyncio.create_task(asyncio.to_thread(load))
        self._images.move_to_end(view)
        task = self._images[view]
        while len(self._images) > self.max_images:
            self._images.popitem(last=False)
        try:
            return await task
        except BaseException:  # the image may be readable next time
            if self._images.get(view) is task:
                del self._images[view]
            raise

    def _data_url(self, image: Image.Image) -> str:
        """Resize an image with the processor, and return it as a PNG in a data URL."""
        self.row_builder.grid(*image.size)  # this raises EchoError for an image that is too elongated
        processor, merge = self.row_builder.image_processor, self.row_builder.merge
        inputs = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
        (_, rows, columns), patch = inputs["image_grid_thw"][0], processor.patch_size
        patches = inputs["pixel_values"].reshape(rows // merge, columns // merge, merge, merge, 3, -1, patch, patch)
        values = patches[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * patch, columns * patch, 3)
        buffer = io.BytesIO()
        Image.fromarray(values.astype(np.uint8)).save(buffer, "PNG", compress_level=1)
        return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

    async def _complete(
        self, model: str, exchange: Exchange, encoded: Sequence[EncodedImage], limit: int, logprobs: bool
    ) -> list[Completion]:
        """Return the server's chat completion of at most `limit` tokens for each branch."""
        row = self.row_builder.row(exchange, [size for _, size in encoded])
        shared, *own = np.bincount(row.segments, minlength=len(exchange.branches) + 1).tolist()
        lengths = [shared + length for length in own]
        images = [{"type": "image_url", "image_url": {"url": url}} for url, _ in encoded]
        # Without frequency_penalty 0, `transformers serve` applies the repetition penalty of generation_config.json.
        options: dict[str, Any] = {"max_tokens": limit, "temperature": 0, "frequency_penalty": 0}
        if logprobs:
            options |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}

        async def complete(branch: Branch, tokens: int) -> Completion:
            content = [*images, {"type": "text", "text": exchange.context + branch.prompt}]
            async with self._slots:
                messages = [{"role": "user", "content": content}]
                reply = await self._request(
                    {"model": model, "messages": messages, **options, "extra_body": self._extra}
                )
            counted = tokens if reply.prompt_tokens is None else reply.prompt_tokens
            if counted != tokens:
                raise BackendError(
                    f"{self.url} counts {counted} tokens for a prompt that has {tokens} tokens here, so its "
                    "tokenizer, chat template or pixel budget differs; start it with those of model_name_or_path "
                    f"and with {self._budget()}"
                )
            # `transformers serve` (5.23) keeps the control tokens of Qwen2-VL, which an engine drops.
            return replace(reply, text=self.row_builder.without_control_tokens(reply.text))

        return await asyncio.gather(*map(complete, exchange.branches, lengths))

    def _budget(self) -> str:
        size = self.row_builder.image_processor.size
        return f"min_pixels {size['shortest_edge']} and max_pixels {size['longest_edge']}"

    async def _request(self, request: Mapping[str, Any]) -> Completion:
        """Send a request, and retry it with increasing waits for up to `patience` seconds."""
        failing_since: float | None = None
        wait = FIRST_RETRY_WAIT
        while True:
            asked = 0  # seconds to wait by the server's Retry-After
            try:
                # httpx (0.28) limits each read, so a reply that arrives byte by byte would never time out.
                async with asyncio.timeout(self.timeout):
                    reply = await self._client.chat.completions.create(**request)
                completion = read_completion(reply)
                self._last_reply = time.monotonic()
                return completion
            except (openai.APITimeoutError, TimeoutError):
                reason = f"no answer within {self.timeout:g} s; raise --server_timeout or lower --batch_size"
            except openai.APIConnectionError as error:
                reason = f"no connection: {error.__cause__ or error}"
            except openai.APIStatusError as error:
                reason = f"{error.status_code}: {error.message[:300]}"
                if 300 <= error.status_code < 400:
                    target = error.response.headers.get("location", "another address")
                    raise BackendError(
                        f"{self.url} redirects to {target[:200]}, and no image is sent there; set --server to that "
                        "address if you trust it"
                    ) from error
                if error.status_code not in RETRY_STATUSES and error.status_code < 500:
                    error_class: type[EchoError] = EchoError if error.status_code in REJECTED_STATUSES else BackendError
                    raise error_class(
                        f"{self.url} rejects a request for the model {request['model']!r} ({reason}); check "
                        "--server, --server_model and the server's limits"
                    ) from error
                retry_after = error.response.headers.get("retry-after", "")
                if retry_after.isdecimal():
                    asked = min(int(retry_after[:9]), LONGEST_RETRY_AFTER)
            except (openai.APIError, AttributeError, IndexError, TypeError, ValueError, RecursionError) as error:
                known = f" ({error})" if isinstance(error, ReplyError) else ""
                reason = f"the reply is not a chat completion{known}; most server addresses end in /v1"
            now = time.monotonic()
            if failing_since is None:
                failing_since = now
                warnings.warn(f"{self.url}: {reason}; retrying for {self.patience:g} s", stacklevel=2)
            if now + asked + wait > failing_since + self.patience:
                # If the server has answered other requests in the meantime, only this one fails.
                error_class = EchoError if self._last_reply > failing_since else BackendError
                raise error_class(
                    f"{self.url} did not answer for {self.patience:g} s ({reason}); start the server and rerun the "
                    "same command to resume the run"
                )
            await asyncio.sleep(asked + wait * random.uniform(0.5, 1))
            wait = min(2 * wait, LONGEST_RETRY_WAIT)


def _generations(replies: Sequence[Completion], bounded: bool = False) -> list[Generation]:
    return [
        Generation(reply.text.strip(), reply.bounded_letters if bounded else reply.letters, reply.cut)
        for reply in replies
    ]


def call_in(loop: asyncio.AbstractEventLoop) -> Callable[[Coroutine[Any, Any, Reply]], Reply]:
    """Return a function that runs a coroutine in the event loop of another thread and waits for its result."""
    return lambda coroutine: asyncio.run_coroutine_threadsafe(coroutine, loop).result()


class ServerThread:
    """Runs a `Server` in the event loop of a separate thread, for callers that have no event loop."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._run, name="echo-ft server", daemon=True).start()
        self.call: Callable[[Coroutine[Any, Any, Any]], Any] = call_in(self._loop)
        """Runs a coroutine of the server and returns its result."""

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def generate(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        """Generate as `Server.generate` does."""
        return self.call(self.server.generate(role, exchanges))

    def close(self) -> None:
        """Close the connections and end the thread, without waiting for them. No call may follow."""

        async def end() -> None:
            try:
                await self.server.__aexit__()
            finally:
                self._loop.stop()

        asyncio.run_coroutine_threadsafe(end(), self._loop)
