"""Network endpoint groups of Compute Engine as the load balancer. Needs google-cloud-compute.

Source: https://cloud.google.com/load-balancing/docs/negs/zonal-neg-concepts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from holdfast.drivers.gcp.api import ComputeApi
from holdfast.drivers.gcp.errors import already_exists, is_gone, translate
from holdfast.drivers.gcp.machines import name_of
from holdfast.drivers.protocol import CapacityPool
from holdfast.errors import ConfigError, HoldfastError, TransientError
from holdfast.model import EndpointGroups, ServeJob
from holdfast.serving.balancer import Endpoint, Standing

if TYPE_CHECKING:
    from google.cloud import compute_v1

KIND = "GCE_VM_IP_PORT"


class EndpointGroupsBalancer:
    """Implements `holdfast.serving.balancer.LoadBalancer`.

    An endpoint belongs to the group of its machine's zone. What was detached is drained by the backend service, for as
    long as its own connection draining says, and is not listed any more.
    """

    def __init__(self, config: EndpointGroups, job: ServeJob, api: ComputeApi) -> None:
        self._name, self._job, self._api = config.name, job, api
        self._zones: set[str] | None = None

    def check(self, pools: Sequence[CapacityPool]) -> None:
        found = self._found()
        if wrong := sorted(zone for zone, kind in found.items() if kind != KIND):
            raise ConfigError(
                f"load_balancer: the network endpoint group {self._name!r} in {', '.join(wrong)} is not of type {KIND}; make it so"
            )
        if missing := sorted({pool.zone for pool in pools} - set(found)):
            raise ConfigError(
                f"load_balancer: there is no network endpoint group {self._name!r} in {', '.join(missing)}, where machines may "
                f"come from; make one there, or name in resources.zones those that have one: {', '.join(sorted(found)) or 'none'}"
            )

    def open(self) -> None:
        """It is the user's."""

    def register(self, endpoint: Endpoint) -> None:
        client = self._api.endpoint_groups
        doing = f"attaching {endpoint.machine} to {self._name}"
        self._carry_out(
            client.attach_network_endpoints_unary, "attach", already_exists, doing, self._group(endpoint), endpoint
        )

    def drain(self, endpoint: Endpoint) -> None:
        client = self._api.endpoint_groups
        doing = f"detaching {endpoint.machine} from {self._name}"
        self._carry_out(
            client.detach_network_endpoints_unary, "detach", is_gone, doing, self._group(endpoint), endpoint
        )

    def remove(self, endpoint: Endpoint) -> None:
        """Where it is still listed: of an instance that is deleted it may be gone already."""
        if name_of(endpoint.machine) in self._listed(endpoint.zone):
            self.drain(endpoint)

    def standings(self) -> dict[str, Standing]:
        if self._zones is None:
            self._zones = set(self._found())
        found: dict[str, Standing] = {}
        for zone in sorted(self._zones):
            found |= self._listed(zone)
        return found

    def close(self) -> None:
        """It is the user's."""

    # -----------------------------------------------------------------------------------------------------------------

    def _found(self) -> dict[str, str]:
        """Type by zone of the groups of this name."""
        pager = self._api.call(
            self._api.endpoint_groups.aggregated_list,
            f"looking for the network endpoint groups {self._name}",
            "compute.networkEndpointGroups.list",
            project=self._api.project,
            filter=f'name = "{self._name}"',
        )
        pages = self._api.pages(pager, "looking for network endpoint groups", "compute.networkEndpointGroups.list")
        return {
            scope.removeprefix("zones/"): group.network_endpoint_type
            for scope, listed in pages
            for group in listed.network_endpoint_groups
            if scope.startswith("zones/")
        }

    def _listed(self, zone: str) -> dict[str, Standing]:
        from google.cloud import compute_v1

        doing = f"listing the endpoints of {self._name} in {zone}"
        pager = self._api.call(
            self._api.endpoint_groups.list_network_endpoints,
            doing,
            "compute.networkEndpointGroups.get",
            **self._where(zone),
            network_endpoint_groups_list_endpoints_request_resource=compute_v1.NetworkEndpointGroupsListEndpointsRequest(
                health_status="SHOW"
            ),
        )
        return {
            one.network_endpoint.instance.rpartition("/")[2]: Standing(state=_state_of(one))
            for one in self._api.pages(pager, doing, "compute.networkEndpointGroups.get")
        }

    def _where(self, zone: str) -> dict[str, str]:
        return {"project": self._api.project, "zone": zone, "network_endpoint_group": self._name}

    def _group(self, endpoint: Endpoint) -> list[compute_v1.NetworkEndpoint]:
        from google.cloud import compute_v1

        return [
            compute_v1.NetworkEndpoint(
                instance=name_of(endpoint.machine), ip_address=endpoint.address, port=endpoint.port
            )
        ]

    def _carry_out(
        self, method: Any, verb: str, is_done: Any, doing: str, endpoints: list[Any], endpoint: Endpoint
    ) -> None:
        """Await it: what is asked for next, such as the machine's end, may rely on it."""
        from google.cloud import compute_v1

        kinds = {
            "attach": compute_v1.NetworkEndpointGroupsAttachEndpointsRequest,
            "detach": compute_v1.NetworkEndpointGroupsDetachEndpointsRequest,
        }
        body = {f"network_endpoint_groups_{verb}_endpoints_request_resource": kinds[verb](network_endpoints=endpoints)}
        try:
            self._api.wait(self._api.ask(method, **self._where(endpoint.zone), **body), doing)
        except HoldfastError:
            raise
        except Exception as error:
            if is_done(error):
                return
            if is_gone(error):  # it was there when the run began: it is the machine that is gone
                raise TransientError(f"{doing}: {error}") from error
            ours = translate(error, doing, f"compute.networkEndpointGroups.{verb}NetworkEndpoints")
            if ours is None:
                raise
            raise ours from error


def _state_of(one: compute_v1.NetworkEndpointWithHealthStatus) -> Any:
    """Healthy for every backend service that has said something of it; none says anything of one that is new."""
    states = {health.health_state for health in one.healths}
    if "DRAINING" in states:
        return "draining"
    return "up" if states == {"HEALTHY"} else "down"
