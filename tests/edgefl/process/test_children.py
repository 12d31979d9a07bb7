"""Children: how they end is heard, and they do not outlive their parent."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap

import pytest

from edgefl.process.children import SHORT_WAITS, Child

WAITS = """
    import sys, time
    from edgefl.process.children import die_with_parent
    die_with_parent()
    print("there", flush=True, file=open(sys.argv[1], "w"))
    time.sleep(600)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write code as a module that a child can run."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(code):
        (tmp_path / "child_of_test.py").write_text(textwrap.dedent(code))
        return "child_of_test"

    return write


@pytest.mark.parametrize(
    ("code", "end"),
    [
        ("raise SystemExit(0)", "ended with exit status 0"),
        ("raise SystemExit(3)", "ended with exit status 3"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGFPE)", "was killed by SIGFPE"),
        ("import os, signal; os.kill(os.getpid(), 9)", "was killed by SIGKILL (the system may have run out of memory)"),
    ],
)
def test_how_it_ended_is_said(module, code, end):
    async def run():
        child = Child(module(code))
        await child.ended.wait()
        assert child.end == end
        await child.kill()  # of one that has ended, this does nothing

    asyncio.run(run())


def test_one_that_will_not_stop_is_killed(module, tmp_path, until):
    deaf = "import signal; signal.signal(signal.SIGTERM, lambda *_: None)"  # before it says that it is there
    code = WAITS.replace("die_with_parent()\n", f"die_with_parent()\n    {deaf}\n", 1)

    async def run():
        child = Child(module(code), str(tmp_path / "there"))
        await until((tmp_path / "there").exists)
        assert child.end == "runs"
        with pytest.raises(TimeoutError):
            await child.stop(0.3)
        await child.ended.wait()
        assert child.end.startswith("was killed by SIGKILL")

    asyncio.run(run())


def test_it_ends_with_its_parent_whatever_ends_that(module, tmp_path, eventually, alive):
    name = module(WAITS)
    parent = f"""
        import asyncio
        from edgefl.process.children import Child
        async def run():
            print(Child({name!r}, {str(tmp_path / "there")!r}).pid, flush=True)
            await asyncio.Event().wait()
        asyncio.run(run())
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    eventually((tmp_path / "there").exists, "the child")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    eventually(lambda: not alive(child), "the child's end")


def test_its_memory_is_bounded_and_its_own_fault(module, tmp_path):
    code = f"""
        from edgefl.process.children import limit_own_memory
        limit_own_memory(200)
        try:
            bytearray(400 << 20)
        except MemoryError:
            open({str(tmp_path / "bounded")!r}, "w").write(open("/proc/self/oom_score_adj").read())
    """

    async def run():
        child = Child(module(code))
        await child.ended.wait()
        assert child.end == "ended with exit status 0"

    asyncio.run(run())
    assert int((tmp_path / "bounded").read_text()) >= 500


def test_variables_replace_the_parent_s_own(module, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("KEPT", "yes")
    name = module("""
        import os, sys
        open(sys.argv[1], "w").write(os.environ["KEPT"] + os.environ["OPENBLAS_THREAD_TIMEOUT"])
    """)

    async def run():
        child = Child(name, str(tmp_path / "said"), environment=SHORT_WAITS)
        await child.ended.wait()
        return child.end

    assert asyncio.run(run()) == "ended with exit status 0"
    assert (tmp_path / "said").read_text() == "yes" + SHORT_WAITS["OPENBLAS_THREAD_TIMEOUT"]
