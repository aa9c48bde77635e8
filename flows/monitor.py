"""Where spot machines are being taken too often: judged on a schedule, told, and avoided by every run that follows."""

from __future__ import annotations

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.artifacts import create_table_artifact
from prefect.events import emit_event

from blocks import load_driver, load_store
from holdfast.market.exporting import prometheus_text
from holdfast.market.monitor import changes
from tasks.market import export_to_cloudwatch, export_to_google, judge_market


@flow(name="monitor", flow_run_name="monitor-{account}")
def monitor(
    account: str | list[str] = "local",
    store: str = "local",
    metrics_file: str = "",
    cloudwatch_region: str = "",
    google_project: str = "",
) -> list[str]:
    """Judge the last six hours of spot machines, and tell what is new.

    Args:
        account: Name of the account block whose living machines count, or several.
        store: Name of the checkpoint-store block whose runs are judged.
        metrics_file: File that Prometheus' textfile collector reads. Empty: none.
        cloudwatch_region: Region of CloudWatch that gets the metrics, with the worker's own credentials. Empty: none.
        google_project: Project whose Cloud Monitoring gets them, with the worker's own credentials. Empty: none.

    Returns why each scope that is cooled is cooled.
    """
    before, after = judge_market(load_driver(account), load_store(store).store())
    log = get_run_logger()
    alarms, calm = changes(before, after)
    for alarm in alarms:
        log.warning("spot market is unstable: %s", alarm.why)
        emit_event(
            "holdfast.market.unstable",
            resource={"prefect.resource.id": f"holdfast.market.{alarm.scope}", "level": alarm.scope.level},
            payload={"why": alarm.why},
        )
    for scope in calm:
        log.info("spot market is calm again: %s", scope)
        emit_event("holdfast.market.calm", resource={"prefect.resource.id": f"holdfast.market.{scope}"})
    rows = [
        {
            "scope": str(rate.scope),
            "machines": rate.machines,
            "preempted": rate.preemptions,
            "hours": round(rate.hours, 2),
            "per instance-hour": round(rate.per_instance_hour, 3),
            "cooled": next((alarm.why for alarm in after.alarms if alarm.scope == rate.scope), ""),
        }
        for rate in after.rates
    ]
    if rows:
        name = account if isinstance(account, str) else "-".join(account)
        create_table_artifact(rows, key=f"spot-market-{name}", description="Spot machines of the last six hours")
    if metrics_file:
        path, new = Path(metrics_file), Path(f"{metrics_file}.new")
        new.write_bytes(prometheus_text(after))
        new.replace(path)  # a collector sees the whole file or the one before
    if cloudwatch_region:
        export_to_cloudwatch(after, cloudwatch_region)
    if google_project:
        export_to_google(after, google_project)
    return [alarm.why for alarm in after.alarms]
