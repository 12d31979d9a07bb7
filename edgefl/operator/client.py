"""A client of the cloud's HTTPS plane, for operators: TLS pinned to the fleet's own CA, a deadline on everything.

A restarted cloud continues its jobs; `insist` retries until the cloud answers or the caller's `Patience` is over.

Every call raises CloudUnreachable if there is no answer, NotFound or CloudRefused if the cloud refuses, ProtocolError
if what answers does not speak as a cloud does.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Self, TypeVar
from urllib.parse import quote

import httpx

from edgefl.config import JobConfig
from edgefl.errors import BlobDamaged, CloudRefused, CloudUnreachable, ConfigError, NotFound, ProtocolError
from edgefl.operator.credentials import Credentials, load_credentials, tls_context, write_operator_credentials
from edgefl.protocols.addresses import other_scheme
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.fields import from_json, parse_json
from edgefl.protocols.labels import meant_by
from edgefl.protocols.messages import BlobRef, Division
from edgefl.records import EvaluationSpec
from edgefl.terminal.text import for_json, one_line

__all__ = [
    "CloudClient", "Credentials", "Patience", "insist", "load_credentials", "may_pass", "write_operator_credentials",
]  # fmt: skip

CONNECT_S = 10.0
ANSWER_S = 60.0  # timeout for the next bytes of an answer; streams send heartbeats far more often

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
MAX_TOLD = 8  # jobs in a message
NO_PARAMS: Mapping[str, str] = MappingProxyType({})

_NOT_WELL = 503
_PASSING = range(502, 505)

NO_ANSWER = (CloudUnreachable, CloudRefused, ProtocolError, BlobDamaged)  # what a call raises without one of use
_STRANGE = "{url} did not answer with JSON; is it an edgefl cloud?"

Json = dict[str, Any]

_T = TypeVar("_T")


def _untold(_reason: str, _seconds: float) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long to retry with a cloud that does not answer, or cannot at the moment."""

    seconds: float = 120.0
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], None] = time.sleep
    on_retry: Callable[[str, float], None] = _untold  # gets each new reason, and for how many seconds retries go on

    def pauses(self) -> Backoff:
        """Return how long to wait between attempts, in seconds."""
        return Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)


def insist(call: Callable[[], _T], patience: Patience | None = None) -> _T:
    """Call until the cloud answers; raises CloudUnreachable when patience ends. For what may be done twice."""
    patience = patience or Patience()
    until_s, pauses, told = patience.clock() + patience.seconds, patience.pauses(), ""
    while True:
        try:
            return call()
        except NO_ANSWER as error:
            if not may_pass(error):
                raise
            pause_s = pauses.next_s()
            if (left_s := until_s - patience.clock()) < pause_s:
                raise
            if (reason := str(error)) != told:
                told = reason
                patience.on_retry(reason, left_s)
        patience.pause(pause_s)


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later: the server was overloaded or stopping, or bytes were damaged."""
    return not isinstance(error, CloudRefused) or error.status in _PASSING


class CloudClient:
    """One operator's connection to one cloud. A context manager; not for several threads at once."""

    def __init__(self, url: str | None, credentials: Credentials) -> None:
        self.url = (url or credentials.url).rstrip("/")
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {credentials.token}"},
            verify=tls_context(self.url, credentials.ca),
            timeout=httpx.Timeout(ANSWER_S, connect=CONNECT_S),
            trust_env=False,  # a proxy cannot hold the fleet's certificate
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def health(self) -> Json:
        """Return the cloud's health; a cloud with failed parts answers, too."""
        with self._deadline():
            answer = self._http.get("/v1/health")
        not_well = answer.status_code == _NOT_WELL and _is_health(answer)
        return _record(_parsed(answer, answer.content) if not_well else _decoded(answer))

    def status(self) -> Json:
        """Return how the cloud is: version, parts, broker, ports, devices, jobs."""
        return self._get("/v1/status", NO_PARAMS)

    def devices(self) -> list[Json]:
        """Return the devices of the fleet, with the presence of each."""
        return self._list("/v1/devices")

    def regions(self) -> list[Json]:
        """Return the regions of the fleet, with what each connected one says of itself."""
        return self._list("/v1/regions")

    def assign_devices(self, pattern: str, parents: Sequence[str]) -> Json:
        """Set the ordered parents of the devices whose names match a pattern; return their names."""
        return self._json("POST", "/v1/devices/assign", {"pattern": pattern, "parents": list(parents)})

    def remove_device(self, name: str) -> Json:
        """Remove a device or a region from the fleet; return which devices have the region no longer as a parent."""
        removed: Json = self._json("DELETE", f"/v1/devices/{quote(name, safe='')}")
        return removed

    def device_log(self, name: str, num_lines: int, job: str = "") -> Json:
        """Return the end of a device's own log (`lines`, `cut`), which it uploads now; only about `job`, if given."""
        params = {"lines": str(num_lines)} | ({"job": job} if job else {})
        return self._get(f"/v1/devices/{quote(name, safe='')}/log", params)

    def new_token(self, valid_for_s: float) -> str:
        """Make a one-time enrolment token."""
        return str(self._json("POST", "/v1/tokens", {"valid_for_s": valid_for_s})["token"])

    def put_blob(self, data: bytes | BinaryIO, sha256: str) -> BlobRef:
        """Upload bytes with a known digest, which the cloud checks."""
        with self._deadline():
            content = data if isinstance(data, bytes) else iter(lambda: data.read(1 << 20), b"")
            answer = self._http.put("/v1/blobs", params={"sha256": sha256}, content=content)
        return from_json(BlobRef, _decoded(answer))

    def get_blob(self, sha256: str, file: BinaryIO) -> None:
        """Download a blob into a file that is open for writing."""
        with self._deadline(), self._http.stream("GET", f"/v1/blobs/{quote(sha256, safe='')}") as answer:
            if answer.is_error:
                answer.read()
            file.writelines(_checked(answer).iter_bytes(1 << 20))

    def submit_job(  # noqa: PLR0913 - the fields of the request
        self, task: str, bundle: BlobRef, parameters: BlobRef, buffers: Sequence[str], config: JobConfig,
        key: str | None = None, *, parted: bool = False, frozen: BlobRef | None = None, name: str | None = None,
        label: str | None = None, evaluation: EvaluationSpec | None = None, division: Division | None = None,
    ) -> str:  # fmt: skip
        """Start a job from uploaded parts, and return its id; repeated calls with the same `key` start one job.

        `name` is the task's name, `label` the job's; both are for people.

        If `parted`, `parameters` holds the trained tensors and the buffers, and `frozen` all others.
        """
        body = {"task": task, "bundle": bundle, "parameters": parameters, "buffers": buffers, "config": config}
        body |= {} if key is None else {"key": key}
        body |= {} if name is None else {"name": name}
        body |= {} if label is None else {"label": label}
        body |= {"parted": True, "frozen": frozen} if parted else {}
        body |= {} if evaluation is None else {"evaluation": evaluation}
        body |= {} if division is None else {"division": division}
        return str(self._json("POST", "/v1/jobs", body)["id"])

    def jobs(self) -> list[Json]:
        """Return every job, the newest first."""
        return self._list("/v1/jobs")

    def find_job(self, word: str) -> str:
        """Return the id of the job that is meant by its id, the beginning of its id, or its name (`run --name`).

        Raises NotFound if there is none, ConfigError if there are several.
        """
        found = meant_by(word, self._list("/v1/jobs", {"named": word}))  # a cloud that does not know `named` sends all
        if len(found) == 1:
            return str(found[0]["id"])
        if not found:
            raise NotFound(f"there is no job {word!r}; list them with `edgefl jobs list`")
        several = ", ".join(f"{one['id']} ({one.get('label') or one['name']})" for one in found[:MAX_TOLD])
        more = f" and {len(found) - MAX_TOLD} more" if len(found) > MAX_TOLD else ""
        raise ConfigError(f"{word!r} may be any of these jobs: {several}{more}. Give the id of one")

    def keep_metrics(self, job: str, number: int, metrics: Mapping[str, float]) -> None:
        """Store metrics of a job's model after a round; the last value of a name is kept."""
        body = {"metrics": {name: value if math.isfinite(value) else None for name, value in metrics.items()}}
        self._json("PUT", f"/v1/jobs/{quote(job, safe='')}/rounds/{number}/metrics", body)

    def job(self, job: str) -> Json:
        """Return a job with its rounds."""
        return self._json("GET", f"/v1/jobs/{quote(job, safe='')}")

    def job_log(self, job: str, num_lines: int, after: str = "") -> Json:
        """Return the end of what the cloud's log says of a job (`lines`, `cut`), since the `end` of an earlier call."""
        params = {"lines": str(num_lines)} | ({"after": after} if after else {})
        return self._get(f"/v1/jobs/{quote(job, safe='')}/log", params)

    def cancel_job(self, job: str) -> Json:
        """Stop a job, and return its state."""
        return self._json("POST", f"/v1/jobs/{quote(job, safe='')}/cancel")

    def pause_job(self, job: str) -> Json:
        """Pause a job after its open round, and return its state."""
        return self._json("POST", f"/v1/jobs/{quote(job, safe='')}/pause")

    def resume_job(self, job: str) -> Json:
        """Let a paused job continue, and return its state."""
        return self._json("POST", f"/v1/jobs/{quote(job, safe='')}/resume")

    def continue_job(  # noqa: PLR0913 - the fields of the request
        self, job: str, config: JobConfig, key: str, *, round_number: int | None = None, label: str | None = None,
        bundle: BlobRef | None = None, task: str | None = None,
    ) -> str:  # fmt: skip
        """Start a job from a kept round of another, and return its id; repeated calls with one `key` start one job."""
        body = {"config": config, "key": key, "round": round_number, "label": label, "bundle": bundle, "task": task}
        return str(self._json("POST", f"/v1/jobs/{quote(job, safe='')}/continue", body)["id"])

    def job_devices(self, job: str) -> list[Json]:
        """Return of each device whether it is in the job's latest cohort, and if not, why."""
        return self._list(f"/v1/jobs/{quote(job, safe='')}/devices")

    def job_events(self, job: str, after: int = 0) -> Iterator[Json]:
        """Yield the rounds after number `after` as they finish, then the job's end; over one connection."""
        return self._lines(f"/v1/jobs/{quote(job, safe='')}/events", {"after": after})

    def start_relay(self, app: str, bundle: BlobRef, name: str | None = None, label: str | None = None) -> str:
        """Start a relay for a Flower app from its uploaded bundle, and return its id."""
        body = {"app": app, "bundle": bundle} | ({} if name is None else {"name": name})
        body |= {} if label is None else {"label": label}
        return str(self._json("POST", "/v1/relays", body)["id"])

    def put_content(self, relay: str, data: bytes, sha256: str) -> None:
        """Upload the content of messages of a relay."""
        with self._deadline():
            _checked(self._http.put(f"/v1/relays/{relay}/contents/{sha256}", content=data))

    def drop_content(self, relay: str, sha256: str) -> None:
        """Delete a content that no message uses any more."""
        self._json("DELETE", f"/v1/relays/{relay}/contents/{sha256}")

    def send_messages(self, relay: str, messages: Sequence[Json]) -> None:
        """Send messages: number, device, envelope, content, within_s."""
        self._json("POST", f"/v1/relays/{relay}/messages", {"messages": messages})

    def relay_events(self, relay: str) -> Iterator[Json]:
        """Yield one line per unacknowledged reply, then the relay's end; over one connection."""
        return self._lines(f"/v1/relays/{relay}/events", {})

    def get_reply(self, relay: str, number: int) -> bytes:
        """Download a reply."""
        with self._deadline():
            return _checked(self._http.get(f"/v1/relays/{relay}/replies/{number}")).content

    def relay_done(self, relay: str, numbers: Sequence[int]) -> None:
        """Acknowledge messages: the cloud deletes them and their replies."""
        self._json("POST", f"/v1/relays/{relay}/done", {"numbers": list(numbers)})

    def end_relay(self, relay: str, state: str, error: str | None) -> None:
        """End a relay."""
        self._json("POST", f"/v1/relays/{relay}/end", {"state": state, "error": error})

    def publish(self, model: str, blob: BlobRef, metrics: Mapping[str, float], **more: Any) -> Json:
        """Publish an uploaded model as the next version, and return the release.

        `more`: its sample, inputs, outputs, offload and new_signature, as in `cloud.http.models.ReleaseRequest`.
        """
        body = {"blob": blob, "metrics": dict(metrics), **more}
        return self._json("POST", f"/v1/models/{quote(model, safe='')}/releases", body)

    def models(self) -> list[Json]:
        """Return every release."""
        return self._list("/v1/models")

    def model(self, name: str) -> list[Json]:
        """Return the releases of one model, the newest first."""
        return self._list(f"/v1/models/{quote(name, safe='')}")

    def start_rollout(
        self, model: str, version: int | None = None, to: Sequence[str] = ("all",), *, rollback: bool = False
    ) -> Json:
        """Tell devices which version to serve, and return the rollout."""
        body = {"model": model, "version": version, "to": list(to), "rollback": rollback}
        return self._json("POST", "/v1/rollouts", body)

    def rollouts(self) -> list[Json]:
        """Return every rollout, the newest first."""
        return self._list("/v1/rollouts")

    def rollout(self, rollout: str) -> Json:
        """Return a rollout with its devices."""
        return self._json("GET", f"/v1/rollouts/{quote(rollout, safe='')}")

    def rollout_events(self, rollout: str, within_s: float | None = None) -> Iterator[Json]:
        """Yield a rollout's status at each change until it is over or the time is up; over one connection."""
        params = {} if within_s is None else {"within_s": within_s}
        return self._lines(f"/v1/rollouts/{quote(rollout, safe='')}/events", params)

    def _lines(self, path: str, params: Mapping[str, Any]) -> Iterator[Json]:
        with self._deadline(), self._http.stream("GET", path, params=dict(params)) as answer:
            if answer.is_error:
                answer.read()
            for line in _checked(answer).iter_lines():
                yield _record(_parsed(answer, line))

    def _json(self, method: str, path: str, body: Any = None) -> Json:
        with self._deadline():
            content = None if body is None else json.dumps(body, default=_plain)
            answer = self._http.request(method, path, content=content, headers={"Content-Type": "application/json"})
        return _record(_decoded(answer))

    def _get(self, path: str, params: Mapping[str, str]) -> Json:
        with self._deadline():
            answer = self._http.get(path, params=dict(params))
        return _record(_decoded(answer))

    def _list(self, path: str, params: Mapping[str, str] = NO_PARAMS) -> list[Json]:
        with self._deadline():
            answer = self._http.get(path, params=dict(params))
        value = _decoded(answer)
        if not isinstance(value, list):
            raise ProtocolError(_STRANGE.format(url=answer.request.url))
        return [_record(one) for one in value]

    @contextmanager
    def _deadline(self) -> Iterator[None]:
        try:
            yield
        except httpx.TransportError as cause:
            reason = str(cause).rstrip(".") or type(cause).__name__
            broken = isinstance(cause, httpx.RemoteProtocolError | httpx.ReadError) or "SSL" in reason
            advice = (other_scheme(self.url) if broken else "") or (
                "Check that the cloud runs there, --cloud, and that the credentials are this cloud's."
            )
            raise CloudUnreachable(f"{self.url} did not answer: {reason}. {advice}") from cause


def _is_health(answer: httpx.Response) -> bool:
    return answer.headers.get("content-type", "").startswith("application/json") and "parts" in answer.text


def _checked(answer: httpx.Response) -> httpx.Response:
    """Raise the error that the cloud's refusal stands for."""
    if answer.is_success:
        return answer
    try:
        message = one_line(str(answer.json()["error"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        message = f"{answer.request.url} answered {answer.status_code} {answer.reason_phrase}; is it an edgefl cloud?"
    if answer.status_code == httpx.codes.NOT_FOUND:
        raise NotFound(message)
    raise CloudRefused(message, answer.status_code)


def _decoded(answer: httpx.Response) -> Any:
    return _parsed(_checked(answer), answer.content)


def _parsed(answer: httpx.Response, text: str | bytes) -> Any:
    """Return JSON from the cloud with all text on one line, safe for the operator's terminal."""
    try:
        return for_json(parse_json(text))
    except (ProtocolError, RecursionError) as cause:
        raise ProtocolError(_STRANGE.format(url=answer.request.url)) from cause


def _record(value: Any) -> Json:
    if not isinstance(value, dict):
        raise ProtocolError(f"the cloud sent a JSON {type(value).__name__}, expected an object")
    return value


def _plain(value: Any) -> Any:
    """Convert the records of a request to JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"a {type(value).__name__} cannot be sent in a request")
