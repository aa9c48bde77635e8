"""The bill is read in each provider's own form, by the real clients, and held against the ledger run by run."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
import requests
from botocore.stub import Stubber
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.auth.credentials import AnonymousCredentials
from google.cloud import bigquery
from prefect_aws import AwsCredentials
from prefect_gcp import GcpCredentials

from blocks import AwsAccount, GcpAccount
from holdfast.drivers.gcp.names import labels_of
from holdfast.drivers.protocol import CapacityPool
from holdfast.errors import ConfigError, CredentialsError, TransientError
from holdfast.ledger.journal import Journal
from holdfast.market.billing_export import read_billing_export
from holdfast.market.bills import Asked, Bill, BillLine, read_bill
from holdfast.market.cost_explorer import read_cost_explorer
from holdfast.market.history import History, Life
from holdfast.market.usage_report import read_usage_report
from holdfast.runtime.contract import journal_prefix, store_tag
from holdfast.storage import DirectoryStore
from tests.emulated import bills
from tests.emulated.bigquery import BigQueryEmulator
from tests.emulated.bills import Item, exported_row
from tests.emulated.object_stores import S3Emulator

START, END = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 8, tzinfo=UTC)
STORE = "0123456789abcdef"
ASKED = Asked(start=START, end=END, store=STORE)
NOON = START + timedelta(days=2, hours=12)
TABLE = "acme.billing.gcp_billing_export_v1_012345_6789AB_CDEF01"

ITEMS = [
    Item("night-3", 1.25, NOON, STORE),
    Item("night-3", 0.75, NOON + timedelta(days=1), STORE, "USW2-BoxUsage:c7i.large"),
    Item("night-3", 0.11, NOON, STORE, "USW2-EBS:VolumeUsage.gp3"),
    Item("night-3", -0.5, NOON, STORE, kind="Credit"),
    Item("night-3", -0.25, NOON, STORE, kind="EdpDiscount"),
    Item("night-3", 0.4, NOON, STORE, kind="Tax"),
    Item("leak", 7.0, NOON, STORE),
    Item("night-3", 99.0, END, STORE),  # the day after
    Item("of-others", 50.0, NOON, "another-store"),
    Item("", 50.0, NOON, ""),  # somebody else's machines
]
LINES = (
    BillLine(tag="leak", machines_usd=7.0),
    BillLine(tag="night-3", machines_usd=2.0, other_usd=0.11, credits_usd=-0.75),
)


@pytest.fixture(scope="module")
def s3():
    with S3Emulator("reports") as emulator:
        yield emulator


def cost_explorer(s3: S3Emulator, items: list[Item]) -> tuple[Any, list[dict[str, Any]]]:
    """A client of moto's Cost Explorer, which has the answers to what it is about to be asked."""
    client = s3.session().client("ce", endpoint_url=s3.endpoint)
    asked: list[dict[str, Any]] = []

    def seed(params: dict[str, Any], **_: Any) -> None:
        asked.append(params)
        answer = bills.cost_explorer_answer(items, params)
        told = requests.post(f"{s3.endpoint}/moto-api/static/ce/cost-and-usage-results", json={"results": [answer]})
        assert told.status_code == 201

    client.meta.events.register("provide-client-params.ce.GetCostAndUsage", seed)
    return client, asked


def test_cost_explorer_is_asked_by_tag_for_usage_and_for_what_is_taken_off(s3: S3Emulator):
    client, asked = cost_explorer(s3, ITEMS)
    bill = read_cost_explorer(client, ASKED)
    assert bill.lines == LINES
    assert bill.reaches == START + timedelta(days=4)
    assert len(asked) == 2  # a cent each
    assert all({"Type": "TAG", "Key": "holdfast-run"} in one["GroupBy"] for one in asked)


def stubbed(*answers: dict[str, Any] | str) -> Any:
    """boto3's client, which gets these answers, or errors by their codes, in this order."""
    client = boto3.client("ce", region_name="us-east-1", aws_access_key_id="A", aws_secret_access_key="S")
    stubber = Stubber(client)
    for answer in answers:
        if isinstance(answer, str):
            stubber.add_client_error("get_cost_and_usage", answer, "the cloud's own words")
        else:
            stubber.add_response("get_cost_and_usage", answer)
    stubber.activate()
    return client


def page(usd: str, more: str = "", unit: str = "USD") -> dict[str, Any]:
    metrics = {"UnblendedCost": {"Amount": usd, "Unit": unit}}
    group = {"Keys": ["holdfast-run$night-3", "Amazon Elastic Compute Cloud - Compute"], "Metrics": metrics}
    days = [{"TimePeriod": {"Start": "2026-11-02", "End": "2026-11-03"}, "Groups": [group]}]
    return {"ResultsByTime": days} | ({"NextPageToken": more} if more else {})


def test_every_page_of_cost_explorer_counts():
    bill = read_cost_explorer(stubbed(page("1.5", "more"), page("0.25"), {"ResultsByTime": []}), ASKED)
    assert bill.lines == (BillLine(tag="night-3", machines_usd=1.75),)


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ("AccessDeniedException", ConfigError, "deployments/aws-billing-policy.json"),
        ("ExpiredTokenException", CredentialsError, "renew them"),
        ("DataUnavailableException", TransientError, "a day after it was switched on"),
        ("ValidationException", ConfigError, "activate the tags"),
        ("LimitExceededException", TransientError, "LimitExceededException"),
        (page("1.0", unit="CNY"), ConfigError, "bills in 'CNY'"),
    ],
)
def test_what_cost_explorer_refuses_is_told_with_its_remedy(answer: Any, error: type[Exception], words: str):
    with pytest.raises(error, match=words):
        read_cost_explorer(stubbed(answer), ASKED)


def test_a_usage_report_is_read_from_s3(s3: S3Emulator):
    key = "cur/daily/20261101-20261201/daily-00001.csv.gz"
    s3.client().put_object(Bucket="reports", Key=key, Body=bills.legacy_csv(ITEMS))
    bill = read_bill(s3.url("reports", "cur/daily"), ASKED, s3.session, lambda project: None)
    assert_is_the_bill(bill)


def put(folder: Path, key: str, body: bytes) -> None:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)


def assert_is_the_bill(bill: Bill) -> None:
    assert [line.tag for line in bill.lines] == ["leak", "night-3"]
    for found, wanted in zip(bill.lines, LINES, strict=True):
        assert found.machines_usd == pytest.approx(wanted.machines_usd)
        assert found.other_usd == pytest.approx(wanted.other_usd)
        assert found.credits_usd == pytest.approx(wanted.credits_usd)
    assert bill.reaches == NOON + timedelta(days=1, hours=1)


@pytest.mark.parametrize(
    ("key", "form"),
    [
        ("daily/20261101-20261201/daily-00001.csv.gz", bills.legacy_csv),
        ("daily/daily/year=2026/month=11/daily-00001.snappy.parquet", bills.legacy_parquet),
        ("daily/data/BILLING_PERIOD=2026-11/daily-00001.snappy.parquet", bills.export_parquet),
        ("daily/data/BILLING_PERIOD=2026-11/daily-00001.csv.gz", bills.export_csv),
    ],
)
def test_a_usage_report_reads_alike_in_every_form(tmp_path: Path, key: str, form: Any):
    put(tmp_path, key, form(ITEMS))
    put(tmp_path, key.replace("202611", "202609").replace("month=11", "month=9").replace("-11", "-09"), b"not read")
    assert_is_the_bill(read_usage_report(f"file://{tmp_path}", None, ASKED))


@pytest.mark.parametrize("kind", ["old", "data exports", "data exports, every delivery kept"])
def test_of_a_report_that_is_delivered_anew_the_newest_delivery_counts(tmp_path: Path, kind: str):
    """Else every dollar would be counted as often as the report came."""
    if kind == "old":
        files = {name: f"daily/20261101-20261201/{name}/daily-1.csv.gz" for name in ("aaa", "bbb")}
        manifests = {
            "daily/20261101-20261201/aaa/daily-Manifest.json": {"reportKeys": [f"cur/{files['aaa']}"]},
            "daily/20261101-20261201/daily-Manifest.json": {"reportKeys": [f"cur/{files['bbb']}"]},
        }
    else:
        files = {name: f"daily/data/BILLING_PERIOD=2026-11/{name}/daily-1.csv.gz" for name in ("1101", "1102")}
        folder = "daily/metadata/BILLING_PERIOD=2026-11"
        manifests = {
            f"{folder}/{name}/daily-Manifest.json": {"dataFiles": [f"s3://reports/cur/{file}"]}
            for name, file in files.items()
        }
        if "kept" not in kind:
            manifests = {f"{folder}/daily-Manifest.json": manifests[f"{folder}/1102/daily-Manifest.json"]}
    for name in files.values():
        put(tmp_path, name, bills.export_csv(ITEMS) if "data" in kind else bills.legacy_csv(ITEMS))
    for name, manifest in manifests.items():
        put(tmp_path, name, json.dumps(manifest).encode())
    assert_is_the_bill(read_usage_report(f"file://{tmp_path}", None, ASKED))


def test_a_report_that_is_not_there_and_one_without_our_columns_are_told(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no report of 2026-11 lies there"):
        read_usage_report(f"file://{tmp_path}", None, ASKED)
    put(
        tmp_path,
        "daily/20261101-20261201/daily-1.csv",
        b"lineItem/UsageType,resourceTags/user:holdfast-run\nBoxUsage,x\n",
    )
    with pytest.raises(ConfigError, match=r"daily-1.csv: has no column 'line_item_unblended_cost'"):
        read_usage_report(f"file://{tmp_path}", None, ASKED)


# -- Google -----------------------------------------------------------------------------------------------------------

CORE, DISK = "Spot Preemptible N2 Instance Core running in Americas", "Balanced PD Capacity"
EXPORTED = [
    exported_row("night-3", STORE, CORE, 1.0, NOON, credit=-0.2),
    exported_row("night-3", STORE, "Spot Preemptible N2 Instance Ram running in Americas", 0.5, NOON),
    exported_row("night-3", STORE, "Nvidia L4 GPU attached to Spot Preemptible VMs running in Iowa", 0.5, NOON),
    exported_row("night-3", STORE, DISK, 0.1, NOON),
    exported_row("night-3", STORE, CORE, 0.3, NOON, cost_type="tax"),
    exported_row("sha256-abc", STORE, CORE, 9.0, NOON, rate=0.9),
    exported_row("night-3", STORE, CORE, 99.0, END),
    exported_row("of-others", "another", CORE, 50.0, NOON),
    exported_row("", STORE, CORE, 50.0, NOON),
]


def client_at(emulator: BigQueryEmulator) -> Any:
    return lambda project: bigquery.Client(
        project, AnonymousCredentials(), client_options={"api_endpoint": emulator.endpoint}
    )


def test_the_billing_export_is_summed_by_the_label_of_the_run_in_dollars():
    with BigQueryEmulator() as emulator:
        emulator.load(TABLE, EXPORTED, bills.GCP_COLUMNS)
        bill = read_billing_export(TABLE, client_at(emulator), ASKED)
        assert bill.lines == (
            BillLine(tag="night-3", machines_usd=2.0, other_usd=0.1, credits_usd=-0.2),
            BillLine(tag="sha256-abc", machines_usd=pytest.approx(10.0)),
        )
        assert bill.reaches == NOON + timedelta(hours=1)
        assert "holdfast" not in emulator.queries[0]["query"]  # values are parameters, nothing is pasted in


@pytest.mark.parametrize(
    ("refusal", "error", "words"),
    [
        (
            (403, "accessDenied", "User does not have bigquery.jobs.create permission"),
            ConfigError,
            "roles/bigquery.jobUser",
        ),
        ((400, "invalidQuery", "Unrecognized name: cost"), ConfigError, "is it a billing export"),
        ((404, "notFound", "Not found: Dataset acme:billing"), ConfigError, "a day after it was switched on"),
    ],
)
def test_what_bigquery_refuses_is_told_with_its_remedy(refusal: Any, error: Any, words: str):
    with BigQueryEmulator() as emulator:
        emulator.refuse = refusal
        with pytest.raises(error, match=words):
            read_billing_export(TABLE, client_at(emulator), ASKED)


def test_a_table_and_a_bill_that_nothing_reads_are_refused_before_anything_is_asked():
    for url in (
        "bigquery://acme.billing",
        "bigquery://acme.billing.t`; DROP TABLE x",
        "https://bill",
        "cost-explorer://x",
    ):
        with pytest.raises(ConfigError):
            read_bill(url, ASKED, lambda: None, lambda project: None)


# -- the flow ---------------------------------------------------------------------------------------------------------


def a_life(run: str, usd: float, at: datetime, cloud: str) -> Life:
    region = "us-west-2" if cloud == "aws" else "us-central1"
    return Life(
        run=run,
        token="1",
        pool=CapacityPool(cloud, region, f"{region}a", "g5.xlarge", "spot"),
        launched_at=at,
        ended_at=at + timedelta(hours=1),
        recorded_at=at + timedelta(hours=1),
        outcome="finished",
        usd=usd,
    )


def reconcile_state(**parameters: Any) -> Any:
    from flows.reconcile import reconcile

    return reconcile(store="local", return_state=True, **parameters)


def events_told(api: str, name: str, at_least: int) -> set[str]:
    """Runs of the events of that name, as the server has them; it writes them down every few seconds."""
    give_up_at = time.monotonic() + 120
    while True:
        found = requests.post(f"{api}/events/filter", json={"filter": {"event": {"name": [name]}}}).json()["events"]
        if len(found) >= at_least:
            return {event["payload"]["run"] for event in found}
        assert time.monotonic() < give_up_at, f"no event {name}"
        time.sleep(0.2)


def test_a_run_that_nobody_knows_fails_the_flow_and_is_told_in_an_event(
    s3: S3Emulator, store: DirectoryStore, prefect_api: str, monkeypatch: pytest.MonkeyPatch
):
    at = datetime.now(UTC) - timedelta(days=5)
    items = [Item("night-3", 2.02, at, store_tag(store.url)), Item("leak", 7.0, at, store_tag(store.url))]
    client, _ = cost_explorer(s3, items)
    monkeypatch.setattr(boto3.Session, "client", lambda *_, **__: client)
    AwsAccount(credentials=AwsCredentials(region_name="us-east-1"), settings={"regions": ["us-west-2"]}).save(
        "billed", overwrite=True
    )
    Journal(store, journal_prefix("night-3")).append("closed", at)
    History(store).record([a_life("night-3", 2.0, at, "aws")])
    state = reconcile_state(account="billed")
    assert state.is_failed() and "1 need a look, the first leak ($+7.00, unknown to the ledger)" in state.message
    assert events_told(prefect_api, "holdfast.bill.differs", at_least=1) == {"leak"}
    told = state.result(raise_on_failure=False)
    verdicts = {one["run"]: one["verdict"] for one in told["differences"]}
    assert verdicts == {"leak": "unknown to the ledger", "night-3": "agrees"}


def test_a_bill_that_agrees_completes_the_flow_on_google_too(store: DirectoryStore):
    at = datetime.now(UTC) - timedelta(days=5)
    run = "Night 3"  # no label can be called so
    tag = labels_of("", {"holdfast-run": run})["holdfast-run"]
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    with BigQueryEmulator() as emulator:
        emulator.load(TABLE, [exported_row(tag, store_tag(store.url), CORE, 2.0, at)], bills.GCP_COLUMNS)
        key = {
            "type": "service_account",
            "project_id": "acme",
            "private_key_id": "1",
            "private_key": private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
            "client_email": "orchestrator@acme.iam.gserviceaccount.com",
            "client_id": "1",
            "token_uri": f"{emulator.endpoint}/token",
        }
        GcpAccount(
            credentials=GcpCredentials(service_account_info=key),
            settings={"project": "acme", "regions": ["us-central1"], "api_endpoint": emulator.endpoint},
        ).save("billed-gcp", overwrite=True)
        History(store).record([a_life(run, 2.0, at, "gcp")])
        state = reconcile_state(account="billed-gcp", bill=f"bigquery://{TABLE}")
    assert state.is_completed(), state.message
    assert "the ledger says $2.00" in state.message and "no difference is beyond the tolerance" in state.message


def test_an_account_without_a_bill_and_another_cloud_s_are_refused(store: DirectoryStore):
    AwsAccount(credentials=AwsCredentials(region_name="us-east-1"), settings={"regions": ["us-west-2"]}).save(
        "billed", overwrite=True
    )
    assert "sends no bill" in reconcile_state(account="local").message
    assert "the account is AWS's" in reconcile_state(account="billed", bill=f"bigquery://{TABLE}").message
