"""`edgefl region`, as it is typed; starting a whole region is for the tests of whole processes."""

import pytest
from click.testing import CliRunner

from cloud.region.cli import region
from edgefl.errors import ConfigError, EnrolmentRefused, HomeError


def invoke(*arguments):
    return CliRunner().invoke(region, [str(one) for one in arguments])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ([], ConfigError, "--parent"),
        (["--parent", "https://cloud:9480"], EnrolmentRefused, "--name"),
        (["--parent", "https://cloud:9480", "--name", "north"], EnrolmentRefused, "cloud token --role region"),
    ],
)
def test_a_first_start_that_lacks_something(tmp_path, options, error, said):
    done = invoke("start", "--home", tmp_path / "north", *options)
    assert type(done.exception) is error
    assert said in str(done.exception)
    assert not (tmp_path / "north").exists()


def test_a_home_of_something_else(tmp_path):
    (tmp_path / "letter.txt").write_text("mine")
    done = invoke("start", "--home", tmp_path, "--parent", "https://c:1", "--name", "n", "--token", "t")
    assert isinstance(done.exception, HomeError)


@pytest.mark.parametrize("port", ["0", "65536", "x"])
def test_a_port_that_cannot_be(tmp_path, port):
    done = invoke("start", "--home", tmp_path, "--grpc-port", port)
    assert done.exit_code == 2
    assert "--grpc-port" in done.output


def test_the_help_has_an_example_to_copy():
    assert "edgefl region start --home" in invoke("start", "--help").output
