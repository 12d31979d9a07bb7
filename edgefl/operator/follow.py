"""Streams of events that survive a lost connection: they resume where they broke off, until patience ends.

A restarted cloud continues its jobs, so watching them continues, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from edgefl.errors import CloudUnreachable, ConfigError
from edgefl.operator.client import NO_ANSWER, CloudClient, Json, Patience, may_pass
from edgefl.process.log_tail import MAX_RECORDS

LOG_EVERY_S = 1.0


class Waits:
    """Gets every event of a stream; reports once what the cloud waits for, and once that the wait is over."""

    def __init__(self, tell: Callable[[str], None] | None) -> None:
        self._tell, self._waits = tell or (lambda _waiting: None), False

    def handle(self, event: Json) -> None:
        """Process an event: while a job waits, the stream's heartbeats say for what."""
        waiting = str(event.get("waiting") or "")
        if bool(waiting) != self._waits and "state" not in event:
            self._waits = bool(waiting)
            self._tell(waiting)


def follow_job(
    client: CloudClient, job: str, after: int = 0, patience: Patience | None = None, *,
    on_waiting: Callable[[str], None] | None = None,
) -> Iterator[Json]:  # fmt: skip
    """Yield each round after number `after` once, then the job's end; raises CloudUnreachable when patience ends.

    `on_waiting` gets what the cloud waits for, such as disk space, and an empty text when it continues.
    """
    seen = after

    def connect() -> Iterator[Json]:
        return client.job_events(job, seen)

    on_event = Waits(on_waiting).handle
    for event in _resumed(connect, lambda event: "state" in event, patience or Patience(), on_event=on_event):
        seen = max(seen, int(event.get("round", 0)))
        yield event


def follow_log(client: CloudClient, job: str, num_lines: int, patience: Patience | None = None) -> Iterator[Json]:
    """Yield the end of what the cloud's log says of a job, then once a second what is new, until the job has ended.

    Raises ConfigError if the cloud is too old to say what is new.
    """
    patience, after = patience or Patience(), ""

    def connect() -> Iterator[Json]:
        nonlocal after
        while True:
            found = client.job_log(job, MAX_RECORDS if after else num_lines, after)
            if "end" not in found:
                raise ConfigError("this cloud is too old for --follow: update it, or leave the option out")
            after = str(found["end"])
            yield found
            patience.pause(LOG_EVERY_S)  # what is new is asked for; the cloud does not send it

    return _resumed(connect, lambda found: not found["running"], patience)


def follow_rollout(
    client: CloudClient, rollout: str, within_s: float, patience: Patience | None = None
) -> Iterator[Json]:
    """Yield a rollout's status at each change, until one is not `running` or the time is up."""
    patience = patience or Patience()
    until_s = patience.clock() + within_s

    def connect() -> Iterator[Json]:
        return client.rollout_events(rollout, max(0.0, until_s - patience.clock()))

    return _resumed(connect, lambda status: status["state"] != "running", patience, until_s)


def follow_relay(
    client: CloudClient, relay: str, patience: Patience | None = None, *,
    on_event: Callable[[Json], None] = lambda _event: None,
) -> Iterator[Json]:  # fmt: skip
    """Yield a relay's replies (an unacknowledged one perhaps twice), then its end; `on_event` gets heartbeats, too."""
    return _resumed(
        lambda: client.relay_events(relay), lambda event: "state" in event, patience or Patience(), on_event=on_event
    )


def _resumed(
    connect: Callable[[], Iterator[Json]], is_last: Callable[[Json], bool], patience: Patience,
    until_s: float = math.inf, *, on_event: Callable[[Json], None] = lambda _event: None,
) -> Iterator[Json]:  # fmt: skip
    heard_s, pauses, told = patience.clock(), patience.pauses(), ""
    while True:
        try:
            for event in connect():
                heard_s, told = patience.clock(), ""
                pauses.reset()
                on_event(event)
                if "heartbeat" in event:
                    continue
                yield event
                if is_last(event):
                    return
            fault: Exception = CloudUnreachable("the cloud ended a stream of events before its end")
        except NO_ANSWER as error:
            if not may_pass(error):
                raise
            fault = error
            if (reason := str(error)) != told:
                told = reason
                patience.on_retry(reason, heard_s + patience.seconds - patience.clock())
        now_s, pause_s = patience.clock(), pauses.next_s()
        if now_s >= until_s:
            return
        if now_s + pause_s - heard_s > patience.seconds:
            raise fault
        patience.pause(min(pause_s, until_s - now_s))
