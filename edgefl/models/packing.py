"""A model in one file: tensors that lie in other files beside it are packed into it.

Invariant: the result refers to no other file; its bytes are the source's own if the source referred to none.
"""

from __future__ import annotations

import mmap
from pathlib import Path

from edgefl.errors import ConfigError, MissingExtra

MAX_FILE_BYTES = (2 << 30) - 1  # of a protobuf message, so of an ONNX file
_MARK = b"location"  # a key in each reference to another file


def packed(path: Path, folder: Path) -> Path:
    """Return the path of a model in one file, in `folder` if it had to be packed; raises ConfigError."""
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} is empty; expected an ONNX file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(_too_large(path, path.stat().st_size))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        if text.find(_MARK) < 0:
            return path
    try:
        import onnx
        from google.protobuf.message import DecodeError, EncodeError
        from onnx.external_data_helper import _get_all_tensors, load_external_data_for_model, uses_external_data
    except ImportError as cause:
        raise MissingExtra("packing a model's external data", "train") from cause
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError:
        return path  # not ONNX, as whoever opens it will say
    outside = [tensor for tensor in _get_all_tensors(model) if uses_external_data(tensor)]
    if not outside:
        return path
    names = sorted({entry.value for tensor in outside for entry in tensor.external_data if entry.key == "location"})
    sizes = [beside.stat().st_size for name in names if (beside := path.parent / name).is_file()]
    if (total := path.stat().st_size + sum(sizes)) > MAX_FILE_BYTES:
        raise ConfigError(_too_large(path, total))
    try:
        load_external_data_for_model(model, str(path.parent))
        target = folder / path.name
        onnx.save(model, target)
    except (OSError, ValueError, onnx.checker.ValidationError, EncodeError) as cause:
        raise ConfigError(
            f"{path} keeps tensors in {', '.join(names)}, which cannot be packed into one file: {cause}. "
            "These files belong into the same folder"
        ) from cause
    return target


def refuse_too_large(name: str, num_bytes: int) -> None:
    """Raise ConfigError if a model with so many bytes of tensors cannot be one ONNX file."""
    if num_bytes > MAX_FILE_BYTES:
        raise ConfigError(_too_large(name, num_bytes))


def _too_large(path: Path | str, num_bytes: int) -> str:
    return (
        f"{path} has {num_bytes} bytes with all its tensors; a release is one ONNX file of less than 2 GiB, the limit "
        "of its format. Parameters of any size can be trained and kept (`edgefl run --out`). Publish a smaller model, "
        "for example with weights in fp16 or int8"
    )
