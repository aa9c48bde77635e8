"""Several clouds behind one driver: one that is away, or that knows nothing of a fleet, must not speak for the others."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from holdfast.drivers.local import LocalCloudConfig, LocalDriver
from holdfast.drivers.protocol import Fleet, LaunchRequest, Machine, Offer
from holdfast.drivers.several import SeveralDrivers
from holdfast.errors import ConfigError, CredentialsError, TransientError
from holdfast.model import Resources, TrainingJob
from holdfast.placement.policy import Launch
from holdfast.runtime.contract import store_tag
from holdfast.storage import DirectoryStore
from holdfast.supervision.opening import open_run
from holdfast.supervision.reap import reap
from tests.conftest import PROGRAMS


class ThisCloud(LocalDriver):
    away: list[TransientError]
    ended: list[str]

    def offers(self) -> Sequence[Offer]:
        if self.away:
            raise self.away.pop(0)
        return super().offers()

    def end_fleet(self, token: str, region: str) -> None:
        self.ended.append(token)


class OtherCloud(LocalDriver):
    """Has machines, but none that the job asks for, and no such region."""

    name = "other"

    def offers(self) -> Sequence[Offer]:
        return [offer for offer in super().offers() if not offer.gpus]

    def fleets(self, tags: Mapping[str, str]) -> Sequence[Fleet]:
        raise ConfigError("no permission to list fleets")

    def machines(self, tags: Mapping[str, str], max_age_seconds: float = 0.0, cloud: str = "") -> Sequence[Machine]:
        raise CredentialsError("renew them")

    def end_fleet(self, token: str, region: str) -> None:
        raise ConfigError(f"region {region!r} is none of this account's")


def both(tmp_path: Path, *away: TransientError) -> tuple[ThisCloud, SeveralDrivers]:
    one, other = (kind(LocalCloudConfig(root=tmp_path / kind.__name__)) for kind in (ThisCloud, OtherCloud))
    assert isinstance(one, ThisCloud)
    one.away, one.ended = list(away), []
    return one, SeveralDrivers([other, one])


def job() -> TrainingJob:
    return TrainingJob(name="light", script="light.py", code=str(PROGRAMS), resources=Resources(gpus=1))


def test_a_run_is_not_given_up_while_the_cloud_that_has_its_machines_is_away(tmp_path: Path) -> None:
    one, driver = both(tmp_path)
    run = open_run(job(), driver, DirectoryStore(tmp_path / "store"), None, "light")
    one.away = [TransientError("the cloud does not answer")]
    with run:
        with pytest.raises(TransientError, match="does not answer"):
            run.decide()
        assert isinstance(run.decide(), Launch)


def test_a_run_waits_for_the_credentials_of_the_cloud_that_has_its_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("holdfast.supervision.run.CREDENTIALS_POLL_WALL_SECONDS", 0.01)
    one, driver = both(tmp_path)
    run = open_run(job(), driver, DirectoryStore(tmp_path / "store"), None, "light")
    one.away = [CredentialsError("renew them"), CredentialsError("renew them")]
    with run:
        assert isinstance(run.decide(), Launch)
        assert run.state.warnings == ["waited for credentials: renew them"]


def test_a_job_is_not_called_impossible_while_a_cloud_is_away(tmp_path: Path) -> None:
    _, driver = both(tmp_path, TransientError("the cloud does not answer"))
    with pytest.raises(TransientError, match="does not answer"):
        open_run(job(), driver, DirectoryStore(tmp_path / "store"), None, "light")


def test_a_fleet_is_ended_by_the_cloud_that_knows_its_region(tmp_path: Path) -> None:
    one, driver = both(tmp_path)
    driver.end_fleet("fleet-1", "here")
    assert one.ended == ["fleet-1"]


def test_a_fleet_of_a_region_that_no_cloud_knows_is_an_error(tmp_path: Path) -> None:
    driver = SeveralDrivers([OtherCloud(LocalCloudConfig(root=tmp_path / "one"))])
    with pytest.raises(ConfigError, match="'nowhere'"):
        driver.end_fleet("fleet-1", "nowhere")


def test_an_orphan_is_reaped_although_another_cloud_can_t_be_asked(tmp_path: Path) -> None:
    one, driver = both(tmp_path)
    store = DirectoryStore(tmp_path / "store")
    orphan = one.launch(
        LaunchRequest(
            token="orphan-0001",
            pool=one.offers()[0].pool,
            tags={"holdfast-run": "orphan", "holdfast-store": store_tag(store.url)},
            environment={},
            startup_script="#!/bin/bash\nsleep 600\n",
        )
    )
    with pytest.raises(TransientError, match="renew them"):
        reap(driver, store)
    give_up_at = time.monotonic() + 30
    while [(machine.id, machine.state) for machine in one.machines({})] != [(orphan.id, "terminated")]:
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
