"""Key and certificate of a home change together: a crash at any moment leaves a pair."""

import os
import shutil

import pytest

from edgefl.protocols import tls
from edgefl.protocols.certificates import pair
from edgefl.protocols.certificates.pair import replace_pair
from edgefl.protocols.tls import Identity


@pytest.fixture
def next_pair(fleet_ca, tmp_path):
    """Makes a key and a certificate for it."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        identity = Identity.in_folder(folder)
        certificate = tls.sign_request(fleet_ca.folder, tls.new_request(identity, "cam-1"), "cam-1")
        return identity.key.read_bytes(), certificate

    return make


@pytest.fixture
def home(tmp_path, fleet_ca, next_pair):
    folder = tmp_path / "home"
    folder.mkdir(mode=0o700)
    key, certificate = next_pair("first")
    tls.write_private(folder / "key.pem", key)
    (folder / "cert.pem").write_bytes(certificate)
    shutil.copy(fleet_ca.cloud.ca, folder / "ca.pem")
    return folder


def held(home):
    """The pair of a home; raises where key and certificate do not go together."""
    identity = Identity.in_folder(home)
    tls.client_context(identity.ca, identity)
    return identity.key.read_bytes(), identity.cert.read_bytes()


def test_pair_after_pair_and_the_former_keys_are_gone(home, next_pair):
    for name in ("second", "third"):
        one = next_pair(name)
        replace_pair(home, *one)
        assert held(home) == one
        assert (home / "key.pem").stat().st_mode & 0o777 == 0o600
    assert len(list(home.glob("pair-*"))) == 1


def test_a_home_with_its_pair_can_be_moved_and_copied(home, next_pair, tmp_path):
    one = next_pair("second")
    replace_pair(home, *one)
    shutil.copytree(home, tmp_path / "copy")
    home.rename(tmp_path / "moved")
    assert held(tmp_path / "copy") == held(tmp_path / "moved") == one


@pytest.mark.parametrize("links_before", [False, True])
def test_a_crash_at_any_moment_leaves_the_old_pair_or_the_new_one(home, next_pair, monkeypatch, links_before):
    if links_before:
        replace_pair(home, *next_pair("zeroth"))
    old, new = held(home), next_pair("second")

    class Crash(BaseException):
        pass

    def crash_at(number):
        calls = iter(range(1000))
        for name in ("mkdir", "fsync", "symlink", "rename", "replace", "unlink", "rmdir", "open"):
            real = getattr(os, name)

            def call(*arguments, real=real, **named):
                if next(calls) == number:
                    raise Crash
                return real(*arguments, **named)

            monkeypatch.setattr(pair.os, name, call)

    seen = set()
    for number in range(1000):
        with monkeypatch.context():
            crash_at(number)
            try:
                replace_pair(home, *new)
            except Crash:
                pass
            else:
                break
            finally:
                monkeypatch.undo()
        seen.add(held(home))
        assert held(home) in (old, new)
    assert number > 10
    assert seen >= {old}
    assert held(home) == new
