from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from echo_ft.inference.server import Server
from echo_ft.model.rows import RowBuilder

Answer = Callable[[dict[str, Any]], Any]
"""What a request gets: (status, body, headers), the last of them or both left out; None cuts the connection."""


LETTERS = {"A": -3.0, "B": -0.5, "C": -4.0, "D": -5.0, " A": -0.1, "Yes": -2.0}


def text_of(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"][-1]["text"]


def completion(body: dict[str, Any], logprobs: bool = True) -> dict[str, Any]:
    """A reply that depends on the prompt alone, as a greedy model's does."""
    text = text_of(body)
    said = "2" if "with its number" in text else "B" if "letter of the correct" in text else f"{len(text)} characters"
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
    if logprobs and body.get("logprobs"):
        top = [{"token": token, "logprob": value, "bytes": None} for token, value in LETTERS.items()]
        choice["logprobs"] = {"content": [{"token": "B", "logprob": -0.5, "bytes": None, "top_logprobs": top}]}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": body["model"], "choices": [choice]}


class FakeServer:
    """A chat server on the loopback that answers by a function, and keeps what it was asked."""

    def __init__(self, answer: Answer = completion, port: int = 0) -> None:
        self.answer = answer
        self.asked: list[dict[str, Any]] = []
        self.under_way = self.most_under_way = 0
        lock, fake = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    fake.asked.append(body)
                    fake.under_way += 1
                    fake.most_under_way = max(fake.most_under_way, fake.under_way)
                try:
                    found = fake.answer(body)
                finally:
                    with lock:
                        fake.under_way -= 1
                if found is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, reply, *more = found if isinstance(found, tuple) else (200, found)
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                for name, value in (more[0] if more else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Clients that gave up waiting are part of these tests."""

        self.http = Quiet(("127.0.0.1", port), Handler)
        self.port = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


def ask_server(
    fake: FakeServer, row_builder: RowBuilder, root: Path, exchanges, role: str = "decision_maker", **options: Any
):
    async def asked():
        async with Server(fake.url, "echo-{role}", row_builder, root, 12, **options) as server:
            return await server.generate(role, exchanges)

    return asyncio.run(asked())


def shown_images(body: dict[str, Any]) -> list[Image.Image]:
    urls = [part["image_url"]["url"] for part in body["messages"][0]["content"][:-1]]
    return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) for url in urls]
