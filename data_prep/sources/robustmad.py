"""RobustMAD (TMLR 2026, arXiv 2607.16243): questions about images of MVTec AD and VisA, which it does not include.

`annotations` is `RobustMAD_MCQ.json` or `RobustMAD_MCQ_low.json`. The root holds the user's own copies of both
datasets, or links to them, as `MVTec-AD` and `VisA`. VisA may have its published layout
(`<product>/Data/Images/Normal/<name>.JPG`) or MVTec AD's (`<product>/test/good/<name>.JPG`), which VisA's own script
produces. RobustMAD's `utils/generate_LoQ_images.py` writes the degraded images next to the clean ones.

The images of the questions form the test split. The reference that RobustMAD gives is used unchanged. The training
images of the same products form the train split. Other images are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_prep.faults import list_images
from data_prep.sources import Items, SourceConfig
from echo_ft.errors import EchoError
from echo_ft.metrics.answer_files.robustmad import AskedImage, load_robustmad
from echo_ft.records import GOOD, Inspection, Rejection

PUBLISHED_FOLDERS = {GOOD: "Data/Images/Normal", "bad": "Data/Images/Anomaly"}
"""Folder of each condition in VisA's published layout."""


def read(config: SourceConfig) -> Items:
    """Yield the queries with their questions and reference, then the normal images of their products.

    Raises EchoError if the question file cannot be read or if none of its images is found.
    """
    if config.annotations is None:
        raise EchoError("the source robustmad needs its questions; set annotations to RobustMAD_MCQ.json")
    asked, rejections = load_robustmad(config.annotations)
    places = {image.id: _locate(config.root, image.image) for image in asked}
    if not any(places.values()):
        raise _no_image_found(asked, config)
    yield from rejections
    for image in asked:
        place = places[image.id]
        if place is None:
            yield Rejection(image.image, _missing(image))
            continue
        yield from _asked(image, place, config.root)
    # The clean photo of a degraded query is no training image either.
    used = {place for one in asked for place in (places[one.id], _locate(config.root, one.id)) if place}
    for dataset, product in dict.fromkeys((image.dataset, image.product) for image in asked):
        yield from _normals(config.root, dataset, product, used)


def _asked(image: AskedImage, place: str, root: Path) -> Items:
    reference = _locate(root, image.reference) if image.reference else None
    if image.reference and reference is None:
        reason = f"the reference that RobustMAD gives for {image.image} is missing; one is retrieved instead"
        yield Rejection(image.reference, reason, "reference")
    yield Inspection(
        id=image.id,
        image=place,
        dataset=image.dataset,
        product=image.product,
        condition=image.condition,
        group=image.id,
        split="test",
        mask=next((mask for mask in _mask_names(image) if (root / mask).is_file()), None),
        reference=reference,
    )
    yield from image.questions


def _locate(root: Path, name: str) -> str | None:
    """Return the path of an image in the layout that is on disk, or None if it exists in neither layout."""
    return next((place for place in (name, *_published(name)) if (root / place).is_file()), None)


def _published(name: str) -> Iterator[str]:
    """Yield the path of an image in VisA's published layout, if the image is from VisA."""
    parts = PurePosixPath(name).parts
    if len(parts) > 4 and parts[0] == "VisA" and parts[3] in PUBLISHED_FOLDERS:
        yield "/".join((*parts[:2], PUBLISHED_FOLDERS[parts[3]], *parts[4:]))


def _mask_names(image: AskedImage) -> Iterator[str]:
    """Yield paths where the mask of a defect may be. Blur and low light do not move the defect."""
    if image.condition == GOOD:
        return
    stem = PurePosixPath(image.id).stem
    folder = f"{image.dataset}/{image.product}/ground_truth/{image.condition}"
    yield from (f"{folder}/{stem}_mask.png", f"{folder}/{stem}.png")
    yield f"{image.dataset}/{image.product}/Data/Masks/Anomaly/{stem}.png"


def _normals(root: Path, dataset: str, product: str, used: set[str]) -> Items:
    """Yield the normal images of a product that no question is about.

    VisA's published layout has no folder of training images, so all its other normal images count as training images.
    """
    folder = root / dataset / product / "train" / GOOD
    if not folder.is_dir():
        folder = root / dataset / product / PUBLISHED_FOLDERS[GOOD]
    names = [path.relative_to(root).as_posix() for path in list_images(folder)]
    for image in (name for name in names if name not in used):
        yield Inspection(
            id=image, image=image, dataset=dataset, product=product, condition=GOOD, group=image, split="train"
        )
    if not names:
        yield Rejection(folder.relative_to(root).as_posix(), "the folder contains no normal image of this product")


def _missing(image: AskedImage) -> str:
    if image.degradation:
        return "the degraded image does not exist; write it with RobustMAD's utils/generate_LoQ_images.py"
    return "the image does not exist under the root"


def _no_image_found(asked: list[AskedImage], config: SourceConfig) -> EchoError:
    if not asked:
        return EchoError(f"{config.annotations} has no usable image; download RobustMAD_MCQ.json again")
    names = ", ".join(sorted({image.dataset for image in asked}))
    remedy = _missing(asked[0]) if asked[0].degradation else "RobustMAD contains none: get MVTec AD and VisA"
    return EchoError(
        f"none of the {len(asked)} images that {config.annotations} lists is in {config.root.resolve()} (such as "
        f"{asked[0].image}); {remedy}, and set --root to the folder that holds {names}"
    )
