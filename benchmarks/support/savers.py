"""Holdfast and torch.distributed.checkpoint, each as its users call it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

import holdfast
from benchmarks.support.workload import Workload
from holdfast.runtime import contract

RUN = "checkpoint-benchmark"
MAX_TO_KEEP = 2
ENDLESS = 10**9


class Holdfast:
    """A program on a machine of a run: everything through the environment and the public calls."""

    def __init__(
        self,
        workload: Workload,
        store_url: str,
        folder: Path,
        every_steps: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        telemetry = folder / f"telemetry-{os.getpid()}.jsonl"
        os.environ |= {
            contract.STORE: store_url,
            contract.RUN: RUN,
            contract.ATTEMPT: "1",
            contract.TELEMETRY: str(telemetry),
            contract.CHECKPOINT_POLICY: json.dumps({"every_steps": every_steps, "max_to_keep": MAX_TO_KEEP}),
        }
        began = time.perf_counter()
        self.run = holdfast.attach(model=workload.model, optimizer=workload.optimizer, **(options or {}))
        self.attach_seconds = time.perf_counter() - began
        self._every_steps, self._left = every_steps, 0
        self._telemetry = _Tail(telemetry)
        self._loop: Iterator[int] | None = None
        self._commits = 0
        self._durable_at: float | None = None
        self.committed: list[dict[str, Any]] = []
        """Telemetry's events of what became durable."""
        self.failed: list[str] = []

    def begin(self) -> None:
        """Up to where the next step asked for brings the first save."""
        self._loop, self._left = self.run.steps(ENDLESS), self._every_steps
        self.catch_up()

    def save(self) -> None:
        assert self._loop
        self._durable_at, self._commits = None, len(self.committed)
        next(self._loop)
        self._left = self._every_steps - 1

    def after_step(self) -> None:
        """The run's own steps go on until the next would save; more of them are the loop's alone."""
        assert self._loop
        if self._left:
            self._left -= 1
            next(self._loop)

    def catch_up(self) -> None:
        """The run's other steps, empty ones, so that the next one asked for saves."""
        assert self._loop
        while self._left:
            self._left -= 1
            next(self._loop)

    def durable_at(self) -> float | None:
        for event in self._telemetry.news():
            if event["kind"] == "committed":
                self.committed.append(event)
                # The event has the hour; windows have the processor's clock.
                age = time.time() - datetime.fromisoformat(event["at"]).timestamp()
                self._durable_at = time.perf_counter() - age
            elif event["kind"] == "commit-failed":
                self.failed.append(event["error"])
                if len(self.failed) > 3:
                    raise SystemExit(f"Holdfast can't commit: {self.failed[-1]}")
        return self._durable_at if len(self.committed) > self._commits else None

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()  # type: ignore[attr-defined]


class _Tail:
    """Lines that a file has grown by."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = os.open(path, os.O_RDONLY)
        self._place, self._rest = 0, b""

    def news(self) -> list[dict[str, Any]]:
        data = os.pread(self._file, 1 << 20, self._place)
        if not data:
            return []
        self._place += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]


class Dcp:
    """`torch.distributed.checkpoint.async_save`; its stager keeps the memory it copies into from save to save.

    `threads`: staged before the call returns, written by a thread. `process`: staged into shared memory by a thread
    while forward and backward run, waited for before the optimizer's step, written by another process. Torch documents
    no other settings that would make it faster without an accelerator.
    """

    def __init__(self, workload: Workload, folder: Path, kind: str) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self._workload, self._folder, self._number = workload, folder, 0
        cuda = workload.device != "cpu"
        overlapped = kind == "process"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=overlapped,
                use_async_staging=overlapped,
                use_non_blocking_copy=cuda,
            )
        )
        self._type = AsyncCheckpointerType.PROCESS if overlapped else AsyncCheckpointerType.THREAD
        self._options = {} if overlapped else {"no_dist": True}
        if overlapped:
            join_a_group_of_one()
        self._staging: Future[Any] | None = None
        self._done_at: list[float] = []
        self._upload: Future[Any] | None = None
        self._hook: Any = None
        """Of the optimizer, for as long as there is something to wait for: Holdfast's waits for more where there are others."""

    def save(self) -> None:
        from torch.distributed.checkpoint import FileSystemWriter, async_save

        self._number += 1
        self._done_at = done_at = []
        response = async_save(
            {"model": self._workload.model.state_dict(), "optimizer": self._workload.optimizer.state_dict()},
            storage_writer=FileSystemWriter(self.path),
            async_stager=self._stager,
            async_checkpointer_type=self._type,
            **self._options,
        )
        if isinstance(response, Future):
            self._upload = response
        else:
            self._staging, self._upload = response.staging_completion, response.upload_completion
            self._hook = self._workload.optimizer.register_step_pre_hook(self._wait_for_staging)
        self._upload.add_done_callback(lambda _: done_at.append(time.perf_counter()))

    @property
    def path(self) -> Path:
        """Of the newest."""
        return self._folder / f"dcp-{self._number}"

    def after_step(self) -> None:
        pass

    def durable_at(self) -> float | None:
        if not self._done_at:
            return None
        assert self._upload
        self._upload.result()
        return self._done_at[0]

    def catch_up(self) -> None:
        """Deletes the one before: outside of any window, to its advantage."""
        shutil.rmtree(self._folder / f"dcp-{self._number - 1}", ignore_errors=True)

    def close(self) -> None:
        self._stager.close()

    def _wait_for_staging(self, *_: Any) -> None:
        if self._staging is not None:
            self._staging.result()
            self._staging = None
            self._hook.remove()


def load_dcp(workload: Workload, path: Path) -> None:
    """Into a fresh model and optimizer, in place."""
    from torch.distributed.checkpoint import FileSystemReader, load

    workload.allocate_moments()
    optimizer = workload.optimizer
    state = {"model": workload.model.state_dict(), "optimizer": optimizer.state_dict()}
    load(state, storage_reader=FileSystemReader(path), no_dist=True)
    optimizer.load_state_dict(state["optimizer"])


def join_a_group_of_one() -> None:
    """What DCP's process needs; its own group meets on loopback."""
    if not torch.distributed.is_initialized():
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
