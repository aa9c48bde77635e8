"""What a job will probably cost, asked before it is paid for: in a terminal, and as a flow with artifacts."""

from __future__ import annotations

import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from flows.__main__ import main
from flows.simulate import simulate
from holdfast.drivers.protocol import CapacityPool
from holdfast.ledger.profiles import JobProfile, Measurement, write_profile
from holdfast.market.history import History, Life
from holdfast.model import TrainingJob, load_job
from holdfast.storage import DirectoryStore
from tests.conftest import PROGRAMS


def job_file(folder: Path, **changes: object) -> Path:
    content = {
        "name": "in-time",
        "script": "light.py",
        "code": str(PROGRAMS),
        "deadline_hours": 30,
        "resources": {"instance_types": ["g5.xlarge"], "zones": ["local-1a"]},
        **changes,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def trace_file(folder: Path, name: str = "zone.json", seed: int = 1) -> Path:
    draw = random.Random(seed)
    data: list[int] = []
    while len(data) < 1500:
        data += [1] * draw.randint(5, 90) + [0] * draw.randint(2, 30)
    path = folder / name
    path.write_text(json.dumps({"metadata": {"gap_seconds": 600}, "data": data}))
    return path


def test_the_command_prints_one_sentence_a_table_and_writes_a_picture(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, trace = job_file(folder, work_hours=20), trace_file(folder)
    arguments = ["simulate", str(job), "--trace", str(trace), "--runs", "40", "--plot", "cost.png"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "likely under $" in said and "never late" in said and "omniscient bound" in said
    assert (folder / "cost.png").read_bytes()[:4] == b"\x89PNG"


def test_the_json_is_the_same_for_the_same_seed_and_folders_are_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job, traces = job_file(folder, work_hours=20), folder / "traces"
    traces.mkdir()
    trace_file(traces, "one.json", 1)
    trace_file(traces, "two.json", 2)
    told = []
    for more in ([], [], ["--seed", "3"], ["--fitted"], ["--spot-usd", "0.1", "--on-demand-usd", "3"]):
        assert main(["simulate", str(job), "--trace", str(traces), "--runs", "20", "--json", *more]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1] != told[2]
    assert "fitted to one and 1 more" in told[3]["market"]
    assert told[4]["policies"]["on-demand"]["mean_usd"] == pytest.approx(60.1)
    assert all(one["late"] == 0 for one in told[0]["policies"].values())


def test_what_is_not_known_or_too_late_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(job_file(folder))]) == 2
    assert "how long job 'in-time' takes is not known" in capsys.readouterr().err
    past = job_file(folder, work_hours=2, deadline_hours=None, deadline="2020-01-01T08:00Z")
    assert main(["simulate", str(past)]) == 2
    assert "is past" in capsys.readouterr().err
    assert main(["simulate", str(job_file(folder, work_hours=2)), "--trace", "nowhere.json"]) == 2
    assert main(["simulate", str(job_file(folder, work_hours=2)), "--trace", "history"]) == 2
    assert "no run on this store has had a spot machine of g5.xlarge" in capsys.readouterr().err


def test_a_profile_and_the_history_of_the_store_are_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = DirectoryStore(folder / ".holdfast")
    measured = Measurement(cloud="local", instance_type="g5.xlarge", step_seconds=36.0, boot_seconds=90.0, steps=300)
    write_profile(store, JobProfile("in-time", 2000).with_measurements([measured], None))
    pool, now = CapacityPool("local", "local-1", "local-1a", "g5.xlarge", "spot"), datetime.now(UTC)
    lives = [
        Life(
            run="before",
            token=str(number),
            pool=pool,
            launched_at=now - timedelta(hours=30 - number),
            ended_at=now - timedelta(hours=27 - number),
            recorded_at=now - timedelta(hours=27 - number),
            outcome="preempted",
        )
        for number in range(10)
    ]
    History(store).record(lives)
    assert main(["simulate", str(job_file(folder)), "--trace", "history", "--runs", "20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["work_hours"] == 20.0 and told["restart_seconds"] == 90.0
    assert "10 interruptions in 30.0 h, 0 of 10 launches refused" in told["market"]


def test_the_flow_publishes_the_study(folder: Path, store: DirectoryStore) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    job: TrainingJob = load_job(job_file(folder, work_hours=20, name="published"))
    told = simulate(job, trace=str(trace_file(folder)), runs=20)
    assert told["sentence"].endswith("never late")
    with get_client(sync_client=True) as client:
        ours = client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(like_="simulation-published-%"))
        )
    assert sorted(str(one.type) for one in ours) == ["image", "markdown"]
    assert any(told["sentence"] in str(one.data) for one in ours)
