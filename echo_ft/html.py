"""HTML pages with a common look: template rendering, a policy against foreign content, and embedded JPEGs.

Every page extends `base.html.jinja` in this folder. Pages need no network, because they contain their styles, scripts
and data.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from PIL import Image

_HERE = Path(__file__).resolve().parent


def render_page(template: Path, filters: Mapping[str, Callable[..., str]] | None = None, /, **values: Any) -> str:
    """Render a Jinja template with `values` and optional `filters`. Values are escaped.

    Templates find `base.html.jinja`, and the styles and scripts that they include, in their own folder or in this one.
    Raises jinja2.UndefinedError if the template uses a value that is missing from `values`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )

    def source(name: str) -> str:
        folder = next(one for one in (template.parent, _HERE) if (one / name).is_file())
        return Markup((folder / name).read_text(encoding="utf-8"))

    environment.globals["source"] = source
    environment.globals["content_policy"] = lambda script: _content_policy(source(script) if script else "")
    environment.filters.update(filters or {})
    return environment.get_template(template.name).render(**values)


def _content_policy(script: str) -> str:
    """Return the Content-Security-Policy of a page that runs only `script`, given as text without the tags.

    Images may be embedded or be in a folder next to the page. All other outside content is blocked. Even unescaped text
    on a page could not run, because the policy allows scripts only by their hash.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"'sha256-{digest}'" if script else "'none'"
    return (
        f"default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )


def jpeg_bytes(image: Image.Image, quality: int = 80) -> bytes:
    """Encode an image as a JPEG with this quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def jpeg_uri(image: Image.Image, quality: int = 80) -> str:
    """Encode an image as the data URI of a JPEG with this quality."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg_bytes(image, quality)).decode()


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Return a copy scaled down to at most `side` pixels on its longer side. Smaller images keep their size."""
    small = image.copy()
    small.thumbnail((side, side))
    return small
