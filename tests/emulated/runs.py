"""The main job on emulated AWS and GCP: an account, a store in a bucket, and machines that really run."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from google.oauth2.credentials import Credentials
from prefect_aws import AwsCredentials, S3Bucket
from prefect_aws.client_parameters import AwsClientParameters
from prefect_gcp import GcpCredentials
from pydantic import SecretStr

from blocks import AwsAccount, CheckpointStore, GcpAccount
from holdfast.drivers.aws import AwsConfig
from holdfast.drivers.gcp import GcpConfig, GcpDriver
from holdfast.drivers.local.config import Fate
from holdfast.drivers.local.processes import marked
from holdfast.drivers.protocol import Driver
from holdfast.ledger.billing import add_usd
from holdfast.model import Resources, TrainingJob
from holdfast.storage import ObjectStore, open_store
from tests.chaos.runs import light_job, tiny_job, wait_until
from tests.emulated.aws import ACCESS_KEY, SECRET_KEY, SESSION_TOKEN, AwsEmulator
from tests.emulated.gce import PROJECT, TOKEN, GceEmulator
from tests.emulated.gcs import GcsEmulator
from tests.emulated.machine_host import MachineHost
from tests.emulated.object_stores import REGION, S3Emulator
from tests.emulated.wire import Wire

BUCKET = "runs"
ROLE = "arn:aws:iam::123456789012:role/holdfast-machine"
CLIENT_SECRET, REFRESH_TOKEN = "planted-client-secret", "planted-refresh-token"


class Login:
    """A person's login whose refresh token an endpoint takes for an access token, and the metadata service of a computer
    in the cloud that gives one to whoever asks: two ways in which an orchestrator has credentials."""

    def __enter__(self) -> Login:
        class Endpoint(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                self.answer({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})

            def do_GET(self) -> None:
                if self.path.split("?")[0].endswith("/token"):
                    return self.answer({"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
                if self.path.endswith("/project/project-id"):
                    return self.answer(PROJECT)
                account = {"email": "orchestrator@example.com", "aliases": ["default"], "scopes": []}
                return self.answer(account)

            def answer(self, told: Any) -> None:
                body = told.encode() if isinstance(told, str) else json.dumps(told).encode()
                self.send_response(200)
                self.send_header("Metadata-Flavor", "Google")
                self.send_header("Content-Type", "application/text" if isinstance(told, str) else "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        host = f"127.0.0.1:{self._server.server_address[1]}"
        self.environment = {"GCE_METADATA_HOST": host, "GCE_METADATA_IP": host}
        self._info = {
            "client_id": "holdfast.apps.googleusercontent.com",
            "client_secret": CLIENT_SECRET,
            "refresh_token": REFRESH_TOKEN,
            "token_uri": f"http://{host}/token",
        }
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def credentials(self) -> Credentials:
        return Credentials(token=None, scopes=["https://www.googleapis.com/auth/cloud-platform"], **self._info)


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """One emulated cloud with a bucket in it."""

    name: str
    driver: Callable[[], Driver]
    open_store: Callable[[], ObjectStore]
    """A new store object with the orchestrator's credentials, as another process would make it."""
    open_store_for_others: Callable[[], ObjectStore]
    """The same for a run whose machines may be of another cloud."""
    contents: Callable[[], dict[str, bytes]]
    host: MachineHost
    emulator: Any
    secrets: Sequence[str]
    """The orchestrator's credentials, which must stay with it."""
    expire: Callable[[], None]
    """The cloud refuses the credentials from now on; `renew` ends that."""
    renew: Callable[[], None]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of a process that is to find its credentials by itself, as on a computer in the cloud."""
    blocks: Callable[[], None]
    """Saves the account and its store as the blocks `aws` or `gcp`, and `bucket`."""
    wires: Sequence[Wire] = ()
    """In front of the cloud's API and of its store, where the account was opened with faults."""


Open = Callable[..., AbstractContextManager[Account]]


@contextmanager
def aws_account(
    folder: Path,
    spot_fates: Sequence[Fate] = (),
    on_demand_fates: Sequence[Fate] = (),
    probability: float | None = None,
    seed: int = 0,
    machine_environment: Mapping[str, str] | None = None,
    **overrides: Any,
) -> Iterator[Account]:
    """`probability`: share of all requests, to EC2 and to S3, that fail; None: no wire lies in between at all."""
    with ExitStack() as stack:
        wires: list[Wire] = []

        def wire(url: str) -> Wire:
            wires.append(Wire(url, probability=probability or 0.0, seed=seed + len(wires)))
            return wires[-1]

        aws = stack.enter_context(
            AwsEmulator(
                folder / "aws",
                spot_fates=spot_fates,
                on_demand_fates=on_demand_fates,
                machine_environment=machine_environment,
                wire=None if probability is None else wire,
            )
        )
        s3 = stack.enter_context(S3Emulator(BUCKET))
        endpoint = s3.endpoint if probability is None else stack.enter_context(wire(s3.endpoint)).url
        url = s3.url(BUCKET, "team", endpoint)
        yield Account(
            name="aws",
            driver=lambda: aws.driver(**overrides),
            open_store=lambda: open_store(url, credentials=aws.session()),
            open_store_for_others=lambda: open_store(f"{url}&role={ROLE}", credentials=aws.session()),
            contents=lambda: s3.contents(BUCKET),
            host=aws.host,
            emulator=aws,
            expire=lambda: aws.refuse("DescribeInstances", "RequestExpired", "Request has expired.", count=math.inf),
            renew=aws.front.injected.clear,
            secrets=[ACCESS_KEY, SECRET_KEY, SESSION_TOKEN],
            blocks=lambda: save_aws_blocks(aws.config(**overrides), aws.endpoint, endpoint),
            wires=wires,
        )


@contextmanager
def gcp_account(
    folder: Path,
    spot_fates: Sequence[Fate] = (),
    on_demand_fates: Sequence[Fate] = (),
    probability: float | None = None,
    seed: int = 0,
    machine_environment: Mapping[str, str] | None = None,
    **overrides: Any,
) -> Iterator[Account]:
    with ExitStack() as stack:
        wires: list[Wire] = []

        def wire(url: str) -> str:
            if probability is None:
                return url
            wires.append(stack.enter_context(Wire(url, probability=probability or 0.0, seed=seed + len(wires))))
            return wires[-1].url

        gce = stack.enter_context(
            GceEmulator(
                folder / "gce",
                spot_fates=spot_fates,
                on_demand_fates=on_demand_fates,
                machine_environment=machine_environment,
                wrap_url=wire,
            )
        )
        gcs = stack.enter_context(GcsEmulator(BUCKET))
        login = stack.enter_context(Login())
        credentials = login.credentials()
        url = gcs.url(BUCKET, "team", wire(gcs.endpoint))
        yield Account(
            name="gcp",
            driver=lambda: GcpDriver(gce.config(**overrides), credentials),
            open_store=lambda: open_store(url, credentials=credentials),
            open_store_for_others=lambda: open_store(url, credentials=credentials),
            contents=lambda: gcs.contents(BUCKET),
            host=gce.host,
            emulator=gce,
            expire=lambda: setattr(gce, "expired", True),
            renew=lambda: setattr(gce, "expired", False),
            environment=login.environment,
            secrets=[CLIENT_SECRET, REFRESH_TOKEN, TOKEN],
            blocks=lambda: save_gcp_blocks(gce.config(**overrides), url, login.environment),
            wires=wires,
        )


def save_aws_blocks(settings: AwsConfig, endpoint: str, store_endpoint: str) -> None:
    def credentials(url: str) -> AwsCredentials:
        return AwsCredentials(
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SecretStr(SECRET_KEY),
            aws_session_token=SESSION_TOKEN,
            region_name=REGION,
            aws_client_parameters=AwsClientParameters(endpoint_url=url),
        )

    settings = settings.model_copy(update={"client_parameters": {}})
    AwsAccount(credentials=credentials(endpoint), settings=settings).save("aws", overwrite=True)
    bucket = S3Bucket(bucket_name=BUCKET, bucket_folder="team", credentials=credentials(store_endpoint))
    CheckpointStore(s3_bucket=bucket).save("bucket", overwrite=True)


def save_gcp_blocks(settings: GcpConfig, store_url: str, environment: Mapping[str, str]) -> None:
    """The store is named by its URL: prefect-gcp's bucket block knows no endpoint of its own."""
    with in_google_s_cloud(environment):
        GcpAccount(credentials=GcpCredentials(project=PROJECT), settings=settings).save("gcp", overwrite=True)
    CheckpointStore(url=store_url).save("bucket", overwrite=True)


ACCOUNTS: dict[str, Open] = {"aws": aws_account, "gcp": gcp_account}
SMALL = {"aws": "c7i.large", "gcp": "n2-standard-2"}


def small_job(account: Account, folder: Path, *, torch: bool = False, **changes: Any) -> TrainingJob:
    """The tests' training job on the cloud's smallest machines."""
    make = tiny_job if torch else light_job
    return make(folder, account.name, resources=Resources(instance_types=[SMALL[account.name]]), **changes)


@contextmanager
def in_google_s_cloud(environment: Mapping[str, str]) -> Iterator[None]:
    """This process finds credentials by itself, as on a computer there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        # google-auth has read its variables when it was imported, which may have been in a test that changed them.
        patch.setattr("google.auth.compute_engine._metadata._GCE_METADATA_HOST", environment["GCE_METADATA_HOST"])
        patch.setattr("google.auth.compute_engine._metadata._NO_GCE_CHECK", False)
        yield


def assert_nothing_left(account: Account) -> None:
    """By the cloud's own word, and by what runs on this computer."""
    driver = account.driver()

    def living() -> list[str]:
        return [machine.id for machine in driver.machines({}) if machine.state != "terminated"]

    # What powered itself off on Google's cloud is stopped, and deleted by whoever saw it; that takes a moment.
    wait_until(lambda: not living(), 20)
    assert account.host.ids()
    assert [one for one in account.host.ids() if account.host.life(one).state != "terminated"] == []
    assert [process for one in account.host.ids() for process in marked(one)] == []


def assert_totals_are_right(summary: dict[str, Any], account: Account) -> None:
    """Every machine that lived is on the bill once, for as long as it lived."""
    launched = [attempt for attempt in summary["attempts"] if attempt["machine"]]
    assert len(launched) == len(account.host.ids()) == len({attempt["machine"] for attempt in launched})
    assert summary["usd_total"] == add_usd(attempt["usd"] for attempt in summary["attempts"])
    assert summary["lost_steps"] == sum(attempt["lost_steps"] for attempt in summary["attempts"])
