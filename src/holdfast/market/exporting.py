"""The monitor's rates as metrics: for Prometheus, CloudWatch and Google Cloud Monitoring. Each is optional."""

from __future__ import annotations

from typing import Any

from holdfast.errors import TransientError
from holdfast.market.monitor import Judgement

NAMESPACE = "Holdfast"
COOLED_METRIC, RATE_METRIC = "CooledScopes", "PreemptionsPerInstanceHour"
GOOGLE_METRIC = "custom.googleapis.com/holdfast/cooled_scopes"
GOOGLE_ENDPOINT = "https://monitoring.googleapis.com"
CALL_SECONDS = 30.0


def prometheus_text(judgement: Judgement) -> bytes:
    """In the text exposition format, for node_exporter's textfile collector or any web server."""
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()
    labels = ("level", "cloud", "region", "family", "zone", "instance_type")

    def gauge(name: str, meaning: str) -> Gauge:
        return Gauge(f"holdfast_spot_{name}", f"{meaning}, over the last six hours", labels, registry=registry)

    rate = gauge("preemptions_per_instance_hour", "Spot machines taken per machine hour")
    share = gauge("preempted_share", "Spot machines taken, of those that ran")
    hours = gauge("instance_hours", "Hours of spot machines")
    cooled = gauge("cooled", "1 where the ranking avoids what is too often taken")
    hot = {alarm.scope for alarm in judgement.alarms}
    for one in judgement.rates:
        scope = one.scope
        values = (scope.level, scope.cloud, scope.region, scope.family, scope.zone, scope.instance_type)
        rate.labels(*values).set(one.per_instance_hour)
        share.labels(*values).set(one.of_launches)
        hours.labels(*values).set(one.hours)
        cooled.labels(*values).set(scope in hot)
    judged = Gauge("holdfast_spot_judged_timestamp_seconds", "When the monitor last looked", registry=registry)
    judged.set(judgement.judged_at.timestamp())
    return generate_latest(registry)


def to_cloudwatch(judgement: Judgement, client: Any) -> None:
    """`client`: boto3's, of cloudwatch; needs cloudwatch:PutMetricData. Its alarm is deployments/aws-spot-alarm.json."""
    at = judgement.judged_at
    data = [{"MetricName": COOLED_METRIC, "Timestamp": at, "Value": len(judgement.alarms), "Unit": "Count"}]
    data += [
        {
            "MetricName": RATE_METRIC,
            "Dimensions": [
                {"Name": "Region", "Value": rate.scope.region},
                {"Name": "Family", "Value": rate.scope.family},
            ],
            "Timestamp": at,
            "Value": rate.per_instance_hour,
            "Unit": "None",
        }
        for rate in judgement.rates
        if rate.scope.level == "family"
    ]
    for start in range(0, len(data), 500):  # a call takes 1000, and 1 MB
        client.put_metric_data(Namespace=NAMESPACE, MetricData=data[start : start + 500])


def to_google(judgement: Judgement, session: Any, project: str, endpoint: str = GOOGLE_ENDPOINT) -> None:
    """`session`: google.auth's AuthorizedSession; needs monitoring.timeSeries.create. Raises TransientError.

    Its alert policy is deployments/gcp-spot-alert.json.
    """
    series = {
        "metric": {"type": GOOGLE_METRIC},
        "resource": {"type": "global", "labels": {"project_id": project}},
        "points": [
            {
                "interval": {"endTime": judgement.judged_at.strftime("%Y-%m-%dT%H:%M:%SZ")},
                "value": {"int64Value": str(len(judgement.alarms))},
            }
        ],
    }
    answer = session.post(
        f"{endpoint}/v3/projects/{project}/timeSeries", json={"timeSeries": [series]}, timeout=CALL_SECONDS
    )
    if answer.status_code != 200:
        raise TransientError(
            f"project {project!r}: Cloud Monitoring refused the metric ({answer.status_code}): {answer.text[:300]}"
        )
