"""Whether a stage fits into the memory that this process may have; if not, in words what to do."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.offload.generation.stage_info import StageInfo

PROGRAM_BYTES = 110 << 20  # Python, numpy, gRPC and the tokenizer, in anonymous memory
CACHED_TOKENS = 1024  # whose keys and values have to fit
_MB = 1 << 20


def check_memory(info: StageInfo, limit_mb: int) -> None:
    """Raise ConfigError unless a stage fits into the limit (0 = none) and the system's limits of this process."""
    available, why = min(_limits(limit_mb))
    cache = CACHED_TOKENS * info.cache_bytes
    needed = info.weight_bytes + cache + PROGRAM_BYTES
    if needed <= available:
        return
    raise ConfigError(
        f"{info.what} needs about {needed / _MB:.0f} MB of memory here (weights {info.weight_bytes / _MB:.0f} MB, keys "
        f"and values of {CACHED_TOKENS} tokens {cache / _MB:.0f} MB, the program {PROGRAM_BYTES / _MB:.0f} MB); there "
        f"are {available / _MB:.0f} MB ({why}). {_remedy(info, int(available) - PROGRAM_BYTES)}"
    )


def _remedy(info: StageInfo, room: int) -> str:
    spec = info.spec
    embedding = 4 * spec.vocabulary * spec.hidden
    ends = embedding if info.is_first or info.is_last else 0
    block = max(1, (info.weight_bytes - ends) // max(1, info.end - info.start))
    most = (room - embedding) // (block + CACHED_TOKENS * spec.cache_bytes(1))
    if most < 0:
        return f"Its embedding alone has {embedding / _MB:.0f} MB: use a smaller model, or a device with more memory"
    most = min(most, spec.num_blocks)
    return (
        f"Split it so that at most {most} of its {spec.num_blocks} blocks are here, and the others in the cloud: "
        f"`edgefl offload split-decoder MODEL --cut {most} --out DIR`, then `edgefl cloud generate DIR/tail` there and "
        "`edgefl agent start --generate DIR/head --generate-tail HOST:PORT` here"
    )


def _limits(limit_mb: int) -> Iterator[tuple[float, str]]:
    """Yield what limits this process's memory, in bytes, and its name."""
    yield float("inf"), "no limit"
    if limit_mb:
        yield limit_mb * _MB, "--generate-memory-mb"
    for number, name in ((resource.RLIMIT_DATA, "RLIMIT_DATA"), (resource.RLIMIT_AS, "RLIMIT_AS")):
        soft, _ = resource.getrlimit(number)
        if soft != resource.RLIM_INFINITY:
            yield soft, name
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            yield int(path.read_text(encoding="ascii")), "the cgroup's limit"
        except (OSError, ValueError):  # no such file, or `max`
            continue
    yield _machine_bytes(), "the machine's memory"


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # imports nothing: there may be no memory for it
