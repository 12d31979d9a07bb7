"""What became of a placed model's requests, as `GET /v2/models/NAME/stats`.

The form is that of Triton's statistics extension, as far as it has a place for it; `placement` is ours.
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_statistics.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.placement.placed_model import PlacedModel


def stats_of(model: PlacedModel) -> Mapping[str, Any]:
    """Return the statistics of one model as JSON data."""
    counts = model.counts
    answered = counts.remote + counts.local + counts.fallback
    return {
        "model_stats": [
            {
                "name": model.name,
                "version": str(model.version),
                "inference_count": answered,
                "inference_stats": {
                    "success": {"count": answered},
                    "fail": {"count": counts.refused},
                },
                "placement": {
                    "current": model.current.name,
                    "breaker": model.breaker.state,
                    "remote": counts.remote,
                    "device": counts.local,
                    "fallback": counts.fallback,
                    "cascade_rows": counts.cascade_rows,
                    "reasons": dict(counts.reasons),
                },
            }
        ]
    }
