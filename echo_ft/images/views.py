from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from echo_ft.images.corruptions import Corruption, corrupt
from echo_ft.images.decode import load_image
from echo_ft.records import Exchange


@dataclass(frozen=True)
class View:
    """An image as a role is shown it: as its file has it, or degraded."""

    root: Path
    image: str
    corruption: Corruption | None = None

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.root / self.image

    def load(self) -> Image.Image:
        """The decoded image in RGB. Raises EchoError where the file is missing or cannot be used."""
        image, how = load_image(self.path), self.corruption
        return image if how is None else corrupt(image, how.kind, how.severity, f"{how.seed}/{self.image}")


def views(exchange: Exchange, root: Path, corruption: Corruption | None = None) -> list[View]:
    """The images of an exchange as its role is shown them: the last one, the query, degraded, its references not."""
    references, query = exchange.images[:-1], exchange.images[-1:]
    return [*(View(root, image) for image in references), *(View(root, image, corruption) for image in query)]
