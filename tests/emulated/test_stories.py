"""The main job's story on AWS and on GCP, through boto3 and google-cloud-compute, over HTTP, on machines that really run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from moto.sts.models import sts_backends

from holdfast.checkpoint.reader import read_metrics, tensor_digest
from holdfast.drivers.local.config import Fate
from holdfast.drivers.several import SeveralDrivers
from holdfast.model import Fallback, Resources
from holdfast.storage import DirectoryStore
from tests.chaos.runs import assert_lost_steps_were_trained_again, carry, cloud, light_job, outcomes, tiny_job
from tests.emulated.aws_machines import ACCOUNT
from tests.emulated.runs import (
    ACCOUNTS,
    ROLE,
    SMALL,
    Account,
    Open,
    assert_nothing_left,
    assert_totals_are_right,
    aws_account,
    gcp_account,
    small_job,
)


@pytest.fixture(params=ACCOUNTS)
def opened(request: pytest.FixtureRequest, folder: Path, prefect_api: str) -> Iterator[Open]:
    with ExitStack() as stack:
        yield lambda *fates, **more: stack.enter_context(ACCOUNTS[request.param](folder, fates, **more))


def test_three_failed_spot_attempts_then_on_demand_in_another_zone(opened: Open, folder: Path) -> None:
    account: Account = opened(Fate(refuse=True), Fate(at_step=4, notice=False), Fate(refuse=True))
    # However late step 4 is seen, what was committed by then is too little progress.
    job = small_job(account, folder, fallback=Fallback(progress_to_reset=1000), steps=60)
    _, summary = carry(job, account.driver(), account.open_store(), "story")
    assert outcomes(summary) == [
        ("spot", "no-capacity"),
        ("spot", "preempted"),
        ("spot", "no-capacity"),
        ("on-demand", "finished"),
    ]
    zones = [attempt["zone"] for attempt in summary["attempts"]]
    assert zones[3] != zones[2] and zones[1] != zones[0]
    assert summary["steps_total"] == 60
    assert_lost_steps_were_trained_again(summary, folder, account.name)
    assert_totals_are_right(summary, account)
    assert_nothing_left(account)


def test_a_notice_is_heard_on_the_machine_and_loses_no_step(opened: Open, folder: Path) -> None:
    account: Account = opened(Fate(at_step=25, notice=True))
    job = small_job(account, folder)
    _, summary = carry(job, account.driver(), account.open_store(), "noticed")
    assert outcomes(summary) == [("spot", "preempted"), ("spot", "finished")]
    assert summary["attempts"][0]["notice"] == "preemption"
    assert summary["lost_steps"] == 0
    assert_totals_are_right(summary, account)
    assert_nothing_left(account)


def test_a_run_that_began_on_aws_goes_on_on_gcp_from_the_same_checkpoint(folder: Path, prefect_api: str) -> None:
    expensive = {"n2-standard-2": {"spot": 0.09, "on_demand": 0.0971}}  # AWS is asked first
    with (
        aws_account(folder, [Fate(at_step=55, notice=False), *[Fate(refuse=True)] * 9]) as aws,
        gcp_account(
            folder, machine_environment={"AWS_ENDPOINT_URL_STS": aws.emulator.direct}, usd_per_hour=expensive
        ) as gcp,
    ):
        resources = Resources(instance_types=list(SMALL.values()))
        job = light_job(folder, "wanderer", resources=resources)
        # The store is AWS' bucket; GCP's machines take on a role of AWS' by their service account's identity.
        store = aws.open_store_for_others()
        _, summary = carry(job, SeveralDrivers([aws.driver(), gcp.driver()]), store, "wanderer")
        assert summary["state"] == "finished"
        attempts = summary["attempts"]
        assert [attempt["cloud"] for attempt in attempts if attempt["machine"]] == ["aws", "gcp"]
        assert {attempt["outcome"] for attempt in attempts[1:-1]} == {"no-capacity"}
        assert {attempt["cloud"] for attempt in attempts[1:-1]} == {"aws"}  # its other zones came first
        assert attempts[-1]["first_step"] == attempts[0]["last_committed_step"] + 1 > 1
        assert_lost_steps_were_trained_again(summary, folder, "wanderer")
        for account in (aws, gcp):
            assert_nothing_left(account)
        assert {role.role_arn for role in sts_backends[ACCOUNT]["aws"].assumed_roles} == {ROLE}


def test_a_preempted_training_ends_with_the_weights_of_one_that_ran_here_in_peace(opened: Open, folder: Path) -> None:
    account: Account = opened(Fate(at_step=75, notice=False))
    store, here = account.open_store(), DirectoryStore(folder / "here")
    carry(tiny_job(folder, "peace"), cloud(folder, []), here, "peace")
    _, summary = carry(small_job(account, folder, torch=True), account.driver(), store, "taken")
    assert outcomes(summary) == [("spot", "preempted"), ("spot", "finished")]
    assert tensor_digest(store, "taken") == tensor_digest(here, "peace")
    assert read_metrics(store, "taken") == read_metrics(here, "peace")
    assert_nothing_left(account)
