"""Credentials: where they are looked for, who may read them, and what is no credential."""

from __future__ import annotations

import stat

import pytest

from edgefl.errors import ConfigError
from edgefl.operator.credentials import load_credentials, tls_context, write_operator_credentials


@pytest.fixture
def written(tmp_path):
    return write_operator_credentials(tmp_path, "https://h:9480", "secret", b"pem")


def test_what_is_written_is_read_and_nobody_else_may(written):
    assert stat.S_IMODE(written.stat().st_mode) == 0o600
    seen = load_credentials(written)
    assert (seen.url, seen.token, seen.ca) == ("https://h:9480", "secret", "pem")


def test_writing_again_replaces_whole(written, tmp_path):
    write_operator_credentials(tmp_path, "https://other:1", "secret", b"pem")
    assert load_credentials(written).url == "https://other:1"
    assert [one.name for one in tmp_path.iterdir()] == ["operator.json"]


def test_the_environment_names_them(written, monkeypatch):
    monkeypatch.setenv("EDGEFL_CREDENTIALS", str(written))
    assert load_credentials().token == "secret"  # noqa: S105 - a test's


def test_without_any_the_error_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGEFL_CREDENTIALS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"\.config/edgefl/operator\.json: No such file.*`edgefl cloud start`"):
        load_credentials()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"url": "u", "token": "t"}'])
def test_a_file_that_holds_none_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"x\.json is not the operator\.json"):
        load_credentials(path)


@pytest.mark.parametrize("url", ["http://localhost:1", "http://127.0.0.1:9480", "http://[::1]:1"])
def test_plain_http_is_for_loopback(url):
    assert tls_context(url, "") is False


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1:1", "http://example.org", "ftp://localhost", "localhost:9480", "https://"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigError, match="is not of the form https://host:port"):
        tls_context(url, "")


def test_a_ca_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="no CA certificate"):
        tls_context("https://h:1", "no pem")
