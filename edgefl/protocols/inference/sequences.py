"""Requests of a sequence: the hidden states that a device sends to the tail of a language model, one after the other.

By the Open Inference Protocol's ModelStreamInfer, with Triton's parameters for models with a state:

    sequence_id     names the sequence, among those of this device
    sequence_start  begins it, or begins it again, with an empty cache
    sequence_end    ends it; the request may have no rows

and ours: `position`, the tokens that the sequence has before these rows, so that a repeated or lost request is
noticed; `max_tokens` with the start, the most tokens that it will have; `more` if no token is wanted, because more of
the prompt follows; `temperature`, `top_p` and `seed` of the choice.
Input: `hidden` (1, T, E) in FP32, FP16 or BF16. Output: `token` (1, 1), INT64; (1, 0) with `more` or without rows.
https://docs.nvidia.com/deeplearning/triton-inference-server, "Stateful Models".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.offload.generation.sampling import Sampling
from edgefl.offload.generation.stage_info import CUT_FORMATS
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.service import REQUEST_DIGEST
from edgefl.protocols.inference.tensors import make_request, request_tensors
from edgefl.trees import Array, bfloat16

HIDDEN, TOKEN = "hidden", "token"
MAX_ID_CHARS = 128
_MAX_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceRequest:
    """Some next rows of a sequence."""

    sequence: str
    hidden: Array  # (T, E)
    starts: bool = False
    ends: bool = False
    position: int = 0  # tokens before these rows
    max_tokens: int = 0  # with the start
    wants_token: bool = True
    sampling: Sampling = field(default_factory=Sampling)


def encode_hidden(hidden: Array, form: str) -> Array:
    """Return float32 hidden states in a format of the cut; raises ProtocolError for values that it cannot hold."""
    if form not in CUT_FORMATS:
        raise ProtocolError(
            f"format {form!r} is not for language models, expected one of: {', '.join(CUT_FORMATS)}; int8 changes "
            "their tokens"
        )
    with np.errstate(over="ignore"):
        made = hidden.astype(bfloat16() if form == "bf16" else "<f2" if form == "fp16" else "<f4")
    if not np.isfinite(made).all():
        raise ProtocolError(
            f"hidden states have values that {form} cannot hold, the largest is {np.abs(hidden).max():.3g}; use bf16"
        )
    return made


def make_sequence_request(model: str, digest: str, given: SequenceRequest) -> pb.ModelInferRequest:
    """Return the message of a request; `digest` is that of the tail which the head belongs to."""
    request = make_request(model, {HIDDEN: given.hidden[None]})
    parameters = request.parameters
    parameters["sequence_id"].string_param = given.sequence
    parameters["sequence_start"].bool_param = given.starts
    parameters["sequence_end"].bool_param = given.ends
    parameters["position"].int64_param = given.position
    parameters[REQUEST_DIGEST].string_param = digest
    if given.starts:
        parameters["max_tokens"].int64_param = given.max_tokens
    if not given.wants_token:
        parameters["more"].bool_param = True
    if given.sampling != Sampling():
        parameters["temperature"].double_param = given.sampling.temperature
        parameters["top_p"].double_param = given.sampling.top_p
        parameters["seed"].int64_param = given.sampling.seed
    return request


def parse_sequence_request(request: pb.ModelInferRequest, hidden_size: int) -> SequenceRequest:
    """Return what a request says; raises ProtocolError for anything that `make_sequence_request` does not write."""
    values = {name: _value(one) for name, one in request.parameters.items()}
    tensors = request_tensors(request)
    if set(tensors) != {HIDDEN}:
        raise ProtocolError(f"the request has the inputs {sorted(tensors)}; expected {HIDDEN} alone")
    hidden = tensors[HIDDEN]
    if hidden.ndim != 3 or hidden.shape[0] != 1 or hidden.shape[2] != hidden_size:
        raise ProtocolError(f"input {HIDDEN} has shape {list(hidden.shape)}; expected [1, rows, {hidden_size}]")
    if hidden.dtype.name not in {"float32", "float16", "bfloat16"}:
        raise ProtocolError(f"input {HIDDEN} has dtype {hidden.dtype}; expected FP32, FP16 or BF16")
    if hidden.size and not np.isfinite(hidden).all():
        raise ProtocolError(f"input {HIDDEN} has NaN or infinity; check what computed it")
    sequence = values.get("sequence_id")
    if isinstance(sequence, int) and not isinstance(sequence, bool):
        sequence = str(sequence)
    if not isinstance(sequence, str) or not 0 < len(sequence) <= MAX_ID_CHARS or sequence == "0":
        raise ProtocolError(
            f"a language model's tail keeps a state: send sequence_id, a number above 0 or 1 to {MAX_ID_CHARS} "
            "characters, and sequence_start with its first request"
        )
    starts, ends, more = (_flag(values, name) for name in ("sequence_start", "sequence_end", "more"))
    if not hidden.shape[1] and not ends:
        raise ProtocolError(f"input {HIDDEN} has no rows; only a request with sequence_end may have none")
    return SequenceRequest(
        sequence=sequence, hidden=hidden[0], starts=starts, ends=ends,
        position=_count(values, "position", least=0), max_tokens=_count(values, "max_tokens", least=1) if starts else 0,
        wants_token=not more and bool(hidden.shape[1]),
        sampling=Sampling(
            temperature=_number(values, "temperature", 0.0), top_p=_number(values, "top_p", 1.0),
            seed=_count(values, "seed", least=0, default=0, most=(1 << 63) - 1),
        ),
    )  # fmt: skip


def _value(parameter: Any) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)


def _flag(values: Mapping[str, Any], name: str) -> bool:
    value = values.get(name, False)
    if type(value) is not bool:
        raise ProtocolError(f"parameter {name!r} is {value!r:.80}; expected a truth value")
    return value


def _count(
    values: Mapping[str, Any], name: str, *, least: int, default: int | None = None, most: int = _MAX_TOKENS
) -> int:
    value = values.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise ProtocolError(f"parameter {name!r} is {value!r:.80}; expected a whole number from {least} to {most}")
    return value


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name, default)
    if type(value) not in {int, float}:
        raise ProtocolError(f"parameter {name!r} is {value!r:.80}; expected a number")
    return float(value)
