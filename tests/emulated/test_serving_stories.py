"""Serving behind the load balancers of AWS and GCP: their clients over HTTP, machines that really run.

The emulators have no load balancer that passes requests on. What is looked at is who is registered when, and what each
replica's own health page tells a load balancer: by moto every target is healthy, whatever it answers.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.drivers.local.config import Fate
from holdfast.drivers.local.machine_files import CONSOLE
from holdfast.errors import ConfigError
from holdfast.model import Resources, ServeJob
from holdfast.serving.balancer import Endpoint
from holdfast.supervision.serve_opening import open_serve_run
from tests.emulated.balancers import make_target_group
from tests.emulated.runs import ACCOUNTS, SMALL, Account, Open, assert_nothing_left
from tests.story.test_serving import serve_job, serving


@pytest.fixture(params=ACCOUNTS)
def opened(request: pytest.FixtureRequest, folder: Path, prefect_api: str) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda *fates, **more: stack.enter_context(ACCOUNTS[request.param](folder, fates, **more))


def health(endpoint: Endpoint) -> int:
    """What the replica answers a load balancer; 0 when nothing answers."""
    try:
        with urllib.request.urlopen(f"http://{endpoint.address}:{endpoint.health_port}/healthz", timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def load_balancer_of(account: Account) -> tuple[str, Callable[[], set[str]]]:
    """How a job names it, and the machines that are in it by the cloud's own word."""
    cloud = account.emulator
    if account.name == "gcp":
        cloud.make_endpoint_groups("served", "us-central1-a")
        return "networkEndpointGroups/served", lambda: set(cloud.endpoints("served"))
    arn = make_target_group(cloud)

    def targets() -> set[str]:
        said = cloud.client("elbv2").describe_target_health(TargetGroupArn=arn)["TargetHealthDescriptions"]
        return {one["Target"]["Id"] for one in said}

    return arn, targets


def take(account: Account, machine: str) -> None:
    """Let the market take this machine now."""
    name = account.emulator.host_id(machine) if account.name == "gcp" else machine
    with open(account.host.folder / name / CONSOLE, "ab") as console:
        console.write(b"\nholdfast: step 1\n")


def job_of(account: Account, folder: Path, load_balancer: str) -> ServeJob:
    zones = ["us-central1-a"] if account.name == "gcp" else []
    return serve_job(
        folder,
        load_balancer=load_balancer,
        resources=Resources(instance_types=[SMALL[account.name]], zones=zones),
        max_run_hours=1,
    )


def test_replicas_join_the_cloud_s_load_balancer_and_leave_it_at_the_notice(opened: Open, folder: Path) -> None:
    account: Account = opened(*[Fate(at_step=1, notice_seconds=10.0)] * 4)
    named, inside = load_balancer_of(account)
    with serving(job_of(account, folder, named), account.driver(), account.open_store()) as served:
        victim, other = served.wait_until_whole()
        assert inside() == {victim, other}
        endpoint = served.run.state.services[victim][-1].endpoint
        assert health(endpoint) == 200
        take(account, victim)
        served.wait_for(lambda: health(endpoint) != 200)
        served.wait_for(lambda: victim not in inside())
        whole = served.wait_until_whole(but={victim})
        assert other in whole and inside() == set(whole)
    assert inside() == set()
    assert served.run.state.services[victim][-1].why.startswith("draining")
    assert served.summary["registrations"] == 3
    assert_nothing_left(account)


def test_a_load_balancer_that_machines_could_not_join_is_refused_before_anything_is_bought(
    opened: Open, folder: Path
) -> None:
    account: Account = opened()
    driver, store = account.driver(), account.open_store()

    def refusal(load_balancer: str) -> str:
        with pytest.raises(ConfigError) as refused:
            open_serve_run(job_of(account, folder, load_balancer), driver, store, None, "served")
        return str(refused.value)

    foreign = "arn:aws:elasticloadbalancing:us-west-2:123456789012:targetgroup/served/0123456789abcdef"
    if account.name == "gcp":
        assert "takes machines of aws only, and the account's are of gcp" in refusal(foreign)
        account.emulator.make_endpoint_groups("served", "us-central1-b")
        said = refusal("networkEndpointGroups/served")
        assert "no network endpoint group 'served' in us-central1-a" in said and "us-central1-b" in said
    else:
        assert "takes machines of gcp only, and the account's are of aws" in refusal("networkEndpointGroups/served")
        assert "has no target group" in refusal(foreign)
        slow = make_target_group(account.emulator, "slow", HealthCheckIntervalSeconds=30, HealthCheckPath="/")
        said = refusal(slow)
        assert "knows nothing of notices" in said and "needs 60 s" in said
        account.emulator.client("elbv2").modify_target_group_attributes(
            TargetGroupArn=(brief := make_target_group(account.emulator, "brief")),
            Attributes=[{"Key": "deregistration_delay.timeout_seconds", "Value": "5"}],
        )
        assert "closes connections 5 s after" in refusal(brief)
    assert account.host.ids() == []
