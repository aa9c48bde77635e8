"""Each part of the benchmark in a process of its own, forked once torch is imported: fresh, without the seconds of the
import. And how much memory such a process and its children hold.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

SHARED = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ (\S+) (\d+) +(/memfd:|/dev/shm/|/dev/zero|/SYSV|/anon_hugepage)")
MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ ")


def in_a_process(log: Path, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` returns there; what it and its children write to standard error goes to `log`."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, log, work, arguments))
    process.start()
    there.close()
    try:
        failure, result = here.recv()
    except EOFError:
        failure, result = "it ended without an answer", None
    finally:
        process.join(60)
        if process.is_alive():
            process.kill()
    if failure:
        said = log.read_text(errors="replace")[-2000:] if log.exists() else ""
        raise SystemExit(f"{work.__name__} failed: {failure}\n{said}")
    return result


def _work(answers: Connection, log: Path, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(file, sys.stderr.fileno())
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    try:
        answers.send(("", work(*arguments)))
    except SystemExit as error:
        answers.send((str(error.code), None))
    except BaseException:
        answers.send((traceback.format_exc(), None))


def memory_held() -> tuple[int, int]:
    """Bytes that this process and its children share, and bytes that are private to one of them."""
    shared: dict[tuple[str, str], int] = {}
    private = 0
    process = psutil.Process()
    for one in (process, *process.children(recursive=True)):
        try:
            text = Path(f"/proc/{one.pid}/smaps").read_text()
            status = Path(f"/proc/{one.pid}/status").read_text()
        except OSError:
            continue
        found = re.search(r"^RssAnon:\s+(\d+) kB", status, re.MULTILINE)
        private += int(found[1]) * 1024 if found else 0
        for place, size in _shared(text).items():
            shared[place] = max(shared.get(place, 0), size)
    return sum(shared.values()), private


def _shared(smaps: str) -> dict[tuple[str, str], int]:
    """Resident bytes of shared memory in one process, by device and inode."""
    found: dict[tuple[str, str], int] = {}
    place = None
    for line in smaps.splitlines():
        if match := SHARED.match(line):
            place = (match[1], match[2])
        elif MAPPING.match(line):
            place = None
        elif place and line.startswith(("Rss:", "Shared_Hugetlb:", "Private_Hugetlb:")):
            found[place] = found.get(place, 0) + int(line.split()[1]) * 1024
    return found
