"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

SCRIPTS = ("data_prep", "train", "evaluation")
CODE = sorted(path for part in ("echo_ft", *SCRIPTS, "benchmarks") for path in (ROOT / part).rglob("*.py"))
LIGHT = [path for path in CODE if path.relative_to(ROOT).parts[0] != "benchmarks"]  # these patch before they import
LIBRARY = sorted((ROOT / "echo_ft").rglob("*.py"))

STREETS = {
    "images": set(),
    "drawn": {"images"},
    "data": {"images"},
    "retrieval": {"images", "data"},
    "leakage": {"images"},
    "experts": {"images", "data"},
    "model": {"images", "data", "experts"},
    "training": {"images", "data", "experts", "model"},
    "inference": {"data", "retrieval", "images", "experts", "model"},
    "metrics": {"images", "data", "experts", "inference"},
    "gate": {"metrics"},
    "export": {"data", "retrieval", "experts", "model", "inference"},
}
"""Which subpackages of echo_ft each one may import. All may import the ground-floor files, which import none of
them."""

SAME_NAME = {
    "main": "the entry point of every command",
}
"""Public names that two modules of echo_ft may define, and why. At most five."""

HEAVY = {
    "accelerate", "bitsandbytes", "cv2", "datasets", "deepspeed", "faiss", "fastapi", "gradio", "jinja2", "matplotlib",
    "open_clip", "openai", "peft", "pyarrow", "skimage", "sklearn", "starlette", "torch", "torchvision", "transformers",
    "trl", "uvicorn", "wandb",
}  # fmt: skip
"""Packages that a function may import, so that `--help` and light commands do not load them."""

OPTIONAL = {"bitsandbytes", "fastapi", "gradio", "matplotlib", "openai", "starlette", "uvicorn"}
"""Packages that only an extra of pyproject.toml installs."""

LIGHT_INSIDE = {"fcntl": "Windows has none", "resource": "Windows has none"}
"""Other modules that a function may import, and why."""

RETIRED = (
    "speak", "SpeakLater", "Utterance", "Utterances", "listen", "interview", "Sheet", "make_sheet", "glimpse",
    "Glimpse", "looked_at", "learn_to_look", "Said", "thin_sides", "two_spellings",
)  # fmt: skip
"""Private names that a term of the field has replaced."""


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_file(module: str) -> Path | None:
    """The file of one of our modules, or None."""
    base = ROOT.joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imported(node: ast.AST) -> list[str]:
    """The modules that an import statement names; for our own modules, down to the deepest submodule."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute"
        deeper = [f"{node.module}.{alias.name}" for alias in node.names]
        return [name if module_file(name) else node.module for name in deeper]
    return []


def all_imports(path: Path) -> set[str]:
    return {name for node in ast.walk(tree(path)) for name in imported(node)}


@pytest.mark.parametrize("path", CODE, ids=names(CODE))
def test_library_imports_no_script_and_scripts_never_each_other(path):
    part = path.relative_to(ROOT).parts[0]
    if part != "benchmarks":
        assert {name.split(".")[0] for name in all_imports(path)} & {*SCRIPTS, "echo_ft"} <= {"echo_ft", part}


@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_streets_import_only_downwards(path):
    parts = path.relative_to(ROOT).parts
    ours = [name.split(".") for name in all_imports(path) if name.startswith("echo_ft.")]
    streets = {name[1] for name in ours if name[1] in STREETS}
    if len(parts) == 2:
        assert parts[1] == "__init__.py" or not streets
    else:
        assert streets - {parts[1]} <= STREETS[parts[1]]


def test_street_table_lists_every_folder_and_has_no_circle():
    folders = {path.name for path in (ROOT / "echo_ft").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*STREETS}
    order = [*STREETS]
    for place, street in enumerate(order):
        assert STREETS[street] <= {*order[:place]}


def test_folders_and_files_and_functions_stay_small():
    for folder in {path.parent for path in LIBRARY}:
        assert len([*folder.glob("*.py")]) <= 12, folder
    for path in CODE:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 350, path
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 60, f"{path}: {node.name} has {length} lines"


def public_definitions(path: Path) -> Iterator[str]:
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        else:
            found = []
        yield from (name for name in found if not name.startswith("_"))


def test_no_public_name_is_defined_twice_in_the_library():
    places = defaultdict(list)
    for path in LIBRARY:
        for name in public_definitions(path):
            places[name].append(str(path.relative_to(ROOT)))
    twice = {name: found for name, found in places.items() if len(found) > 1 and name not in SAME_NAME}
    assert not twice
    assert len(SAME_NAME) <= 5


def test_library_prints_nothing():
    for path in LIBRARY:
        calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
        assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id == "print"], path
        assert not [c for c in calls if isinstance(c.func, ast.Attribute) and c.func.attr == "print"], path


@cache
def is_heavy(module: str) -> bool:
    """Whether importing one of our modules imports a heavy package."""
    path = module_file(module)
    if path is None:
        return module.split(".")[0] in HEAVY
    return any(is_heavy(name) for node in tree(path).body for name in imported(node))


def imports_inside_functions(path: Path) -> Iterator[tuple[int, str]]:
    for function in ast.walk(tree(path)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                yield from ((node.lineno, name) for name in imported(node))


@pytest.mark.parametrize("path", LIGHT, ids=names(LIGHT))
def test_functions_import_only_what_is_heavy(path):
    loaded = {name for node in tree(path).body for name in imported(node)}
    for line, name in imports_inside_functions(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {name} inside a function"
        assert name.split(".")[0] in LIGHT_INSIDE or is_heavy(name), f"{where}, which saves nothing"
        assert name not in loaded, f"{where}, which the file has loaded already"


def test_command_help_loads_no_heavy_package():
    for module in ("data_prep.build", "evaluation.score", "evaluation.compare"):
        script = f"import sys, {module}; print(*sorted(set(sys.modules) & {{'torch', 'transformers', 'trl', 'faiss'}}))"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "", f"{module} loads {done.stdout}"


@cache
def loaded_at_start(module: str) -> frozenset[str]:
    """The packages of others that importing one of our modules imports."""
    path = module_file(module)
    if path is None:
        return frozenset({module.split(".")[0]})
    return frozenset().union(*(loaded_at_start(name) for node in tree(path).body for name in imported(node)))


def test_commands_start_without_the_packages_of_extras():
    assert "openai" in loaded_at_start("echo_ft.inference.server")
    for path in LIGHT:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] in SCRIPTS:
            found = loaded_at_start(".".join(parts)) & OPTIONAL
            assert not found, f"{path.relative_to(ROOT)} loads {found}; import it inside a function"


def test_models_load_from_safetensors_and_never_run_remote_code():
    text = "\n".join(path.read_text(encoding="utf-8") for path in CODE)
    assert not re.search(r"trust_remote_code\s*=\s*True", text)
    # Without the argument, transformers asks on stdin, and the answer `y` runs the model folder's own code.
    loads = [node for path in CODE for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    loads = [node for node in loads if isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"]
    automatic = [node for node in loads if ast.unparse(node.func).lower().startswith("auto")]
    assert len(automatic) >= 3
    for node in automatic:
        assert "trust_remote_code=False" in ast.unparse(node), ast.unparse(node)
    assert not re.search(r"torch\.load\((?!path, weights_only=True)|pickle\.load", text)


OPENERS = re.compile(
    r"^open$|\.(open|read_text|read_bytes|fromfile|loadtxt|read_index|read_csv)$|(^|\.)(safe_open|load_file)$"
    r"|^(json|yaml|np|numpy|torch|pickle|tomllib)\.(load|loads|safe_load|compose)$"
)
"""Functions that open or parse a file."""

DOORS = ("echo_ft/inputs.py", "echo_ft/images/decode.py")
"""The modules that open files from outside."""

OTHER_OPENERS = {
    ("data_prep/knowledge.py", "yaml.compose"): "text that read_yaml has checked",
    ("echo_ft/config.py", "os.open"): "the null device",
    ("echo_ft/files.py", "os.open"): "what was just written, to flush it",
    ("echo_ft/processes.py", "os.open"): "a temporary file or folder, to lock it",
    ("echo_ft/drawn/stations.py", "Image.open"): "a JPEG that it has just encoded in memory",
    ("echo_ft/html.py", "(folder / name).read_text"): "a part of a template of this project",
    ("echo_ft/images/corruptions.py", "Image.open"): "a JPEG that it has just encoded in memory",
    ("echo_ft/export/vllm.py", "safe_open"): "names of tensors, by safetensors",
    ("echo_ft/inference/run_folder.py", "json.loads"): "what it has just encoded",
    ("echo_ft/model/adapter_layers.py", "safe_open"): "names of tensors, by safetensors",
    ("echo_ft/processes.py", "path.read_bytes"): "the state of a process, from the kernel",
    ("echo_ft/provenance.py", "_module_file(package, module).read_text"): "source files of this package",
    ("echo_ft/retrieval/descriptor_cache.py", "np.load"): "descriptors that a build stored, without pickle",
    ("echo_ft/retrieval/products.py", "np.load"): "descriptors of a bundle, without pickle",
    ("echo_ft/retrieval/index.py", "faiss.read_index"): "an index that a build stored",
    ("echo_ft/tracking.py", "json.loads"): "what it has just encoded",
    ("echo_ft/tracking.py", "file.read_text"): "the id of a run that it has written",
    ("echo_ft/training/checkpoints.py", "json.loads"): "state that training saved",
    ("echo_ft/training/checkpoints.py", "(checkpoint / 'trainer_state.json').read_text"): "state that training saved",
    ("echo_ft/training/option_changes.py", "json.loads"): "state that training saved",
    ("echo_ft/training/option_changes.py", "file.read_text"): "state that training saved",
    ("echo_ft/training/mask_loss.py", "load_file"): "heads that training saved, by safetensors",
    ("train/doctor.py", "limit.read_text"): "the memory limit of a container, from the kernel",
}
"""All other calls in the library and the commands that open or parse files, and what they read."""


def writes(call: ast.Call) -> bool:
    """Whether a call opens a file for writing or appending."""
    modes = [one for one in (*call.args, *(k.value for k in call.keywords)) if isinstance(one, ast.Constant)]
    return any(re.fullmatch(r"[wax]b?\+?", str(mode.value)) for mode in modes)


def test_one_module_opens_files_from_outside():
    found = set()
    for path in (path for path in LIGHT if "tiny" not in path.relative_to(ROOT).parts):
        name = path.relative_to(ROOT).as_posix()
        for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            if name not in DOORS and OPENERS.search(called) and not writes(call):
                found.add((name, called))
    assert found == {*OTHER_OPENERS}, "open files by echo_ft.inputs or echo_ft.images.decode, or say why not"


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    kinds = {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".jinja", ".cff"}
    return [path for name in listed.stdout.split("\0") if (path := ROOT / name).suffix in kinds and path.is_file()]


def test_no_machine_path_is_committed():
    for path in tracked():
        found = re.search(r"(?<![\w.])/(?:home|root|Users|tmp)/\w+", path.read_text(encoding="utf-8"))
        assert not found, f"{path.relative_to(ROOT)}: {found.group()}"


def test_retired_names_do_not_come_back():
    pattern = re.compile(rf"\b({'|'.join(RETIRED)})\b")
    for path in tracked():
        if path != Path(__file__).resolve() and path.name != "tokenizer.json":  # a vocabulary has any word
            found = pattern.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)} says {found.group()}"


def test_readme_maps_every_folder_of_the_library():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [street for street in STREETS if not re.search(rf"\b{street}/", readme)]
    assert not missing
