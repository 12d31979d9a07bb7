"""An updater as tests have it: it loads and serves in the tests' own process, and they play its link."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import numpy as np

from edge_agent.link.channel import CloudChannel
from edge_agent.link.profile import load_profile
from edge_agent.releases.updater import Updater, UpdaterDependencies
from edge_agent.sessions import Models, load
from edgefl.protocols.manifest import load_public_key


class Here:
    """Loads and serves in this process, where the agent has another one for it."""

    def __init__(self) -> None:
        self.models, self.trials, self.forgotten = Models(), [], []
        self.before_load = None  # a coroutine function of the model: may wait, or raise

    async def prepare(self, model, *, trial):
        self.trials.append((model.version, trial))
        if self.before_load is not None:
            await self.before_load(model)
        served = await asyncio.to_thread(load, model.name, model.version, model.path, model.sample)
        return SimpleNamespace(
            switch=lambda: self.models.put(served), forget=lambda: self.forgotten.append(model.version)
        )

    def drop(self, name):
        self.models.drop(name)


class Device:
    """An updater and what it tells; tests play the link."""

    def __init__(self, home, until) -> None:
        self.until = until
        self.host, self.notes, self.changes = Here(), [], []
        self.models = self.host.models
        self.channel = CloudChannel(load_profile(home), home)
        self.updater = Updater(
            UpdaterDependencies(
                device="cam-1", home=home, fleet_key=load_public_key((home / "fleet.pub").read_bytes()),
                channel=self.channel, host=self.host, report=self.notes.append,
                changed=lambda: self.changes.append(self.models.versions()),
            )
        )  # fmt: skip

    def states(self) -> list[tuple[int, str]]:
        return [(note.version, note.state) for note in self.notes]

    def predict(self) -> float:
        return float(self.models.get("digits").run(["y"], {"x": np.ones((1, 3), np.float32)})[0][0, 0])

    async def install(self, *signed) -> None:
        """Hear wishes one by one, each until it is dealt with."""
        for one in signed:
            self.updater.handle(one)
            await self.settled()

    async def settled(self) -> None:
        await self.until(lambda: not self.updater._desired)
