"""Self-contained HTML pages: the template environment, and images as small JPEGs inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def render_page(template: Path, filters: Mapping[str, Callable[..., str]] | None = None, /, **values: Any) -> str:
    """The text of a page from a jinja template; a value that the template names and `values` lacks is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(filters or {})
    return environment.get_template(template.name).render(**values)


def jpeg_uri(image: Image.Image, quality: int = 80) -> str:
    """An image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """The image scaled so that its longer side has `side` pixels, but never enlarged."""
    small = image.copy()
    small.thumbnail((side, side))
    return small
