"""One line for people."""

from __future__ import annotations

from edge_agent.placement.text import placement_text

FACTS = {
    "placement": "split:h", "form": "fp16", "server": "10.0.0.1:9450", "breaker": "closed", "reason": "", "link": "",
    "remote": 7, "local": 0, "fallback": 0, "cascade_rows": 0, "refused": 0, "reasons": {}, "p50_ms": 3.0,
}  # fmt: skip


def test_what_is_told() -> None:
    assert placement_text({}) == ""
    assert placement_text(FACTS) == "split:h fp16, 7 by 10.0.0.1:9450"
    late = {"fallback": 2, "reasons": {"no answer within 90 ms": 2}, "link": "5 Mbit/s, 31 ms", "server": ""}
    assert placement_text(FACTS | late) == (
        "split:h fp16, 7 by no server, 2 by the fall-back, 5 Mbit/s, 31 ms, last reasons: no answer within 90 ms"
    )
    opened = {"breaker": "open", "reason": "UNAVAILABLE: refused", "refused": 1}
    assert placement_text(FACTS | opened).endswith("1 refused, open: UNAVAILABLE: refused")
    assert placement_text(FACTS | {"placement": "device", "form": "", "local": 3, "remote": 0}) == "device, 3 here"
