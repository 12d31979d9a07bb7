"""A parent is killed; what it started is gone, whatever that was."""

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from edgefl.process import guardian as module
from edgefl.process.guardian import Guardian, gated, open_gate

SLEEP = "import time; time.sleep(60)"


def parent(body):
    """Run a script in a process of its own until it says `ready`; return it and the pids that it said before."""
    script = "import os, subprocess, sys, threading, time\nfrom edgefl.process.guardian import *\n" + textwrap.dedent(
        body
    )
    script += "\nprint('ready', flush=True)\ntime.sleep(60)\n"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    pids = []
    for line in process.stdout:
        if line == "ready\n":
            return process, [psutil.Process(pid) for pid in pids]
        pids.append(int(line))
    raise AssertionError("it ended")


def end(process):
    process.kill()
    process.wait(10)
    process.stdout.close()


def gone(processes):
    done, left = psutil.wait_procs(processes, timeout=10)
    for one in left:
        one.kill()
    return len(done) == len(processes)


def test_a_child_alone_and_a_group_end_with_a_parent_that_is_killed():
    process, children = parent(
        f"""
        alone = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
        guardian.watch(alone.pid)
        nested = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]);" \\
                 "import time; print(child.pid, flush=True); time.sleep(60)"
        leader = subprocess.Popen(gated([sys.executable, "-c", nested]), stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, text=True, start_new_session=True)
        open_gate(leader, group=True)
        print(alone.pid, leader.pid, leader.stdout.readline().strip(), sep="\\n")
        print(guardian._process.pid)
        """
    )
    assert len(children) == 4
    end(process)
    assert gone(children)


def test_a_program_begins_only_once_its_guardian_knows_of_it(tmp_path):
    process, children = parent(
        f"""
        child = subprocess.Popen(gated(["/bin/sh", "-c", "touch {tmp_path}/began; sleep 60"]), stdin=subprocess.PIPE)
        print(child.pid)
        """
    )
    end(process)
    assert gone(children)
    assert not (tmp_path / "began").exists()


def test_a_fork_that_holds_the_pipe_open_delays_nothing():
    process, children = parent(
        f"""
        child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
        guardian.watch(child.pid)
        print(child.pid, flush=True)
        fork = os.fork()
        if fork == 0:
            time.sleep(60)
        print(fork)
        """
    )
    child, fork = children
    end(process)
    assert gone([child])
    assert fork.is_running()
    fork.kill()


def test_a_guardian_that_was_killed_is_replaced_and_told_again():
    process, children = parent(
        f"""
        children = [subprocess.Popen([sys.executable, "-c", {SLEEP!r}]) for _ in range(2)]
        guardian.watch(children[0].pid)
        guardian._process.kill()
        guardian._process.wait()
        guardian.watch(children[1].pid)
        for child in children:
            print(child.pid)
        """
    )
    end(process)
    assert gone(children)


def test_what_has_ended_is_not_watched_and_a_guardian_without_children_ends():
    one = Guardian()
    children = [subprocess.Popen([sys.executable, "-c", SLEEP]) for _ in range(2)]
    for child in children:
        one.watch(child.pid)
    pid = one._process.pid
    children[0].kill()
    children[0].wait(10)
    one.release(children[0].pid)
    assert psutil.pid_exists(pid)
    one.release(children[1].pid)  # still there: nobody is to kill it
    assert not psutil.pid_exists(pid)
    assert children[1].poll() is None
    one.release(12345)  # never heard of
    children[1].kill()
    children[1].wait(10)


def test_a_gated_program_has_its_own_pid_its_arguments_and_its_exit_status():
    code = "import os, sys; print(os.getpid(), sys.argv[1:], sys.stdin.read() == ''); sys.exit(7)"
    process = subprocess.Popen(
        gated([sys.executable, "-c", code, "a b", "$HOME"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    open_gate(process)
    said, _ = process.communicate(timeout=10)
    module.guardian.release(process.pid)
    assert said == f"{process.pid} ['a b', '$HOME'] True\n"
    assert process.returncode == 7


def test_a_gate_needs_a_pipe():
    process = subprocess.Popen(["/bin/true"], stdin=subprocess.DEVNULL)
    with pytest.raises(ValueError, match="stdin"):
        open_gate(process)
    process.wait(10)
    module.guardian.release(process.pid)


def test_signals_for_a_terminals_group_do_not_end_a_guardian():
    process, children = parent(
        f"""
        child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
        guardian.watch(child.pid)
        print(child.pid)
        print(guardian._process.pid)
        """
    )
    child, keeper = children
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(keeper.pid, number)
    end(process)
    assert gone([child, keeper])
