"""A machine of a fleet learns who it is from its metadata service, in the words of the cloud's API."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer

import pytest

from holdfast.clock import WallClock
from holdfast.drivers.local.metadata import Facts, serve
from holdfast.errors import TransientError
from holdfast.runtime.metadata import own_machine_id

VARIABLES = {"aws": "AWS_EC2_METADATA_SERVICE_ENDPOINT", "gcp": "GCE_METADATA_HOST"}


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes this process a machine with these metadata."""
    servers: list[ThreadingHTTPServer] = []

    def start(dialect: str, **facts: object) -> None:
        known = {"zone": "z-1a", "region": "z-1", "instance_type": "small", "user_data": "", "machine_id": "i-0abc"}
        server = serve(Facts(dialect=dialect, **{**known, **facts}))  # type: ignore[arg-type]
        servers.append(server)
        address = f"127.0.0.1:{server.server_address[1]}"
        for variable in VARIABLES.values():
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv(VARIABLES[dialect], f"http://{address}/" if dialect == "aws" else address)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_on_aws_it_is_the_instance_id(serving: Callable[..., None]) -> None:
    serving("aws")
    assert own_machine_id(WallClock()) == "i-0abc"


def test_on_gcp_it_is_the_name(serving: Callable[..., None]) -> None:
    serving("gcp", name="hf-one", number="4711")
    assert own_machine_id(WallClock()) == "hf-one"


def test_in_a_managed_group_which_gives_names_again_the_number_follows(serving: Callable[..., None]) -> None:
    made_by = {"created-by": "projects/1/regions/z-1/instanceGroupManagers/crowd"}
    serving("gcp", name="hf-one", number="4711", attributes=made_by)
    assert own_machine_id(WallClock()) == "hf-one.4711"


def test_without_a_metadata_service_it_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9/")
    monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
    with pytest.raises(TransientError, match="no metadata service tells this machine's id"):
        own_machine_id(WallClock(), patience_seconds=0.0)
