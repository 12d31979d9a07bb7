"""What MODEL names: a file, a task or a release with its sample."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.errors import ConfigError, NotFound
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.connection import CloudConnection
from edgefl.operator.publish import publish_onnx
from edgefl.operator.splitting import open_source
from tests import onnx_models
from tests.edgefl.offload.graphs import rows

NO_CLOUD = CloudConnection(None, None)


@pytest.fixture
def affine(tmp_path):
    path = tmp_path / "affine.onnx"
    path.write_bytes(onnx_models.affine(features=4))
    return path


def test_a_release_comes_with_its_published_sample(http_plane, affine, tmp_path):
    np.savez(tmp_path / "given.npz", x=rows(2))
    with CloudClient(None, load_credentials(http_plane.credentials)) as client:
        publish_onnx(client, "m", affine, sample=tmp_path / "given.npz")
        publish_onnx(client, "m", affine)
    there = CloudConnection(None, http_plane.credentials)
    found = open_source("m", tmp_path, there, version=1)
    assert (found.who, found.path.read_bytes()) == ("m version 1", affine.read_bytes())
    assert found.feeds["x"].tolist() == rows(2)[:1].tolist()
    newest = open_source("m", tmp_path, there)
    assert newest.who == "m version 2"
    np.savez(tmp_path / "given.npz", x=rows(1, seed=9))
    own = open_source("m", tmp_path, there, sample=tmp_path / "given.npz")
    assert own.feeds["x"].tolist() == rows(1, seed=9).tolist()
    with pytest.raises(NotFound, match="model 'm' has no version 3; there are: 2, 1"):
        open_source("m", tmp_path, there, version=3)
    with pytest.raises(NotFound):
        open_source("other", tmp_path, there)


def test_a_release_of_an_older_version_gets_a_sample(http_plane, affine, tmp_path):
    http_plane.registry.publish("old", http_plane.blobs.put(affine.read_bytes()), {})
    found = open_source("old", tmp_path, CloudConnection(None, http_plane.credentials))
    assert [one["x"].shape for one in found.cases] == [(1, 4), (3, 4)]


def test_options_that_would_do_nothing_are_refused(affine, tmp_path):
    assert open_source(str(affine), tmp_path, NO_CLOUD).who == "affine.onnx"
    with pytest.raises(ConfigError, match=r"--version would do nothing here: .*affine\.onnx is a file"):
        open_source(str(affine), tmp_path, NO_CLOUD, version=1)
    with pytest.raises(ConfigError, match="--parameters would do nothing here: digits is a release"):
        open_source("digits", tmp_path, NO_CLOUD, parameters=affine)
    with pytest.raises(ConfigError, match="--sample would do nothing here: examples/digits is a task"):
        open_source("examples/digits", tmp_path, NO_CLOUD, sample=affine)
    with pytest.raises(ConfigError, match=r"none\.onnx: there is no such file"):
        open_source("none.onnx", tmp_path, NO_CLOUD)
