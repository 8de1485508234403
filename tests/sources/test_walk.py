"""Every source walks folders in the same way: no system files or pipes, each folder once, no links out of the root."""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.build import build
from data_prep.collect import check_records
from data_prep.config import BuildConfig
from data_prep.sources import LinkOutside, SourceConfig, folder, manifest, visa
from data_prep.truth import merge_records
from echo_ft.data.knowledge import read_knowledge
from echo_ft.errors import EchoError
from echo_ft.files import list_folder, walk
from tests.support import folder_layouts
from tests.support.folder_layouts import LAYOUTS, draw, draw_mask, labelme_file, split_items, write_csv, write_json


def read(name: str, config: SourceConfig):
    return split_items(import_module(f"data_prep.sources.{name.split('-')[0]}").read(config))


def add_system_files(root: Path) -> None:
    """Add what systems and network storage leave behind: a companion for each file, and their own files and folders."""
    for path in sorted(root.rglob("*")):
        if path.is_file():
            path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7metadata")
    for place in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "Thumbs.db", "THUMBS.DB", "desktop.ini"):
            (place / name).write_bytes(b"content")
    for name in ("__MACOSX", "$RECYCLE.BIN", ".Trashes", "@eaDir", "#recycle", "lost+found"):
        (root / name / "nut").mkdir(parents=True)
        (root / name / "nut" / "part.png").write_bytes(b"content")
        write_json(root / name / "nut" / "part.json", labelme_file("part.png", []))


@pytest.mark.parametrize(
    "name", ["folder", "magnetic_tile", "manifest-labelme", "mmad", "mvtec_loco", "real_iad", "visa"]
)
def test_system_files_and_companions_change_nothing(tmp_path, name):
    layout = LAYOUTS[name](tmp_path)
    before = read(name, layout.config)
    add_system_files(tmp_path)
    assert read(name, layout.config) == before


@pytest.mark.parametrize("name", ["folder", "magnetic_tile", "manifest-labelme", "mmad", "mvtec_loco", "visa"])
def test_pipes_are_never_opened(tmp_path, name):
    """Opening a pipe to which nobody writes would wait forever."""
    layout = LAYOUTS[name](tmp_path)
    inspections, *_ = read(name, layout.config)
    for place in {(layout.config.root / i.image).parent for i in inspections}:
        for file in ("pipe.png", "pipe.json"):
            os.mkfifo(place / file)
    found, _, rejections = read(name, layout.config)
    assert found == inspections
    items = {Path(rejection.item).name for rejection in rejections}
    assert items == (set() if name in ("manifest-labelme", "visa") else {"pipe.png", "pipe.json"})
    assert all("not a file but a pipe" in rejection.reason for rejection in rejections)


def test_pipe_in_place_of_a_list_is_an_error(tmp_path):
    os.mkfifo(folder_layouts.visa(tmp_path).config.root / "fifo.csv")
    with pytest.raises(EchoError, match=r"there is no file .*fifo\.csv"):
        list(visa.read(SourceConfig(tmp_path / "VisA", tmp_path / "VisA" / "fifo.csv")))


def test_knowledge_folder_with_pipes_companions_and_a_circle_is_read(tmp_path):
    (tmp_path / "nut.yaml").write_text("line: {nut: {good: Even.}}\n")
    (tmp_path / "._nut.yaml").write_bytes(b"\0\5\x16\7")
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "again").symlink_to(tmp_path)
    assert read_knowledge(tmp_path)[0] == {"line": {"nut": {"good": "Even."}}}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=3), min_size=1, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from("xyz")), max_size=4),
)
def test_walk_reads_every_file_once_whatever_links_there_are(tmp_path_factory, places, links):
    root = tmp_path_factory.mktemp("tree", numbered=True)
    folders = [root.joinpath(*place) for place in places]
    for place in folders:
        place.mkdir(parents=True, exist_ok=True)
        (place / "part.png").touch()
    every = sorted(root.rglob("part.png"))
    for start, target, name in links:
        link = folders[start % len(folders)] / name
        if not link.exists():
            link.symlink_to([root, *folders][target % (1 + len(folders))])
    assert walk(root) == (every, [])


def test_linked_folder_in_a_hidden_one_is_read_and_one_outside_is_not(tmp_path):
    root = tmp_path / "root"
    for place in (root / ".store/nut", tmp_path / "elsewhere/bolt", root / "cap"):
        draw(place / "0.png")
    (root / "nut").symlink_to(root / ".store/nut")
    (root / "cap" / "bolt").symlink_to("../../elsewhere/bolt")
    (root / "gone").symlink_to(root / "nowhere")
    assert walk(root) == ([root / "cap/0.png", root / "nut/0.png"], [root / "cap/bolt"])
    assert root / "gone" in list_folder(root)


def labelled(place: Path, count: int) -> None:
    for number in range(count):
        draw(place / f"{number}.png", 90 + number)
        shapes = [("dent", "rectangle", [[4, 6], [12, 10]])] if number % 2 else []
        write_json(place / f"{number}.json", labelme_file(f"{number}.png", shapes))


def test_labelme_names_a_linked_folder_outside_the_root(tmp_path):
    root = tmp_path / "photos"
    labelled(root / "gasket", 5), labelled(tmp_path / "store/nut", 5), labelled(root / "bolt", 2)
    (root / "nut").symlink_to("../store/nut")
    (root / "again").symlink_to("bolt")
    inspections, _, rejections = split_items(manifest.read(SourceConfig(root)))
    assert [(r.item, r.reason) for r in rejections] == [
        (
            "nut",
            f"the folder is a link out of the root to {tmp_path / 'store/nut'} and is skipped; "
            "set root to a folder above both, or copy it",
        )
    ]
    assert [i.image.split("/")[0] for i in inspections] == ["bolt"] * 2 + ["gasket"] * 5
    found, _, rejections = split_items(manifest.read(SourceConfig(tmp_path)))
    assert len({i.image for i in found}) == 12
    assert rejections == []


def test_build_warns_of_linked_folders_outside_the_root(tmp_path):
    labelled(tmp_path / "photos/gasket", 8), labelled(tmp_path / "store/nut", 2)
    (tmp_path / "photos/nut").symlink_to("../store/nut")
    config = BuildConfig("manifest", tmp_path / "out", tmp_path / "photos", descriptor="skimage", split="seeded")
    made = build(config)
    (warning,) = [one for one in made["warnings"] if "linked" in one]
    assert warning.startswith("1 linked folders lead out of the root and are skipped: nut; set root to a folder")
    assert made["rejected"] == 1


def test_root_with_only_a_link_outside_says_so(tmp_path):
    labelled(tmp_path / "store/nut", 2)
    draw(tmp_path / "store/cap/train/good/0.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/nut").symlink_to("../store/nut")
    with pytest.raises(EchoError, match=r"no labelme file .*photos \(nut is a link out of it, which is not followed\)"):
        list(manifest.read(SourceConfig(tmp_path / "photos")))
    (tmp_path / "photos/nut").unlink()
    (tmp_path / "photos/nut").symlink_to("..")
    with pytest.raises(EchoError, match=r"it holds links out of it \(nut\), which are not followed"):
        list(folder.read(SourceConfig(tmp_path / "photos")))


@pytest.mark.parametrize(
    "name", ["btad", "folder", "goods_ad", "magnetic_tile", "mpdd", "mvtec_ad", "mvtec_loco", "real_iad", "visa"]
)
def test_folders_of_a_layout_may_be_links_to_another_disk(tmp_path, name):
    layout = LAYOUTS[name](tmp_path / "one")
    root = layout.config.root
    draw(root / next(iter(layout.images)).split("/")[0] / "spare" / "0.png")
    before = read(name, layout.config)
    assert before[2], "the spare image is named"
    for number, product in enumerate(path for path in list_folder(root) if path.is_dir()):
        elsewhere = tmp_path / f"disk{number}" / "moved"
        elsewhere.parent.mkdir()
        product.rename(elsewhere)
        product.symlink_to(elsewhere)
    assert before[0] and read(name, layout.config) == before


def test_deeper_links_and_unused_folders_of_a_linked_product_are_named(tmp_path):
    root, disk = tmp_path / "line", tmp_path / "disk/nut"
    draw(disk / "train/good/0.png"), draw(disk / "test/dent/0.png"), draw(disk / "spare/0.png")
    draw_mask(disk / "ground_truth/scratch/0.png")
    draw(tmp_path / "elsewhere/0.png"), draw(tmp_path / "other/notes/0.png")
    (disk / "test/scratch").symlink_to("../../../elsewhere")
    root.mkdir()
    (root / "nut").symlink_to(disk), (root / "again").symlink_to(disk), (root / "spare").symlink_to("../other")
    (root / "circle").symlink_to(tmp_path)
    inspections, _, rejections = split_items(folder.read(SourceConfig(root)))
    assert [i.image for i in inspections] == ["again/train/good/0.png", "again/test/dent/0.png"]
    reasons = {r.item: r.reason for r in rejections}
    assert "folder ignored (files: 1)" in reasons["spare"]
    assert "folder ignored (files: 1)" in reasons["again/spare"]
    assert "again/train/good, which is read there" in reasons["nut/train/good"]
    assert "a link out of the root" in reasons["again/test/scratch"]
    assert "a link out of the root" in reasons["circle"]


def test_folder_layout_may_be_made_of_links(tmp_path):
    """Each image is read once: at its path without links if there is one, otherwise through the first link."""
    root = tmp_path / "line"
    draw(root / "raw/nut-v3/train/good/0.png"), draw(root / "raw/nut-v3/test/dent/0.png")
    draw(root / "bolt/test/dent/0.png"), draw(root / "cap/train/good/0.png")
    (root / "nut").symlink_to("raw/nut-v3")
    (root / "nut2").symlink_to("nut")
    (root / "bolt/train").mkdir()
    (root / "bolt/train/good").symlink_to("../../cap/train/good")
    (root / "cap/test").mkdir()
    (root / "cap/test/scratch").symlink_to("../../..")
    inspections, _, rejections = split_items(folder.read(SourceConfig(root)))
    assert [i.image for i in inspections] == [
        "bolt/test/dent/0.png",
        "cap/train/good/0.png",
        "nut/train/good/0.png",
        "nut/test/dent/0.png",
    ]
    assert [i.product for i in inspections] == ["bolt", "cap", "nut", "nut"]
    reasons = {r.item: r.reason for r in rejections}
    assert set(reasons) == {"raw", "bolt/train/good", "cap/test/scratch", "nut2/train/good", "nut2/test/dent"}
    assert reasons["bolt/train/good"] == "folder ignored: it leads to cap/train/good, which is read there"
    assert reasons["nut2/test/dent"] == "folder ignored: it leads to nut/test/dent, which is read there"
    assert "a link out of the root" in reasons["cap/test/scratch"]


def test_masks_behind_a_link_outside_are_named(tmp_path):
    root = tmp_path / "line"
    draw(root / "nut/train/good/0.png"), draw(root / "nut/test/dent/0.png")
    draw_mask(tmp_path / "masks/dent/0.png")
    (root / "nut/ground_truth").symlink_to("../../masks")
    inspections, _, (rejection,) = split_items(folder.read(SourceConfig(root)))
    assert isinstance(rejection, LinkOutside), "a build counts links by their type"
    assert rejection.item == "nut/ground_truth"
    assert "a link out of the root" in rejection.reason
    assert all(i.mask is None for i in inspections)


def test_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "nut").mkdir()

    def refuse(path: Path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(EchoError, match=r"the folder .* cannot be read \(Permission denied\); check its permissions"):
        list_folder(tmp_path / "nut")


def test_thumbnails_of_network_storage_are_no_defect_of_a_flat_product(tmp_path):
    draw(tmp_path / "nut/good/0.png"), draw(tmp_path / "nut/dent/0.png"), draw(tmp_path / "nut/@eaDir/thumb.png")
    inspections, _, rejections = split_items(folder.read(SourceConfig(tmp_path, split="seeded")))
    assert {i.condition for i in inspections} == {"good", "dent"}
    assert rejections == []


def test_companions_do_not_cost_a_defect_with_several_masks(tmp_path):
    layout = folder_layouts.mvtec_loco(tmp_path)
    add_system_files(tmp_path)
    config = BuildConfig(
        "mvtec_loco", tmp_path / "out", layout.config.root, descriptor="skimage", split="seeded", fractions=[1, 0, 0]
    )
    made = build(config)
    assert made["rejected"] == 0
    rows = [json.loads(row) for row in (tmp_path / "out/inspections.jsonl").read_text().splitlines()]
    assert {row["image"] for row in rows} == set(layout.images)


@pytest.mark.parametrize(
    ("below_links", "used"),
    [(False, {"a.png", "inside.png"}), (True, {"a.png", "inside.png", "disk/b.png"}), (None, None)],
)
def test_links_out_of_the_root_are_refused_by_name_unless_allowed(tmp_path, below_links, used):
    root = tmp_path / "root"
    for path in (root / "a.png", tmp_path / "b.png", tmp_path / "other/b.png"):
        draw(path)
    (root / "inside.png").symlink_to("a.png")
    (root / "out.png").symlink_to("../b.png")
    (root / "disk").symlink_to("../other")
    names = ("a.png", "inside.png", "out.png", "disk/b.png")
    rows = [{"image": name, "product": "cap", "condition": "good"} for name in names]
    path = write_csv(root / "parts.csv", rows, ["image", "product", "condition"])
    records = merge_records(manifest.read(SourceConfig(root, path)))
    usable = check_records(records, root, below_links)
    assert {one.image for one in usable.inspections} == (used or set(names))
    refused = [one.item for one in usable.rejections]
    assert refused == [name for name in names if name not in (used or names)]
    assert all("is a link out of the root to" in one.reason for one in usable.rejections)
