"""Use the page of `evaluation.inspect --serve` with Gradio's own client, and misuse it with handmade requests.

`PYTHON -m tests.support.page_client ADDRESS IMAGE LARGE` prints one line of JSON. PYTHON is the interpreter of an
environment with echo-ft and Gradio. IMAGE is inspected; LARGE is a file that is too large.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import httpx
from gradio_client import Client, handle_file


def inspected(client: Client, image: str) -> list[str]:
    """Upload a file, and return the HTML after each step."""
    job = client.submit(handle_file(image), "washer", api_name="/inspect")
    job.result(timeout=300)
    return [shown for _, shown in job.outputs()]


def asked(address: str, path: str) -> str:
    """Request a path on the server, which Gradio's client would upload first, and return the events in the reply."""
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}}, "washer"]
    started = httpx.post(f"{address}/gradio_api/call/inspect", json={"data": data})
    return httpx.get(f"{address}/gradio_api/call/inspect/{started.json()['event_id']}", timeout=60).text


def uploaded(address: str, image: str) -> str:
    """Upload a file, and return its path on the server."""
    with open(image, "rb") as file:
        return str(httpx.post(f"{address}/gradio_api/upload", files={"files": file}).json()[0])


def main(address: str, image: str, large: str) -> dict[str, Any]:
    """How the page answers an upload, misuse, and requests for other hosts and files."""
    client = Client(address, verbose=False)
    page = httpx.get(address)
    with open(large, "rb") as file:
        upload = httpx.post(f"{address}/gradio_api/upload", files={"files": file}, timeout=120)
    with open(image, "rb") as file:
        foreign = httpx.post(
            f"{address}/gradio_api/upload", files={"files": file}, headers={"Origin": "http://evil.example"}
        )
    waiting = [uploaded(address, image) for _ in range(2)]
    return {
        "steps": inspected(client, image),
        "again": inspected(client, image)[-1:],
        "same": [asked(address, path) for path in waiting],
        "other_website": foreign.status_code,
        "broken": inspected(client, __file__),
        "server_file": asked(address, str(Path(image).resolve())),
        "address": asked(address, "https://example.org/part.png"),
        "large": upload.status_code,
        "policy": page.headers.get("content-security-policy", ""),
        "other_host": httpx.get(address, headers={"Host": "evil.example"}).status_code,
        "file": httpx.get(f"{address}/gradio_api/file={Path(image).resolve()}").status_code,
    }


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
