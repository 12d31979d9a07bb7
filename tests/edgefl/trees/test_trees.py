"""Trees: our bytes are safetensors' bytes, and a lying header is refused before anything is allocated."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from edgefl import trees
from edgefl.errors import ProtocolError
from edgefl.trees import SpooledTree, TensorSpec, Tree, read_tree, spec_of, write_tree

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
SHAPES: list[tuple[int, ...]] = [(), (0,), (3, 0, 2), (5,), (2, 3), (1, 1, 1, 4)]


def encode(tree: Tree) -> bytes:
    file = io.BytesIO()
    write_tree(tree, file)
    return file.getvalue()


def sample(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(7).integers(-100, 100, size=shape)
    return np.asarray(values).astype(dtype)


def everything() -> dict[str, np.ndarray]:
    return {f"{dtype}{shape}": sample(dtype, shape) for dtype in DTYPES for shape in SHAPES}


def assert_same(seen: Tree, wanted: Tree) -> None:
    assert list(seen) == list(wanted)
    for name, array in wanted.items():
        assert seen[name].dtype == array.dtype, name
        assert seen[name].shape == array.shape, name
        assert np.array_equal(seen[name], array), name


def spool(folder: Path, data: bytes) -> SpooledTree:
    file = folder / "tree"
    file.write_bytes(data)
    return SpooledTree(file)


def test_bytes_by_hand() -> None:
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    wanted = struct.pack("<Q", len(header)) + header + struct.pack("<ff", 1.0, -2.0)
    assert encode({"w": np.array([1.0, -2.0], np.float32)}) == wanted


def test_every_dtype_and_shape_comes_back() -> None:
    assert_same(read_tree(encode(everything())), everything())


def test_a_spooled_tree_is_the_tree(tmp_path: Path) -> None:
    spooled = spool(tmp_path, encode(everything()))
    assert_same(spooled, everything())
    assert len(spooled) == len(everything())
    assert spec_of(spooled) == spec_of(everything())


def test_a_spooled_tensor_cannot_be_written(tmp_path: Path) -> None:
    tensor = spool(tmp_path, encode({"w": np.zeros(3, np.float32)}))["w"]
    with pytest.raises(ValueError, match="read-only"):
        tensor[0] = 1


def test_encoded_size_is_known_before_encoding() -> None:
    assert trees.encoded_bytes(everything()) == len(encode(everything()))
    assert trees.tree_bytes({"a": np.zeros((2, 3), np.float32), "b": np.array(True)}) == 25


def test_an_empty_tree_is_a_tree() -> None:
    assert read_tree(encode({})) == {}


def test_strided_and_big_endian_arrays_are_written_by_value() -> None:
    square = np.arange(6, dtype=np.float32).reshape(2, 3)
    seen = read_tree(encode({"t": square.T, "s": square[:, ::2], "b": square.astype(">f4")}))
    assert np.array_equal(seen["t"], square.T)
    assert np.array_equal(seen["s"], square[:, ::2])
    assert np.array_equal(seen["b"], square)
    assert seen["b"].dtype == np.dtype("<f4")


def test_the_safetensors_library_reads_ours() -> None:
    seen = safetensors.numpy.load(encode(everything()))
    assert_same({name: seen[name] for name in everything()}, everything())


def test_we_read_the_safetensors_library(tmp_path: Path) -> None:
    data = safetensors.numpy.save(everything(), metadata={"made": "elsewhere"})
    for seen in (read_tree(data), spool(tmp_path, data)):
        assert set(seen) == set(everything())
        assert_same({name: seen[name] for name in everything()}, everything())


@pytest.mark.parametrize("dtype", ["c8", "O", "U3", "M8[s]"])
def test_a_dtype_the_wire_lacks_is_refused(dtype: str) -> None:
    with pytest.raises(ProtocolError, match=r"tensor 'w' has dtype .* be sent"):
        encode({"w": np.zeros(2, dtype)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (4,)])
def test_apply_undoes_subtract(dtype: str, shape: tuple[int, ...]) -> None:
    old, new = sample(dtype, shape), np.asarray(sample("i8", shape) * 3 + 1).astype(dtype)
    moved = trees.apply(old, trees.subtract(new, old))
    assert isinstance(moved, np.ndarray)
    assert (moved.dtype, moved.shape) == (new.dtype, new.shape)
    assert np.array_equal(moved, new)


def test_blocks_cover_everything_once() -> None:
    size = 2 * trees.BLOCK_ELEMENTS + 3
    covered = np.concatenate([np.arange(size)[block] for block in trees.blocks(size)])
    assert np.array_equal(covered, np.arange(size))
    assert list(trees.blocks(0)) == []


def test_a_spec_reads_like_a_tensor() -> None:
    assert str(TensorSpec((2, 3), np.dtype(np.float32))) == "float32[2, 3]"


# --- by enemy ---------------------------------------------------------------------------------------------------


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def forge(header: Any, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


GOOD = forge({"w": entry()})
LIES: dict[str, bytes] = {
    "nothing": b"",
    "no whole length": b"\0" * 7,
    "cut in the header": GOOD[:20],
    "cut in the data": GOOD[:-1],
    "too long": GOOD + b"\0",
    "huge header": struct.pack("<Q", 1 << 60) + b"{}",
    "header a little too large": struct.pack("<Q", trees.MAX_HEADER_BYTES + 1) + b"{}",
    "not JSON": forge(b"{"),
    "not UTF-8": forge(b'{"\xff": 1}'),
    "a list": forge([]),
    "nested too deeply": forge(b"[" * 100_000),
    "entry is no object": forge({"w": 3}),
    "no shape": forge({"w": {"dtype": "F32", "data_offsets": [0, 8]}}),
    "unknown dtype": forge({"w": entry(dtype="F8_E4M3")}),
    "dtype is a list": forge({"w": entry(dtype=["F32"])}),
    "shape is text": forge({"w": entry(shape="2")}),
    "shape is a number": forge({"w": entry(shape=2)}),
    "shape of fractions": forge({"w": entry(shape=[2.0])}),
    "shape is infinite": forge(b'{"w":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}'),
    "shape of truths": forge({"w": entry(shape=[True, 2])}),
    "negative shape": forge({"w": entry(shape=[-1, -2])}),
    "shape beyond memory": forge({"w": entry(shape=[1 << 62])}),
    "empty, yet beyond memory": forge({"w": entry(shape=[0, 1 << 62], data_offsets=[0, 0])}, b""),
    "too many dimensions": forge({"w": entry(shape=[1] * 65 + [2])}),
    "offsets too few": forge({"w": entry(data_offsets=[0])}),
    "offsets too many": forge({"w": entry(data_offsets=[0, 8, 16])}),
    "offsets of text": forge({"a": entry(data_offsets=["0", "8"]), "b": entry()}),
    "offsets nested": forge({"a": entry(data_offsets=[[0], 8]), "b": entry()}),
    "offsets negative": forge({"w": entry(data_offsets=[-8, 0])}),
    "offsets backwards": forge({"w": entry(data_offsets=[8, 0])}),
    "offsets too wide": forge({"w": entry(data_offsets=[0, 16])}, b"\0" * 16),
    "overlap": forge({"a": entry(), "b": entry(data_offsets=[4, 12])}, b"\0" * 12),
    "both at one place": forge({"a": entry(), "b": entry()}),
    "a hole": forge({"a": entry(), "b": entry(data_offsets=[12, 20])}, b"\0" * 20),
    "beyond the end": forge({"a": entry(data_offsets=[8, 16])}, b"\0" * 16),
    "name that cannot be encoded": forge(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
}


def test_the_forger_can_make_a_good_one(tmp_path: Path) -> None:
    assert read_tree(GOOD)["w"].tolist() == [0, 0]
    assert spool(tmp_path, GOOD)["w"].tolist() == [0, 0]


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_from_memory(lie: str) -> None:
    with pytest.raises(ProtocolError):
        read_tree(LIES[lie])


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_from_a_file(tmp_path: Path, lie: str) -> None:
    with pytest.raises(ProtocolError):
        spool(tmp_path, LIES[lie])


def test_a_refusal_does_not_repeat_an_enemy_at_length() -> None:
    forged = forge({"x" * 100_000: entry(data_offsets=[8, 16])}, b"\0" * 16)
    with pytest.raises(ProtocolError) as refusal:
        read_tree(forged)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_written_and_read_as_safetensors_does(shape: tuple[int, ...]) -> None:
    wanted = torch.from_numpy(np.asarray(sample("f4", shape) / 8)).to(torch.bfloat16)
    array = sample("f4", shape) / np.float32(8)
    data = encode({"w": np.asarray(array.astype(trees.bfloat16())), "m": np.zeros(2)})
    assert torch.equal(safetensors.torch.load(data)["w"], wanted)
    seen = read_tree(safetensors.torch.save({"w": wanted}))["w"]
    assert (seen.dtype, seen.shape) == (trees.bfloat16(), shape)
    np.testing.assert_array_equal(seen.astype(np.float32), array)


@pytest.mark.parametrize("name", ["f2", "f4", "f8", "bfloat16"])
def test_what_is_floating(name: str) -> None:
    assert trees.is_float(trees.bfloat16() if name == "bfloat16" else np.dtype(name))
    assert not trees.is_float(np.dtype("i8"))
    assert not trees.is_float(np.dtype("?"))


def test_a_refusal_names_the_way_out() -> None:
    assert trees.why_not_sent(trees.bfloat16()) is None
    assert trees.why_not_sent(np.dtype(">f4")) is None
    assert "real and imaginary parts separately" in (trees.why_not_sent(np.dtype("c8")) or "")
    assert "convert it to one of them" in (trees.why_not_sent(np.dtype("O")) or "")


def test_only_tensors_above_the_limit_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE_BYTES", 100)
    assert not trees.is_large({"w": np.zeros(25, np.float32)})
    assert trees.is_large({"w": np.zeros(25, np.float32), "b": np.zeros(1, np.uint8)})


@pytest.mark.parametrize("length", [8, 4096 - 8, 4096, 2 * 4096 - 8])
def test_a_tree_without_bytes_is_read_wherever_its_data_would_begin(tmp_path: Path, length: int) -> None:
    """A part of a file that ends with it, at the border of a page: nothing is left that could be mapped."""
    head = json.dumps({"w": {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}}).encode()
    head = head.ljust(max(length, len(head)))
    data = struct.pack("<Q", len(head)) + head
    for before in (0, 4096):
        path = tmp_path / f"{before}"
        path.write_bytes(bytes(before) + data)
        tree = SpooledTree(path, (before, len(data)))
        assert (tree["w"].shape, tree["w"].dtype) == ((0, 3), np.float32)
        assert tree.read("w", slice(0, 0)).size == 0
