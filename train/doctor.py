"""Show what this machine can run, what is missing and how to install it: `python -m train.doctor [--json]`.

Checks Python, packages, memory, disk, GPUs, access to the Hugging Face hub, stored weights and tools. Exits with status
1 if anything the demo needs is missing. Everything else is optional.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from huggingface_hub import constants, try_to_load_from_cache
from packaging.requirements import Requirement

from echo_ft import config as configs
from echo_ft.errors import EchoError
from echo_ft.model.loading import indexed_files
from echo_ft.terminal import format_gib

GIB = 2**30
DEMO_MEMORY, DEMO_DISK = 7 * GIB, 2 * GIB
"""Total memory and free disk space that the demo needs, in bytes. Machines sold with 8 GB have a little less."""

HUB_SECONDS = 5.0
"""How long to wait for the hub's answer."""

WEIGHTS = {"Qwen/Qwen2-VL-2B-Instruct": 4.5, "Qwen/Qwen2-VL-7B-Instruct": 16.6}
"""Published models in the recipes, and the disk space that their weights take, in GiB."""

TOOLS = {
    "git": ("records the commit in datasets, adapters and runs", "apt install git"),
    "make": ("make demo and make test", "apt install make"),
    "g++": ("ZeRO with offload to the CPU, for which DeepSpeed compiles its optimizer", "apt install g++"),
    "chromium": ("make pictures, and the tests of the pages", "apt install chromium"),
    "npm": ("the tests with the published vocabulary", "apt install npm"),
}
"""Programs, what they are for, and how to get them on Debian or Ubuntu. Only the commands named here need them."""

ABILITIES = (
    ("run the 2B", 7.5),
    ("train the 2B", 8.9),
    ("run the 7B", 19.6),
    ("train the 7B at half of MMAD's pixel budget", 19.4),
    ("train the 7B at MMAD's pixel budget", 20.9),
    ("train the 2B without gradient checkpointing", 63.7),
)
"""Tasks for one GPU with LoRA in bf16, and the GiB that `train.memory` estimates for the largest role."""

GPU_MARGIN = (1.1, 1.0)
"""A factor for an estimate, and a number of GiB to add afterwards. They allow for fragmentation and CUDA itself."""


@dataclass(frozen=True)
class DoctorConfig:
    """Options of `python -m train.doctor`."""

    json: bool = field(default=False, metadata={"help": "Print one JSON object."})


@dataclass(frozen=True)
class Check:
    """The result of one check, and what to do if anything is missing."""

    name: str
    found: str
    remedy: str = ""
    """Empty if nothing is missing."""
    needed: bool = False
    """Whether the demo needs it."""

    @property
    def state(self) -> str:
        """`ok`, or else `missing` if the demo needs it and `optional` if not."""
        return "ok" if not self.remedy else "missing" if self.needed else "optional"


def main(argv: list[str]) -> None:
    """Check this machine and print the result. Exits with 1 if the demo cannot run."""
    (config,) = configs.parse([DoctorConfig], argv)
    gpus = find_gpus()
    checks = [
        *check_packages(importlib.metadata.requires("echo-ft") or ()),
        check_memory(total_memory()),
        check_disk(Path.cwd(), shutil.disk_usage(Path.cwd()).free),
        check_gpus(gpus),
        check_hub(os.environ),
        *check_weights(),
        *(check_tool(name) for name in TOOLS),
    ]
    abilities = list_abilities([memory for _, memory in gpus])
    missing = [check for check in checks if check.state == "missing"]
    if config.json:
        shown = [{**asdict(check), "state": check.state} for check in checks]
        print(json.dumps({"ready": not missing, "checks": shown, "abilities": abilities}, ensure_ascii=False))
    else:
        print_result(checks, abilities)
    if missing:
        sys.exit(1)


def print_result(checks: Sequence[Check], abilities: Mapping[str, bool]) -> None:
    """Print the checks, then what to do, then what this machine can run."""
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.state:<8}  {check.name:<{width}}  {check.found}")
    for state, title in (("missing", "The demo needs:"), ("optional", "Other commands need:")):
        chosen = [check for check in checks if check.state == state]
        if chosen:
            print(f"\n{title}")
            print("\n".join(f"  {check.name}: {check.remedy}" for check in chosen))
    print("\nThis machine can, according to estimates from train.memory that were not measured on a GPU:")
    for ability, possible in abilities.items():
        print(f"  {'yes' if possible else 'no ':<3}  {ability}")


def check_packages(requirements: Sequence[str]) -> list[Check]:
    """Compare the installed packages with the project's requirements: one check for the core, one for each extra."""
    wanted: dict[str, list[Requirement]] = {"": []}
    for requirement in map(Requirement, requirements):
        extra = str(requirement.marker).partition("==")[2].strip(" \"'") if requirement.marker else ""
        if requirement.name != "echo-ft":
            wanted.setdefault(extra, []).append(requirement)
    checks = [Check("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")]
    for extra, members in wanted.items():
        faults = [fault for member in members if (fault := package_fault(member))]
        found = "; ".join(faults) or f"{len(members)} of {len(members)} installed"
        # Gradio (6.31), in the extra serving, needs a different Pillow from the one that constraints.txt pins.
        remedies = {
            "": "pip install -c constraints.txt -e .",
            "serving": "python3 -m venv env-page && env-page/bin/pip install -e '.[serving]'",
        }
        remedy = remedies.get(extra, f"pip install -c constraints.txt -e '.[{extra}]'")
        checks.append(Check(f"packages {extra}".strip(), found, remedy if faults else "", needed=not extra))
    return checks


def package_fault(requirement: Requirement) -> str:
    """Return what is wrong with a package, or an empty string."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is not installed"
    if requirement.specifier.contains(version, prereleases=True):
        return ""
    return f"{requirement.name} is {version}, not {requirement.specifier}"


def total_memory() -> int:
    """Return the memory of this machine in bytes, or of this container if it has less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(path)
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            total = min(total, int(text))
    return total


def check_memory(total: int) -> Check:
    """Check the main memory, in bytes."""
    # macOS does not say which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{format_gib(total)} GiB of memory, {cores} CPU core{'s' if cores != 1 else ''}"
    remedy = "" if total >= DEMO_MEMORY else "use a machine with 8 GB of memory or more"
    return Check("memory", found, remedy, needed=True)


def check_disk(folder: Path, free: int) -> Check:
    """Check the `free` bytes on the disk of `folder`."""
    remedy = "" if free >= DEMO_DISK else f"free {format_gib(DEMO_DISK - free)} GiB more, or work on another disk"
    return Check("disk", f"{format_gib(free)} GiB free in {folder}", remedy, needed=True)


def find_gpus() -> list[tuple[str, int]]:
    """Return the name and the memory in bytes of each GPU that torch can use, and nothing if torch is missing."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [(one.name, one.total_memory) for one in found]


def check_gpus(gpus: Sequence[tuple[str, int]]) -> Check:
    """Check the GPUs. A machine without a GPU runs everything with echo-tiny."""
    if gpus:
        return Check("gpu", ", ".join(f"{name} with {format_gib(memory)} GiB" for name, memory in gpus))
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", "none", "use a machine with an NVIDIA GPU to train or run the 2B and the 7B")
    remedy = "install a torch with CUDA (https://pytorch.org/get-started/locally), then check nvidia-smi"
    return Check("gpu", "torch cannot use the GPU", remedy)


def check_hub(environment: Mapping[str, str]) -> Check:
    """Check whether weights can be downloaded."""
    # huggingface_hub accepts the same values.
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Check("hub", "switched off by HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE to download weights")
    address = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "echo-ft"})
        urllib.request.urlopen(request, timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # the hub answered
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        remedy = "set HTTPS_PROXY, set HF_ENDPOINT to a mirror, or copy the weights into the HF_HOME folder"
        return Check("hub", f"{address} does not answer ({reason})", remedy)
    return Check("hub", f"{address} answers")


def check_weights() -> list[Check]:
    """Check which published models are stored, and whether there is room for the rest."""
    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    checks = []
    for name, size in WEIGHTS.items():
        state = download_state(name)
        room = "" if free >= size * GIB else f", which has no room for its {size} GiB: set HF_HOME to a larger disk"
        stored = state == "stored"
        found = f"{state} in {cache}" + ("" if stored else room)
        checks.append(Check(name.partition("/")[2], found, "" if stored else f"hf download {name}"))
    return checks


def download_state(name: str) -> str:
    """Return `stored`, `incomplete` or `not` for the weights of a model. An interrupted download leaves their index."""
    index = try_to_load_from_cache(name, "model.safetensors.index.json")
    if not isinstance(index, str):
        return "not"
    try:
        files = indexed_files(Path(index))
    except EchoError:
        return "incomplete"
    return "stored" if all(isinstance(try_to_load_from_cache(name, file), str) for file in files) else "incomplete"


def check_tool(name: str) -> Check:
    """Check one of TOOLS."""
    purpose, remedy = TOOLS[name]
    path = shutil.which(name)
    return Check(name, path or f"not found; for {purpose}", "" if path else remedy)


def list_abilities(gpu_memory: Sequence[int]) -> dict[str, bool]:
    """Return what this machine can run, given the bytes of memory of each GPU."""
    largest = max(gpu_memory, default=0) / GIB
    factor, margin = GPU_MARGIN
    abilities = {"build datasets, train and evaluate with echo-tiny, score runs": True}
    return abilities | {work: factor * need + margin <= largest for work, need in ABILITIES}


if __name__ == "__main__":
    configs.run_main(main)
