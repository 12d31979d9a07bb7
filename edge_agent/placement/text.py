"""How a model is placed, in one line for people: for `edgefl agent status` and telemetry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def placement_text(facts: Mapping[str, Any]) -> str:
    """Return the line of facts of `edge_agent.placement.keeper`; empty if the model is served whole."""
    if not facts:
        return ""
    parts = [f"{facts['placement']} {facts['form']}".strip()]
    if facts["form"]:
        parts.append(f"{facts['remote']} by {facts['server'] or 'no server'}")
    parts += [f"{facts[key]} {words}" for key, words in _COUNTS.items() if facts[key]]
    if facts["link"]:
        parts.append(facts["link"])
    if facts["breaker"] != "closed":
        parts.append(f"{facts['breaker']}: {facts['reason']}")
    elif facts["reasons"]:
        parts.append("last reasons: " + "; ".join(facts["reasons"]))
    return ", ".join(parts)


_COUNTS: Mapping[str, str] = {
    "local": "here",
    "fallback": "by the fall-back",
    "cascade_rows": "rows by the small model",
    "refused": "refused",
}
