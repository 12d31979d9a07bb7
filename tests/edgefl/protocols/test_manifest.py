"""Signed documents: what is signed comes back, and everything else is refused before it is read."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from edgefl.errors import ManifestRejected
from edgefl.protocols import manifest
from edgefl.protocols.manifest import Bundle, Desired, Release, check_blob, check_version, sign, verify
from edgefl.protocols.messages import BlobRef, Signed, decode, encode

KEY = manifest.new_fleet_key()
PUBLIC = KEY.public_key()
BLOB = BlobRef(sha256="0" * 64, size=3)
RELEASE = Release(model="digits", version=2, blob=BLOB, metrics={"accuracy": 0.95})
BUNDLE = Bundle(blob=BLOB, task="digits.task:task")
DESIRED = Desired(device="a", release=RELEASE, sequence=7)


@pytest.mark.parametrize("document", [RELEASE, BUNDLE, DESIRED], ids=lambda d: type(d).__name__)
def test_what_is_signed_comes_back_through_the_wire(document: Any) -> None:
    signed = decode(Signed, encode(sign(document, KEY)))
    assert verify(signed, type(document), PUBLIC) == document


def test_the_canonical_text_by_hand() -> None:
    wanted = '{"blob":{"sha256":"' + "0" * 64 + '","size":3},"kind":"bundle","task":"digits.task:task"}'
    assert manifest.canonical(BUNDLE) == wanted
    assert sign(BUNDLE, KEY).text == wanted


def test_nothing_that_is_no_number_is_signed() -> None:
    with pytest.raises(ValueError, match=r"holds .accuracy. that is nan, not a finite number"):
        sign(dataclasses.replace(RELEASE, metrics={"accuracy": float("nan")}), KEY)


def signed_text(text: str) -> Signed:
    signature = base64.b64encode(KEY.sign(text.encode())).decode()
    return Signed(text=text, key_id=manifest.key_id(PUBLIC), signature=signature)


GOOD = sign(RELEASE, KEY)
FORGED = {
    "tampered text": dataclasses.replace(GOOD, text=GOOD.text.replace('"version":2', '"version":3')),
    "a space more": dataclasses.replace(GOOD, text=GOOD.text + " "),
    "another key": sign(RELEASE, manifest.new_fleet_key()),
    "another key that says it is ours": dataclasses.replace(
        sign(RELEASE, manifest.new_fleet_key()), key_id=manifest.key_id(PUBLIC)
    ),
    "no signature": dataclasses.replace(GOOD, signature=""),
    "signature cut short": dataclasses.replace(GOOD, signature=base64.b64encode(b"\0" * 63).decode()),
    "signature is not base64": dataclasses.replace(GOOD, signature="é!"),
    "text that cannot be encoded": dataclasses.replace(GOOD, text="\ud800"),
}


@pytest.mark.parametrize("fault", FORGED)
def test_what_our_key_has_not_signed_is_refused(fault: str) -> None:
    with pytest.raises(ManifestRejected, match=f"not signed by the fleet's key {manifest.key_id(PUBLIC)}"):
        verify(FORGED[fault], Release, PUBLIC)


def test_a_document_of_another_kind_is_refused() -> None:
    """A good signature over a bundle must not install it as a release."""
    with pytest.raises(ManifestRejected, match="got a signed 'bundle', expected a release"):
        verify(sign(BUNDLE, KEY), Release, PUBLIC)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "3", '{"kind":"release"}', '{"kind":"release","model":3,"version":1}']
)
def test_a_signed_text_that_is_no_release_is_refused(text: str) -> None:
    with pytest.raises(ManifestRejected):
        verify(signed_text(text), Release, PUBLIC)


def test_a_blob_must_be_what_was_signed(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"abc")
    ref = BlobRef(sha256=hashlib.sha256(b"abc").hexdigest(), size=3)
    check_blob("model", ref, file)
    with pytest.raises(ManifestRejected, match="model has 3 bytes, but 4 were signed"):
        check_blob("model", dataclasses.replace(ref, size=4), file)
    file.write_bytes(b"abd")
    with pytest.raises(
        ManifestRejected, match=r"model has SHA-256 a52d159f262b2c6d\.\.\., but ba7816bf8f01cfea\.\.\. was signed"
    ):
        check_blob("model", ref, file)


@pytest.mark.parametrize("installed", [None, 1, 2])
def test_versions_rise(installed: int | None) -> None:
    check_version(DESIRED, installed)


def test_an_older_version_is_refused_unless_told_to_roll_back() -> None:
    with pytest.raises(ManifestRejected, match="digits version 2 is older than the installed 3"):
        check_version(DESIRED, 3)
    check_version(dataclasses.replace(DESIRED, rollback=True), 3)


def test_keys_come_back_and_are_private(tmp_path: Path) -> None:
    file = tmp_path / "fleet.key"
    manifest.save_private_key(KEY, file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert manifest.public_pem(manifest.load_private_key(file)) == manifest.public_pem(KEY)
    assert manifest.key_id(manifest.load_public_key(manifest.public_pem(KEY))) == manifest.key_id(PUBLIC)
    with pytest.raises(FileExistsError):
        manifest.save_private_key(KEY, file)


def test_another_kind_of_key_is_refused(tmp_path: Path) -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    file = tmp_path / "key"
    pem = serialization.Encoding.PEM
    file.write_bytes(other.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    with pytest.raises(ManifestRejected, match="not an Ed25519 private key"):
        manifest.load_private_key(file)
    with pytest.raises(ManifestRejected, match="not an Ed25519 public key"):
        manifest.load_public_key(other.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"no key")
    with pytest.raises(ManifestRejected, match="does not hold an unencrypted private key in PEM"):
        manifest.load_private_key(file)
    with pytest.raises(ManifestRejected, match="is not a public key in PEM"):
        manifest.load_public_key(b"no key")


def test_the_signature_covers_the_text_that_travels() -> None:
    assert json.loads(GOOD.text)["version"] == 2
    PUBLIC.verify(base64.b64decode(GOOD.signature), GOOD.text.encode())
