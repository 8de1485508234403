"""Self-contained HTML pages: template rendering and images embedded as small JPEGs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image


def render_page(template: Path, filters: Mapping[str, Callable[..., str]] | None = None, /, **values: Any) -> str:
    """Render a Jinja template with `values` and optional `filters`. Values are escaped.

    Raises jinja2.UndefinedError if the template uses a value that is missing from `values`.
    """
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
    """Encode an image as the data URI of a JPEG with this quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Return a copy scaled down to at most `side` pixels on its longer side. Smaller images keep their size."""
    small = image.copy()
    small.thumbnail((side, side))
    return small
