"""The metadata a machine sees. The clouds' own client libraries, unchanged, run on the machine and are the judges."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from holdfast.clock import WallClock
from holdfast.drivers.local import LocalDriver
from holdfast.drivers.local.config import Fate
from holdfast.drivers.local.metadata import Facts, serve
from holdfast.drivers.protocol import Machine
from holdfast.runtime.metadata import AwsMetadata, GcpMetadata
from tests.contract.machines import POOLS, driver_of, ended, line_of, nothing_left, request

SPEED = 60.0


class Cloud:
    """Machines that run a Python program; what it prints as JSON after `said: ` is what they know."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.driver: LocalDriver

    def machine(
        self, dialect: str, program: str, fate: Fate | None = None, speed: float = SPEED, **changes: Any
    ) -> Machine:
        self.driver = driver_of(self.root, fate or Fate(), clock_speed=speed)
        say = "import json\ndef say(**facts): print('said:', json.dumps(facts, default=str), flush=True)\n"
        script = f"cat > program.py <<'END'\n{say}{program}\nEND\nexec {sys.executable} program.py"
        library = str(Path(__file__).parents[2] / "src")
        return self.driver.launch(
            request("run-1", script, POOLS[dialect], environment={"PYTHONPATH": library}, **changes)
        )

    def said_by(
        self, dialect: str, program: str, fate: Fate | None = None, speed: float = SPEED, **changes: Any
    ) -> dict[str, Any]:
        self.last = self.machine(dialect, program, fate, speed, **changes)
        return json.loads(line_of(self.driver, self.last, "said:"))


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    cloud = Cloud(tmp_path / "cloud")
    yield cloud
    with nothing_left(cloud.driver):
        pass


# -- AWS --------------------------------------------------------------------------------------------------------------


def test_botocore_finds_role_credentials_and_region(cloud: Cloud) -> None:
    said = cloud.said_by(
        "aws",
        """
import os
from botocore.session import Session
from botocore.utils import IMDSRegionProvider, InstanceMetadataFetcher
session = Session()
found = session.get_credentials()
frozen = found.get_frozen_credentials()
say(method=found.method, key=frozen.access_key, token=frozen.token, region=IMDSRegionProvider(session).provide(),
    role=InstanceMetadataFetcher(base_url=os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"])
        .retrieve_iam_role_credentials()["role_name"])
""",
    )
    assert said == {
        "method": "iam-role",
        "key": "LOCALCLOUDNOTAKEY",
        "token": "local-cloud-token",
        "region": "local-1",
        "role": "holdfast-machine",
    }


IMDS = """
import os, sys, time, urllib.error, urllib.request
from datetime import datetime
from holdfast.clock import clock_from_environment
clock = clock_from_environment()
base = os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"]
def ask(path, method="GET", **headers):
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(base + path, method=method, headers=named)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""
token = ask("latest/api/token", "PUT", X_aws_ec2_metadata_token_ttl_seconds="60")[1]
def get(path):
    return ask("latest/" + path, X_aws_ec2_metadata_token=token)
"""


def test_without_a_token_nothing_is_told(cloud: Cloud) -> None:
    said = cloud.said_by(
        "aws",
        IMDS
        + """
say(v1=ask("latest/meta-data/instance-id")[0],
    wrong=ask("latest/meta-data/instance-id", X_aws_ec2_metadata_token="guess")[0],
    right=get("meta-data/instance-id"),
    lifetimes=[ask("latest/api/token", "PUT", **headers)[0] for headers in
               ({}, *({"X_aws_ec2_metadata_token_ttl_seconds": ttl} for ttl in ("0", "x", "21601", "21600")))])
""",
    )
    assert (said["v1"], said["wrong"]) == (401, 401)
    assert said["right"] == [200, cloud.last.id]
    assert said["lifetimes"] == [400, 400, 400, 400, 200]


def test_a_machine_knows_what_it_is(cloud: Cloud) -> None:
    said = cloud.said_by(
        "aws",
        IMDS
        + """
say(zone=get("meta-data/placement/availability-zone")[1], kind=get("meta-data/instance-type")[1],
    life=get("meta-data/instance-life-cycle")[1], data=get("user-data")[1][:8], nothing=get("meta-data/unheard-of")[0],
    document=get("dynamic/instance-identity/document")[1], calm=get("meta-data/spot/instance-action")[0])
""",
    )
    assert (said["zone"], said["kind"], said["life"]) == ("local-1a", "c7i.large", "spot")
    assert (said["data"], said["nothing"], said["calm"]) == ("cat > pr", 404, 404)
    document = json.loads(said["document"])
    assert (document["instanceId"], document["region"]) == (cloud.last.id, "local-1")


def test_rebalance_comes_first_then_both_forms_of_the_notice_then_the_end_at_the_announced_time(cloud: Cloud) -> None:
    """Launched at 0 s, recommended to move at 60 s, warned at 120 s of what comes at 240 s, and gone at 240 s."""
    said = cloud.said_by(
        "aws",
        IMDS
        + """
seen = {}
while len(seen) < 3:
    for path in ("events/recommendations/rebalance", "spot/instance-action", "spot/termination-time"):
        status, body = get("meta-data/" + path)
        if status == 200 and path not in seen:
            seen[path] = (clock.now().isoformat(), body)
say(**seen)
time.sleep(300)
""",
        Fate(after_seconds=120, rebalance_seconds_before=60),
    )
    launched_at = cloud.last.launched_at
    (rebalance_at, rebalance), (action_at, action), (_, time) = (
        said[path] for path in ("events/recommendations/rebalance", "spot/instance-action", "spot/termination-time")
    )
    assert timedelta(seconds=60) <= datetime.fromisoformat(rebalance_at) - launched_at
    assert datetime.fromisoformat(rebalance_at) < datetime.fromisoformat(action_at)
    assert json.loads(rebalance).keys() == {"noticeTime"}
    assert json.loads(action) == {"action": "terminate", "time": time}
    reclaim_at = datetime.fromisoformat(time)
    assert timedelta(seconds=239) <= reclaim_at - launched_at
    over = ended(cloud.driver, cloud.last)
    assert over.reason == "preempted" and over.terminated_at
    # It goes when the announced second has begun, and then soon: a second of this computer's is a minute here.
    assert timedelta(0) <= over.terminated_at - reclaim_at < timedelta(seconds=300)


# -- GCP --------------------------------------------------------------------------------------------------------------


def test_google_auth_finds_the_service_its_project_and_a_token(cloud: Cloud) -> None:
    said = cloud.said_by(
        "gcp",
        """
import google.auth, google.auth.transport.requests
from google.auth.compute_engine import _metadata
request = google.auth.transport.requests.Request()
credentials, project = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
credentials.refresh(request)
say(ping=_metadata.ping(request), project=_metadata.get_project_id(request), default=project,
    kind=type(credentials).__module__, token=credentials.token, email=credentials.service_account_email)
""",
    )
    assert said == {
        "ping": True,
        "project": "local-project",
        "default": "local-project",
        "kind": "google.auth.compute_engine.credentials",
        "token": "local-cloud-token",
        "email": "holdfast-machine@local.invalid",
    }


GCE = """
import http.client, os, time
from holdfast.clock import clock_from_environment
clock = clock_from_environment()
def ask(path, **headers):
    connection = http.client.HTTPConnection(os.environ["GCE_METADATA_HOST"])
    connection.request("GET", path, headers=headers or {"Metadata-Flavor": "Google"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers["Metadata-Flavor"]
def get(path):
    return ask("/computeMetadata/v1/instance/" + path)
"""


def test_without_its_header_google_s_service_tells_nothing(cloud: Cloud) -> None:
    said = cloud.said_by(
        "gcp",
        GCE
        + """
say(without=ask("/computeMetadata/v1/instance/id", Accept="*/*")[0], with_it=get("id"), zone=get("zone")[1],
    nothing=get("unheard-of")[0], calm=get("preempted")[1])
""",
    )
    assert said["without"] == 403
    assert said["with_it"] == [200, cloud.last.id, "Google"]
    assert (said["zone"], said["nothing"], said["calm"]) == ("projects/0/zones/local-2a", 404, "FALSE")


def test_who_waits_for_a_change_is_told_of_the_preemption_when_it_is_decided(cloud: Cloud) -> None:
    """And the shutdown script runs then, on the machine, in its environment."""
    said = cloud.said_by(
        "gcp",
        GCE
        + """
before = get("preempted?wait_for_change=true&timeout_sec=0")[1]
print("holdfast: step 1", flush=True)
after = get("preempted?wait_for_change=true&timeout_sec=60")[1]
say(before=before, after=after, at=clock.now().isoformat())
time.sleep(300)
""",
        Fate(at_step=1),
        speed=4.0,
        shutdown_script='echo "shutting down: $HOLDFAST_MACHINE_ID"; sleep 300',
    )
    assert (said["before"], said["after"]) == ("FALSE", "TRUE")
    assert line_of(cloud.driver, cloud.last, "shutting down: ") == cloud.last.id
    over = ended(cloud.driver, cloud.last)
    assert over.reason == "preempted" and over.terminated_at
    told_at = datetime.fromisoformat(said["at"])
    assert timedelta(seconds=10) < over.terminated_at - told_at <= timedelta(seconds=60)


def test_a_machine_on_aws_runs_no_shutdown_script(cloud: Cloud) -> None:
    machine = cloud.machine(
        "aws", "import time; time.sleep(300)", Fate(after_seconds=0), 240.0, shutdown_script="echo shutting down"
    )
    ended(cloud.driver, machine)
    assert "shutting down" not in cloud.driver.console(machine.id, machine.pool)


# -- what Holdfast itself hears ---------------------------------------------------------------------------------------

WATCH = """
import threading
from holdfast.clock import clock_from_environment
from holdfast.runtime.watchers import NoticeWatcher
heard = []
watcher = NoticeWatcher(clock_from_environment(), 5.0, lambda notice: heard.append(notice.to_json()))
watcher.start()
print("holdfast: step 1", flush=True)
watcher.join()
say(dialect=watcher.dialect, heard=heard)
import time; time.sleep(300)
"""


@pytest.mark.parametrize(("dialect", "notice_seconds"), [("aws", 120), ("gcp", 30)])
def test_the_watcher_hears_each_dialect_in_time(cloud: Cloud, dialect: str, notice_seconds: int) -> None:
    said = cloud.said_by(dialect, WATCH, Fate(at_step=1), speed=notice_seconds / 2)
    assert (said["dialect"], [notice["kind"] for notice in said["heard"]]) == (dialect, ["preemption"])
    (notice,) = said["heard"]
    reclaim_at, seen_at = (datetime.fromisoformat(notice[name]) for name in ("reclaim_at", "seen_at"))
    over = ended(cloud.driver, cloud.last)
    assert over.terminated_at and seen_at < over.terminated_at
    assert timedelta(seconds=notice_seconds / 2) < reclaim_at - seen_at <= timedelta(seconds=notice_seconds)


def test_the_watcher_hears_the_recommendation_before_the_notice(cloud: Cloud) -> None:
    said = cloud.said_by("aws", WATCH, Fate(after_seconds=90, rebalance_seconds_before=60))
    kinds = [notice["kind"] for notice in said["heard"]]
    assert kinds == ["rebalance"] * (len(kinds) - 1) + ["preemption"] and len(kinds) >= 2


@pytest.fixture
def facts() -> Facts:
    return Facts(
        machine_id="i-1", dialect="gcp", zone="local-2a", region="local-2", instance_type="n2-standard-2", user_data=""
    )


def test_a_preemption_between_two_questions_is_not_waited_past(facts: Facts) -> None:
    """Asked "preempted?", told no; preempted; then asked to say when it changes: the answer must come at once."""
    server = serve(facts)
    service = GcpMetadata(WallClock(), f"127.0.0.1:{server.server_address[1]}")
    assert service.notice() is None
    now = datetime.now(UTC)
    facts.change(reclaim_at=now + timedelta(seconds=30))
    service.wait_for_change(seconds=20)
    assert datetime.now(UTC) - now < timedelta(seconds=10)
    assert service.notice()
    server.shutdown()


def test_a_token_that_has_ended_is_renewed(facts: Facts) -> None:
    facts.dialect = "aws"
    server = serve(facts)
    service = AwsMetadata(WallClock(), f"http://127.0.0.1:{server.server_address[1]}/")
    assert service.answers() and service.notice() is None
    server.RequestHandlerClass.tokens.clear()  # type: ignore[attr-defined]
    facts.change(reclaim_at=datetime(2026, 11, 1, 12, 2, tzinfo=UTC))
    notice = service.notice()
    assert notice and (notice.kind, notice.reclaim_at) == ("preemption", datetime(2026, 11, 1, 12, 2, tzinfo=UTC))
    server.shutdown()


def test_a_service_that_is_not_there_does_not_answer() -> None:
    assert not AwsMetadata(WallClock(), "http://127.0.0.1:9").answers()
    assert not GcpMetadata(WallClock(), "127.0.0.1:9").answers()
