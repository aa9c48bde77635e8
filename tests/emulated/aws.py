"""AWS on this computer: moto answers, and every instance that it is asked for really runs its user data.

    with AwsEmulator(folder, spot_fates=[Fate(refuse=True)]) as aws:
        driver = aws.driver()
        ...
        assert aws.calls["RunInstances"] == 1

One at a time in a process: moto's state is the process's.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Self

import boto3
import botocore.loaders
import botocore.session
from moto.core.base_backend import BackendDict
from moto.ec2.models import ec2_backends
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from holdfast.drivers.aws import AwsConfig, AwsDriver
from holdfast.drivers.local.config import Fate
from tests.emulated.aws_front import Front, Injected, Recorded
from tests.emulated.aws_machines import ACCOUNT, Machines, wrap_moto
from tests.emulated.machine_host import MachineHost

REGIONS = ("us-east-1", "us-west-2")
INSTANCE_TYPES = ["c7i.large", "m7i.2xlarge", "g5.xlarge"]
PROFILE = "holdfast-machine"
ACCESS_KEY = "AKIAEMULATEDHOLDFAST"
SECRET_KEY = "planted/secret+of/the-emulated-account"
SESSION_TOKEN = "planted-session-token-of-the-emulated-account"
LOADER = botocore.loaders.create_loader()
"""Shared: reading EC2's model again for every session would take longer than most tests."""
ROLE_POLICY = '{"Version": "2012-10-17", "Statement": []}'


class _Handler(MotoRequestHandler):
    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        """Nothing: what was asked for is in `requests`."""


class AwsEmulator:
    def __init__(
        self,
        folder: Path,
        *,
        spot_fates: Sequence[Fate] = (),
        on_demand_fates: Sequence[Fate] = (),
        machine_environment: Mapping[str, str] | None = None,
        notice_seconds: float = 2.0,
        wire: Callable[[str], AbstractContextManager[Any]] | None = None,
    ) -> None:
        """`wire` makes, of the emulator's URL, a proxy with a `url` (`Wire` itself will do): `endpoint` is then the proxy's,
        and `direct` stays the emulator's own.
        """
        self.host = MachineHost(
            folder / "machines",
            "aws",
            machine_environment or {},
            spot_fates,
            on_demand_fates,
            notice_seconds=notice_seconds,
        )
        self.wire: Any = None
        self._make_wire = wire
        self._stack = ExitStack()
        self._clients: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> Self:
        assert Machines.current is None, "another AwsEmulator is open in this process"
        wrap_moto()
        BackendDict.reset()
        self._machines = Machines.current = Machines(self.host)
        self._stack.callback(self._close)
        images = {region: _image_of(region) for region in REGIONS}
        self.front = Front(DomainDispatcherApplication(create_backend_app), self._machines, images)
        server = make_server("127.0.0.1", 0, self.front, threaded=True, request_handler=_Handler)
        server.daemon_threads = True  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True, name="aws").start()
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)
        self.direct = self.endpoint = f"http://127.0.0.1:{server.server_port}"
        self._make_profile()
        if self._make_wire:
            self.wire = self._stack.enter_context(self._make_wire(self.direct))
            self.endpoint = self.wire.url
        self.forget_calls()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- how it is used -----------------------------------------------------------------------------------------------

    def session(self) -> boto3.Session:
        core = botocore.session.get_session()
        core.register_component("data_loader", LOADER)
        return boto3.Session(
            botocore_session=core,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            aws_session_token=SESSION_TOKEN,
            region_name=REGIONS[0],
        )

    def config(self, **overrides: Any) -> AwsConfig:
        given: dict[str, Any] = {
            "regions": [REGIONS[0]],
            "instance_types": INSTANCE_TYPES,
            "instance_profile": PROFILE,
            "client_parameters": {"endpoint_url": self.endpoint},
            "poll_seconds": 0.1,
            "describe_seconds": 0.5,
            **overrides,
        }
        return AwsConfig(**given)

    def driver(self, **overrides: Any) -> AwsDriver:
        return AwsDriver(self.config(**overrides), self.session())

    def client(self, service: str, region: str = REGIONS[0]) -> Any:
        """Past the wire, for tests that look or prepare."""
        if (service, region) not in self._clients:
            made = self.session().client(service, region_name=region, endpoint_url=self.direct)
            self._clients[service, region] = made
        return self._clients[service, region]

    @property
    def calls(self) -> Counter[str]:
        """How often each action reached the cloud."""
        return self.front.calls

    @property
    def requests(self) -> list[Recorded]:
        return self.front.requests

    def forget_calls(self) -> None:
        self.front.calls.clear()
        self.front.requests.clear()

    # -- what it does to its users ------------------------------------------------------------------------------------

    def refuse(self, action: str, code: str, message: str = "injected", *, status: int = 400, count: float = 1) -> None:
        """Answer the next `count` requests for `action` with this error."""
        self.front.injected.append(Injected(action, code, message, status, count))

    def deny(self, *actions: str) -> None:
        """The account's policy allows these no more."""
        self.front.denied.update(actions)

    def allow_for_tagged_machines_only(self, *actions: str) -> None:
        self.front.tagged_only.update(actions)

    def hide_new_machines(self, seconds: float) -> None:
        """Instances launched from now on are unknown to the API for so long."""
        self._machines.hidden_seconds = seconds

    def delay(self, action: str, seconds: float) -> None:
        """Answer it so much later from now on."""
        self.front.delays[action] = seconds

    def forget_machine(self, machine_id: str) -> None:
        """As EC2 forgets a terminated instance after about an hour."""
        self._machines.forget(machine_id)

    def serve_pages_of(self, size: int) -> None:
        self.front.page_size = size

    def set_quota(self, code: str, vcpus: float) -> None:
        self.front.quotas[code] = vcpus

    # -----------------------------------------------------------------------------------------------------------------

    def _make_profile(self) -> None:
        iam = self.client("iam")
        iam.create_role(RoleName=PROFILE, AssumeRolePolicyDocument=ROLE_POLICY)
        iam.create_instance_profile(InstanceProfileName=PROFILE)
        iam.add_role_to_instance_profile(InstanceProfileName=PROFILE, RoleName=PROFILE)

    def _close(self) -> None:
        Machines.current = None
        for machine_id in self.host.ids():  # those that are still booting too: they read it when they come up
            self.host.terminate(machine_id)
        self.host.stop_all()
        BackendDict.reset()


def _image_of(region: str) -> str:
    """An image of moto's with a root device, standing for the Deep Learning AMI."""
    images = ec2_backends[ACCOUNT][region].describe_images(owners=["amazon"])
    return next(image.id for image in images if image.architecture == "x86_64" and image.platform != "windows")
