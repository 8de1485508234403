"""The page of `python -m evaluation.inspect --serve`: drop an image, and follow what the experts say.

Gradio serves the page. By default, it accepts only connections from this machine. It sends nothing elsewhere and keeps
no upload.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from echo_ft.errors import EchoError
from echo_ft.html import jpeg_uri, render_page, thumbnail
from echo_ft.images.decode import image_size, load_image
from echo_ft.inference.inspector import Inspector, Progress, Result
from echo_ft.inputs import read_bytes
from echo_ft.processes import scratch_folder
from echo_ft.records import ROLES
from evaluation.case_images import IMAGE_SIDE

MAX_UPLOAD_BYTES = 64 * 2**20
"""Largest accepted size of an upload. `images.decode` limits the pixels of the image in it."""

FORM_BYTES = 2**20
"""Bytes that a request may have in addition to one upload."""

WAITING = 16
"""How many images may wait for their turn; the experts inspect one at a time."""

UPLOAD_SECONDS = 24 * 60 * 60
"""How long Gradio keeps an upload that is not inspected, for example because the browser was closed while it waited.

Gradio also removes uploads that still wait, so this leaves more than an hour for each of `WAITING` images. After an
inspection, the upload is removed at once.
"""

CLOSING_SECONDS = 5
"""How long the page waits for open connections after Ctrl-C or SIGTERM. An expert that is running still finishes its
answer."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")

CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'none'"
)
"""The browser loads nothing from other addresses. Gradio (6.31) writes its own scripts and styles into the page, and
compiles its templates there."""

NEAREST = "found by similarity"

INTRODUCTION = (
    "# Inspect an image\nThe four experts compare it with a normal image. It is removed after the inspection."
)


def require_gradio() -> None:
    """Raise EchoError if Gradio is not installed."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise EchoError(
            f"the page needs Gradio ({error}); install echo-ft[serving] in a separate environment, as "
            "docs/inspecting.md describes"
        ) from error


def serve(load: Callable[[], Inspector], host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM. Port 0 selects a free port. `load` loads the inspector.

    Raises EchoError if Gradio is missing or the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise EchoError(f"the page cannot use port {port} of {host} ({error}); choose another --port") from error
    with listening, scratch_folder("echo-ft-page-") as uploads:
        # Gradio reads both when it is imported.
        os.environ |= {"GRADIO_TEMP_DIR": str(uploads), "GRADIO_ANALYTICS_ENABLED": "False"}
        require_gradio()
        import uvicorn

        app = make_app(load(), host, uploads)
        shown = f"[{host}]" if ":" in host else host
        print(f"the page is at http://{shown}:{listening.getsockname()[1]}; Ctrl-C stops it", flush=True)
        settings = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=CLOSING_SECONDS)
        # uvicorn (0.54) logs a traceback for each connection that it ends.
        logging.getLogger("uvicorn.error").addFilter(
            lambda record: not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
        )
        uvicorn.Server(settings).run(sockets=[listening])


def refusal(headers: Mapping[str, str]) -> tuple[int, str] | None:
    """Return the HTTP status and the reason if a request with these headers is refused. Their names are lower-case.

    Other websites may make a browser send requests to this machine, and one request may have many uploads.
    """
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower():
        return 403, "requests from other websites are refused; open the page itself"
    if "transfer-encoding" in headers:
        return 411, "requests of unknown size are refused; send Content-Length"
    if int(headers.get("content-length", "0")) > MAX_UPLOAD_BYTES + FORM_BYTES:
        return 413, f"the request is larger than {MAX_UPLOAD_BYTES // 2**20} MiB; send one image per request"
    return None


def make_app(inspector: Inspector, host: str, uploads: Path) -> Any:
    """Return the page as a FastAPI application with its limits: hosts, origins, content policy and size of uploads."""
    import gradio
    from fastapi import FastAPI, Request
    from fastapi.responses import PlainTextResponse
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    if host in LOOPBACK:  # otherwise, another website whose host name resolves to this address could read the answers
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])

    @app.middleware("http")
    async def add_policy(request: Request, call_next: Any) -> Any:
        refused = refusal(request.headers)
        response = await call_next(request) if refused is None else PlainTextResponse(refused[1], refused[0])
        response.headers["Content-Security-Policy"] = CONTENT_POLICY
        return response

    separate_uploads()
    return gradio.mount_gradio_app(
        app,
        make_page(inspector, uploads),
        path="/",
        footer_links=[],
        run_history=False,  # Gradio would keep the results in the browser
        show_error=False,
        max_file_size=MAX_UPLOAD_BYTES,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )


def separate_uploads() -> None:
    """Give each upload its own path. Gradio (6.31) takes the folder's name from the content.

    If the same file is uploaded twice, the first inspection would remove the file of the second.
    """
    from gradio import route_utils

    class SeparateUpload(route_utils.GradioUploadFile):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.sha.update(secrets.token_bytes(16))

    route_utils.GradioUploadFile = SeparateUpload


def make_page(inspector: Inspector, uploads: Path) -> Any:
    """Return the page as Gradio's Blocks. Its only function, `inspect`, takes a file in `uploads` and a product."""
    import gradio

    def inspect(path: str | None, product: str | None) -> Iterator[tuple[Any, str]]:
        if path is not None:
            for shown in inspect_upload(inspector, Path(path), None if product == NEAREST else product):
                yield None, shown  # the field is cleared for the next image

    with gradio.Blocks(title="echo-ft", analytics_enabled=False, delete_cache=(60, UPLOAD_SECONDS)) as page:
        gradio.Markdown(INTRODUCTION)
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                product = gradio.Dropdown([NEAREST, *inspector.products.comparable], value=NEAREST, label="Product")
                upload = gradio.File(label="Image", file_types=["image"], height=180)
            with gradio.Column(scale=3):
                shown = gradio.HTML()
        # Gradio (6.31) would leave an empty file per request.
        upload.preprocess = lambda payload: None if payload is None else payload.path
        take = upload.async_move_resource_to_block_cache

        async def take_upload(path: Any) -> Any:
            """Gradio (6.31) would fetch the address that a request names, and read any file if it is mounted."""
            if not Path(path).resolve().is_relative_to(uploads.resolve()):
                raise gradio.Error("only uploads are inspected", print_exception=False)
            return await take(path)

        upload.async_move_resource_to_block_cache = take_upload
        upload.upload(inspect, [upload, product], [upload, shown], api_name="inspect", concurrency_limit=1)
    page.queue(max_size=WAITING)
    return page


def inspect_upload(inspector: Inspector, path: Path, product: str | None) -> Iterator[str]:
    """Inspect an uploaded image and remove it. Yield HTML with what is known about it, even while experts work."""
    values: dict[str, Any] = {"query": None, "size": None}
    reference: str | None = None
    try:
        read_bytes(path, MAX_UPLOAD_BYTES)
        for step in inspector.steps(path, product):
            if values["query"] is None:
                values |= {"query": _embedded(path), "size": image_size(path)}
            if step.reference is not None and step.reference != reference:
                reference = step.reference
                values |= {"reference": _embedded(Path(reference))}
            yield show(step, values)
    except (EchoError, OSError, ValueError) as error:
        yield show(None, values, str(error).replace(str(path), path.name))
    finally:
        with suppress(OSError):
            path.unlink()


def show(step: Progress | Result | None, images: dict[str, Any], problem: str | None = None) -> str:
    """Return HTML with what is known about an image so far.

    `images` has the addresses `query` and `reference`, and `size`.
    """
    traces = () if step is None else step.trace
    asked = {} if step is None else _questions(step)
    return render_page(
        Path(__file__).parent / "inspection.html.jinja",
        problem=problem,
        product=None if step is None else step.product,
        result=step if isinstance(step, Result) else None,
        working=step.role if isinstance(step, Progress) else None,
        roles=ROLES,
        traces={role: [one for one in traces if one.role == role] for role in ROLES},
        questions=asked,
        reference_name="" if step is None or step.reference is None else Path(step.reference).name,
        **{"reference": None, **images},
    )


def _questions(step: Progress | Result) -> dict[str, str]:
    """Return the text of each question by its id."""
    if isinstance(step, Progress):
        return {one.id: one.text for one in step.questions}
    return {one.question: one.question_text for one in step.answers}


def _embedded(path: Path) -> str:
    return jpeg_uri(thumbnail(load_image(path, min_size=(IMAGE_SIDE, IMAGE_SIDE)), IMAGE_SIDE))
