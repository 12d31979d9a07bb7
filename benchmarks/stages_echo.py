"""The floor of a call to a stage: a bare grpc.aio server, in a process of its own, that sends back what it gets.

python -m benchmarks.stages_echo PORT
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc

ECHO = "/benchmark.Echo/Echo"


async def main(port: int) -> None:
    """Serve until killed."""

    async def echo(request: bytes, _context: Any) -> bytes:
        return request

    server = grpc.aio.server()
    method = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark.Echo", {"Echo": method}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    print("ready", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
