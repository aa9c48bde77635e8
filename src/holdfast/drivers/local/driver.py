"""The local cloud's driver. All state lives in the cloud's folder: any process that opens it sees the same machines."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from holdfast.clock import Clock, FastClock, WallClock, clock_to_text
from holdfast.drivers.local import catalogue, machine_files
from holdfast.drivers.local.config import Fate, LocalCloudConfig
from holdfast.drivers.local.market import fate_of, price_history
from holdfast.drivers.local.processes import kill_marked
from holdfast.drivers.protocol import (
    CapacityPool,
    Finding,
    Fleet,
    FleetRequest,
    LaunchRequest,
    Machine,
    Offer,
    PricePoint,
)
from holdfast.errors import CapacityError, ConfigError, TransientError
from holdfast.process_identity import lives

log = logging.getLogger(__name__)

START_SECONDS = 20.0
CONSOLE_BYTES = 64 * 1024
FLEET_TAG, MEMBER_TAG = "holdfast-fleet", "holdfast-member"


class LocalDriver:
    """Implements `holdfast.drivers.protocol.Driver`."""

    name = catalogue.CLOUD
    poll_seconds = 0.1
    describe_seconds = 0.0
    image_python: Path | None = Path(sys.executable)

    def __init__(self, config: LocalCloudConfig) -> None:
        self._config = config
        self._root = config.root.absolute()
        self._machines_folder = self._root / "machines"
        self._launches_folder = self._root / "launches"
        self._fleets_folder = self._root / "fleets"
        try:
            self._machines_folder.mkdir(parents=True, exist_ok=True)
            self._launches_folder.mkdir(parents=True, exist_ok=True)
            self._fleets_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"account: the local cloud's folder {self._root} can't be made: {error}") from error
        self.clock = self._open_clock()

    def check(self) -> None:
        if not shutil.which("bash"):
            raise ConfigError("account: the local cloud needs bash on the path; install it")
        if not os.access(self._machines_folder, os.W_OK):
            raise ConfigError(f"account: the local cloud's folder {self._root} is not writable; name another")

    def examine(self) -> Iterator[Finding]:
        try:
            self.check()
            yield Finding(subject="machines", ok=True, detail=f"processes of this computer, kept in {self._root}")
        except ConfigError as error:
            yield Finding(subject="machines", ok=False, detail=str(error))

    def offers(self) -> Sequence[Offer]:
        now = self.clock.now()
        return [
            Offer(
                pool=pool,
                usd_per_hour=price_history(self._config.market, pool, zone, kind, now, now)[-1].usd_per_hour,
                on_demand_usd_per_hour=kind.on_demand_usd_per_hour,
                vcpus=kind.vcpus,
                memory_gib=kind.memory_gib,
                gpus=kind.gpus,
                gpu_name=kind.gpu_name,
                interruptions_per_hour=kind.interruptions_per_hour if pool.provisioning_model == "spot" else 0.0,
            )
            for pool, zone, kind in catalogue.pools()
        ]

    def price_history(self, pool: CapacityPool, start: datetime, end: datetime) -> Sequence[PricePoint]:
        zone, kind = _known(pool)
        return price_history(self._config.market, pool, zone, kind, start, end)

    def launch(self, request: LaunchRequest) -> Machine:
        zone, _ = _known(request.pool)
        fate = self._fate(request)
        if fate.refuse:
            pool = request.pool
            raise CapacityError(f"no {pool.provisioning_model} capacity for {pool.instance_type} in {zone.name}")
        # Of this cloud alone: the mark by which a machine's processes are ended must never fit another cloud's.
        machine_id = "i-" + hashlib.sha256(f"{self._root}\n{request.token}".encode()).hexdigest()[:17]
        folder = self._machines_folder / machine_id
        if not (folder / machine_files.SPEC).exists():
            folder.mkdir(exist_ok=True)
            spec = {
                "id": machine_id,
                "token": request.token,
                "pool": dataclasses.asdict(request.pool),
                "tags": dict(request.tags),
                "environment": dict(request.environment),
                "startup_script": request.startup_script,
                "shutdown_script": request.shutdown_script,
                "launched_at": self.clock.now().isoformat(),
                "clock": clock_to_text(self.clock),
                "dialect": zone.dialect,
                "notice_seconds": (
                    catalogue.NOTICE_SECONDS[zone.dialect] if fate.notice_seconds is None else fate.notice_seconds
                ),
                "shutdown_grace_seconds": self._config.shutdown_grace_seconds,
                "fate": fate.model_dump(),
            }
            # Whoever creates the file starts the host: of two launches at once, one does.
            if machine_files.write_json(folder / machine_files.SPEC, spec):
                _start_host(folder)
        self._await_start(folder)
        machine = self._describe(folder)
        assert machine
        return machine

    def launch_fleet(self, request: FleetRequest) -> Sequence[Machine]:
        """A maintained fleet is looked after whenever any process describes the machines."""
        path = self._fleets_folder / f"{hashlib.sha256(request.token.encode()).hexdigest()[:32]}.json"
        if request.kind == "maintained":
            machine_files.write_json(path, {**dataclasses.asdict(request), "tags": dict(request.tags)})
        machines, refusal = self._fill(request)
        if not machines and refusal:
            if request.kind == "maintained":
                path.unlink(missing_ok=True)
            raise refusal
        return machines

    def fleets(self, tags: Mapping[str, str]) -> Sequence[Fleet]:
        return [
            Fleet(
                token=kept.token,
                cloud=self.name,
                region=kept.pools[0].region,
                machines=kept.machines,
                tags=kept.tags,
            )
            for kept in self._kept_fleets()
            if all(kept.tags.get(name) == value for name, value in tags.items())
        ]

    def end_fleet(self, token: str, region: str) -> None:
        for path in self._fleets_folder.glob("*.json"):
            kept = machine_files.read_json(path)
            if kept and kept["token"] == token:
                path.unlink(missing_ok=True)
        for machine in self._described({FLEET_TAG: token}):
            self.terminate(machine.id, machine.pool)

    def machines(self, tags: Mapping[str, str], max_age_seconds: float = 0.0, cloud: str = "") -> Sequence[Machine]:
        for kept in self._kept_fleets():
            self._fill(kept)
        return self._described(tags)

    def _fill(self, request: FleetRequest) -> tuple[list[Machine], CapacityError | None]:
        """One machine for every member that has none; a member's tokens are numbered through its lives."""
        found: list[Machine] = []
        refusal: CapacityError | None = None
        spot = round(request.machines * request.spot_share)
        for member in range(request.machines):
            model = "spot" if member < spot else "on-demand"
            pools = [pool for pool in request.pools if pool.provisioning_model == model]
            token = f"{request.token}-{member:04d}"
            lives = self._described({FLEET_TAG: request.token, MEMBER_TAG: str(member)})
            living = [machine for machine in lives if machine.state != "terminated"]
            if living or (lives and request.kind == "instant"):
                found += living or lives[-1:]
                continue
            tags = {**request.tags, FLEET_TAG: request.token, MEMBER_TAG: str(member)}
            for pool in pools:
                try:
                    asked = LaunchRequest(
                        token=f"{token}-{len(lives)}-{pool}",
                        pool=pool,
                        tags=tags,
                        environment={},
                        startup_script=request.startup_script,
                        shutdown_script=request.shutdown_script,
                        max_run_seconds=request.max_run_seconds,
                    )
                    found.append(self.launch(asked))
                    break
                except CapacityError as error:
                    refusal = error
        return found, refusal

    def _kept_fleets(self) -> list[FleetRequest]:
        kept = [machine_files.read_json(path) for path in sorted(self._fleets_folder.glob("*.json"))]
        return [
            FleetRequest(**{**one, "pools": [CapacityPool(**pool) for pool in one["pools"]]}) for one in kept if one
        ]

    def _described(self, tags: Mapping[str, str]) -> list[Machine]:
        found = []
        for folder in sorted(self._machines_folder.iterdir()):
            spec = machine_files.read_json(folder / machine_files.SPEC)
            if spec and all(spec["tags"].get(name) == value for name, value in tags.items()):
                machine = self._describe(folder)
                if machine:
                    found.append(machine)
        return found

    def terminate(self, machine_id: str, pool: CapacityPool) -> None:
        folder = self._folder(machine_id)
        if folder is None or (folder / machine_files.END).exists():
            return
        (folder / machine_files.TERMINATE).touch()
        self._describe(folder)

    def console(self, machine_id: str, pool: CapacityPool) -> str:
        folder = self._folder(machine_id)
        path = folder / machine_files.CONSOLE if folder else None
        if path is None or not path.exists():
            return ""
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - CONSOLE_BYTES))
            return file.read().decode(errors="replace")

    # -----------------------------------------------------------------------------------------------------------------

    def _fate(self, request: LaunchRequest) -> Fate:
        """The market's answer to this token: decided once, in the order of launches, whoever asks again."""
        model = request.pool.provisioning_model
        answers = sorted(self._launches_folder.glob(f"{model}-*.json"))
        while True:
            for path in answers:
                answer = machine_files.read_json(path)
                if answer and answer["token"] == request.token:
                    return Fate.model_validate(answer["fate"])
            number = len(answers)
            elapsed_seconds = (self.clock.now() - self._began_at).total_seconds()
            fate = fate_of(self._config.market, request.pool, number, elapsed_seconds)
            path = self._launches_folder / f"{model}-{number:06d}.json"
            if machine_files.write_json(path, {"token": request.token, "fate": fate.model_dump()}):
                return fate
            answers = sorted(self._launches_folder.glob(f"{model}-*.json"))  # another launch was first: look again

    def _describe(self, folder: Path) -> Machine | None:
        spec = machine_files.read_json(folder / machine_files.SPEC)
        if spec is None:
            return None
        end = machine_files.read_json(folder / machine_files.END)
        host = machine_files.read_json(folder / machine_files.RUNNING)
        if end is None and self._host_is_dead(folder, host):
            if kill_marked(spec["id"]):
                machine_files.record_end(folder, "host-failed", self.clock.now())
                end = machine_files.read_json(folder / machine_files.END)
            else:
                log.error("processes are left that can't be ended machine=%s", spec["id"])
        if end:
            state = "terminated"
        elif (folder / machine_files.TERMINATE).exists():
            state = "stopping"
        else:
            state = "running" if host else "pending"
        return Machine(
            id=spec["id"],
            pool=CapacityPool(**spec["pool"]),
            state=state,  # type: ignore[arg-type]
            tags=spec["tags"],
            launched_at=datetime.fromisoformat(spec["launched_at"]),
            terminated_at=datetime.fromisoformat(end["terminated_at"]) if end else None,
            reason=end["reason"] if end else "",
            detail=_detail(end["reason"], spec) if end else "",
        )

    def _host_is_dead(self, folder: Path, host: dict[str, Any] | None) -> bool:
        if host:
            return not lives(host) and not (folder / machine_files.END).exists()
        # Not yet reported: its starter may have died between the file and the process, or it is slow. One that comes up
        # after all finds the end recorded, and its machine does not start, or is ended.
        age = time.time() - (folder / machine_files.SPEC).stat().st_mtime
        return age > START_SECONDS

    def _await_start(self, folder: Path) -> None:
        give_up_at = time.monotonic() + START_SECONDS
        while not (folder / machine_files.RUNNING).exists() and not (folder / machine_files.END).exists():
            if time.monotonic() > give_up_at:
                self._describe(folder)
                said = (folder / "host.log").read_text(errors="replace") if (folder / "host.log").exists() else ""
                raise TransientError(f"machine in {folder} did not start within {START_SECONDS:.0f} s: {said[-2000:]}")
            time.sleep(0.005)

    def _folder(self, machine_id: str) -> Path | None:
        folder = self._machines_folder / machine_id
        return folder if folder.parent == self._machines_folder and folder.is_dir() else None

    def _open_clock(self) -> Clock:
        """One clock for every process: it is made once, and made anew only while no machine lives by it."""
        path, speed = self._root / "clock.json", self._config.clock_speed
        fresh = {"origin": datetime.now(UTC).isoformat(), "speed": speed}
        if not machine_files.write_json(path, fresh):
            kept = machine_files.read_json(path) or fresh
            if kept["speed"] == speed:
                fresh = kept
            else:
                self.clock = _clock(kept)
                if living := [machine.id for machine in self.machines({}) if machine.state != "terminated"]:
                    raise ConfigError(
                        f"account: clock_speed is {speed:g}, but {len(living)} machines of {self._root} live by a clock of "
                        f"speed {kept['speed']:g}; use that, or another folder"
                    )
                staged = path.with_suffix(".staged")
                staged.write_text(json.dumps(fresh))
                staged.replace(path)
        self._began_at = datetime.fromisoformat(fresh["origin"])
        return _clock(fresh)


def _clock(kept: Mapping[str, Any]) -> Clock:
    return WallClock() if kept["speed"] == 1 else FastClock(datetime.fromisoformat(kept["origin"]), kept["speed"])


def _known(pool: CapacityPool) -> tuple[catalogue.Zone, catalogue.InstanceType]:
    zone = catalogue.find_zone(pool.zone)
    kind = catalogue.find_type(zone, pool.instance_type) if zone else None
    if zone is None or kind is None:
        raise ConfigError(f"the local cloud has no {pool.instance_type!r} in zone {pool.zone!r}")
    return zone, kind


def _start_host(folder: Path) -> None:
    package_root = str(Path(__file__).parents[3])
    with open(folder / "host.log", "wb") as output:
        subprocess.Popen(
            [sys.executable, "-m", "holdfast.drivers.local.host", str(folder)],
            cwd=folder,
            env={
                "PATH": os.environ.get("PATH", ""),
                "PYTHONPATH": package_root,
                "LANG": "C.UTF-8",
                machine_files.HOST_MARK: folder.name,
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _detail(reason: str, spec: Mapping[str, Any]) -> str:
    if reason == "preempted":
        notice = f"{spec['notice_seconds']:.0f} s of notice" if spec["fate"]["notice"] else "no notice"
        return f"the market took the machine, with {notice}"
    return {"host-failed": "the machine's host died", "terminated-by-user": "terminated through the API"}.get(
        reason, ""
    )
