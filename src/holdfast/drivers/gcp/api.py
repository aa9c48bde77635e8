"""Calls to Compute Engine and its neighbours: with time limits, tried again where that helps, errors translated."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from holdfast.drivers.gcp.config import GcpConfig
from holdfast.drivers.gcp.errors import OperationFailedError, already_exists, may_pass, translate, translated
from holdfast.errors import HoldfastError, TransientError

if TYPE_CHECKING:
    from google.auth.credentials import Credentials
    from google.cloud import compute_v1

T = TypeVar("T")

log = logging.getLogger(__name__)

CALL_SECONDS = 30.0
RETRY_SECONDS = 20.0
"""How long a call that failed in passing is tried again, by the library's own retries. Then its caller decides."""
OPERATION_SECONDS = 300.0
CREATE_TRIES = 3
CONNECTIONS = 64
PAGE = 500
NAMESPACE = uuid.UUID("2f1f1d2e-5f0b-5c1e-9a53-6f1d0c8f2b11")
CLOUD_PLATFORM_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class ComputeApi:
    """The clients of one project. Threads may share it."""

    def __init__(self, config: GcpConfig, credentials: Credentials) -> None:
        self.config = config
        self.project = config.project
        self._credentials = credentials
        self._clients: dict[str, Any] = {}
        self._lock = threading.Lock()

    # google.cloud.compute_v1 takes seconds to import and each client opens connections: made when first needed.

    @property
    def instances(self) -> compute_v1.InstancesClient:
        return self._client("InstancesClient")

    @property
    def zone_operations(self) -> compute_v1.ZoneOperationsClient:
        return self._client("ZoneOperationsClient")

    @property
    def region_operations(self) -> compute_v1.RegionOperationsClient:
        return self._client("RegionOperationsClient")

    @property
    def global_operations(self) -> compute_v1.GlobalOperationsClient:
        return self._client("GlobalOperationsClient")

    @property
    def machine_types(self) -> compute_v1.MachineTypesClient:
        return self._client("MachineTypesClient")

    @property
    def regions(self) -> compute_v1.RegionsClient:
        return self._client("RegionsClient")

    @property
    def images(self) -> compute_v1.ImagesClient:
        return self._client("ImagesClient")

    @property
    def networks(self) -> compute_v1.NetworksClient:
        return self._client("NetworksClient")

    @property
    def templates(self) -> compute_v1.InstanceTemplatesClient:
        return self._client("InstanceTemplatesClient")

    @property
    def groups(self) -> compute_v1.RegionInstanceGroupManagersClient:
        return self._client("RegionInstanceGroupManagersClient")

    @property
    def all_groups(self) -> compute_v1.InstanceGroupManagersClient:
        return self._client("InstanceGroupManagersClient")

    @property
    def endpoint_groups(self) -> compute_v1.NetworkEndpointGroupsClient:
        return self._client("NetworkEndpointGroupsClient")

    @property
    def advice(self) -> compute_v1.AdviceClient:
        return self._client("AdviceClient")

    @property
    def region_instances(self) -> compute_v1.RegionInstancesClient:
        return self._client("RegionInstancesClient")

    def _client(self, name: str) -> Any:
        with self._lock:
            if name not in self._clients:
                from google.cloud import compute_v1

                options = {"api_endpoint": self.config.api_endpoint} if self.config.api_endpoint else None
                client = getattr(compute_v1, name)(credentials=self._credentials, client_options=options)
                _widen(client)
                self._clients[name] = client
            return self._clients[name]

    @cached_property
    def session(self) -> Any:
        """For the APIs whose own clients are not worth a dependency."""
        from google.auth.credentials import with_scopes_if_required
        from google.auth.transport.requests import AuthorizedSession

        return AuthorizedSession(with_scopes_if_required(self._credentials, [CLOUD_PLATFORM_SCOPE]))

    def call(self, method: Callable[..., T], doing: str, permission: str = "", **request: Any) -> T:
        """`method` of a client. What fails in passing is tried again for a while: inserts carry a request id."""
        with translated(doing, permission):
            return method(request=request, timeout=CALL_SECONDS, retry=self._retry())

    def ask(self, method: Callable[..., T], **request: Any) -> T:
        """As `call`, but with Google's own errors, for callers that tell them apart."""
        from google.api_core.exceptions import RetryError

        try:
            return method(request=request, timeout=CALL_SECONDS, retry=self._retry())
        except RetryError as error:
            raise error.cause or error from error

    def create(
        self,
        method: Callable[..., compute_v1.Operation],
        doing: str,
        permission: str,
        once: tuple[object, ...] = (),
        **request: Any,
    ) -> compute_v1.Operation | None:
        """Insert something by `method` and await it; None when there was something of that name.

        `once` tells this insert from every other one: whoever repeats it gets the operation of the first. An operation
        that failed in passing is asked for anew, since repeating it would repeat its failure. Without `once`, the name
        alone keeps a repetition from making a second.
        """
        for number in range(CREATE_TRIES):
            try:
                if once:
                    request["request_id"] = request_id(self.project, *once, number)
                return self.wait(self.ask(method, project=self.project, **request), doing)
            except HoldfastError:
                raise
            except Exception as error:
                if already_exists(error):
                    return None
                ours = translate(error, doing, permission)
                if ours is None:
                    raise
                again = isinstance(error, OperationFailedError) and isinstance(ours, TransientError)
                if not again or number == CREATE_TRIES - 1:
                    raise ours from error
                log.warning("asked for anew: %s", ours)
        raise AssertionError("unreachable")

    def json(self, method: str, service: str, path: str, doing: str, permission: str = "", **arguments: Any) -> Any:
        """The answer of `https://SERVICE.googleapis.com/PATH`."""
        from google.api_core.exceptions import from_http_response

        url = f"{self.config.api_endpoint or f'https://{service}.googleapis.com'}/{path}"

        def once() -> Any:
            response = self.session.request(method, url, timeout=CALL_SECONDS, **arguments)
            if response.status_code >= 400:
                raise from_http_response(response)
            return response.json()

        with translated(doing, permission):
            return self._retry()(once)()

    def pages(self, pager: Any, doing: str, permission: str = "") -> Iterator[Any]:
        """Everything of a paged answer; its later pages are errors' places too."""
        with translated(doing, permission):
            yield from pager

    def wait(self, operation: compute_v1.Operation, doing: str) -> compute_v1.Operation:
        """Poll until it is done; raises OperationFailedError if it failed.

        By hand: the library's `result()` builds a client of its own, which knows nothing of `api_endpoint`.
        """
        from google.cloud import compute_v1

        give_up_at = time.monotonic() + OPERATION_SECONDS
        pause = 0.05
        while operation.status != compute_v1.Operation.Status.DONE:
            if time.monotonic() > give_up_at:
                raise TransientError(
                    f"{doing}: operation {operation.name} was not done within {OPERATION_SECONDS:.0f} s; it is asked again"
                )
            time.sleep(pause)
            pause = min(2.0, pause * 2)
            operation = self._look(operation, doing)
        if operation.error.errors or operation.http_error_status_code >= 400:
            raise OperationFailedError(operation)
        return operation

    def _look(self, operation: compute_v1.Operation, doing: str) -> compute_v1.Operation:
        name, scope = operation.name, {"project": self.project}
        if operation.zone:
            zone = operation.zone.rpartition("/")[2]
            return self.call(
                self.zone_operations.get, doing, "compute.zoneOperations.get", operation=name, zone=zone, **scope
            )
        if operation.region:
            region = operation.region.rpartition("/")[2]
            return self.call(
                self.region_operations.get,
                doing,
                "compute.regionOperations.get",
                operation=name,
                region=region,
                **scope,
            )
        return self.call(self.global_operations.get, doing, "compute.globalOperations.get", operation=name, **scope)

    def _retry(self) -> Any:
        from google.api_core.retry import Retry

        return Retry(predicate=may_pass, initial=0.3, multiplier=2.0, maximum=5.0, timeout=RETRY_SECONDS)


def _widen(client: Any) -> None:
    """Let as many threads call at once as a large flow has: the usual ten connections are thrown away and made anew."""
    from requests.adapters import HTTPAdapter

    session = getattr(client.transport, "_session", None)
    if session is not None and not session.is_mtls:
        for scheme in ("https://", "http://"):
            session.mount(scheme, HTTPAdapter(pool_maxsize=CONNECTIONS))


def request_id(*parts: object) -> str:
    """The same for the same parts: a repeated request with it returns the operation of the first."""
    return str(uuid.uuid5(NAMESPACE, "/".join(str(part) for part in parts)))


def metadata_of(items: Mapping[str, str]) -> compute_v1.Metadata:
    from google.cloud import compute_v1

    return compute_v1.Metadata(items=[compute_v1.Items(key=key, value=value) for key, value in items.items()])
