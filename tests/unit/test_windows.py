"""What the doctor says of the windows: the store's speed, and the size of what the job's runs have stored."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from holdfast.checkpoint.commits import CheckpointId
from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.protocol import Finding
from holdfast.errors import TransientError
from holdfast.model import TrainingJob
from holdfast.runtime.contract import checkpoint_prefix, journal_prefix
from holdfast.storage import DirectoryStore
from holdfast.storage.protocol import Data
from holdfast.supervision.doctor import examine, to_text
from holdfast.supervision.windows import examine_windows, last_checkpoint, upload_bytes_per_second

MB = 10**6


class SlowStore(DirectoryStore):
    """Behind a link of so many bytes in a second."""

    bytes_per_second = 0.0

    def put(self, key: str, data: Data | Iterable[Data]) -> None:
        def trickling() -> Iterable[Data]:
            for piece in [data] if isinstance(data, Data) else data:
                time.sleep(len(piece) / self.bytes_per_second)
                yield piece

        super().put(key, trickling())


class FullStore(DirectoryStore):
    """Takes what is small, as a disk that is almost full does."""

    def put(self, key: str, data: Data | Iterable[Data]) -> None:
        raise TransientError("no space left on device")


def slow(folder: Path, bytes_per_second: float) -> SlowStore:
    store = SlowStore(folder)
    store.bytes_per_second = bytes_per_second
    return store


def job(folder: Path, name: str = "gpt") -> TrainingJob:
    (folder / "train.py").write_text("")
    return TrainingJob(name=name, script="train.py", code=str(folder))


def stored(
    store: DirectoryStore, run_id: str, name: str, sizes: dict[int, int], complete: bool = True, day: int = 1
) -> None:
    """Checkpoints of a run of the job of that name: bytes by step."""
    first = {"kind": "run-started", "at": f"2026-11-{day:02d}T12:00:00+00:00", "job": {"name": name}}
    DirectoryStore.put(store, f"{journal_prefix(run_id)}000001.json", json.dumps(first).encode())
    for step, size in sizes.items():
        prefix = f"{checkpoint_prefix(run_id)}{CheckpointId(1, step)}/"
        DirectoryStore.put(store, prefix + "rank-0/state.safetensors", bytes(size))
        if complete:
            DirectoryStore.put(store, prefix + "manifest.json", b"")


def by_subject(findings: Iterable[Finding]) -> dict[str, Finding]:
    return {finding.subject: finding for finding in findings}


def test_the_speed_is_tried_and_nothing_of_it_stays(folder: Path) -> None:
    store = DirectoryStore(folder / "store")
    assert upload_bytes_per_second(store) > MB
    assert store.list("") == []


def test_a_slow_store_is_not_kept_busy_for_long(folder: Path) -> None:
    store = slow(folder / "store", 2 * MB)
    began = time.monotonic()
    assert MB < upload_bytes_per_second(store) <= 2.01 * MB
    assert time.monotonic() - began < 10
    assert store.list("") == []


def test_a_job_that_was_never_run_is_told_the_speed_alone(folder: Path) -> None:
    [finding] = examine_windows(slow(folder / "store", 8 * MB), "aws+gcp", job(folder))
    assert finding.subject == "store speed" and finding.ok and not finding.warning
    enough = re.fullmatch(
        r"([\d.]+) MB/s from this computer, a machine's may differ; "
        r"a notice of 30 s \(GCP\) is enough for (\d+) MB, 120 s \(AWS\) is enough for (\d+) MB",
        finding.detail,
    )
    assert enough, finding.detail
    speed, in_30, in_120 = map(float, enough.groups())
    assert in_30 == pytest.approx(speed * 28 / 1.25, rel=0.1)
    assert in_120 == pytest.approx(speed * 118 / 1.25, rel=0.1)


def test_only_the_windows_of_the_account_s_clouds_are_told(folder: Path) -> None:
    store = DirectoryStore(folder / "store")
    for clouds, told in (("aws", ["AWS"]), ("gcp", ["GCP"]), ("local", ["GCP", "AWS"]), ("", ["GCP", "AWS"])):
        [finding] = examine_windows(store, clouds, None)
        assert re.findall("AWS|GCP", finding.detail) == told


def test_checkpoints_too_large_for_a_window_are_a_warning_with_the_interval_that_helps(folder: Path) -> None:
    store = slow(folder / "store", 0.5 * MB)
    stored(store, "gpt-20261101-120000", "gpt", {100: 20 * MB})
    found = by_subject(examine_windows(store, "aws+gcp", job(folder)))
    warned = found["checkpoint size"]
    assert warned.ok and warned.warning
    assert re.fullmatch(
        r"20 MB at \d+ kB/s does not fit 30 s; every (60|90|120) s is recommended; "
        r"as 0001-000000000100 of run gpt-20261101-120000",
        warned.detail,
    ), warned.detail
    assert to_text(found.values()).splitlines()[1].startswith("warning  checkpoint size  20 MB at ")
    assert to_text(found.values()).endswith("everything works")


def test_the_newest_complete_checkpoint_of_the_job_s_own_runs_counts(folder: Path) -> None:
    store = DirectoryStore(folder / "store")
    assert last_checkpoint(store, "gpt") is None
    stored(store, "gpt-fe", "gpt", {100: 10, 200: 20}, day=1)
    stored(store, "gpt-2a", "gpt", {10: 30, 20: 40}, day=2)
    stored(store, "gpt-2b", "gpt", {10: 50}, complete=False, day=3)
    stored(store, "gpt-large-1", "gpt-large", {10: 60}, day=4)
    stored(store, "other", "other", {10: 70}, day=5)
    known = last_checkpoint(store, "gpt")
    assert known
    assert (known.run_id, known.name, known.size_bytes) == ("gpt-2a", "0001-000000000020", 40)
    large = last_checkpoint(store, "gpt-large")
    assert large and large.size_bytes == 60


def test_a_store_that_fails_under_the_probe_is_said(folder: Path) -> None:
    [finding] = examine_windows(FullStore(folder / "store"), "aws", None)
    assert (finding.subject, finding.ok, finding.detail) == ("store speed", False, "no space left on device")


def test_the_doctor_tells_the_windows_after_the_store_s_rights(folder: Path) -> None:
    store, driver = DirectoryStore(folder / "store"), LocalDriver(LocalCloudConfig(root=folder / "cloud"))
    stored(store, "gpt-20261101-120000", "gpt", {100: MB})
    found = by_subject(examine(lambda: store, lambda: driver, job(folder)))
    subjects = list(found)
    assert subjects.index("store delete") < subjects.index("store speed") < subjects.index("checkpoint size")
    assert found["checkpoint size"].detail == (
        "1 MB fits every notice; as 0001-000000000100 of run gpt-20261101-120000"
    )
    assert all(finding.ok and not finding.warning for finding in found.values())
