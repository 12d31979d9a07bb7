"""The client of stage servers: formats, digests, addresses, and certificates that are renewed."""

from __future__ import annotations

import asyncio
import dataclasses
import os

import numpy as np
import pytest

from edge_agent.placement.tail_client import TailCall, TailClient, TailFailed
from edgefl.errors import ProtocolError
from edgefl.protocols.tls import Identity
from tests.edge_agent.placement.conftest import DIGEST

CALL = TailCall(model="m.2", digest=DIGEST, form="fp16", outputs=["y"])
H = {"h": np.ones((1, 4), np.float32)}


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "int8"])
def test_each_wire_format_and_what_a_call_costs(placed, form) -> None:
    async def run():
        async with placed() as (model, server, _):
            found = await model.tail.infer(dataclasses.replace(CALL, form=form), H, 60)
            assert found.outputs["y"].shape == (1, 3)
            assert server.seen[0].parameters["wire_format"].string_param == form
            assert server.seen[0].parameters["release_digest"].string_param == DIGEST
            assert found.num_bytes == len(server.seen[0].raw_input_contents[0]) + 12
            assert found.server_ms == 0.5
            assert found.total_ms > 0

    asyncio.run(run())


def test_a_ping_is_a_second_call_since_the_first_may_open_the_connection(placed) -> None:
    async def run():
        async with placed() as (model, server, _):
            assert await model.tail.ping_ms(60) > 0
            assert server.num_pings == 2

    asyncio.run(run())


def test_a_value_beyond_half_precision_is_sent_whole_and_nan_is_refused(placed) -> None:
    async def run():
        async with placed() as (model, server, _):
            await model.tail.infer(CALL, {"h": np.full((1, 4), 1e6, np.float32)}, 60)
            assert server.seen[0].parameters["wire_format"].string_param == "fp32"
            with pytest.raises(ProtocolError, match="has NaN"):
                await model.tail.infer(CALL, {"h": np.full((1, 4), np.nan, np.float32)}, 60)

    asyncio.run(run())


def test_a_server_that_knows_no_wire_formats_gets_plain_tensors(placed) -> None:
    """As Triton, which has no such properties and returns no time."""

    async def run():
        async with placed() as (model, server, _):
            server.formats = ""
            assert (await model.tail.infer(CALL, H, 60)).outputs["y"].shape == (1, 3)
            assert [one.name for one in server.seen[0].inputs] == ["h"]
            assert "wire_format" not in server.seen[0].parameters

    asyncio.run(run())


def test_another_release_is_seen_before_anything_is_sent(placed) -> None:
    async def run():
        async with placed() as (model, server, _):
            server.digest = "cd" * 32
            with pytest.raises(TailFailed, match="the stage server has another release: cdcd") as failed:
                await model.tail.infer(CALL, H, 60)
            assert (failed.value.status, failed.value.at_once) == ("FAILED_PRECONDITION", True)
            assert server.seen == []

    asyncio.run(run())


def test_addresses_that_are_none_dead_or_next(placed) -> None:
    async def run():
        nobody = TailClient([], None, "cam")
        with pytest.raises(TailFailed, match=r"no stage server is known: .* started without --stages"):
            await nobody.infer(CALL, H, 60)
        async with placed() as (_, _, process):
            client = TailClient(["127.0.0.1:1", f"127.0.0.1:{process.port}"], None, "cam")
            with pytest.raises(TailFailed, match="UNAVAILABLE") as failed:
                await client.infer(CALL, H, 60)
            assert not failed.value.at_once
            client.renew(elsewhere=True)
            assert client.address.endswith(str(process.port))
            await client.infer(CALL, H, 60)
            assert await client.ping_ms(60) > 0
            client.renew(elsewhere=True)
            assert client.address == "127.0.0.1:1"
            await client.close()

    asyncio.run(run())


def test_a_renewed_certificate_is_used_by_the_next_connection(tmp_path) -> None:
    async def run():
        identity = Identity(tmp_path / "k", tmp_path / "c", tmp_path / "ca")
        for path in (identity.key, identity.cert, identity.ca):
            path.write_text("none")
        client = TailClient(["127.0.0.1:1"], identity, "cam")
        client._stub()
        first = client._channel
        client.renew()
        assert client._channel is first
        os.utime(identity.cert, (1, 1))
        client.renew()
        assert client._channel is None
        await client.close()

    asyncio.run(run())
