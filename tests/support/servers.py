"""A fake OpenAI-compatible server, and helpers to send requests to it and to read them."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from echo_ft.experts.roles import PROMPT_VERSION
from echo_ft.inference.engine import Engine
from echo_ft.inference.server import Server
from echo_ft.model.rows import RowBuilder
from echo_ft.records import ROLES, Branch, Exchange

Answer = Callable[[dict[str, Any]], Any]
"""Maps a request to a reply: a body, (status, body) or (status, body, headers). None closes the connection.

An iterator sends its chunks without a length.
"""

LETTERS = {"A": -3.0, "B": -0.5, "C": -4.0, "D": -5.0, " A": -0.1, "Yes": -2.0}
"""Log-probabilities of the most likely tokens in every reply."""


def text_of(body: dict[str, Any]) -> str:
    """Return the prompt text of a request."""
    return body["messages"][0]["content"][-1]["text"]


def completion(body: dict[str, Any], logprobs: bool = True) -> dict[str, Any]:
    """Reply with text that depends only on the prompt, like that of a greedy model."""
    prompt = text_of(body)
    text = (
        "2"
        if "with its number" in prompt
        else "B"
        if "letter of the correct" in prompt
        else f"{len(prompt)} characters"
    )
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if logprobs and body.get("logprobs"):
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in LETTERS.items()]
        choice["logprobs"] = {"content": [{"token": "B", "logprob": -0.5, "bytes": None, "top_logprobs": top}]}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}


class FakeServer:
    """A chat server on the loopback interface that replies with a function and records the requests."""

    def __init__(self, answer: Answer = completion, port: int = 0) -> None:
        self.answer = answer
        self.requests: list[dict[str, Any]] = []
        self.in_flight = self.max_in_flight = 0
        lock, fake = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.requests.append(body)
                    fake.in_flight += 1
                    fake.max_in_flight = max(fake.max_in_flight, fake.in_flight)
                try:
                    answer = fake.answer(body)
                finally:
                    with lock:
                        fake.in_flight -= 1
                if answer is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, reply, *headers = answer if isinstance(answer, tuple) else (200, answer)
                if isinstance(reply, Iterator):
                    self.send_response(status)
                    self.end_headers()
                    for chunk in reply:
                        self.wfile.write(chunk)
                    return
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Ignore clients that timed out, which these tests provoke."""

        self.http = Quiet(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def model_answers(model: Any, row_builder: RowBuilder, folder: Path, served: Callable[[str], str]) -> Answer:
    """Answer requests with a model that has adapters named after the roles, and count the tokens of the prompt.

    `served` maps the model name in a request to the adapter that answers; the base model answers to any other name.
    `folder` holds the images of the requests.
    """
    lock, engine = threading.Lock(), Engine(model, row_builder, folder)

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        with lock:
            names = []
            for image in shown_images(body):
                names.append(f"{hash(image.tobytes())}.png")
                image.save(folder / names[-1])
            exchange = Exchange("", "request", tuple(names), "", (Branch("", text_of(body)),), PROMPT_VERSION)
            engine.max_new_tokens = engine.answer_tokens = body["max_tokens"]
            role = served(body["model"])
            with nullcontext() if role in ROLES else model.disable_adapter():
                ((said,),) = engine.generate(role if role in ROLES else ROLES[0], [exchange])
            sizes = [image.size for image in shown_images(body)]
            tokens = len(row_builder.row(exchange, sizes).input_ids)
        top = [{"token": letter, "logprob": value, "bytes": None} for letter, value in said.letters.items()]
        return {
            **completion(body),
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": said.text},
                    "finish_reason": "length" if said.cut else "stop",
                    "logprobs": {"content": [{"token": "A", "logprob": 0.0, "bytes": None, "top_logprobs": top}]},
                }
            ],
            "usage": {"prompt_tokens": tokens, "completion_tokens": 1, "total_tokens": tokens + 1},
        }

    return answer


def ask_server(
    fake: FakeServer, row_builder: RowBuilder, root: Path, exchanges, role: str = "decision_maker", **options: Any
):
    """Generate for the exchanges with a `Server` client of the fake server."""

    async def generate():
        async with Server(fake.url, "echo-{role}", row_builder, root, 12, **options) as server:
            return await server.generate(role, exchanges)

    return asyncio.run(generate())


def shown_images(body: dict[str, Any]) -> list[Image.Image]:
    """Decode the images of a request."""
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"][:-1]]
    return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls]
