"""A process is told from another one under the same number, whatever the clock on the wall does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from holdfast.process_identity import PROC, identify, lives

linux = pytest.mark.skipif(not PROC.is_dir(), reason="needs /proc")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    # A name with a bracket and spaces: the kernel writes it into the line that is read.
    name = "import ctypes, time; ctypes.CDLL(None).prctl(15, b'a) Z 1 (b', 0, 0, 0); print(flush=True); time.sleep(300)"
    with subprocess.Popen([sys.executable, "-c", name], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process
        process.kill()


@linux
def test_a_process_lives_until_it_is_dead_and_not_while_it_waits_to_be_collected(
    sleeper: subprocess.Popen[bytes],
) -> None:
    known = json.loads(json.dumps(identify(sleeper.pid)))
    assert lives(known)
    sleeper.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, and its number still taken
    assert psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE
    assert not lives(known)
    sleeper.wait()
    assert not lives(known)


@linux
def test_another_process_under_the_same_number_is_another(sleeper: subprocess.Popen[bytes]) -> None:
    known = identify(sleeper.pid)
    assert not lives({**known, "start_ticks": known["start_ticks"] - 1})
    assert not lives({**known, "boot": "00000000-0000-0000-0000-000000000000"})


@linux
def test_what_is_kept_does_not_depend_on_the_time_of_day() -> None:
    """The start in seconds since 1970 moves when the clock is set, and would make a living process another one."""
    assert set(identify(os.getpid())) == {"pid", "boot", "start_ticks"}


def test_where_there_is_no_proc_the_time_of_its_start_is_kept() -> None:
    me = {"pid": os.getpid(), "created_at": psutil.Process().create_time()}
    assert lives(me)
    assert not lives({**me, "created_at": me["created_at"] - 10})


def test_nobody_is_not_identified() -> None:
    with pytest.raises(psutil.NoSuchProcess):
        identify(2**22 + 1)
    assert not lives({"pid": 2**22 + 1, "created_at": 0.0})
