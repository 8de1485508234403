"""Every source fulfils its contract on files drawn in the exact layout of its dataset."""

from __future__ import annotations

import json
import pkgutil
import shutil
from collections import Counter
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data_prep import sources
from data_prep.build import build, main
from data_prep.config import BuildConfig
from data_prep.faults import IMAGE_SUFFIXES
from data_prep.sources import ItemPlace, SourceConfig, real_iad, synthetic, visa
from echo_ft.config import parse
from echo_ft.data.splits import HELD_OUT_FIELDS
from echo_ft.errors import EchoError
from echo_ft.images import masks
from echo_ft.records import GOOD, Inspection
from tests.conftest import ROOT
from tests.support import folder_layouts
from tests.support.collected import collect
from tests.support.folder_layouts import (
    LAYOUTS,
    SIZE,
    DatasetLayout,
    draw,
    draw_mask,
    split_items,
    write_csv,
    write_json,
)

MANIFEST_SOURCES = ("manifest", "manifest-coco", "mmad")
"""Sources that read a manifest, so that the folders around the images may contain anything."""


@pytest.fixture(params=sorted(LAYOUTS))
def name(request) -> str:
    return request.param


@pytest.fixture
def layout(name, tmp_path) -> DatasetLayout:
    return LAYOUTS[name](tmp_path)


def read(name: str, config: SourceConfig):
    return split_items(import_module(f"data_prep.sources.{name.split('-')[0]}").read(config))


def marks(inspection: Inspection, root: Path) -> np.ndarray:
    found = masks.load_mask(inspection, root, SIZE)
    assert found is not None
    return found


SQUARE = np.zeros((SIZE[1], SIZE[0]), bool)
SQUARE[6:10, 4:12] = True
"""The region that `draw_mask` marks by default."""


OWN_TESTS = {"synthetic", "robustmad"}
"""Sources without a layout here: drawn parts have no folder, and test_robustmad.py draws its own."""


def test_every_source_has_a_drawn_layout():
    names = {module.name for module in pkgutil.iter_modules(sources.__path__) if not module.name.startswith("_")}
    assert names == {name.split("-")[0] for name in LAYOUTS} | OWN_TESTS


def test_source_finds_every_image_with_condition_split_mask_and_group(name, layout):
    inspections, _, rejections = read(name, layout.config)
    assert rejections == []
    assert {i.image: (i.condition, i.split) for i in inspections} == layout.images
    assert {i.image for i in inspections if masks.is_marked(i)} == set(layout.masked)
    assert len({i.group for i in inspections}) == (layout.groups or len(inspections))
    assert all(i.product and i.dataset for i in inspections)


def test_ids_are_unique_and_independent_of_the_location(name, layout, tmp_path_factory):
    inspections, questions, _ = read(name, layout.config)
    assert len({i.id for i in inspections}) == len(inspections)
    moved = tmp_path_factory.mktemp("moved") / "layout"
    base = layout.config.root.parent if name == "real_iad" else layout.config.root
    shutil.copytree(base, moved)
    root = moved / layout.config.root.relative_to(base)
    annotations = layout.config.annotations and moved / layout.config.annotations.relative_to(base)
    again, asked, _ = read(name, SourceConfig(root, annotations))
    changed = {"folder": "dataset", "manifest-labelme": "dataset"}.get(name)  # the dataset is named after the root
    strip = [{**vars(i), **({"dataset": "", "product": ""} if changed else {})} for i in inspections]
    assert strip == [{**vars(i), **({"dataset": "", "product": ""} if changed else {})} for i in again]
    assert asked == questions


def test_paths_are_under_the_root_and_masks_fit_their_images(name, layout):
    root = layout.config.root
    inspections, questions, rejections = read(name, layout.config)
    for inspection in inspections:
        files = masks.mask_files(inspection)
        for path in filter(None, (inspection.image, *files, inspection.reference)):
            assert not Path(path).is_absolute()
            assert ".." not in Path(path).parts
            assert "\\" not in path
            assert (root / path).is_file()
        for name in files:
            with Image.open(root / name) as mask, Image.open(root / inspection.image) as image:
                assert mask.size == image.size
        if masks.is_marked(inspection):
            assert marks(inspection, root).any() == (inspection.condition != GOOD)
    kept, _, rejected = collect([*inspections, *questions, *rejections], root)
    assert kept == inspections
    assert rejected == []


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Return modification time and content of every file and folder in `folder`."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def test_build_does_not_change_the_source(name, layout, tmp_path, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "dataset"
    before = contents(tmp_path)
    given = BuildConfig(
        source=name.split("-")[0],
        root=layout.config.root,
        annotations=layout.config.annotations,
        output=output,
        descriptor="skimage",
        split="seeded",
        fractions=[1.0, 0.0, 0.0],
    )
    manifest = build(given)
    assert manifest["rejected"] == 0
    assert sum(manifest["counts"]["photographs"].values()) == len(layout.images)
    assert contents(tmp_path) == before


def test_every_unused_file_is_reported(name, layout):
    """An unreadable image and a file of unknown type, added to every folder, are each named in a rejection."""
    root = layout.config.root
    before, *_ = read(name, layout.config)
    if name in MANIFEST_SOURCES:
        folders = {(root / i.image).parent for i in before} if name == "mmad" else set()
    else:
        folders = {path for path in root.rglob("*") if path.is_dir()} | {root}
    extra_files = [folder / f"alien-{n}{end}" for n, folder in enumerate(sorted(folders)) for end in (".heic", ".tiff")]
    for path in extra_files:
        path.write_bytes(b"content")
    inspections, _, rejections = read(name, layout.config)
    _, _, broken = collect(inspections, root)
    named = {rejection.item: rejection.reason for rejection in [*rejections, *broken]}
    images = {i.image for i in inspections}
    for path in extra_files:
        item = path.relative_to(root).as_posix()
        if item in images:
            continue  # it is next to images and read as one; the build reports that it is broken
        reported = item in named or any(item in reason for reason in named.values())
        places = [place for place in named if Path(item).is_relative_to(place)]
        assert reported or any("ignored" in named[place] for place in places), item
    masked = {i.image for i in inspections if {root / mask for mask in masks.mask_files(i)} & set(extra_files)}
    assert {r.item for r in broken} == images - {i.image for i in before} | masked
    assert {i.image for i in before} <= images


def test_missing_images_and_masks_are_reported(name, layout):
    root = layout.config.root
    inspections, *_ = read(name, layout.config)
    first, *others = inspections
    (root / first.image).unlink()
    masked = next((i for i in others if i.mask), None)
    if masked:
        (root / str(masked.mask)).unlink()
    after, _, rejections = read(name, layout.config)
    report = "\n".join(f"{rejection.item}: {rejection.reason}" for rejection in rejections)
    if name in (*MANIFEST_SOURCES, "visa", "real_iad", "manifest-labelme"):
        assert first.image in report
    assert first.image not in {i.image for i in after}
    if masked:
        assert str(masked.mask) in report or f"the mask of {masked.image} is missing" in report
        assert {i.mask for i in after if i.image == masked.image} <= {None}


def test_synthetic_keeps_the_contract(tmp_path):
    config = SourceConfig(tmp_path, parts=synthetic.MIN_PARTS)
    inspections, questions, rejections = split_items(synthetic.read(config))
    assert len({i.id for i in inspections}) == len(inspections)
    assert collect([*inspections, *questions, *rejections], tmp_path) == (inspections, [], [])
    used = {path for i in inspections for path in (i.image, i.mask) if path}
    assert {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.suffix in IMAGE_SUFFIXES
    } == used


@pytest.mark.parametrize("name", ["manifest", "manifest-coco", "real_iad", "visa"])
def test_broken_image_is_reported_with_its_place_in_the_manifest(name, layout):
    root = layout.config.root
    module = import_module(f"data_prep.sources.{name.split('-')[0]}")
    broken = next(i for i in read(name, layout.config)[0] if i.condition != GOOD)
    places = [item for item in module.read(layout.config) if isinstance(item, ItemPlace)]
    place = next(item.place for item in places if item.inspection == broken.id)
    whole = (root / broken.image).read_bytes()
    (root / broken.image).write_bytes(whole[: len(whole) * 2 // 3])
    _, _, (rejection,) = collect(module.read(layout.config), root)
    report = f"{rejection.item}: {rejection.reason}"
    assert broken.image in report
    assert place in report
    assert place.split(":")[0].endswith((".csv", ".json"))


def test_every_source_has_a_valid_recipe():
    recipes = sorted((ROOT / "recipes").glob("*/data.yaml")) + sorted((ROOT / "recipes" / "data").glob("*.yaml"))
    configs = {path: parse([BuildConfig], ["--config", str(path)])[0] for path in recipes}
    assert {config.source for config in configs.values()} == {*(name.split("-")[0] for name in LAYOUTS)} | OWN_TESTS
    for path, config in configs.items():
        assert path.relative_to(ROOT).as_posix() in path.read_text(), "a recipe contains its command"
        assert not config.held_out or config.split in HELD_OUT_FIELDS


RECIPES = sorted((ROOT / "recipes" / "data").glob("*.yaml"))


def test_recipe_commands_set_every_path_of_the_recipe():
    for path in RECIPES:
        comment = path.read_text().split("source:")[0]
        for key in {"root", "annotations", "knowledge"} & yaml.safe_load(path.read_text()).keys():
            assert f"--{key} F" in comment, f"{path.name}: {key}"


def test_command_in_mmads_recipe_builds_the_downloaded_folder(tmp_path, monkeypatch):
    folder = folder_layouts.mmad(tmp_path / "MMAD").config.root
    write_json(folder / "domain_knowledge.json", {"VisA": {"candle": {"good": "Even wax."}}})
    comment = (ROOT / "recipes/data/mmad.yaml").read_text().split("source:")[0].replace("\\\n#", "")
    command = comment.split("python -m data_prep.build ")[1].split("  (")[0].replace("FOLDER", str(folder))
    monkeypatch.chdir(ROOT)
    folders = ["--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "out")]
    main([*command.split(), "--descriptor", "skimage", *folders])
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rejected"] == 0
    assert "VisA/candle" not in manifest["products_without_knowledge"]


def test_recipes_build_datasets_with_the_routing_of_their_runs():
    for run in (ROOT / "recipes").glob("*/run.yaml"):
        own = run.with_name("data.yaml")
        for data in [own] if own.is_file() else RECIPES:
            (config,) = parse([BuildConfig], ["--config", str(data)])
            assert config.routing == yaml.safe_load(run.read_text())["routing"], (run, data)


# folder layouts


def test_several_masks_of_an_image_count_as_one(tmp_path):
    layout = folder_layouts.mvtec_loco(tmp_path)
    root = layout.config.root
    by_image = {i.image: i for i in read("mvtec_loco", layout.config)[0]}
    three = by_image["breakfast_box/test/structural_anomalies/000.png"]
    wanted = np.zeros_like(SQUARE)
    for index in range(3):
        wanted[6:10, 4 + 8 * index : 8 + 8 * index] = True
    assert np.array_equal(marks(three, root), wanted)
    folder = "breakfast_box/ground_truth/structural_anomalies/000"
    assert three.mask is None
    assert three.masks == tuple(f"{folder}/{index:03d}.png" for index in range(3))
    one = by_image["breakfast_box/test/logical_anomalies/001.png"]
    assert one.mask == "breakfast_box/ground_truth/logical_anomalies/001/000.png"
    assert not one.masks


def test_every_mask_counts_for_the_dataset_fingerprint(tmp_path):
    layout = folder_layouts.mvtec_loco(tmp_path / "raw")
    given = BuildConfig(
        source="mvtec_loco", root=layout.config.root, output=tmp_path / "out", descriptor="skimage", split="seeded"
    )
    first = build(given)
    draw_mask(layout.config.root / "breakfast_box/ground_truth/structural_anomalies/000/002.png", (20, 6, 25, 10))
    assert build(given)["images_fingerprint"] != first["images_fingerprint"]


@pytest.mark.parametrize(
    ("change", "message", "kept_image"),
    [
        (lambda path: draw(path, 255, (20, 20)), "20 x 20 pixels but its image has 32 x 24", False),
        (lambda path: path.write_bytes(b"content"), "broken", False),
        (lambda path: [draw(file, 0) for file in path.parent.iterdir()], "marks nothing", True),
    ],
)
def test_unusable_masks_are_reported_and_only_empty_ones_keep_the_image(tmp_path, change, message, kept_image):
    layout = folder_layouts.mvtec_loco(tmp_path)
    change(layout.config.root / "breakfast_box/ground_truth/logical_anomalies/000/001.png")
    kept, _, (rejection,) = collect(read("mvtec_loco", layout.config)[0], layout.config.root)
    assert rejection.item == "breakfast_box/test/logical_anomalies/000.png"
    assert message in rejection.reason
    assert "logical_anomalies/000/001.png" in rejection.reason
    assert ("used without it" in rejection.reason) == kept_image
    assert [masks.is_marked(i) for i in kept if i.image == rejection.item] == [False] * kept_image


def test_mask_without_an_image_is_reported(tmp_path):
    layout = folder_layouts.mvtec_ad(tmp_path)
    truth = layout.config.root / "bottle" / "ground_truth"
    draw_mask(truth / "contamination" / "007_mask.png")
    draw_mask(truth / "crack" / "000_mask.png")
    rejections = {r.item: r.reason for r in read("mvtec_ad", layout.config)[2]}
    assert set(rejections) == {"bottle/ground_truth/contamination/007_mask.png", "bottle/ground_truth/crack"}
    assert all("no image has this name" in reason for reason in rejections.values())


@pytest.mark.parametrize("source", ["mvtec_ad", "mvtec_loco", "goods_ad", "btad", "mpdd"])
def test_folder_without_a_product_is_an_error(tmp_path, source):
    draw(tmp_path / "photo.png")
    with pytest.raises(EchoError, match=r"no folder <product>/train"):
        read(source, SourceConfig(tmp_path))


# visa


def test_visa_uses_the_split_file_named_by_annotations(tmp_path):
    layout = folder_layouts.visa(tmp_path)
    root = layout.config.root
    inspections, _, rejections = read("visa", SourceConfig(root, root / "split_csv" / "2cls_fewshot.csv"))
    assert {i.product for i in inspections} == {"candle"}
    assert [r.item for r in rejections] == ["pcb1"]
    assert "lists nothing in it" in rejections[0].reason


def test_visa_without_defect_names_leaves_defects_unnamed(tmp_path):
    layout = folder_layouts.visa(tmp_path)
    (layout.config.root / "pcb1" / "image_anno.csv").unlink()
    inspections, _, rejections = read("visa", layout.config)
    assert rejections == []
    assert {i.condition for i in inspections if i.product == "pcb1"} == {"good", "defective"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "validation"}, "neither train nor test"),
        ({"label": "bad"}, "neither normal nor anomaly"),
        ({"label": "normal"}, "'bent,melt' in pcb1/image_anno.csv"),
        ({"image": "../secret.JPG"}, "outside the root"),
        ({"image": "pcb1/Data/Images/Anomaly/900.JPG"}, "does not exist"),
        ({"object": "candle"}, "folder of its object 'candle'"),
    ],
)
def test_visa_rejects_an_unusable_row_by_its_line(tmp_path, change, message):
    layout = folder_layouts.visa(tmp_path)
    path = layout.config.root / "split_csv" / "1cls.csv"
    rows = [
        dict(zip(folder_layouts.VISA_COLUMNS, line.split(","), strict=True))
        for line in path.read_text().splitlines()[1:]
    ]
    write_csv(path, [*rows[:-1], {**rows[-1], **change}], folder_layouts.VISA_COLUMNS)
    inspections, _, rejections = read("visa", layout.config)
    reasons = {r.item: r.reason for r in rejections}
    assert message in reasons["1cls.csv:11"]
    assert len(inspections) == len(layout.images) - 1
    left_over = any(item.startswith("pcb1") for item in reasons)
    assert left_over, "the image of the rejected row is then unlisted"


@pytest.mark.parametrize("content", [None, "image,label\n", "object;split;label;image;mask\n"])
def test_visa_rejects_other_files(tmp_path, content):
    if content is not None:
        (tmp_path / "split_csv").mkdir()
        (tmp_path / "split_csv" / "1cls.csv").write_text(content)
    with pytest.raises(EchoError, match=r"1cls\.csv"):
        list(visa.read(SourceConfig(tmp_path)))


# real_iad


def test_real_iad_groups_views_and_treats_hidden_defects_as_normal(tmp_path):
    layout = folder_layouts.real_iad(tmp_path)
    inspections, *_ = read("real_iad", layout.config)
    views = Counter(i.group for i in inspections)
    assert set(views.values()) == {3}
    sample = [i for i in inspections if i.group == "audiojack/NG/AK/S0001/audiojack_0001_NG_AK"]
    assert [i.condition for i in sample] == ["pit", "pit", "good"]


def test_real_iad_finds_its_manifests_from_within_the_root(tmp_path, monkeypatch):
    layout = folder_layouts.real_iad(tmp_path)
    monkeypatch.chdir(layout.config.root)
    assert read("real_iad", SourceConfig(Path())) == read("real_iad", layout.config)


def test_real_iad_reads_all_manifests_or_a_single_one(tmp_path):
    layout = folder_layouts.real_iad(tmp_path)
    lists = layout.config.root.parent / "realiad_jsons"
    whole = read("real_iad", layout.config)
    shutil.move(lists, tmp_path / "lists")
    shutil.move(tmp_path / "lists", lists / "realiad_jsons")
    assert read("real_iad", layout.config) == whole
    one, _, rejections = read("real_iad", SourceConfig(layout.config.root, lists / "realiad_jsons" / "toy_brick.json"))
    assert {i.product for i in one} == {"toy_brick"}
    assert [r.item for r in rejections] == ["audiojack"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anomaly_class": "XX"}, "'XX'"),
        ({"image_path": "../../../secret.jpg"}, "outside the root"),
        ({"image_path": "NG/gone.jpg"}, "does not exist"),
        ({"mask_path": "NG/gone.png"}, "mask audiojack/NG/gone.png does not exist"),
        ({"category": None}, "category and image_path must be strings"),
    ],
)
def test_real_iad_rejects_an_unusable_row_by_its_place(tmp_path, change, message):
    layout = folder_layouts.real_iad(tmp_path)
    path = layout.config.root.parent / "realiad_jsons" / "audiojack.json"
    content = json.loads(path.read_text())
    index = next(i for i, row in enumerate(content["test"]) if row["mask_path"])
    content["test"][index].update(change)
    write_json(path, content)
    inspections, _, rejections = read("real_iad", layout.config)
    reasons = {r.item: r.reason for r in rejections}
    assert message in reasons[f"audiojack.json:test[{index}]"]
    assert len(inspections) == len(layout.images) - 1


@pytest.mark.parametrize("content", ["{", "[]", '{"train": [], "test": []}', '{"meta": {"normal_class": "OK"}}'])
def test_real_iad_rejects_other_files_and_suggests_a_root(tmp_path, content):
    root = tmp_path / "realiad_512"
    root.mkdir()
    with pytest.raises(EchoError, match=r"set root to .*realiad_512"):
        list(real_iad.read(SourceConfig(tmp_path)))
    (tmp_path / "toy.json").write_text(content)
    with pytest.raises(EchoError, match=r"toy\.json"):
        list(real_iad.read(SourceConfig(root, tmp_path / "toy.json")))
