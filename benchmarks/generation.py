"""A language model split between device and cloud: what fits, what the split costs, and many devices at one tail.

SmolLM2-135M-Instruct in float32, cut behind 6 of 30 blocks. The device's part runs in the agent's generation process,
whose memory the kernel limits to 512 MB (RLIMIT_DATA), or in this process; the tail in `edgefl cloud generate`.

    python -m benchmarks.generation [--quick] [--json F]
"""

from __future__ import annotations

import os

from edgefl.process.children import SHORT_WAITS

os.environ.update(SHORT_WAITS)  # as the agent's generation process has it, before numpy is imported

import asyncio
import contextlib
import itertools
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from benchmarks.generation_model import PROMPT, NoModel, stage_folders
from benchmarks.report import Row, Target, command
from benchmarks.stages import DEVICES, make_home, running
from edge_agent.generation.generator import Generator, TextJob
from edge_agent.generation.tail_link import TailAddress, TailLink
from edge_agent.generation.text import TextCodec
from edgefl.local_fleet import LocalFleet, LoggedProcess, free_ports
from edgefl.offload.generation.blocks import DecoderPart, Rows, numpy_engine, torch_engine
from edgefl.offload.generation.generate import generate, load_part
from edgefl.offload.generation.sampling import Sampling
from edgefl.offload.generation.stage_info import CUT_FORMATS, read_stage
from edgefl.protocols.inference.sequences import SequenceRequest, encode_hidden

DEVICE_MB = 512
WORKLOAD = "SmolLM2-135M, cut behind block 6 of 30"
READY_S = 600.0
GREEDY = Sampling()


def measure(*, quick: bool) -> Iterator[Row]:
    """Run everything, and yield the rows as they are done."""
    try:
        folder = stage_folders()
    except NoModel as reason:
        yield Row(workload=WORKLOAD, metric="everything", unit="", skipped=str(reason))
        return
    num = 32 if quick else 64
    codec = TextCodec(folder / "head", read_stage(folder / "head"))
    prompt = codec.encode_chat([{"role": "user", "content": PROMPT}])
    whole = list(generate([load_part(folder / "whole", numpy_engine())], prompt, num, GREEDY))
    yield from _small_device(folder, prompt, whole, formats=CUT_FORMATS[:1] if quick else CUT_FORMATS)
    with tail_server(folder / "tail") as port:
        yield asyncio.run(_overhead(folder, port, prompt, num, turns=2 if quick else 8))
        yield asyncio.run(_many_devices(folder, port, prompt, whole, 16))


def _small_device(folder: Path, prompt: list[int], whole: list[int], formats: Sequence[str]) -> Iterator[Row]:
    """Yield what an agent with little memory says and generates, over TLS."""
    limit = ("--generate-memory-mb", DEVICE_MB)
    with (
        tempfile.TemporaryDirectory() as name,
        LocalFleet(Path(name) / "fleet") as fleet,
        contextlib.ExitStack() as ends,
    ):
        fleet.start()
        port = free_ports(1)[0]
        tail = fleet.spawn("tail.log", "cloud", "generate", folder / "tail", "--home", fleet.home, "--port", port)
        ends.callback(tail.stop)
        tail.wait_for("tail.ready", READY_S)
        fleet.enroll("cam")
        agent = fleet.start_agent("cam", "--generate", folder / "whole", *limit)
        agent.wait_for("generation.refused", READY_S)
        answer = httpx.get(f"{_url(fleet)}/v1/models", timeout=READY_S)
        agent.stop()
        yield Row(
            workload=f"SmolLM2-135M whole, device with {DEVICE_MB} MB", metric="refused in words", unit="of 1",
            ours=float(answer.status_code == 503), targets=(Target(of="ours", at_least=1.0),),
            detail={"words": answer.json()["error"]["message"]},
        )  # fmt: skip
        for form in formats:
            agent = _device(fleet, folder, port, form)
            seen = _text(fleet, prompt, len(whole))
            process = _child(agent, "generation_main")
            yield _equal(f"{WORKLOAD}, device with {DEVICE_MB} MB, {form}", "tokens equal to the whole model's", folder,
                         whole, seen, peak_mb=_peak_mb(process))  # fmt: skip
            if form == formats[-1]:
                seen = _text(fleet, prompt, len(whole), kill=tail)
                yield _equal(f"{WORKLOAD}, tail killed ten times", "tokens equal", folder, whole, seen)
            agent.stop()


def _device(fleet: LocalFleet, folder: Path, port: int, form: str) -> LoggedProcess:
    agent = fleet.start_agent(
        "cam", "--generate", folder / "head", "--generate-tail", f"127.0.0.1:{port}", "--generate-format", form,
        "--generate-memory-mb", str(DEVICE_MB),
    )  # fmt: skip
    agent.wait_for("generation.up", READY_S)
    return agent


def _text(fleet: LocalFleet, prompt: list[int], num: int, kill: LoggedProcess | None = None) -> str:
    """Return a text of the device, greedily; with `kill`, the tail's process is killed ten times meanwhile."""
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": num, "temperature": 0, "stream": True}
    pieces: list[str] = []
    kills = 0
    with httpx.stream("POST", f"{_url(fleet)}/v1/completions", json=body, timeout=READY_S) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            value = httpx.Response(200, text=line.removeprefix("data: ")).json()
            if "error" in value:
                raise RuntimeError(value["error"]["message"])
            pieces.append(value["choices"][0]["text"])
            if kill is not None and kills < 10 and len(pieces) % 2 == 0:
                with contextlib.suppress(StopIteration):  # it has not started again yet
                    os.kill(_child(kill, "tail_main").pid, signal.SIGKILL)
                    kills += 1
    if kill is not None and kills < 10:
        raise RuntimeError(f"the tail was killed {kills} times only")
    return "".join(pieces)


def _equal(workload: str, metric: str, folder: Path, whole: list[int], seen: str, **detail: object) -> Row:
    """Return a row with the number of leading tokens that are equal."""
    codec = TextCodec(folder / "head", read_stage(folder / "head"))
    ends = codec.end_tokens
    expected = whole[: next((at for at, token in enumerate(whole) if token in ends), len(whole))]
    stream = codec.decoding()
    text, equal = "", 0
    for token in expected:
        text += stream.add(token)
        equal += seen.startswith(text)
    equal = len(expected) if seen == text + stream.rest() else equal
    return Row(
        workload=workload, metric=metric, unit="tokens", ours=float(equal), limit=float(len(expected)),
        more_is_better=True, targets=(Target(of="ours", at_least=float(len(expected))),), detail=detail,
    )  # fmt: skip


@contextlib.contextmanager
def tail_server(tail: Path) -> Iterator[int]:
    """Serve a tail to `DEVICES` without TLS; yields its port."""
    with tempfile.TemporaryDirectory() as name:
        home = Path(name) / "home"
        make_home(home)
        port = free_ports(1)[0]
        arguments = ["cloud", "generate", str(tail), "--home", str(home), "--port", str(port), "--insecure"]
        with running([sys.executable, "-m", "edgefl", *arguments], "tail.ready"):
            yield port


async def _overhead(folder: Path, port: int, prompt: list[int], num: int, turns: int) -> Row:
    """Return the time of a token of the split against that of the unsplit model, as an agent generates both.

    They take turns, because a machine's speed changes in minutes by more than what is measured.
    """
    head = load_part(folder / "head", numpy_engine())
    wholes = {"numpy": load_part(folder / "whole", numpy_engine())}
    with contextlib.suppress(ImportError):
        wholes["torch"] = load_part(folder / "whole", torch_engine())
    ms: dict[str, list[float]] = {name: [] for name in ("split", "bare loop", *wholes)}
    with ThreadPoolExecutor(1, initializer=_without_gradients) as worker:
        link = TailLink(_address(head, port, DEVICES[0]))
        split = Generator(head, worker, link)
        others = {name: Generator(part, worker, None) for name, part in wholes.items()}
        for _ in range(1 + turns):  # the first one warms up
            ms["split"].append(await _token_ms(split, prompt, num))
            for name, one in others.items():
                ms[name].append(await _token_ms(one, prompt, num))
            ms["bare loop"].append(await asyncio.to_thread(_bare_token_ms, wholes["numpy"], prompt, num))
        await split.close()
        await link.close()
    medians = {name: statistics.median(some[1:]) for name, some in ms.items()}
    best = min(wholes, key=lambda name: medians[name])
    return Row(
        workload=f"{WORKLOAD}, one device, no link", metric="time of a token", unit="ms",
        ours=medians["split"], rival=f"edgefl, unsplit, on {best}", theirs=medians[best],
        targets=(Target(of="ratio", at_least=1 / 1.1),), detail={"medians_ms": medians, "turns_ms": ms},
    )  # fmt: skip


async def _token_ms(generator: Generator, prompt: list[int], num: int) -> float:
    """Return the median time between a text's tokens."""
    job = TextJob(prompt=prompt, max_tokens=num, sampling=GREEDY)
    return _median_ms([time.perf_counter() async for _ in generator.tokens(job)])


def _bare_token_ms(part: DecoderPart, prompt: list[int], num: int) -> float:
    """Return the same of a loop without an agent."""
    return _median_ms([time.perf_counter() for _ in generate([part], prompt, num, GREEDY)])


def _median_ms(times_s: list[float]) -> float:
    return 1e3 * statistics.median(after - before for before, after in itertools.pairwise(times_s))


def _without_gradients() -> None:
    """Let torch record nothing in this thread."""
    with contextlib.suppress(ImportError):
        import torch

        torch.set_grad_enabled(False)


async def _many_devices(folder: Path, port: int, prompt: list[int], whole: list[int], num_devices: int) -> Row:
    """Return the tokens per second of many devices at one tail, against one.

    Devices have processors of their own, and here they would share this machine's with the tail: so their heads'
    activations are computed before, and each device waits for the time that one took.
    """
    head = load_part(folder / "head", numpy_engine())
    cache, sent, head_s = head.new_cache(), [], []
    for tokens in (prompt, *([one] for one in whole[:-1])):
        begun_s = time.perf_counter()
        sent.append(head.run(head.embed(tokens), [Rows(cache, len(tokens))]))
        head_s.append(time.perf_counter() - begun_s)
    wait_s = statistics.median(head_s[1:])
    links = [TailLink(_address(head, port, device)) for device in DEVICES[:num_devices]]

    async def text(link: TailLink) -> bool:
        """Whether the tail's tokens are the whole model's."""
        stream, position, seen = link.open(), 0, []
        for number, hidden in enumerate(sent):
            request = SequenceRequest(
                sequence="text", hidden=encode_hidden(hidden, "fp16"), starts=not number, position=position,
                max_tokens=len(prompt) + len(whole), ends=number == len(sent) - 1,
            )  # fmt: skip
            seen.append(await stream.send(request, READY_S))
            position += len(hidden)
            await asyncio.sleep(wait_s)
        stream.cancel()
        return seen == whole

    await text(links[0])  # warms up
    rates, equal = {}, 0
    for some in (links[:1], links):
        begun_s = time.perf_counter()
        equal = sum(await asyncio.gather(*(text(one) for one in some)))
        rates[len(some)] = len(whole) * len(some) / (time.perf_counter() - begun_s)
    for link in links:
        await link.close()
    return Row(
        workload=f"{WORKLOAD}, {num_devices} devices at one tail", metric="tokens, prompts included", unit="1/s",
        ours=rates[num_devices], rival="edgefl, one device", theirs=rates[1], more_is_better=True,
        targets=(Target(of="ratio", at_least=4.0),),
        detail={"texts_equal": equal, "texts": num_devices, "head_ms": 1e3 * wait_s},
    )  # fmt: skip


def _address(head: DecoderPart, port: int, device: str) -> TailAddress:
    return TailAddress(target=f"127.0.0.1:{port}", model=head.info.name, digest=head.info.tail_digest, device=device)


def _url(fleet: LocalFleet) -> str:
    return (fleet.folder / "cam" / "serving").read_text(encoding="ascii")


def _child(parent: LoggedProcess, module: str) -> psutil.Process:
    return next(one for one in psutil.Process(parent.pid).children() if module in " ".join(one.cmdline()))


def _peak_mb(process: psutil.Process) -> float:
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
    return int(next(one.split()[1] for one in lines if one.startswith("VmHWM"))) / 1024


if __name__ == "__main__":
    command(measure, __doc__)()
