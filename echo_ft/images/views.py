"""Images as a role sees them: clean references and a clean or corrupted query."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from echo_ft.images.corruptions import Corruption, corrupt
from echo_ft.images.decode import load_image
from echo_ft.records import Exchange


@dataclass(frozen=True)
class View:
    """An image as a role sees it, clean or corrupted."""

    root: Path
    image: str
    corruption: Corruption | None = None

    @property
    def path(self) -> Path:
        """The path of the image file."""
        return self.root / self.image

    def load(self) -> Image.Image:
        """Decode the image in RGB and corrupt it if required. Raises EchoError if the file is missing or unusable."""
        image, corruption = load_image(self.path), self.corruption
        if corruption is None:
            return image
        return corrupt(image, corruption.kind, corruption.severity, f"{corruption.seed}/{self.image}")


def views(exchange: Exchange, root: Path, corruption: Corruption | None = None) -> list[View]:
    """Return the images of an exchange as its role sees them. Only the query, which is the last image, is corrupted."""
    references, query = exchange.images[:-1], exchange.images[-1:]
    return [*(View(root, image) for image in references), *(View(root, image, corruption) for image in query)]
