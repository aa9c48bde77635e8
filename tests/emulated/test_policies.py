"""The policies in deployments/ grant what the drivers and the stores ask for, and nothing that they never use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from holdfast.drivers.protocol import CapacityPool, Driver, FleetRequest, LaunchRequest
from holdfast.model import ServeJob
from holdfast.queues import Lease, open_queue
from holdfast.serving.balancer import Endpoint
from holdfast.serving.opening import open_balancer
from holdfast.storage import open_store
from tests.contract.brokers import SqsEmulator
from tests.contract.machines import ended, wait_for
from tests.emulated.aws import AwsEmulator
from tests.emulated.balancers import make_target_group
from tests.emulated.gce import PERMISSIONS, GceEmulator
from tests.emulated.object_stores import S3Emulator
from tests.emulated.pubsub import PubSubEmulator
from tests.emulated.wire import Wire

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
SLEEP = "#!/bin/bash\nexec sleep 300\n"
RIGHT_OF_S3_CALL = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
}
WITHOUT_A_CALL_OF_THEIR_OWN = {
    "ec2:CreateTags",  # tags are part of the launch
    "autoscaling:CreateOrUpdateTags",  # of the group's creation
    "iam:PassRole",  # the machine's role, at the launch
    "iam:CreateServiceLinkedRole",  # once in an account's life, by EC2 on our behalf
    "servicequotas:GetServiceQuota",
    "autoscaling:DescribeScalingActivities",  # why a maintained fleet's first members do not come
}
RIGHTS_OF_PUBSUB_CALL = {
    "CreateTopic": ["pubsub.topics.create"],
    "Publish": ["pubsub.topics.publish"],
    "CreateSubscription": ["pubsub.subscriptions.create", "pubsub.topics.attachSubscription"],
    "Pull": ["pubsub.subscriptions.consume"],
    "Acknowledge": ["pubsub.subscriptions.consume"],
    "ModifyAckDeadline": ["pubsub.subscriptions.consume"],
}
"""Source: https://docs.cloud.google.com/pubsub/docs/access-control"""
IN_RARE_CASES_ON_GCP = {
    "compute.images.get",  # an image named by its name, not by its family
    "compute.instances.setDeletionProtection",  # somebody has protected a machine
    "compute.instanceGroupManagers.get",  # a group that was made before its answer was lost
    "compute.instanceGroupManagers.update",
    "compute.instanceTemplates.get",
}


def granted(file: str) -> set[str]:
    policy = json.loads((DEPLOYMENTS / file).read_text())
    return {action for statement in policy["Statement"] for action in actions_of(statement)}


def actions_of(statement: dict[str, Any]) -> list[str]:
    assert statement["Effect"] == "Allow"
    actions = statement["Action"]
    return [actions] if isinstance(actions, str) else actions


def use_everything(driver: Driver, spot: CapacityPool, on_demand: CapacityPool) -> None:
    """Every call that a driver makes in the lives of machines and fleets."""
    driver.check()
    list(driver.examine())
    driver.offers()
    now = driver.clock.now()
    for pool in (spot, on_demand):
        driver.price_history(pool, now - timedelta(hours=1), now)
    machine = driver.launch(LaunchRequest(token="one", pool=spot, tags=TAGS, environment={}, startup_script=SLEEP))
    driver.console(machine.id, machine.pool)
    driver.terminate(machine.id, machine.pool)
    ended(driver, machine)
    driver.console(machine.id, machine.pool)
    for member in driver.launch_fleet(fleet("instant", [spot, on_demand])):
        driver.terminate(member.id, member.pool)
    driver.launch_fleet(fleet("maintained", [spot, on_demand]))
    driver.fleets({})
    driver.end_fleet("maintained", spot.region)
    wait_for(lambda: all(one.state == "terminated" for one in driver.machines({})), 60)


def use_load_balancer(driver: Driver, pools: list[CapacityPool], load_balancer: str) -> None:
    job = ServeJob(
        name="served",
        command=["serve"],
        replicas=1,
        max_run_hours=1,
        load_balancer=load_balancer,  # type: ignore[arg-type]
    )
    balancer = open_balancer(job, driver, "run", "store")
    balancer.check(pools)
    balancer.open()
    machine = driver.launch(LaunchRequest(token="lb", pool=pools[0], tags=TAGS, environment={}, startup_script=SLEEP))
    wait_for(lambda: driver.machines({})[-1].state == "running", 60)
    one = Endpoint(machine=machine.id, zone=machine.pool.zone, address="127.0.0.1", port=8000, health_port=8001)
    balancer.register(one)
    balancer.register(one)
    assert balancer.standings()[machine.id].state == "up"
    balancer.drain(one)
    balancer.drain(one)
    assert machine.id not in balancer.standings()
    balancer.remove(one)
    driver.terminate(machine.id, machine.pool)


TAGS = {"holdfast-run": "run"}


def fleet(kind: Any, pools: list[CapacityPool]) -> FleetRequest:
    return FleetRequest(token=kind, kind=kind, pools=pools, machines=2, spot_share=0.5, tags=TAGS, startup_script=SLEEP)


def test_the_orchestrator_s_policy_grants_what_is_called_on_aws_and_no_more(tmp_path: Path) -> None:
    with AwsEmulator(tmp_path) as aws:
        # The policy allows these on tagged machines only, so trying them on none proves nothing: IAM is asked.
        aws.front.tagged_only |= {"TerminateInstances", "ModifyInstanceAttribute", "GetConsoleOutput"}
        group = make_target_group(aws)
        aws.forget_calls()
        places = pools("aws", "us-east-1", "us-east-1a", "c7i.large")
        use_load_balancer(aws.driver(), list(places), group)
        use_everything(aws.driver(), *places)
        called = {f"{request.service}:{request.action}" for request in aws.requests}
    called.discard("sts:GetCallerIdentity")  # everybody may
    rights = {right for right in granted("aws-orchestrator-policy.json") if not right.startswith("s3:")}
    assert called - rights == set(), "called, but not granted"
    assert rights - called - WITHOUT_A_CALL_OF_THEIR_OWN == set(), "granted, but never called"


@pytest.fixture
def s3_calls(tmp_path: Path) -> Iterator[set[str]]:
    """What a store asks of S3 when all of its verbs are used, on small objects and large ones."""
    with S3Emulator("bucket") as s3, Wire(s3.endpoint) as wire:
        store = open_store(s3.url("bucket", "prefix", wire.url), credentials=s3.session())
        store.put("small", b"x")
        store.put("large", (b"x" * (8 << 20) for _ in range(5)))
        store.create("new", b"x")
        store.get("large")
        store.get_range("large", 5, 10)
        store.list("")
        store.delete("small")

        def failing() -> Iterator[bytes]:
            for _ in range(5):
                yield b"x" * (8 << 20)
            raise OSError("the source ends")

        with pytest.raises(Exception, match="the source ends"):
            store.put("failing", failing())
        yield {RIGHT_OF_S3_CALL.get(action, f"s3:{action}") for action in wire.calls()}


@pytest.mark.parametrize("file", ["aws-orchestrator-policy.json", "aws-machine-policy.json"])
def test_both_policies_grant_what_a_store_calls_and_no_more(file: str, s3_calls: set[str]) -> None:
    assert {right for right in granted(file) if right.startswith("s3:")} == s3_calls


def test_a_machine_may_use_the_store_and_nothing_else() -> None:
    assert all(right.startswith("s3:") for right in granted("aws-machine-policy.json"))


def test_the_orchestrator_s_role_grants_what_is_called_on_gcp_and_no_more(tmp_path: Path) -> None:
    with GceEmulator(tmp_path) as gce:
        gce.make_endpoint_groups("served", "us-central1-a")
        places = pools("gcp", "us-central1", "us-central1-a", "n2-standard-2")
        use_load_balancer(gce.driver(), list(places), "networkEndpointGroups/served")
        use_everything(gce.driver(), *places)
        needed = {permission for method in gce.calls for permission in PERMISSIONS[method]}
    needed.discard("iam.serviceAccounts.actAs")  # on the machines' service account alone: roles/iam.serviceAccountUser
    rights = set(yaml.safe_load((DEPLOYMENTS / "gcp-role.yaml").read_text())["includedPermissions"])
    assert needed - rights == set(), "needed, but not granted"
    assert rights - needed - IN_RARE_CASES_ON_GCP == set(), "granted, but never needed"


def use_queue(url: str, credentials: Any = None) -> None:
    """Every verb."""
    queue = open_queue(url, "policies", credentials=credentials)
    queue.put([b"one", b"two", b"three"])
    leases: list[Lease] = []
    wait_for(lambda: len(leases.extend(queue.lease(3 - len(leases))) or leases) == 3, 60)
    first, second, third = leases
    queue.extend([first, second])
    queue.acknowledge([first])
    queue.hand_back([second])
    queue.dead_letter(third, "no good")
    assert len(queue.dead()) == 1
    queue.depth()
    queue.close()


def test_the_queues_policy_grants_what_is_called_on_sqs_and_no_more() -> None:
    with SqsEmulator() as sqs:
        use_queue(f"sqs://us-east-1/?endpoint={sqs.endpoint}", sqs.session())
    # What a batch call needs is the right to the single one.
    assert granted("aws-queue-policy.json") == {f"sqs:{call.removesuffix('Batch')}" for call in sqs.calls}


def test_the_queues_role_grants_what_is_called_on_pubsub_and_no_more() -> None:
    with PubSubEmulator() as pubsub:
        use_queue(f"pubsub://holdfast-test/?endpoint=http://127.0.0.1:{pubsub.port}")
    role = yaml.safe_load((DEPLOYMENTS / "gcp-queue-role.yaml").read_text())
    assert set(role["includedPermissions"]) == {right for call in pubsub.calls for right in RIGHTS_OF_PUBSUB_CALL[call]}


def test_reading_the_bill_is_granted_by_itself_and_nothing_else() -> None:
    assert granted("aws-billing-policy.json") == {"ce:GetCostAndUsage", "s3:ListBucket", "s3:GetObject"}
    role = yaml.safe_load((DEPLOYMENTS / "gcp-billing-role.yaml").read_text())
    assert set(role["includedPermissions"]) == {"bigquery.jobs.create", "bigquery.tables.getData"}


def pools(cloud: str, region: str, zone: str, kind: str) -> tuple[CapacityPool, CapacityPool]:
    return CapacityPool(cloud, region, zone, kind, "spot"), CapacityPool(cloud, region, zone, kind, "on-demand")
