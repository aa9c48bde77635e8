"""The monitor tells: metrics that arrive, alarms that are defined on them, and an automation that Prefect takes."""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import boto3
import pytest
import requests
import yaml
from moto import mock_aws

from holdfast.drivers.protocol import CapacityPool
from holdfast.errors import TransientError
from holdfast.market.exporting import COOLED_METRIC, GOOGLE_METRIC, NAMESPACE, prometheus_text, to_cloudwatch, to_google
from holdfast.market.history import Life
from holdfast.market.monitor import Judgement, judge

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
NOW = datetime.now(UTC)


def unstable() -> Judgement:
    pool = CapacityPool("aws", "us-east-1", "us-east-1a", "g5.xlarge", "spot")
    lives = [
        Life(
            run="r",
            token=str(hours),
            pool=pool,
            launched_at=NOW - timedelta(hours=hours + 1),
            ended_at=NOW - timedelta(hours=hours),
            recorded_at=NOW,
            outcome="preempted",
        )
        for hours in (1, 2)
    ]
    return judge(lives, [], NOW)


def test_prometheus_reads_the_rates_and_what_is_cooled():
    from prometheus_client.parser import text_string_to_metric_families

    found = {family.name: family for family in text_string_to_metric_families(prometheus_text(unstable()).decode())}
    cooled = {sample.labels["level"]: sample.value for sample in found["holdfast_spot_cooled"].samples}
    assert cooled == {"pool": 1.0, "family": 0.0, "region": 0.0}
    assert {sample.value for sample in found["holdfast_spot_preemptions_per_instance_hour"].samples} == {1.0}


def test_cloudwatch_gets_the_metric_that_the_shipped_alarm_watches(monkeypatch: pytest.MonkeyPatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    with mock_aws():
        client = boto3.client("cloudwatch", region_name="us-east-1")
        alarm = json.loads((DEPLOYMENTS / "aws-spot-alarm.json").read_text())
        client.put_metric_alarm(**alarm)
        to_cloudwatch(unstable(), client)
        got = client.get_metric_statistics(
            Namespace=alarm["Namespace"],
            MetricName=alarm["MetricName"],
            StartTime=NOW - timedelta(hours=1),
            EndTime=NOW + timedelta(hours=1),
            Period=alarm["Period"],
            Statistics=[alarm["Statistic"]],
        )
        assert [point["Maximum"] for point in got["Datapoints"]] == [1.0]
        assert client.describe_alarms()["MetricAlarms"][0]["MetricName"] == COOLED_METRIC
    policy = json.loads((DEPLOYMENTS / "aws-market-policy.json").read_text())
    right = next(one for one in policy["Statement"] if one["Action"] == "cloudwatch:PutMetricData")
    assert right["Condition"]["StringEquals"]["cloudwatch:namespace"] == NAMESPACE


@contextmanager
def cloud_monitoring(status: int) -> Iterator[tuple[str, list[tuple[str, dict]]]]:
    """Cloud Monitoring as far as it is asked: it takes time series, and refuses with a status."""
    asked: list[tuple[str, dict]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            body = b"{}"
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def test_cloud_monitoring_gets_the_metric_that_the_shipped_policy_watches():
    with cloud_monitoring(200) as (url, asked):
        to_google(unstable(), requests.Session(), "acme", url)
    path, body = asked[0]
    assert path == "/v3/projects/acme/timeSeries"
    assert body["timeSeries"][0]["metric"]["type"] == GOOGLE_METRIC
    assert body["timeSeries"][0]["points"][0]["value"] == {"int64Value": "1"}
    policy = json.loads((DEPLOYMENTS / "gcp-spot-alert.json").read_text())
    assert f'metric.type = "{GOOGLE_METRIC}"' in policy["conditions"][0]["conditionThreshold"]["filter"]


def test_a_refused_metric_is_told():
    with cloud_monitoring(403) as (url, _), pytest.raises(TransientError, match=r"'acme'.*\(403\)"):
        to_google(unstable(), requests.Session(), "acme", url)


@pytest.mark.parametrize(
    ("file", "event"),
    [("unstable-market.yaml", "holdfast.market.unstable"), ("bill-differs.yaml", "holdfast.bill.differs")],
)
def test_the_automation_is_one_that_prefect_takes(file: str, event: str):
    from prefect.automations import AutomationCore

    text = (DEPLOYMENTS / file).read_text().replace("BLOCK_ID", str(uuid.uuid4()))
    automation = AutomationCore.model_validate(yaml.safe_load(text)["automations"][0])
    assert automation.trigger.expect == {event}
