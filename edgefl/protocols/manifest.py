"""The signed documents that a device accepts, with the fleet's key (Ed25519, RFC 8032).

A signature covers the canonical JSON text (sorted keys, no spaces, ASCII), which is sent
unchanged. Invariant: a device checks signature, hash, size and version before it uses anything, and
goes back to an older version only if a signed `Desired` says `rollback`.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from edgefl.errors import ConfigError, ManifestRejected, ProtocolError, SignatureChanged
from edgefl.protocols.fields import Checked, from_json, limited, parse_json
from edgefl.protocols.inference.placement import Offload
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.messages import MAX_NAME_CHARS, BlobRef, Signed

MAX_TASK_CHARS = 500
MAX_PARENTS = 16
MAX_FORMER = 16  # parents that a device has left
_MODEL_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle(Checked):
    """A task's code: a zip of its folder, and where the task is inside it."""

    blob: BlobRef
    task: str = field(metadata=limited(max_chars=MAX_TASK_CHARS))  # module:attribute inside the bundle
    kind: str = "bundle"


@dataclass(frozen=True, kw_only=True, slots=True)
class Release(Checked):
    """A version of a model. Version numbers of a model only increase."""

    model: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    version: int = field(metadata=limited(least=0))  # from 1
    blob: BlobRef  # the ONNX file, or a language model's weights
    metrics: Mapping[str, float] = field(default_factory=dict)  # e.g. accuracy, accuracy_drop
    sample: BlobRef | None = None  # inputs and expected outputs (`edgefl.models.sample`); None in older releases
    inputs: Mapping[str, str] = field(default_factory=dict)  # datatype and shape by name; empty = not known
    outputs: Mapping[str, str] = field(default_factory=dict)
    offload: Offload | None = None  # how it is placed; None = on the device. Older devices serve the whole model
    base: BlobRef | None = None  # another ONNX file, from which the patch makes this one (`edgefl.models.adapters`)
    patch: BlobRef | None = None
    text: TextStage | None = None  # of a language model, whose `blob` are weights; None = `blob` is an ONNX file
    kind: str = "release"


@dataclass(frozen=True, kw_only=True, slots=True)
class Desired(Checked):
    """Which version of a model one device should serve. Of two documents, the one with the higher sequence wins."""

    device: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    release: Release
    sequence: int = field(metadata=limited(least=0))  # increases with every change for this device and model
    rollback: bool = False  # allows a version below the one installed
    kind: str = "desired"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParentAddress(Checked):
    """Where a device reaches the cloud, or a region."""

    name: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # `cloud`, or the region's
    url: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # https://host:port
    grpc: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # host:port
    broker: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))  # mqtts://host:port


@dataclass(frozen=True, kw_only=True, slots=True)
class Parents(Checked):
    """Where one device may connect: to the first that it reaches. The document with the highest sequence is valid."""

    device: str = field(metadata=limited(max_chars=MAX_NAME_CHARS))
    sequence: int = field(metadata=limited(least=0))  # increases with every change for this device
    parents: Sequence[ParentAddress] = field(metadata=limited(max_items=MAX_PARENTS))  # in its order
    # Regions that it may not connect to any more; they get this document too, to tell it so.
    former: Sequence[str] = field(default_factory=list, metadata=limited(max_items=MAX_FORMER))
    kind: str = "parents"


def check_model_name(name: str) -> None:
    """Raise ConfigError for an invalid model name: it is used as a folder's name on devices, and in URLs."""
    if not _MODEL_NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:80]!r} cannot be a model's name: expected 1 to 64 of a-z 0-9 . _ -, with first and last a "
            "letter or digit"
        )


def check_same_signature(release: Release, before: Release) -> None:
    """Raise SignatureChanged if a release takes or returns other tensors than the version before it.

    Of an older release, or from an older client, they are not known.
    """
    for what, now, then in (("inputs", release.inputs, before.inputs), ("outputs", release.outputs, before.outputs)):
        if now != then and now and then:
            raise SignatureChanged(
                f"the {what} of {release.model} would change: version {before.version} has {_told(then)}; this file "
                f"has {_told(now)}. Its clients may fail. Publish it under another name, or allow it: --new-signature"
            )


def _told(tensors: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {text}" for name, text in sorted(tensors.items()))


def new_fleet_key() -> Ed25519PrivateKey:
    """Create a fleet's signing key."""
    return Ed25519PrivateKey.generate()


def save_private_key(key: Ed25519PrivateKey, path: Path) -> None:
    """Write PEM with mode 0600; the file must not exist yet."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read what `save_private_key` wrote; raises ManifestRejected for anything else."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as cause:
        raise ManifestRejected(f"{path} does not hold an unencrypted private key in PEM: {cause}") from cause
    if not isinstance(key, Ed25519PrivateKey):
        raise ManifestRejected(f"{path} holds a {type(key).__name__}, not an Ed25519 private key")
    return key


def public_pem(key: Ed25519PrivateKey) -> bytes:
    """Return the public key, as devices store it."""
    return key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def load_public_key(pem: bytes) -> Ed25519PublicKey:
    """Read a public key; raises ManifestRejected for anything else."""
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as cause:
        raise ManifestRejected(f"the fleet key is not a public key in PEM: {cause}") from cause
    if not isinstance(key, Ed25519PublicKey):
        raise ManifestRejected(f"the fleet key is a {type(key).__name__}, not an Ed25519 public key")
    return key


def key_id(key: Ed25519PublicKey) -> str:
    """Return the first 16 hex digits of the key's SHA-256: enough to identify the key."""
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return hashlib.sha256(raw).hexdigest()[:16]


def canonical(document: Any) -> str:
    """Return the canonical JSON text of a document; raises ValueError for NaN and infinity."""
    return json.dumps(dataclasses.asdict(document), sort_keys=True, separators=(",", ":"), allow_nan=False)


def sign(document: Bundle | Release | Desired | Parents, key: Ed25519PrivateKey) -> Signed:
    """Sign a document with the fleet's key."""
    text = canonical(document)
    signature = base64.b64encode(key.sign(text.encode())).decode()
    return Signed(text=text, key_id=key_id(key.public_key()), signature=signature)


def verify(signed: Signed, schema: type[_T], key: Ed25519PublicKey) -> _T:
    """Return the document if its signature is valid; raises ManifestRejected otherwise."""
    what = schema.__name__.lower()
    try:
        key.verify(base64.b64decode(signed.signature, validate=True), signed.text.encode())
    except (InvalidSignature, ValueError) as cause:
        raise ManifestRejected(
            f"the {what} is not signed by the fleet's key {key_id(key)} (it names {signed.key_id}). "
            "Publish it through this fleet's cloud, or enrol the device again."
        ) from cause
    try:
        value = parse_json(signed.text)
        kind = value.get("kind") if isinstance(value, dict) else None
        if isinstance(value, dict) and kind != what:
            raise ManifestRejected(f"got a signed {kind!r:.80}, expected a {what}")
        return from_json(schema, value)
    except ProtocolError as cause:
        raise ManifestRejected(f"the signed {what} cannot be read: {cause}") from cause


def check_blob(name: str, ref: BlobRef, path: Path) -> None:
    """Raise ManifestRejected unless the file has exactly the size and SHA-256 that were signed."""
    size = path.stat().st_size
    if size != ref.size:
        raise ManifestRejected(f"{name} has {size} bytes, but {ref.size} were signed")
    with path.open("rb") as file:
        seen = hashlib.file_digest(file, "sha256").hexdigest()
    if seen != ref.sha256:
        raise ManifestRejected(f"{name} has SHA-256 {seen[:16]}..., but {ref.sha256[:16]}... was signed")


def check_version(desired: Desired, installed: int | None) -> None:
    """Raise ManifestRejected for a version below the installed one, unless it is a rollback."""
    version = desired.release.version
    if installed is not None and version < installed and not desired.rollback:
        raise ManifestRejected(
            f"{desired.release.model} version {version} is older than the installed {installed}. "
            "Only `edgefl rollout start --rollback` goes back."
        )
