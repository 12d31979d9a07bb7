"""A connection may be ended that has ended by itself."""

import asyncio
import contextlib

from edgefl.protocols import tls
from edgefl.protocols.ports.transports import abort


def test_a_connection_is_ended_and_one_that_is_gone_stays_so(fleet_ca):
    async def main():
        came = asyncio.get_running_loop().create_future()
        context = tls.server_context(fleet_ca.cloud, client_certificates=False)
        server = await asyncio.start_server(lambda *streams: came.set_result(streams), "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            theirs = tls.client_context(fleet_ca.cloud.ca)
            reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=theirs, server_hostname="localhost")
            _, ours = await came
            abort(ours.transport)
            ours.close()
            with contextlib.suppress(OSError):
                assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            with contextlib.suppress(OSError):
                await asyncio.wait_for(writer.wait_closed(), 5)
            abort(ours.transport)
            abort(writer.transport)

    asyncio.run(main())
