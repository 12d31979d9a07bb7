"""`rounds.select` for simulated clients: the fields of an expression from the population and its devices.

Invariant: what a client is does not depend on the engine; only what is learnt of it changes between rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from edgefl.choosing.expression import parse
from edgefl.choosing.facts import LEARNT, TAG, Value
from edgefl.choosing.history import History
from edgefl.errors import ConfigError
from edgefl.records import Answer, Plan, Traffic
from edgefl.rounds import Fleet
from edgefl.simulation.world.devices import Devices
from edgefl.simulation.world.schedule import NumSamples

SIMULATED = ("name", "mem_mb", "mem_total_mb", *LEARNT)  # and the tags


class ClientSelection:
    """Which clients of a population meet an expression."""

    def __init__(
        self, text: str, devices: Devices, tags: Mapping[str, Sequence[str]], num_samples: NumSamples, history: History
    ) -> None:
        self._expression = parse(text)
        unknown = [name for name in self._expression.fields if not name.startswith(TAG) and name not in SIMULATED]
        unknown += [name for name in self._expression.fields if name.startswith(TAG) and name[len(TAG) :] not in tags]
        if unknown:
            known = ", ".join([*SIMULATED, *(TAG + name for name in tags)])
            raise ConfigError(
                f"rounds.select reads {', '.join(unknown)}, which simulated clients do not have; they have {known}. "
                "Add tags with [population.tags]"
            )
        self._devices, self._tags, self._num_samples, self._history = devices, tags, num_samples, history
        self._changes = bool({*self._expression.fields} & {*LEARNT} - {"samples"})
        self._met: dict[str, bool] = {}  # if nothing that is learnt is read

    def meets(self, client: str, round_number: int) -> bool:
        """Whether a client may take part in this round."""
        if not self._changes and client in self._met:
            return self._met[client]
        learnt = self._history.facts(client, round_number)

        def facts(name: str) -> Value | None:
            if name.startswith(TAG):
                values = self._tags[name[len(TAG) :]]
                return values[self._devices.names.index(client) % len(values)]
            if name in {"mem_mb", "mem_total_mb"}:
                return self._devices.device(client).memory_mb
            if name == "samples":
                return float(self._num_samples(client))
            return client if name == "name" else learnt[name]

        met = not self._expression.why_not(facts)
        if not self._changes:
            self._met[client] = met
        return met


class SelectedFleet:
    """An engine, whose clients are those that meet the expression."""

    def __init__(self, inner: Fleet, meets: Callable[[str, int], bool], first_round: int) -> None:
        self._inner, self._meets, self._next_round = inner, meets, first_round

    def clients(self) -> Sequence[str]:
        """Return the clients that can take part in the next round."""
        return [client for client in self._inner.clients() if self._meets(client, self._next_round)]

    def collect(self, plan: Plan) -> Iterator[Answer]:
        """Send the plan and yield answers, as the engine does."""
        self._next_round = plan.round + 1
        return self._inner.collect(plan)

    def traffic(self) -> Traffic:
        return self._inner.traffic()
