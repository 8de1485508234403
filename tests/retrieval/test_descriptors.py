"""Descriptors do not depend on the batch, and errors name the descriptor to use instead."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from echo_ft.errors import EchoError
from echo_ft.retrieval.descriptors import OpenClip, load_extractor
from tests.conftest import ROOT
from tests.support.textures import draw_texture


@pytest.fixture(scope="module")
def small_clip() -> OpenClip:
    """open_clip's smallest architecture with random weights."""
    return OpenClip("ViT-S-32-alt", None)


def test_clip_descriptors_do_not_depend_on_the_batch(tmp_path: Path, small_clip: OpenClip) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    paths = [tmp_path / f"n{number}.png" for number in range(8)]
    for number, path in enumerate(paths):
        draw_texture(path, number)
    paths.insert(3, tmp_path / "broken.png")
    batched, errors = small_clip.vectors(paths)
    for path, vector, error in zip(paths, batched, errors, strict=True):
        single = small_clip.vectors([path])[0][0]
        if path.name == "broken.png":
            assert vector is None
            assert single is None
            assert error
        else:
            assert vector is not None
            assert single is not None
            assert error is None
            assert vector.dtype == np.float32
            np.testing.assert_allclose(vector, single, atol=1e-5)
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_openai_weights_use_the_activation_of_their_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    quick_gelu = {}

    def create(model: str, pretrained: str, **options: object) -> None:
        quick_gelu[f"{model}/{pretrained}"] = options["force_quick_gelu"]
        raise OSError("no weights here")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", create)
    for name in ("ViT-B-16/openai", "ViT-B-16/laion2b_s34b_b88k"):
        with pytest.raises(EchoError, match="cannot be loaded"):
            load_extractor(name).vectors([tmp_path / "n0.png"])
    assert quick_gelu == {"ViT-B-16/openai": True, "ViT-B-16/laion2b_s34b_b88k": False}


def test_local_folders_have_keys_by_path_and_weights(tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "b", tmp_path / "a-b"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "open_clip_model.safetensors").write_bytes(b"one")
    keys = [load_extractor(f"local-dir:{folder}").key for folder in folders]
    assert len(set(keys)) == 2
    assert all("/" not in key for key in keys)
    assert keys[0] == load_extractor(f"local-dir:{folders[0]}").key
    (folders[0] / "open_clip_model.safetensors").write_bytes(b"other")
    assert load_extractor(f"local-dir:{folders[0]}").key not in keys


def test_missing_weights_end_in_one_line_with_a_remedy(tmp_path: Path) -> None:
    draw_texture(tmp_path / "n0.png", 0)
    script = (
        "import sys; from pathlib import Path\n"
        "from echo_ft.config import run_main\n"
        "from echo_ft.records import Inspection\n"
        "from echo_ft.retrieval.references import find_references\n"
        "one = Inspection('a', 'n0.png', 'd', 'p', 'good', 'g')\n"
        "run_main(lambda argv: find_references([one], [one], Path(argv[0]), 'ViT-B-16/openai', 1, 'all', 0, None))\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 2
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: descriptor ViT-B-16/openai: the weights cannot be loaded")
    assert error.endswith("or set `descriptor: skimage`, which needs no weights")
    assert "Traceback" not in done.stderr
