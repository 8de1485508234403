"""Fixtures for tests that check options without training."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from echo_ft.model.architectures import meta_model
from tests.conftest import ECHO_TINY, ROOT


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """The options of echo-tiny's decision maker, on a CPU."""
    options: dict[str, Any] = yaml.safe_load((ROOT / "recipes/tiny/decision_maker.yaml").read_text())
    return {**options, "model_name_or_path": str(ECHO_TINY), "use_cpu": True}


@pytest.fixture(scope="module")
def architecture():
    """echo-tiny on the meta device."""
    return meta_model(str(ECHO_TINY))
