"""A tail as a server that computes in the test's process, and may refuse, hang or cut what the test says."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest

from edge_agent.generation.generator import Generator
from edge_agent.generation.tail_link import TailAddress, TailLink
from edgefl.offload.generation.blocks import Rows, numpy_engine
from edgefl.offload.generation.generate import generate, load_part
from edgefl.offload.generation.sampling import choose
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.sequences import TOKEN, parse_sequence_request
from edgefl.protocols.inference.service import STREAM_STATUS, inference_handler
from edgefl.protocols.inference.tensors import add_output, encode_raw
from tests.language_models import write_stages


class SmallTail:
    """The stream of a tail: its own sequences and positions, and what the test does to the request of a number."""

    def __init__(self, folder) -> None:
        self.part, self.sequences, self.requests = load_part(folder, numpy_engine()), {}, []
        self.faults = {}  # number of the request: (status, words), "cut", "die", "forget", "lose" or "hang"

    def __getattr__(self, name):
        async def unused(request, context):
            raise NotImplementedError

        return unused

    async def ModelStreamInfer(self, requests, context):  # noqa: N802
        async for data in requests:
            request = pb.ModelInferRequest.FromString(data)
            parsed = parse_sequence_request(request, self.part.info.spec.hidden)
            number = len(self.requests)
            self.requests.append(parsed)
            fault = self.faults.pop(number, None)
            if fault == "hang":
                await asyncio.Event().wait()
            if fault in {"die", "forget"}:
                self.sequences.clear()
            if fault in {"cut", "die"}:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")
            if isinstance(fault, tuple):
                await context.write(_refusal(*fault))
                continue
            response = self._answer(parsed)
            if fault == "lose":  # computed, but the response is lost
                await context.abort(grpc.StatusCode.UNAVAILABLE, "lost")
            await context.write(response)

    def _answer(self, given):
        if given.starts:
            self.sequences[given.sequence] = (self.part.new_cache(), None)
        cache, last = self.sequences.get(given.sequence, (None, None))
        if cache is None:
            return _refusal("ABORTED", "it is not here")
        if not len(given.hidden):
            self.sequences.pop(given.sequence)
            return _response(None)
        if last is not None and given.position + len(given.hidden) == cache.length:
            return _response(last)
        if given.position != cache.length:
            return _refusal("ABORTED", f"it has {cache.length}, not {given.position}")
        hidden = self.part.run(given.hidden.astype(np.float32), [Rows(cache, len(given.hidden))])
        token = None
        if given.wants_token:
            token = choose(self.part.logits(hidden[-1:])[0], given.sampling, cache.length)
        self.sequences[given.sequence] = (cache, token)
        return _response(token)


def _response(token):
    response = pb.ModelInferResponse(model_name="tiny")
    tokens = np.array([[] if token is None else [token]], np.int64)
    add_output(response, (TOKEN, "INT64", tokens.shape), encode_raw(tokens))
    return pb.ModelStreamInferResponse(infer_response=response)


def _refusal(status, words):
    response = pb.ModelInferResponse(model_name="tiny")
    response.parameters[STREAM_STATUS].string_param = status
    return pb.ModelStreamInferResponse(error_message=words, infer_response=response)


@pytest.fixture
def folders(tmp_path):
    write_stages(tmp_path, 2)
    write_stages(tmp_path, None)
    return tmp_path


@pytest.fixture
def expected(folders):
    def tokens(prompt, num, sampling):
        return list(generate([load_part(folders / "whole", numpy_engine())], prompt, num, sampling))

    return tokens


@pytest.fixture
def generating(folders, free_port):
    """Run a generator and its tail; yields both."""

    @contextlib.asynccontextmanager
    async def run(form="fp32"):
        tail, server = SmallTail(folders / "tail"), grpc.aio.server()
        server.add_generic_rpc_handlers((inference_handler(tail),))
        server.add_insecure_port(f"127.0.0.1:{free_port}")
        await server.start()
        head = load_part(folders / "head", numpy_engine())
        link = TailLink(TailAddress(target=f"127.0.0.1:{free_port}", model="tiny", digest=head.info.tail_digest,
                                    device="cam"))  # fmt: skip
        with ThreadPoolExecutor(1) as worker:
            generator = Generator(head, worker, link, form)
            try:
                yield generator, tail
            finally:
                await generator.close()
                await link.close()
                await server.stop(0)

    return run


async def all_of(tokens):
    return [one async for one in tokens]


def run(coroutine):
    return asyncio.run(coroutine)
