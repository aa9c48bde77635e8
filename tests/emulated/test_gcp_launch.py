"""What a launch on Google Cloud really sends, and that it ends in one machine whatever happens to its answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.cloud import compute_v1

from holdfast.drivers.gcp import names
from holdfast.drivers.gcp.driver import GcpDriver
from holdfast.drivers.local.config import Fate
from holdfast.drivers.protocol import CapacityPool, LaunchRequest
from holdfast.errors import CapacityError, ConfigError, CredentialsError, QuotaError, TransientError
from tests.contract.machines import SLEEP, described, ended, wait_for
from tests.emulated.gce import TOKEN, GceEmulator
from tests.emulated.wire import Wire

SPOT = CapacityPool("gcp", "us-central1", "us-central1-a", "n2-standard-2", "spot")
ON_DEMAND = CapacityPool("gcp", "us-central1", "us-central1-b", "n2-standard-2", "on-demand")


@pytest.fixture
def gce(tmp_path: Path) -> Iterator[GceEmulator]:
    with GceEmulator(tmp_path / "gce") as emulator:
        yield emulator


def asked(token: str = "run-0001", pool: CapacityPool = SPOT, **changes: Any) -> LaunchRequest:
    given: dict[str, Any] = {
        "tags": {"holdfast-run": "run", "holdfast-attempt": "1"},
        "environment": {},
        "startup_script": f"#!/bin/bash\n{SLEEP}\n",
        **changes,
    }
    return LaunchRequest(token=token, pool=pool, **given)


def inserted(gce: GceEmulator) -> dict[str, Any]:
    """The body of the only insert."""
    (body,) = [body for method, body in gce.bodies if method == "instances.insert"]
    return body


# -- what is sent -----------------------------------------------------------------------------------------------------


def test_a_spot_machine_ends_by_deletion_and_by_the_cloud_s_own_switch(gce: GceEmulator) -> None:
    gce.driver(preemption_notice_seconds=120).launch(asked(max_run_seconds=3600.5, disk_gib=250.2))
    body = inserted(gce)
    assert body["scheduling"] == {
        "provisioningModel": "SPOT",
        "instanceTerminationAction": "DELETE",
        "maxRunDuration": {"seconds": "3601"},
        "preemptionNoticeDuration": {"seconds": "120"},
        "automaticRestart": False,
        "onHostMaintenance": "TERMINATE",
    }
    (disk,) = body["disks"]
    assert disk["boot"] and disk["autoDelete"]
    assert disk["initializeParams"]["diskSizeGb"] == "251"
    assert disk["initializeParams"]["diskType"] == "zones/us-central1-a/diskTypes/pd-balanced"


def test_an_on_demand_machine_is_of_the_standard_model_and_never_restarts(gce: GceEmulator) -> None:
    gce.driver().launch(asked(pool=ON_DEMAND))
    scheduling = inserted(gce)["scheduling"]
    assert scheduling == {"provisioningModel": "STANDARD", "automaticRestart": False, "onHostMaintenance": "MIGRATE"}


def test_a_machine_has_the_least_scopes_no_keys_and_its_scripts(gce: GceEmulator) -> None:
    gce.driver().launch(asked(shutdown_script="#!/bin/bash\necho over\n"))
    body = inserted(gce)
    assert body["serviceAccounts"] == [
        {
            "email": "holdfast-machine@test-project.iam.gserviceaccount.com",
            "scopes": ["https://www.googleapis.com/auth/devstorage.read_write"],
        }
    ]
    items = {item["key"]: item["value"] for item in body["metadata"]["items"]}
    assert items["block-project-ssh-keys"] == "TRUE"
    assert items["startup-script"].endswith(f"{SLEEP}\n") and items["shutdown-script"].endswith("echo over\n")
    assert body["shieldedInstanceConfig"] == {"enableVtpm": True, "enableIntegrityMonitoring": True}
    assert gce.tokens_seen == {TOKEN} and TOKEN not in json.dumps(gce.bodies)


@pytest.mark.parametrize(
    ("machine_type", "attached"),
    [
        ("a2-highgpu-1g", None),
        (
            "n1-standard-4",
            [{"acceleratorCount": 2, "acceleratorType": "zones/us-central1-b/acceleratorTypes/nvidia-tesla-t4"}],
        ),
    ],
)
def test_gpus_are_attached_where_the_family_carries_none(
    gce: GceEmulator, machine_type: str, attached: list[dict[str, Any]] | None
) -> None:
    driver = gce.driver(
        machine_types=["a2-highgpu-1g", "n1-standard-4"],
        gpus={"n1-standard-4": {"type": "nvidia-tesla-t4", "count": 2}},
    )
    driver.launch(asked(pool=CapacityPool("gcp", "us-central1", "us-central1-b", machine_type, "on-demand")))
    body = inserted(gce)
    assert body.get("guestAccelerators") == attached
    assert body["scheduling"]["onHostMaintenance"] == "TERMINATE"
    assert {"key": "install-nvidia-driver", "value": "True"} in body["metadata"]["items"]


def test_tags_that_no_label_may_be_are_kept_whole(gce: GceEmulator) -> None:
    tags = {
        "holdfast-run": "Digits_2026/ä",
        "holdfast-store": "gs://a-bucket/and/a/prefix",
        "holdfast-job": "digits",
        "Cost Centre": "R&D",
    }
    driver = gce.driver()
    machine = driver.launch(asked(tags=tags))
    labels = inserted(gce)["labels"]
    assert labels["holdfast-job"] == "digits" and labels["holdfast-run"].startswith("sha256-")
    assert machine.tags == tags  # the emulator refuses labels that Google would
    assert gce.driver().machines({"holdfast-store": "gs://a-bucket/and/a/prefix"})[0].tags == tags


def test_names_are_valid_and_differ_where_anything_differs() -> None:
    tags = {"holdfast-run": "R" * 200, "holdfast-attempt": "12"}
    name = names.instance_name("token", tags, SPOT)
    assert len(name) == 55 and name == names.instance_name("token", tags, SPOT)
    others = {
        names.instance_name("token2", tags, SPOT),
        names.instance_name("token", {**tags, "holdfast-attempt": "13"}, SPOT),
        names.instance_name("token", tags, ON_DEMAND),
    }
    assert len(others | {name}) == 4
    parsed = names.parse_name(name)
    assert parsed and parsed.kind(["g2-standard-4", "n2-standard-2"]) == ("n2-standard-2", "spot")
    assert parsed.matches(tags) and not parsed.matches({**tags, "holdfast-run": "r"})
    assert not parsed.matches({"holdfast-job": "digits"})  # no name tells the job
    assert names.parse_name("hf-somebody-elses") is None


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["operation", "http"])
@pytest.mark.parametrize(
    "code", ["ZONE_RESOURCE_POOL_EXHAUSTED", "ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS", "STOCKOUT"]
)
def test_a_stockout_is_told_from_a_busy_server_in_either_form(tmp_path: Path, form: Any, code: str) -> None:
    with GceEmulator(tmp_path, spot_fates=[Fate(refuse=True)]) as gce:
        gce.refusal_form, gce.stockout_code = form, code
        driver = gce.driver()
        for _ in range(2):  # whoever asks again with the same token gets the same answer
            with pytest.raises(CapacityError, match=rf"us-central1-a: no capacity: {code}"):
                driver.launch(asked())
        assert gce.calls["instances.insert"] == 2  # never tried again by itself
        assert gce.names == [] and driver.machines({"holdfast-run": "run"}) == []


@pytest.mark.parametrize("form", ["operation", "http"])
def test_a_quota_is_named_with_its_limit_and_region(gce: GceEmulator, form: Any) -> None:
    gce.refusal_form, gce.limits["us-central1", "PREEMPTIBLE_CPUS"] = form, 3.0
    driver = gce.driver()
    driver.launch(asked("run-0001"))
    with pytest.raises(QuotaError, match=r"quota PREEMPTIBLE_CPUS is 3 .*us-central1"):
        driver.launch(asked("run-0002"))
    assert driver.launch(asked("run-0003", ON_DEMAND)).pool == ON_DEMAND


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": "projects/own/global/images/no-such"}, "no-such"),
        ({"network": "no-such"}, "no-such"),
        ({"disk_gib": 20}, "smaller than the image"),
    ],
)
def test_what_the_account_names_wrongly_is_named_back(gce: GceEmulator, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        gce.driver(**changes).launch(asked())


def test_a_pool_outside_the_account_is_refused_before_anything_is_sent(gce: GceEmulator) -> None:
    for pool in (
        CapacityPool("aws", "us-central1", "us-central1-a", "n2-standard-2", "spot"),
        CapacityPool("gcp", "asia-east1", "asia-east1-a", "n2-standard-2", "spot"),
    ):
        with pytest.raises(ConfigError, match="regions us-central1, europe-west4"):
            gce.driver().launch(asked(pool=pool))
    assert not gce.calls


def test_a_missing_permission_is_named_with_the_line_that_grants_it(gce: GceEmulator) -> None:
    gce.denied.add("compute.instances.create")
    with pytest.raises(
        ConfigError, match=r"compute\.instances\.create is missing.*gcp-role\.yaml.*`- compute\.instances\.create`"
    ):
        gce.driver().launch(asked())


def test_credentials_that_ended_are_waited_for_and_lose_no_machine(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked())
    gce.expired = True
    for call in (lambda: driver.launch(asked("run-0002")), lambda: driver.machines({}), driver.check):
        with pytest.raises(CredentialsError, match="renew them"):
            call()
    gce.expired = False
    assert [one.id for one in driver.machines({})] == [machine.id]


# -- one machine for a token ------------------------------------------------------------------------------------------


def test_a_lost_answer_leaves_one_machine(gce: GceEmulator) -> None:
    with Wire(gce.endpoint) as wire:
        fault = wire.inject("lost", when=lambda request: request.action == "instances.insert")
        driver = gce.driver(api_endpoint=wire.url)
        machine = driver.launch(asked())
        assert fault.hits == 1 and gce.calls["instances.insert"] == 2
        assert gce.names == [machine.id]
        # Somebody else, who never heard of the first call at all:
        assert gce.driver().launch(asked()).id == machine.id and gce.names == [machine.id]


def test_an_instance_of_that_name_is_adopted_only_when_it_is_of_this_launch(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked())
    gce.forget_requests()  # as Google does in time
    assert gce.driver().launch(asked()) == machine
    gce.instance(machine.id).labels[names.TOKEN_LABEL] = "another"
    with pytest.raises(ConfigError, match=rf"{machine.id}.*not of this launch"):
        gce.driver().launch(asked())


def test_a_launch_whose_operation_failed_in_passing_is_asked_for_anew(gce: GceEmulator) -> None:
    gce.failing_operations += ["INTERNAL_ERROR", "RESOURCE_OPERATION_RATE_EXCEEDED"]
    machine = gce.driver().launch(asked())
    assert gce.calls["instances.insert"] == 3
    assert gce.driver().launch(asked()).id == machine.id  # meets the failed operations again, and gets past them
    assert gce.names == [machine.id]
    gce.failing_operations += ["INTERNAL_ERROR"] * 3
    with pytest.raises(TransientError, match="INTERNAL_ERROR"):
        gce.driver().launch(asked("run-0002"))


def test_a_machine_that_is_over_is_not_launched_again_by_its_token(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked(startup_script="#!/bin/bash\ntrue\n"))
    over = ended(driver, machine)
    wait_for(lambda: gce.names == [])
    gce.forget_requests()
    assert driver.launch(asked()) == over
    successor = gce.driver()
    assert successor.machines({"holdfast-run": "run", "holdfast-attempt": "1"})
    again = successor.launch(asked())
    assert (again.state, again.pool, again.terminated_at) == ("terminated", SPOT, over.terminated_at)
    assert gce.names == []


def test_faults_of_the_network_are_ridden_out(gce: GceEmulator) -> None:
    with Wire(gce.endpoint, probability=0.15, seed=7) as wire:
        driver = gce.driver(api_endpoint=wire.url)
        machines = [driver.launch(asked(f"run-{number:04d}")) for number in range(5)]
        assert sorted(machine.id for machine in driver.machines({})) == sorted(machine.id for machine in machines)
        for machine in machines:
            driver.terminate(machine.id, machine.pool)
        wait_for(lambda: all(machine.state == "terminated" for machine in driver.machines({})))
        faults = [request.fault for request in wire.requests if request.fault]
        assert len(faults) >= 3, "the seed met too few faults to prove anything"
    assert gce.names == []


def test_a_network_that_stays_away_is_transient(gce: GceEmulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("holdfast.drivers.gcp.api.RETRY_SECONDS", 1.0)
    driver = gce.driver(api_endpoint="http://127.0.0.1:9")
    with pytest.raises(TransientError, match="can't be reached"):
        driver.launch(asked())


def test_a_request_is_sent_where_the_account_says_and_nowhere_else(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"compute\.googleapis\.com"), GceEmulator(tmp_path) as gce:
        driver = GcpDriver(gce.config(api_endpoint=""), gce.credentials())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("holdfast.drivers.gcp.api.RETRY_SECONDS", 0.1)
            with pytest.raises(TransientError):
                driver.check()


# -- protected machines -----------------------------------------------------------------------------------------------


def test_a_protected_machine_is_terminated_all_the_same(gce: GceEmulator) -> None:
    driver = gce.driver()
    machine = driver.launch(asked(pool=ON_DEMAND))
    gce.instance(machine.id).deletion_protection = True
    driver.terminate(machine.id, machine.pool)
    assert gce.calls["instances.setDeletionProtection"] == 1
    assert described(driver, machine).state in ("stopping", "terminated")
    assert ended(driver, machine).reason == "terminated-by-user"


def test_every_call_of_a_launch_is_among_the_permissions_that_are_examined(gce: GceEmulator) -> None:
    from holdfast.drivers.gcp.examination import PERMISSIONS as EXAMINED
    from tests.emulated.gce import PERMISSIONS

    driver = gce.driver()
    machine = driver.launch(asked(startup_script="#!/bin/bash\ntrue\n"))
    ended(driver, machine)
    driver.console(machine.id, machine.pool)
    driver.check()
    list(driver.examine())
    needed = {name for method in gce.calls for name in PERMISSIONS[method]}
    own_line = {"compute.advice.capacity"}  # of the examination: runs do without it
    assert needed - set(EXAMINED) == own_line


def test_scheduling_of_the_client_knows_the_notice() -> None:
    """The field is what `preemption_notice_seconds` needs; an older client has none."""
    assert "preemption_notice_duration" in compute_v1.Scheduling.meta.fields
