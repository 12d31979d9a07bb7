"""The registry: versions of models, signed by the fleet's key.

Invariant: the versions of one model are 1, 2, 3, ... without a gap, even with concurrent publishers,
and a published version never changes.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud.state.blobs import BlobStore
from cloud.state.store import releases
from edgefl.errors import ConfigError, NotFound
from edgefl.protocols.manifest import Release, check_model_name, sign, verify
from edgefl.protocols.messages import BlobRef, Signed, from_json

Rows = list[dict[str, Any]]

MAX_METRICS = 64


class Registry:
    """All releases of a fleet. Methods may be called from any thread."""

    def __init__(
        self, engine: sa.Engine, blobs: BlobStore, fleet_key: Ed25519PrivateKey,
        clock: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._blobs = blobs
        self._key = fleet_key
        self._clock = clock
        self._publishing = threading.Lock()

    def publish(self, model: str, blob: BlobRef, metrics: Mapping[str, float]) -> Signed:
        """Sign a stored ONNX file as the model's next version; raises ConfigError."""
        _refuse(model, metrics)
        self._refuse_blob(blob)
        newest = sa.select(sa.func.max(releases.c.version)).where(releases.c.model == model)
        with self._publishing, self._engine.begin() as db:
            version = (db.scalar(newest) or 0) + 1
            signed = sign(Release(model=model, version=version, blob=blob, metrics=dict(metrics)), self._key)
            row = {"model": model, "version": version, "signed": dataclasses.asdict(signed)}
            db.execute(releases.insert().values(row | {"created_s": self._clock()}))
        return signed

    def release(self, model: str, version: int | None = None) -> Release:
        """Return a release, by default the newest; raises NotFound."""
        matching = releases.c.model == model
        if version is not None:
            matching &= releases.c.version == version
        newest_first = sa.select(releases.c.signed).where(matching).order_by(releases.c.version.desc()).limit(1)
        with self._engine.connect() as db:
            found = db.scalar(newest_first)
        if found is None:
            which = f"model {model!r}" if version is None else f"version {version} of model {model!r}"
            raise NotFound(f"there is no {which}; list them with `edgefl models list`")
        return self._verified(found)

    def list(self, model: str | None = None) -> Rows:
        """Return the releases, of one model or of all, the newest version first."""
        rows = releases.select().order_by(releases.c.model, releases.c.version.desc())
        if model is not None:
            rows = rows.where(releases.c.model == model)
        with self._engine.connect() as db:
            found = db.execute(rows).mappings().all()
        return [_shown(self._verified(row["signed"]), row["created_s"]) for row in found]

    def _verified(self, signed: Mapping[str, Any]) -> Release:
        return verify(from_json(Signed, signed), Release, self._key.public_key())

    def _refuse_blob(self, blob: BlobRef) -> None:
        if not self._blobs.has(blob.sha256):
            raise ConfigError(f"the model's file {blob.sha256[:16]}... is not in the cloud; upload it first")
        size = self._blobs.path(blob.sha256).stat().st_size
        if size != blob.size:
            raise ConfigError(f"the model's file {blob.sha256[:16]}... has {size} bytes, not {blob.size}")


def _refuse(model: str, metrics: Mapping[str, float]) -> None:
    check_model_name(model)
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise ConfigError(f"metric {wrong[0]!r} is {metrics[wrong[0]]}, not a finite number")
    if len(metrics) > MAX_METRICS:
        raise ConfigError(f"{len(metrics)} metrics; a release carries at most {MAX_METRICS}")


def _shown(release: Release, created_s: float) -> dict[str, Any]:
    facts = dataclasses.asdict(release)
    del facts["kind"]
    return facts | {"created_s": created_s}
