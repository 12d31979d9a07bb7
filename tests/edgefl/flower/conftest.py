"""Flower apps on the devices of a fleet, which are played."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgefl.flower import FlowerRunResult, load_flower_app, run_on_fleet
from edgefl.flower.fleet.deliver import NodeMessage, deliver
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.protocols.messages import Deliver


@pytest.fixture
def on_fleet(http_plane, play_devices, tmp_path) -> Callable[..., FlowerRunResult]:
    """Run an app's folder on two played devices, whose parts are 0 and 1; their ClientApps are real."""
    states: dict[str, bytes] = {}

    def run(folder: Path, *names: str, config=None, gate=None, **options) -> FlowerRunResult:
        names = names or ("cam-0", "cam-1")

        def respond(device: str, plan: Deliver, content: bytes) -> bytes | None:
            if gate is not None and not gate(device, plan):
                return None
            order, state = tmp_path / f"{device}.order", tmp_path / f"{device}.state"
            order.write_bytes(content)
            state.write_bytes(states.get(device, b""))
            outcome = deliver(
                NodeMessage(
                    app=folder.name, folder=folder, order=order, envelope=plan.envelope, state=state,
                    options={"part": str(names.index(device)), "parts": str(len(names))},
                )
            )  # fmt: skip
            if outcome.state is not None:
                states[device] = outcome.state
            return outcome.reply

        play_devices(respond, *names)
        app = load_flower_app(folder)
        return run_on_fleet(app, lambda: CloudClient(None, load_credentials(http_plane.credentials)), config, **options)

    return run
