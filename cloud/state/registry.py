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
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud.state.blobs import BlobStore
from cloud.state.store import releases
from edgefl.errors import ConfigError, NotFound
from edgefl.models.sample import MAX_SAMPLE_BYTES
from edgefl.protocols.inference.placement import Offload
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.manifest import Release, check_model_name, check_same_signature, sign, verify
from edgefl.protocols.messages import BlobRef, Signed, from_json

Rows = list[dict[str, Any]]

MAX_METRICS = 64
MAX_RECORD_BYTES, MAX_TOKENIZER_BYTES = 1 << 20, 256 << 20  # of a language model


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensors:
    """What a model takes and returns; older clients send none of it."""

    sample: BlobRef | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)  # datatype and shape by name
    outputs: Mapping[str, str] = field(default_factory=dict)
    base: BlobRef | None = None  # see `Release`
    patch: BlobRef | None = None
    text: TextStage | None = None


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

    def publish(
        self, model: str, blob: BlobRef, metrics: Mapping[str, float], tensors: Tensors | None = None, *,
        new_signature: bool = False, offload: Offload | None = None,
    ) -> Signed:  # fmt: skip
        """Sign a stored ONNX file as the model's next version; raises ConfigError.

        Raises SignatureChanged if its inputs or outputs differ from those of the version before, unless
        `new_signature` allows it.
        """
        _refuse(model, metrics)
        tensors = tensors or Tensors()
        self._refuse_blob("file", blob)
        if tensors.sample is not None:
            self._refuse_blob("sample", tensors.sample, MAX_SAMPLE_BYTES)
        for part, files in ({} if offload is None else offload.all_parts()).items():
            self._refuse_blob(f"part {part}", files.blob)
            self._refuse_blob(f"sample of part {part}", files.sample, MAX_SAMPLE_BYTES)
        if tensors.text is not None:
            self._refuse_blob("record", tensors.text.record, MAX_RECORD_BYTES)
            self._refuse_blob("tokenizer", tensors.text.tokenizer, MAX_TOKENIZER_BYTES)
        if (tensors.base is None) != (tensors.patch is None):
            raise ConfigError("a release on a base has both, the base's file and the patch; one of them is missing")
        if tensors.base is not None and tensors.patch is not None:
            self._refuse_blob("base", tensors.base)
            self._refuse_blob("patch", tensors.patch)
        newest = sa.select(releases.c.signed).where(releases.c.model == model)
        with self._publishing, self._engine.begin() as db:
            found = db.scalar(newest.order_by(releases.c.version.desc()).limit(1))
            before = None if found is None else self._verified(found)
            release = Release(
                model=model, version=before.version + 1 if before else 1, blob=blob, metrics=dict(metrics),
                sample=tensors.sample, inputs=dict(tensors.inputs), outputs=dict(tensors.outputs),
                offload=offload, base=tensors.base, patch=tensors.patch, text=tensors.text,
            )  # fmt: skip
            if before is not None and not new_signature:
                check_same_signature(release, before)
            signed = sign(release, self._key)
            row = {"model": model, "version": release.version, "signed": dataclasses.asdict(signed)}
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

    def _refuse_blob(self, what: str, blob: BlobRef, max_bytes: int | None = None) -> None:
        if not self._blobs.has(blob.sha256):
            raise ConfigError(f"the model's {what} {blob.sha256[:16]}... is not in the cloud; upload it first")
        size = self._blobs.path(blob.sha256).stat().st_size
        if size != blob.size:
            raise ConfigError(f"the model's {what} {blob.sha256[:16]}... has {size} bytes, not {blob.size}")
        if max_bytes is not None and size > max_bytes:
            raise ConfigError(f"the model's {what} has {size} bytes, allowed: {max_bytes}; publish a smaller one")


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
