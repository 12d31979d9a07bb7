"""A bare ASGI app that only computes; uvicorn with uvloop and httptools, one process.

No checks, no limits, no second model, no change of releases.
    python -m benchmarks.serving_bare MODEL PORT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from edgefl.models.session import new_session

_Call = Callable[..., Awaitable[Any]]


def make_app(path: str) -> Callable[[dict[str, Any], _Call, _Call], Awaitable[None]]:
    """Return the application for one model."""
    session = new_session(Path(path), keeps_memory=False)
    (wanted,), (given,) = session.get_inputs(), session.get_outputs()

    async def app(scope: dict[str, Any], receive: _Call, send: _Call) -> None:
        length = next((int(value) for name, value in scope["headers"] if name == b"inference-header-content-length"), 0)
        message = await receive()
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        head = json.loads(body[:length] if length else body)
        tensor = head["inputs"][0]
        values = np.frombuffer(body, np.float32, offset=length) if length else np.array(tensor["data"], np.float32)
        (result,) = session.run(None, {wanted.name: values.reshape(tensor["shape"])})
        output: dict[str, Any] = {"name": given.name, "datatype": "FP32", "shape": result.shape}
        answer: dict[str, Any] = {"model_name": "cnn", "model_version": "1", "outputs": [output]}
        headers = []
        if length:
            output["parameters"] = {"binary_data_size": result.nbytes}
            text = json.dumps(answer).encode()
            headers = [(b"inference-header-content-length", str(len(text)).encode())]
            text += result.tobytes()
        else:
            output["data"] = result.reshape(-1).tolist()
            text = json.dumps(answer).encode()
        headers.append((b"content-length", str(len(text)).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    return app


def main() -> None:
    model, port = sys.argv[1:]
    uvicorn.run(
        make_app(model), port=int(port), loop="uvloop", http="httptools", lifespan="off", log_level="warning",
        access_log=False, proxy_headers=False, server_header=False, date_header=True, interface="asgi3",
    )  # fmt: skip


if __name__ == "__main__":
    main()
