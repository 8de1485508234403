"""echo-ft: fine-tune Qwen2-VL for industrial inspection with Echo's four expert roles.

The public names below are imported on first use, so `import echo_ft` loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "Case": "echo_ft.records",
    "EchoError": "echo_ft.errors",
    "Inspector": "echo_ft.inference.inspector",
    "Prediction": "echo_ft.records",
    "load_cases": "echo_ft.data.dataset",
    "load_dataset": "echo_ft.data.dataset",
}

__all__ = ["Case", "EchoError", "Inspector", "Prediction", "load_cases", "load_dataset"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
