"""The two metadata services' words for "this machine will be taken away"."""

from __future__ import annotations

import http.client
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol
from urllib.parse import urlsplit

from holdfast.clock import Clock
from holdfast.errors import TransientError
from holdfast.runtime.contract import NOTICE_SECONDS, NoticeKind

AWS_ENDPOINT = "http://169.254.169.254"
GCP_HOST = "metadata.google.internal"
TIMEOUT_SECONDS = 2.0
GCP_NOTICE_SECONDS = 30.0
TOKEN_SECONDS = 21600


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    kind: NoticeKind
    reclaim_at: datetime | None
    seen_at: datetime

    def to_json(self) -> dict[str, str | None]:
        return {
            "kind": self.kind,
            "reclaim_at": self.reclaim_at.isoformat() if self.reclaim_at else None,
            "seen_at": self.seen_at.isoformat(),
        }


class MetadataService(Protocol):
    dialect: str

    def answers(self) -> bool: ...

    def machine_id(self) -> str:
        """The id by which the cloud's API knows this machine. Raises as `notice` does."""

    def address(self) -> str:
        """Where other machines of its network reach this one. Raises as `notice` does."""

    def notice(self) -> Notice | None:
        """What is announced now. Raises OSError or http.client.HTTPException when the service can't be asked."""


class AwsMetadata:
    """IMDSv2. https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html"""

    dialect = "aws"

    def __init__(self, clock: Clock, endpoint: str) -> None:
        self._clock, self._endpoint, self._token = clock, endpoint, ""

    def answers(self) -> bool:
        try:
            self._renew_token()
        except (OSError, http.client.HTTPException):
            return False
        return True

    def machine_id(self) -> str:
        return _known(self._get("latest/meta-data/instance-id"), "instance-id")

    def address(self) -> str:
        return _known(self._get("latest/meta-data/local-ipv4"), "local-ipv4")

    def notice(self) -> Notice | None:
        if action := self._get("latest/meta-data/spot/instance-action"):
            return self._notice("preemption", json.loads(action)["time"])
        if at := self._get("latest/meta-data/spot/termination-time"):  # the older form
            return self._notice("preemption", at)
        if self._get("latest/meta-data/events/recommendations/rebalance"):
            return self._notice("rebalance", None)
        return None

    def _notice(self, kind: NoticeKind, reclaim_at: str | None) -> Notice:
        at = datetime.fromisoformat(reclaim_at) if reclaim_at else None
        return Notice(kind=kind, reclaim_at=at, seen_at=self._clock.now())

    def _renew_token(self) -> None:
        status, body, _ = _request(
            self._endpoint, "PUT", "latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
        )
        if status != 200:
            raise http.client.HTTPException(f"no IMDSv2 token: status {status}")
        self._token = body

    def _get(self, path: str) -> str | None:
        for _ in range(2):
            status, body, _ = _request(self._endpoint, "GET", path, {"X-aws-ec2-metadata-token": self._token})
            if status != 401:
                break
            self._renew_token()  # tokens end, and a machine may outlive many
        return body if status == 200 else None


class GcpMetadata:
    """https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption"""

    dialect = "gcp"

    def __init__(self, clock: Clock, host: str) -> None:
        self._clock, self._endpoint = clock, f"http://{host}"
        self._etag = ""

    def answers(self) -> bool:
        try:
            return self._preempted() is not None
        except (OSError, http.client.HTTPException):
            return False

    def machine_id(self) -> str:
        """The instance's name. A managed group gives a name again to another instance: there, its number follows."""
        name = _known(self._instance("name"), "instance/name")
        if "/instanceGroupManagers/" in (self._instance("attributes/created-by") or ""):
            return f"{name}.{_known(self._instance('id'), 'instance/id')}"
        return name

    def address(self) -> str:
        return _known(self._instance("network-interfaces/0/ip"), "instance/network-interfaces/0/ip")

    def _instance(self, path: str) -> str | None:
        path = f"computeMetadata/v1/instance/{path}"
        status, body, _ = _request(self._endpoint, "GET", path, {"Metadata-Flavor": "Google"})
        return body.strip() if status == 200 else None

    def notice(self) -> Notice | None:
        if self._preempted() != "TRUE":
            return None
        now = self._clock.now()
        seconds = float(os.environ.get(NOTICE_SECONDS) or GCP_NOTICE_SECONDS)
        return Notice(kind="preemption", reclaim_at=now + timedelta(seconds=seconds), seen_at=now)

    def wait_for_change(self, seconds: int) -> None:
        """Return when `preempted` is another than `notice` last saw, or after `seconds` of the wall."""
        # With the last ETag: without it, a change between the two questions would be waited past.
        # https://cloud.google.com/compute/docs/metadata/querying-metadata#etags
        query = f"wait_for_change=true&timeout_sec={seconds}" + (f"&last_etag={self._etag}" if self._etag else "")
        _request(
            self._endpoint,
            "GET",
            f"computeMetadata/v1/instance/preempted?{query}",
            {"Metadata-Flavor": "Google"},
            seconds + TIMEOUT_SECONDS,
        )

    def _preempted(self) -> str | None:
        status, body, self._etag = _request(
            self._endpoint, "GET", "computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"}
        )
        return body.strip() if status == 200 else None


def candidate_services(clock: Clock) -> Iterator[MetadataService]:
    """Both dialects at their usual addresses, or only the one whose address the environment gives."""
    aws = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    gcp = os.environ.get("GCE_METADATA_HOST")
    if aws or not gcp:
        yield AwsMetadata(clock, aws or AWS_ENDPOINT)
    if gcp or not aws:
        yield GcpMetadata(clock, gcp or GCP_HOST)


def own_machine_id(clock: Clock, patience_seconds: float = 60.0) -> str:
    """This machine's id, of whichever service answers. Raises TransientError when none does for so long (wall)."""
    return _told(clock, "id", lambda service: service.machine_id(), patience_seconds)


def own_address(clock: Clock, patience_seconds: float = 60.0) -> str:
    """The same for its address among the machines of its network."""
    return _told(clock, "address", lambda service: service.address(), patience_seconds)


def _told(clock: Clock, what: str, ask: Callable[[MetadataService], str], patience_seconds: float) -> str:
    give_up_at = time.monotonic() + patience_seconds
    while True:
        for service in candidate_services(clock):
            try:
                return ask(service)
            except (OSError, http.client.HTTPException) as error:
                problem = error
        if time.monotonic() > give_up_at:
            raise TransientError(f"no metadata service tells this machine's {what}: {problem!r}") from problem
        time.sleep(1.0)


def _known(value: str | None, path: str) -> str:
    if not value:
        raise http.client.HTTPException(f"the metadata service has no {path}")
    return value


def _request(
    endpoint: str, method: str, path: str, headers: dict[str, str], timeout: float = TIMEOUT_SECONDS
) -> tuple[int, str, str]:
    """Status, body and ETag."""
    parts = urlsplit(endpoint)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=timeout)
    try:
        connection.request(method, f"{parts.path.rstrip('/')}/{path}", headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode(), response.headers.get("ETag", "")
    finally:
        connection.close()
