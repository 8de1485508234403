"""What every source promises, on a tree drawn in the exact layout of its dataset; and what is special to some."""

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
from data_prep.collect import collect
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
from tests.support.folder_layouts import SIZE, TREES, Tree, draw, draw_mask, parted, write_csv, write_json

LISTED = ("manifest", "manifest-coco", "mmad")
"""Sources of a list: the tree around may hold anything."""


@pytest.fixture(params=sorted(TREES))
def name(request) -> str:
    return request.param


@pytest.fixture
def tree(name, tmp_path) -> Tree:
    return TREES[name](tmp_path)


def read(name: str, config: SourceConfig):
    return parted(import_module(f"data_prep.sources.{name.split('-')[0]}").read(config))


def marks(inspection: Inspection, root: Path) -> np.ndarray:
    found = masks.load_mask(inspection, root, SIZE)
    assert found is not None
    return found


SQUARE = np.zeros((SIZE[1], SIZE[0]), bool)
SQUARE[6:10, 4:12] = True
"""What `draw_mask` marks by default."""


def test_every_source_is_drawn_for_these_tests():
    names = {module.name for module in pkgutil.iter_modules(sources.__path__) if not module.name.startswith("_")}
    assert names == {name.split("-")[0] for name in TREES} | {"synthetic"}


def test_a_source_finds_every_photograph_with_its_condition_split_mask_and_group(name, tree):
    inspections, _, rejections = read(name, tree.config)
    assert rejections == []
    assert {i.image: (i.condition, i.split) for i in inspections} == tree.photographs
    assert {i.image for i in inspections if masks.is_marked(i)} == set(tree.masked)
    assert len({i.group for i in inspections}) == (tree.groups or len(inspections))
    assert all(i.product and i.dataset for i in inspections)


def test_ids_are_unique_and_the_same_wherever_the_tree_lies(name, tree, tmp_path_factory):
    inspections, questions, _ = read(name, tree.config)
    assert len({i.id for i in inspections}) == len(inspections)
    moved = tmp_path_factory.mktemp("moved") / "tree"
    base = tree.config.root.parent if name == "real_iad" else tree.config.root
    shutil.copytree(base, moved)
    root = moved / tree.config.root.relative_to(base)
    annotations = tree.config.annotations and moved / tree.config.annotations.relative_to(base)
    again, asked, _ = read(name, SourceConfig(root, annotations))
    changed = {"folder": "dataset", "manifest-labelme": "dataset"}.get(name)  # that is the name of the root
    strip = [{**vars(i), **({"dataset": "", "product": ""} if changed else {})} for i in inspections]
    assert strip == [{**vars(i), **({"dataset": "", "product": ""} if changed else {})} for i in again]
    assert asked == questions


def test_paths_lie_under_the_root_and_masks_have_the_size_of_their_photographs(name, tree):
    root = tree.config.root
    inspections, questions, rejections = read(name, tree.config)
    for inspection in inspections:
        files = masks.mask_files(inspection)
        for path in filter(None, (inspection.image, *files, inspection.reference)):
            assert not Path(path).is_absolute() and ".." not in Path(path).parts and "\\" not in path
            assert (root / path).is_file()
        for name in files:
            with Image.open(root / name) as mask, Image.open(root / inspection.image) as image:
                assert mask.size == image.size
        if masks.is_marked(inspection):
            assert marks(inspection, root).any() == (inspection.condition != GOOD)
    kept, _, rejected = collect([*inspections, *questions, *rejections], root)
    assert kept == inspections and rejected == []


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Every file and folder in `folder`, with its time of change and its bytes."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def test_a_build_leaves_the_dataset_as_it_is(name, tree, tmp_path, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "dataset"
    before = contents(tmp_path)
    given = BuildConfig(
        source=name.split("-")[0],
        root=tree.config.root,
        annotations=tree.config.annotations,
        output=output,
        descriptor="skimage",
        split="seeded",
        fractions=[1.0, 0.0, 0.0],
    )
    manifest = build(given)
    assert manifest["rejected"] == 0 and sum(manifest["counts"]["photographs"].values()) == len(tree.photographs)
    assert contents(tmp_path) == before


def test_nothing_is_dropped_in_silence(name, tree):
    """A file of an unknown kind and one of a known one, planted in every folder, are each named in a rejection."""
    root = tree.config.root
    before, *_ = read(name, tree.config)
    if name in LISTED:
        folders = {(root / i.image).parent for i in before} if name == "mmad" else set()
    else:
        folders = {path for path in root.rglob("*") if path.is_dir()} | {root}
    planted = [folder / f"alien-{n}{end}" for n, folder in enumerate(sorted(folders)) for end in (".heic", ".tiff")]
    for path in planted:
        path.write_bytes(b"content")
    inspections, _, rejections = read(name, tree.config)
    _, _, broken = collect(inspections, root)
    named = {rejection.item: rejection.reason for rejection in [*rejections, *broken]}
    images = {i.image for i in inspections}
    for path in planted:
        item = path.relative_to(root).as_posix()
        if item in images:
            continue  # it lies where photographs lie and is taken for one; the build tells that it is broken
        told = item in named or any(item in reason for reason in named.values())
        places = [place for place in named if Path(item).is_relative_to(place)]
        assert told or any("ignored" in named[place] for place in places), item
    masked = {i.image for i in inspections if {root / mask for mask in masks.mask_files(i)} & set(planted)}
    assert {r.item for r in broken} == images - {i.image for i in before} | masked
    assert {i.image for i in before} <= images


def test_a_photograph_or_mask_that_is_gone_is_named(name, tree):
    root = tree.config.root
    inspections, *_ = read(name, tree.config)
    photograph, *others = inspections
    (root / photograph.image).unlink()
    masked = next((i for i in others if i.mask), None)
    if masked:
        (root / str(masked.mask)).unlink()
    after, _, rejections = read(name, tree.config)
    told = "\n".join(f"{rejection.item}: {rejection.reason}" for rejection in rejections)
    if name in (*LISTED, "visa", "real_iad", "manifest-labelme"):
        assert photograph.image in told
    assert photograph.image not in {i.image for i in after}
    if masked:
        assert str(masked.mask) in told or f"the mask of {masked.image} is missing" in told
        assert {i.mask for i in after if i.image == masked.image} <= {None}


def test_synthetic_keeps_the_contract_too(tmp_path):
    config = SourceConfig(tmp_path, parts=synthetic.MIN_PARTS)
    inspections, questions, rejections = parted(synthetic.read(config))
    assert len({i.id for i in inspections}) == len(inspections)
    assert collect([*inspections, *questions, *rejections], tmp_path) == (inspections, [], [])
    used = {path for i in inspections for path in (i.image, i.mask) if path}
    assert {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.suffix in IMAGE_SUFFIXES
    } == used


@pytest.mark.parametrize("name", ["manifest", "manifest-coco", "real_iad", "visa"])
def test_a_photograph_that_turns_out_to_be_broken_is_named_with_its_place_in_the_list(name, tree):
    root = tree.config.root
    module = import_module(f"data_prep.sources.{name.split('-')[0]}")
    broken = next(i for i in read(name, tree.config)[0] if i.condition != GOOD)
    place = {item.inspection: item.place for item in module.read(tree.config) if isinstance(item, ItemPlace)}[broken.id]
    whole = (root / broken.image).read_bytes()
    (root / broken.image).write_bytes(whole[: len(whole) * 2 // 3])
    _, _, (rejection,) = collect(module.read(tree.config), root)
    told = f"{rejection.item}: {rejection.reason}"
    assert broken.image in told and place in told and place.split(":")[0].endswith((".csv", ".json"))


def test_every_source_has_a_recipe_that_its_settings_take():
    recipes = sorted((ROOT / "recipes").glob("*/data.yaml")) + sorted((ROOT / "recipes" / "data").glob("*.yaml"))
    configs = {path: parse([BuildConfig], ["--config", str(path)])[0] for path in recipes}
    assert {config.source for config in configs.values()} == {*(name.split("-")[0] for name in TREES), "synthetic"}
    for path, config in configs.items():
        assert path.relative_to(ROOT).as_posix() in path.read_text(), "it says how to run it"
        assert not config.held_out or config.split in HELD_OUT_FIELDS


RECIPES = sorted((ROOT / "recipes" / "data").glob("*.yaml"))


def test_the_command_in_a_recipe_says_where_to_put_each_path_that_the_recipe_guesses():
    for path in RECIPES:
        comment = path.read_text().split("source:")[0]
        for key in {"root", "annotations", "knowledge"} & yaml.safe_load(path.read_text()).keys():
            assert f"--{key} F" in comment, f"{path.name}: {key}"


def test_the_command_in_mmads_recipe_builds_a_folder_as_mmad_is_downloaded(tmp_path, monkeypatch):
    folder = folder_layouts.mmad(tmp_path / "MMAD").config.root
    write_json(folder / "domain_knowledge.json", {"VisA": {"candle": {"good": "Even wax."}}})
    comment = (ROOT / "recipes/data/mmad.yaml").read_text().split("source:")[0].replace("\\\n#", "")
    command = comment.split("python -m data_prep.build ")[1].split("  (")[0].replace("FOLDER", str(folder))
    monkeypatch.chdir(ROOT)
    main(
        [
            *command.split(),
            "--descriptor",
            "skimage",
            "--cache",
            str(tmp_path / "cache"),
            "--output",
            str(tmp_path / "out"),
        ]
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rejected"] == 0 and "VisA/candle" not in manifest["products_without_knowledge"]


def test_datasets_are_built_for_the_routing_that_the_runs_beside_them_take():
    for run in (ROOT / "recipes").glob("*/run.yaml"):
        own = run.with_name("data.yaml")
        for data in [own] if own.is_file() else RECIPES:
            (config,) = parse([BuildConfig], ["--config", str(data)])
            assert config.routing == yaml.safe_load(run.read_text())["routing"], (run, data)


# trees of folders


def test_several_masks_of_a_photograph_count_as_one(tmp_path):
    tree = folder_layouts.mvtec_loco(tmp_path)
    root = tree.config.root
    by_image = {i.image: i for i in read("mvtec_loco", tree.config)[0]}
    three = by_image["breakfast_box/test/structural_anomalies/000.png"]
    wanted = np.zeros_like(SQUARE)
    for index in range(3):
        wanted[6:10, 4 + 8 * index : 8 + 8 * index] = True
    assert np.array_equal(marks(three, root), wanted)
    folder = "breakfast_box/ground_truth/structural_anomalies/000"
    assert three.mask is None and three.masks == tuple(f"{folder}/{index:03d}.png" for index in range(3))
    one = by_image["breakfast_box/test/logical_anomalies/001.png"]
    assert one.mask == "breakfast_box/ground_truth/logical_anomalies/001/000.png" and not one.masks


def test_each_of_several_masks_counts_for_the_fingerprint_of_a_dataset(tmp_path):
    tree = folder_layouts.mvtec_loco(tmp_path / "raw")
    given = BuildConfig(
        source="mvtec_loco", root=tree.config.root, output=tmp_path / "out", descriptor="skimage", split="seeded"
    )
    first = build(given)
    draw_mask(tree.config.root / "breakfast_box/ground_truth/structural_anomalies/000/002.png", (20, 6, 25, 10))
    assert build(given)["images_fingerprint"] != first["images_fingerprint"]


@pytest.mark.parametrize(
    ("change", "words", "stands"),
    [
        (lambda path: draw(path, 255, (20, 20)), "20 x 20 pixels but its image has 32 x 24", False),
        (lambda path: path.write_bytes(b"content"), "broken", False),
        (lambda path: [draw(file, 0) for file in path.parent.iterdir()], "marks nothing", True),
    ],
)
def test_masks_that_cannot_be_used_are_named_and_the_photograph_stands_as_with_one_mask(
    tmp_path, change, words, stands
):
    tree = folder_layouts.mvtec_loco(tmp_path)
    change(tree.config.root / "breakfast_box/ground_truth/logical_anomalies/000/001.png")
    kept, _, (rejection,) = collect(read("mvtec_loco", tree.config)[0], tree.config.root)
    assert rejection.item == "breakfast_box/test/logical_anomalies/000.png"
    assert words in rejection.reason and "logical_anomalies/000/001.png" in rejection.reason
    assert ("used without it" in rejection.reason) == stands
    assert [masks.is_marked(i) for i in kept if i.image == rejection.item] == [False] * stands


def test_a_mask_of_no_photograph_is_named(tmp_path):
    tree = folder_layouts.mvtec_ad(tmp_path)
    truth = tree.config.root / "bottle" / "ground_truth"
    draw_mask(truth / "contamination" / "007_mask.png")
    draw_mask(truth / "crack" / "000_mask.png")
    rejections = {r.item: r.reason for r in read("mvtec_ad", tree.config)[2]}
    assert set(rejections) == {"bottle/ground_truth/contamination/007_mask.png", "bottle/ground_truth/crack"}
    assert all("no image has this name" in reason for reason in rejections.values())


@pytest.mark.parametrize("source", ["mvtec_ad", "mvtec_loco", "goods_ad", "btad", "mpdd"])
def test_a_folder_without_a_product_is_one_clear_error(tmp_path, source):
    draw(tmp_path / "photo.png")
    with pytest.raises(EchoError, match=r"no folder <product>/train"):
        read(source, SourceConfig(tmp_path))


# visa


def test_visa_takes_the_split_file_that_annotations_name(tmp_path):
    tree = folder_layouts.visa(tmp_path)
    root = tree.config.root
    inspections, _, rejections = read("visa", SourceConfig(root, root / "split_csv" / "2cls_fewshot.csv"))
    assert {i.product for i in inspections} == {"candle"}
    assert [r.item for r in rejections] == ["pcb1"] and "lists nothing in it" in rejections[0].reason


def test_visa_without_the_names_of_defects_leaves_them_unnamed(tmp_path):
    tree = folder_layouts.visa(tmp_path)
    (tree.config.root / "pcb1" / "image_anno.csv").unlink()
    inspections, _, rejections = read("visa", tree.config)
    assert rejections == []
    assert {i.condition for i in inspections if i.product == "pcb1"} == {"good", "defective"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"split": "validation"}, "neither train nor test"),
        ({"label": "bad"}, "neither normal nor anomaly"),
        ({"label": "normal"}, "'bent,melt' in pcb1/image_anno.csv"),
        ({"image": "../secret.JPG"}, "outside the root"),
        ({"image": "pcb1/Data/Images/Anomaly/900.JPG"}, "does not exist"),
        ({"object": "candle"}, "folder of its object 'candle'"),
    ],
)
def test_visa_rejects_a_row_that_cannot_be_used_by_its_line(tmp_path, change, words):
    tree = folder_layouts.visa(tmp_path)
    path = tree.config.root / "split_csv" / "1cls.csv"
    rows = [
        dict(zip(folder_layouts.VISA_COLUMNS, line.split(","), strict=True))
        for line in path.read_text().splitlines()[1:]
    ]
    write_csv(path, [*rows[:-1], {**rows[-1], **change}], folder_layouts.VISA_COLUMNS)
    inspections, _, rejections = read("visa", tree.config)
    reasons = {r.item: r.reason for r in rejections}
    assert words in reasons["1cls.csv:11"] and len(inspections) == len(tree.photographs) - 1
    left_over = any(item.startswith("pcb1") for item in reasons)
    assert left_over, "the photograph of the row is then in no row"


@pytest.mark.parametrize("content", [None, "image,label\n", "object;split;label;image;mask\n"])
def test_visa_refuses_another_file(tmp_path, content):
    if content is not None:
        (tmp_path / "split_csv").mkdir()
        (tmp_path / "split_csv" / "1cls.csv").write_text(content)
    with pytest.raises(EchoError, match=r"1cls\.csv"):
        list(visa.read(SourceConfig(tmp_path)))


# real_iad


def test_real_iad_keeps_the_views_of_a_sample_together_and_hidden_defects_normal(tmp_path):
    tree = folder_layouts.real_iad(tmp_path)
    inspections, *_ = read("real_iad", tree.config)
    views = Counter(i.group for i in inspections)
    assert set(views.values()) == {3}
    sample = [i for i in inspections if i.group == "audiojack/NG/AK/S0001/audiojack_0001_NG_AK"]
    assert [i.condition for i in sample] == ["pit", "pit", "good"]


def test_real_iad_reads_the_lists_of_the_unpacked_archive_and_one_list_alone(tmp_path):
    tree = folder_layouts.real_iad(tmp_path)
    lists = tree.config.root.parent / "realiad_jsons"
    whole = read("real_iad", tree.config)
    shutil.move(lists, tmp_path / "lists")
    shutil.move(tmp_path / "lists", lists / "realiad_jsons")
    assert read("real_iad", tree.config) == whole
    one, _, rejections = read("real_iad", SourceConfig(tree.config.root, lists / "realiad_jsons" / "toy_brick.json"))
    assert {i.product for i in one} == {"toy_brick"}
    assert [r.item for r in rejections] == ["audiojack"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"anomaly_class": "XX"}, "'XX'"),
        ({"image_path": "../../../secret.jpg"}, "outside the root"),
        ({"image_path": "NG/gone.jpg"}, "does not exist"),
        ({"mask_path": "NG/gone.png"}, "mask audiojack/NG/gone.png does not exist"),
        ({"category": None}, "category and image_path must be strings"),
    ],
)
def test_real_iad_rejects_a_row_that_cannot_be_used_by_its_place(tmp_path, change, words):
    tree = folder_layouts.real_iad(tmp_path)
    path = tree.config.root.parent / "realiad_jsons" / "audiojack.json"
    content = json.loads(path.read_text())
    index = next(i for i, row in enumerate(content["test"]) if row["mask_path"])
    content["test"][index].update(change)
    write_json(path, content)
    inspections, _, rejections = read("real_iad", tree.config)
    reasons = {r.item: r.reason for r in rejections}
    assert words in reasons[f"audiojack.json:test[{index}]"]
    assert len(inspections) == len(tree.photographs) - 1


@pytest.mark.parametrize("content", ["{", "[]", '{"train": [], "test": []}', '{"meta": {"normal_class": "OK"}}'])
def test_real_iad_refuses_another_file_and_says_where_lists_belong(tmp_path, content):
    root = tmp_path / "realiad_512"
    root.mkdir()
    with pytest.raises(EchoError, match=r"set root to .*realiad_512"):
        list(real_iad.read(SourceConfig(tmp_path)))
    (tmp_path / "toy.json").write_text(content)
    with pytest.raises(EchoError, match=r"toy\.json"):
        list(real_iad.read(SourceConfig(root, tmp_path / "toy.json")))
