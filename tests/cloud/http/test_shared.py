"""What routes share: strict bodies, 404s, and streams that block nobody."""

from __future__ import annotations

import contextlib
import dataclasses
import threading

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from cloud.http.shared import MAX_STREAMS, Body, known
from edgefl.errors import ConfigError, NotFound, ProtocolError
from edgefl.protocols import tls


class Wish(Body):
    model: str


def test_a_body_refuses_what_it_does_not_know():
    with pytest.raises(ValidationError, match="modle"):
        Wish.model_validate({"model": "m", "modle": "n"})


def test_what_a_url_names_and_is_not_there_is_not_found():
    def find(key):
        if key == "a":
            return 1
        raise (ConfigError if key == "b" else ProtocolError)(key)

    assert known(find, "a") == 1
    with pytest.raises(NotFound, match="b"):
        known(find, "b")
    with pytest.raises(ProtocolError):
        known(find, "c")


def test_many_open_streams_do_not_delay_other_requests(http_plane):
    parameters = http_plane.blobs.put_tree({"w": np.zeros(1, np.float32)})
    body = {"task": "t:t", "bundle": dataclasses.asdict(http_plane.blobs.put(b"z"))}
    body["parameters"] = dataclasses.asdict(parameters)
    header = {"Authorization": f"Bearer {http_plane.services.operator_token}"}
    context = tls.client_context(http_plane.ca.cloud.ca)
    limits = httpx.Limits(max_connections=None)
    with (
        httpx.Client(base_url=http_plane.url, verify=context, trust_env=False, headers=header, limits=limits) as http,
        contextlib.ExitStack() as streams,
    ):
        job = http.post("/v1/jobs", json=body).json()["id"]
        for _ in range(MAX_STREAMS + 4):
            answer = streams.enter_context(http.stream("GET", f"/v1/jobs/{job}/events"))
            assert answer.status_code == 200
        assert http.get("/v1/jobs").status_code == 200  # or httpx's own time limit would end it
    assert threading.active_count() < 3 * MAX_STREAMS
