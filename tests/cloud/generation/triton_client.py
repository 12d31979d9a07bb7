"""A sequence by an unmodified tritonclient; a process of its own, because two copies of its stubs clash in one.

python triton_client.py PORT DIGEST FILE.npy     the hidden states (T, E) of a prompt; prints the token
"""

from __future__ import annotations

import queue
import sys

import numpy as np
import tritonclient.grpc as triton


def main() -> None:
    port, digest, path = sys.argv[1:]
    hidden = np.load(path)[None]
    responses: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        client.start_stream(lambda result, error: responses.put((result, error)), headers={"edgefl-device": "a"})
        for at, position, flags in ((0, 0, {"sequence_start": True}), (1, hidden.shape[1], {"sequence_end": True})):
            rows = hidden if at == 0 else hidden[:, -1:]
            given = triton.InferInput("hidden", rows.shape, "FP32")
            given.set_data_from_numpy(np.ascontiguousarray(rows))
            parameters = {"position": position, "release_digest": digest, "max_tokens": 20}
            client.async_stream_infer("tiny", [given], sequence_id=7, parameters=parameters, **flags)
            result, error = responses.get(timeout=60)
            if error is not None:
                raise SystemExit(str(error))
            sys.stdout.write(f"{result.as_numpy('token').item()}\n")
        client.stop_stream()


if __name__ == "__main__":
    main()
