"""Exchanges of a test case, with and without completions."""

from __future__ import annotations

from dataclasses import replace

from echo_ft.experts import roles
from echo_ft.records import Exchange, Upstream

UPSTREAM = Upstream(best=1, normal="An even surface.", guide="stain: look for this. A dark spot.", reasons={})


def exchanges_of(case):
    """Render the exchanges of all roles for a case, with fixed upstream outputs."""
    upstream = replace(UPSTREAM, reasons={q.id: f"Observe: a mark. Conclude: {q.text}" for q in case.seen.questions})
    return [exchange for role in roles.ROLES for exchange in roles.render(role, case.id, case.seen, upstream)]


def with_completions(exchange: Exchange, completions=("A", "stain: look for this.", "B")) -> Exchange:
    """Add completions to the branches of an exchange, in rotation."""
    branches = tuple(
        replace(branch, completion=completions[index % len(completions)])
        for index, branch in enumerate(exchange.branches)
    )
    return replace(exchange, branches=branches)
