"""The clients of one account: one for each service and region, made late, used by any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from holdfast.drivers.aws.config import AwsConfig
from holdfast.drivers.aws.errors import CAPACITY, code_of, translated
from holdfast.drivers.protocol import CapacityPool

if TYPE_CHECKING:
    import boto3

LAUNCHES = ("RunInstances", "CreateFleet")


class Account:
    def __init__(self, config: AwsConfig, session: boto3.Session) -> None:
        self.config = config
        self._session = session
        self._clients: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()

    def calling(self, service: str, pool: CapacityPool | None = None) -> AbstractContextManager[None]:
        """Around every call: its errors come out as ours."""
        return translated(service, self.config, pool)

    def client(self, service: str, region: str) -> Any:
        with self._lock:  # a session is for one thread at a time; clients are not
            if (service, region) not in self._clients:
                with self.calling(service):
                    self._clients[service, region] = self._make(service, region)
            return self._clients[service, region]

    def _make(self, service: str, region: str) -> Any:
        from botocore.config import Config

        parameters = dict(self.config.client_parameters)
        ours = Config(
            retries={"mode": "standard", "total_max_attempts": 4},
            connect_timeout=5,
            read_timeout=30,
            max_pool_connections=50,
            user_agent_extra="holdfast",
        )
        theirs = parameters.pop("config", None)
        if theirs is not None:
            ours = ours.merge(Config(**theirs) if isinstance(theirs, dict) else theirs)
        client = self._session.client(service, region_name=region, config=ours, **parameters)
        for launch in LAUNCHES if service == "ec2" else ():
            client.meta.events.register_first(f"needs-retry.ec2.{launch}", _give_up_on_capacity(launch))
        return client


def _give_up_on_capacity(operation: str) -> Callable[..., None]:
    def give_up(response: Any = None, **_: Any) -> None:
        """An empty pool is answered with HTTP 500, which botocore would repeat while another zone waits to be asked."""
        from botocore.exceptions import ClientError

        parsed = response[1] if response else {}
        error = ClientError(parsed, operation)
        if code_of(error) in CAPACITY:
            raise error

    return give_up
