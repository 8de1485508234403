"""A backend without a model, for tests of the pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from echo_ft.errors import EchoError
from echo_ft.records import Exchange, Generation


@dataclass
class ScriptedBackend:
    """Returns fixed strings for each role, and records the exchanges that it receives."""

    texts: dict[str, str] = field(
        default_factory=lambda: {"best": "2", "normal": "NORMAL", "guide": "GUIDE", "reason": "REASON", "decide": "B"}
    )
    broken: str = ""
    shown: list[Exchange] = field(default_factory=list)

    def __call__(self, role: str, exchanges: Sequence[Exchange]) -> list[list[Generation]]:
        for exchange in exchanges:
            if self.broken and self.broken in exchange.images:
                raise EchoError(f"{self.broken} is broken")
        self.shown += exchanges
        key = {"reasoning_expert": "reason", "decision_maker": "decide"}.get(role, "")
        letters = {"A": math.log(0.1), "B": math.log(0.3), "C": math.log(0.2), "D": math.log(0.2), "E": math.log(0.2)}
        return [[Generation(self.texts[key or branch.id], letters) for branch in e.branches] for e in exchanges]

    def roles(self) -> list[str]:
        return list(dict.fromkeys(exchange.role for exchange in self.shown))

    def of(self, role: str) -> list[Exchange]:
        return [exchange for exchange in self.shown if exchange.role == role]
