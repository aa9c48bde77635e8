"""Account and store blocks through a real Prefect API: saved, loaded, renewed, refused, and silent about their keys."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect_aws import AwsCredentials, MinIOCredentials, S3Bucket
from prefect_aws.client_parameters import AwsClientParameters
from prefect_gcp import GcpCredentials
from pydantic import SecretStr

from blocks import AwsAccount, CheckpointStore, GcpAccount, load_account, load_store
from blocks.credentials import aws_session
from flows.train import train
from holdfast.drivers.protocol import Driver
from holdfast.errors import ConfigError, TransientError
from holdfast.model import TrainingJob
from holdfast.storage import ObjectStore
from tests.emulated.aws import ACCESS_KEY, SECRET_KEY, SESSION_TOKEN
from tests.emulated.gce import PROJECT
from tests.emulated.object_stores import REGION, S3Emulator
from tests.emulated.runs import BUCKET, ROLE, Account, aws_account
from tests.emulated.wire import Wire

REPOSITORY = Path(__file__).parents[2]
READ_AGAIN_SECONDS = 0.2


@pytest.fixture(scope="module")
def aws_for_all(tmp_path_factory: pytest.TempPathFactory, prefect_api: str) -> Iterator[Account]:
    with aws_account(tmp_path_factory.mktemp("aws")) as account:
        yield account


@pytest.fixture
def aws(aws_for_all: Account, folder: Path) -> Iterator[Account]:
    aws_for_all.blocks()
    aws_for_all.emulator.forget_calls()
    yield aws_for_all
    aws_for_all.emulator.front.denied.clear()


@pytest.fixture(scope="module")
def gcp_key() -> dict[str, str]:
    """A service account's key file."""
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return {
        "type": "service_account",
        "project_id": PROJECT,
        "private_key_id": "planted-key-id",
        "private_key": private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
        "client_email": f"orchestrator@{PROJECT}.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": "https://oauth2.googleapis.com/token",
    }


def keys(**changes: Any) -> AwsCredentials:
    given = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SecretStr(SECRET_KEY), "region_name": REGION}
    return AwsCredentials(**given | changes)


# -- saved and loaded -------------------------------------------------------------------------------------------------


def test_one_command_registers_every_block_with_its_form(prefect_api: str) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "prefect", "block", "register", "-m", "blocks"],
        env={**os.environ, "PREFECT_API_URL": prefect_api, "COLUMNS": "200"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    nested = {"AWS Credentials", "S3 Bucket", "GCP Credentials", "GCS Bucket"}
    ours = {"AWS Account", "GCP Account", "Checkpoint Store", "Local Account", "Spending Budget"}
    assert [name for name in ours if name not in told.stdout] == []
    with get_client(sync_client=True) as client:
        assert ours | nested <= {kind.name for kind in client.read_block_types()}
        for block, field in [(AwsAccount, "settings"), (GcpAccount, "settings"), (CheckpointStore, "s3_bucket")]:
            kind = client.read_block_type_by_slug(block.get_block_type_slug())
            form = client.get_most_recent_block_schema_for_block_type(kind.id)
            assert form and form.fields["properties"][field]["title"]


def test_an_account_on_aws_comes_back_as_it_was_saved(aws: Account) -> None:
    loaded = load_account("aws")
    assert loaded.settings == aws.driver().config.model_copy(update={"client_parameters": {}})
    assert loaded.driver().config.client_parameters["endpoint_url"] == aws.emulator.endpoint
    assert loaded.driver().offers() == aws.driver().offers()


def test_an_account_on_gcp_comes_back_as_it_was_saved(folder: Path, prefect_api: str, gcp_key: dict[str, str]) -> None:
    settings = GCP_SETTINGS | {"gpus": {"n1-standard-4": {"type": "nvidia-tesla-t4", "count": 1}}, "disk_gib": 200}
    saved = GcpAccount(credentials=GcpCredentials(service_account_info=gcp_key, project=PROJECT), settings=settings)
    saved.save("google", overwrite=True)
    loaded = load_account("google")
    assert loaded.settings == saved.settings
    assert loaded.credentials.service_account_info.get_secret_value() == gcp_key
    assert loaded.driver().config == saved.settings


def test_a_store_comes_back_with_its_bucket_folder_and_role(aws: Account) -> None:
    bucket = CheckpointStore.load("bucket").s3_bucket
    CheckpointStore(s3_bucket=bucket, machine_role=ROLE).save("for-both", overwrite=True)
    store = load_store("for-both").store()
    assert store.url == aws.open_store_for_others().url
    store.put("key", b"value")
    assert aws.open_store().get("key") == b"value"


def test_nested_credentials_may_be_a_block_of_their_own(aws: Account) -> None:
    ours = keys(
        aws_session_token=SESSION_TOKEN, aws_client_parameters=AwsClientParameters(endpoint_url=aws.emulator.endpoint)
    )
    ours.save("ours", overwrite=True)
    AwsAccount(credentials=AwsCredentials.load("ours"), settings=aws.emulator.config()).save("nested", overwrite=True)
    keys(aws_session_token="another", region_name="us-west-2").save("ours", overwrite=True)
    loaded = AwsAccount.load("nested").credentials
    assert (loaded.aws_session_token, loaded.region_name) == ("another", "us-west-2")  # a reference, not a copy


def test_a_bucket_may_have_the_credentials_of_another_server_than_aws(folder: Path, prefect_api: str) -> None:
    with S3Emulator("minio") as s3:
        credentials = MinIOCredentials(
            minio_root_user="root",
            minio_root_password=SecretStr("planted-password"),
            region_name=REGION,
            aws_client_parameters=AwsClientParameters(endpoint_url=s3.endpoint),
        )
        CheckpointStore(s3_bucket=S3Bucket(bucket_name="minio", credentials=credentials)).save("minio", overwrite=True)
        assert "everything works" in CheckpointStore.load("minio").check()


def test_what_the_guide_to_aws_saves_is_what_its_commands_name(
    folder: Path, prefect_api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    guide = (REPOSITORY / "docs/aws.md").read_text()
    names: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        exec(snippet, names)
    assert "--account aws --store s3" in guide
    assert load_account("aws").settings.regions == ["us-east-1", "us-west-2"]
    url = load_store("s3").store().url
    assert url == f"s3://my-holdfast-runs/?region=us-east-1&role={ROLE}"


def test_the_policies_are_ones_that_iam_takes_where_the_guide_puts_them(aws: Account) -> None:
    """moto checks their grammar; the sizes are IAM's own, without white space."""
    iam = aws.emulator.client("iam")
    files = [file for file in (REPOSITORY / "deployments").glob("aws-*.json") if "alarm" not in file.stem]
    policies = {file.stem: json.loads(file.read_text()) for file in files}
    for number, (name, policy) in enumerate(policies.items()):
        text = json.dumps(policy, separators=(",", ":")).replace("SERVICE_ACCOUNT_UNIQUE_ID", "123456789012345678901")
        if "trust" in name:
            iam.create_role(RoleName=f"trusting-{number}", AssumeRolePolicyDocument=text)
            assert len(text) <= 2048
        else:
            iam.create_policy(PolicyName=name, PolicyDocument=text.replace("BUCKET", "my-holdfast-runs"))
            assert len(text) <= 6144
    google = policies["aws-machine-trust-google"]["Statement"]
    assert google[0] == policies["aws-machine-trust"]["Statement"][0]
    assert (
        google[1]["Condition"]["StringEquals"]["accounts.google.com:oaud"] == "holdfast"
    )  # what web_identity asks for


# -- their keys are told to nobody ------------------------------------------------------------------------------------


def test_what_is_printed_of_a_block_or_a_check_holds_no_key(aws: Account, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    block, store = load_account("aws"), load_store("bucket")
    checks = [block.check(), store.check()]
    assert [text for text in checks if "everything works" not in text] == []
    told = [repr(block), str(block), f"{[block]}", repr(block.driver()), *checks, caplog.text]
    told += [repr(store), str(store), repr(store.store()), store.store().url]
    assert [secret for secret in AWS_KEYS.values() for text in told if secret in text] == []


def test_what_prefect_shows_of_a_saved_block_is_masked(aws: Account, gcp_key: dict[str, str]) -> None:
    google = GcpAccount(credentials=GcpCredentials(service_account_info=gcp_key), settings=GCP_SETTINGS)
    secret = gcp_key["private_key"].splitlines()[1]
    assert secret not in repr(google) + str(google)
    google.save("with-a-key", overwrite=True)
    with get_client(sync_client=True) as client:
        shown = [
            json.dumps(client.read_block_document_by_name(name, slug, include_secrets=False).data)
            for name, slug in [("with-a-key", "gcp-account"), ("aws", "aws-account"), ("bucket", "checkpoint-store")]
        ]
    assert [text for text in shown if secret in text or SECRET_KEY in text or "********" not in text] == []


# -- wrong settings ---------------------------------------------------------------------------------------------------


def save_as_the_ui_does(kind: type[Any], name: str, data: dict[str, Any]) -> None:
    """The form is checked against the schema's types at most: what our validators refuse can be saved."""
    kind.register_type_and_schema()
    with get_client(sync_client=True) as client:
        try:
            there = client.read_block_document_by_name(name, kind.get_block_type_slug())
            client.delete_block_document(there.id)
        except ObjectNotFound:
            pass
        body = {
            "name": name,
            "data": data,
            "block_type_id": str(kind._block_type_id),
            "block_schema_id": str(kind._block_schema_id),
        }
        answer = client._client.post("/block_documents/", json=body)
        assert answer.status_code == 201, answer.text


AWS_KEYS = {
    "aws_access_key_id": ACCESS_KEY,
    "aws_secret_access_key": SECRET_KEY,
    "aws_session_token": SESSION_TOKEN,
}
AWS_SETTINGS = {"regions": ["us-east-1"]}
GCP_SETTINGS = {"project": "my-project", "regions": ["us-central1"]}
WRONG: dict[str, tuple[type[Any], dict[str, Any], list[str]]] = {
    "region": (
        AwsAccount,
        {"credentials": AWS_KEYS, "settings": {"regions": ["us-east-1a"]}},
        ["aws-account/wrong", "regions 'us-east-1a'", "such as us-east-1"],
    ),
    "group": (
        AwsAccount,
        {"credentials": AWS_KEYS, "settings": AWS_SETTINGS | {"security_group_ids": ["default"]}},
        ["aws-account/wrong", "security_group_ids 'default'", "ids such as sg-"],
    ),
    "unknown setting": (
        AwsAccount,
        {"credentials": AWS_KEYS, "settings": AWS_SETTINGS | {"instance_typs": ["g5.xlarge"]}},
        ["aws-account/wrong", "settings.instance_typs", "not permitted"],
    ),
    "no settings": (AwsAccount, {"credentials": AWS_KEYS}, ["aws-account/wrong", "settings: Field required"]),
    "machine type": (
        GcpAccount,
        {"credentials": {"project": "my-project"}, "settings": GCP_SETTINGS | {"machine_types": []}},
        ["gcp-account/wrong", "settings: machine_types is empty", "drop the field"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_settings_are_refused_by_field_value_and_remedy(
    case: str, folder: Path, prefect_api: str, gcp_key: dict[str, str]
) -> None:
    kind, data, words = WRONG[case]
    if kind is GcpAccount:
        data = data | {"credentials": {"service_account_info": gcp_key, "project": PROJECT}}
    save_as_the_ui_does(kind, "wrong", data)
    try:
        with pytest.raises(ConfigError) as refused:
            load_account("wrong")
    finally:
        kind.delete("wrong")
    said = str(refused.value)
    assert [word for word in [*words, "account: block"] if word not in said] == [], said
    # A traceback prints causes too, and pydantic's words hold what it was given.
    assert refused.value.__cause__ is None and refused.value.__suppress_context__
    assert [secret for secret in (SECRET_KEY, SESSION_TOKEN, ACCESS_KEY, "PRIVATE KEY") if secret in said] == []


def test_wrong_settings_are_refused_by_the_flow_and_by_the_command_line(folder: Path, prefect_api: str) -> None:
    kind, data, words = WRONG["region"]
    save_as_the_ui_does(kind, "wrong", data)
    (folder / "job.yaml").write_text("{name: mine, script: train.py}")
    (folder / "train.py").write_text("")
    try:
        with pytest.raises(ConfigError, match="regions 'us-east-1a'"):
            train(TrainingJob(name="mine", script="train.py"), account="wrong")
        for command in ("train", "doctor"):
            told = subprocess.run(
                [sys.executable, "-m", "flows", command, "job.yaml", "--account", "wrong"],
                env={**os.environ, "PREFECT_API_URL": prefect_api, "PYTHONPATH": str(REPOSITORY)},
                cwd=folder,
                capture_output=True,
                text=True,
            )
            assert told.returncode == 2, told.stderr
            line = next(line for line in told.stderr.splitlines() if line.startswith("refused: "))
            assert [word for word in words if word not in line] == [], told.stderr
            assert [secret for secret in AWS_KEYS.values() if secret in told.stderr + told.stdout] == []
    finally:
        kind.delete("wrong")


@pytest.mark.parametrize(
    "data, words",
    [
        (
            {"url": "s3://runs", "gcs_bucket": None, "machine_role": "", "s3_bucket": {"bucket_name": "runs"}},
            "one place",
        ),
        ({"url": "gs://runs", "machine_role": ROLE}, "machine_role is for an S3 bucket"),
        ({"url": "ftp://runs"}, "no store speaks 'ftp'"),
        ({"url": "s3://runs", "machine_role": "holdfast-machine"}, "'holdfast-machine' is no role's ARN"),
    ],
)
def test_a_store_that_can_not_be_one_is_refused(
    data: dict[str, Any], words: str, folder: Path, prefect_api: str
) -> None:
    save_as_the_ui_does(CheckpointStore, "wrong", data)
    try:
        with pytest.raises(ConfigError, match=words):
            load_store("wrong").store()
    finally:
        CheckpointStore.delete("wrong")


def test_a_role_for_google_s_machines_is_part_of_a_store_s_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    store = CheckpointStore(url="s3://runs/team?region=us-west-2", machine_role=ROLE).store()
    assert store.url == f"s3://runs/team?region=us-west-2&role={ROLE}"


def test_a_profile_that_is_not_there_is_refused_by_its_name(folder: Path) -> None:
    settings = {"regions": ["us-east-1"]}
    with pytest.raises(ConfigError, match=r"profile \(nobody\) could not be found; correct the credentials block"):
        AwsAccount(credentials=AwsCredentials(profile_name="nobody"), settings=settings).driver()


@pytest.fixture
def without_google(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A computer without any Google credentials: no file, no metadata service."""
    monkeypatch.setattr("google.auth.compute_engine._metadata._NO_GCE_CHECK", True)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(folder / "nothing"))
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)


@pytest.mark.usefixtures("without_google")
def test_a_computer_without_google_credentials_is_told_how_to_get_some(folder: Path, prefect_api: str) -> None:
    save_as_the_ui_does(GcpAccount, "keyless", {"credentials": {}, "settings": GCP_SETTINGS})
    save_as_the_ui_does(CheckpointStore, "keyless", {"gcs_bucket": {"bucket": "runs", "gcp_credentials": {}}})
    cases: list[Callable[[], Any]] = [
        lambda: load_account("keyless"),
        lambda: load_store("keyless"),
        lambda: CheckpointStore(url="gs://runs").store(),
    ]
    try:
        for load in cases:
            with pytest.raises(ConfigError, match="gcloud auth application-default login"):
                load()
    finally:
        GcpAccount.delete("keyless")
        CheckpointStore.delete("keyless")


def test_a_prefect_server_that_is_away_is_named(folder: Path, prefect_api: str) -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    nobody = "http://127.0.0.1:9/api"
    with (
        temporary_settings({PREFECT_API_URL: nobody, PREFECT_CLIENT_MAX_RETRIES: 0}),
        pytest.raises(TransientError, match=f"{nobody} does not answer .*; start it"),
    ):
        load_account("aws")


# -- renewed ----------------------------------------------------------------------------------------------------------


def whoever(driver: Driver) -> str:
    return next(iter(driver.examine())).detail


def new_keys(aws: Account, user: str) -> AwsCredentials:
    iam = aws.emulator.client("iam")
    iam.create_user(UserName=user)
    key = iam.create_access_key(UserName=user)["AccessKey"]
    return keys(
        aws_access_key_id=key["AccessKeyId"],
        aws_secret_access_key=SecretStr(key["SecretAccessKey"]),
        aws_client_parameters=AwsClientParameters(endpoint_url=aws.emulator.endpoint),
    )


def test_a_driver_uses_the_keys_that_somebody_has_saved_since(aws: Account, prefect_api: str) -> None:
    account = AwsAccount(credentials=new_keys(aws, "before"), settings=aws.emulator.config())
    account.save("renewed", overwrite=True)
    driver = load_account("renewed").driver(READ_AGAIN_SECONDS)
    assert "user/before" in whoever(driver)
    account.credentials = new_keys(aws, "after")
    account.save("renewed", overwrite=True)
    time.sleep(READ_AGAIN_SECONDS)
    assert "user/after" in whoever(driver)


def test_credentials_of_a_block_of_their_own_are_read_again_too(aws: Account, prefect_api: str) -> None:
    new_keys(aws, "shared-before").save("shared", overwrite=True)
    AwsAccount(credentials=AwsCredentials.load("shared"), settings=aws.emulator.config()).save("both", overwrite=True)
    driver = load_account("both").driver(READ_AGAIN_SECONDS)
    assert "user/shared-before" in whoever(driver)
    new_keys(aws, "shared-after").save("shared", overwrite=True)
    time.sleep(READ_AGAIN_SECONDS)
    assert "user/shared-after" in whoever(driver)


def test_keys_at_hand_go_on_while_the_block_can_not_be_read() -> None:
    def away() -> AwsCredentials:
        raise TransientError("the server is away")

    session = aws_session(keys(), away, READ_AGAIN_SECONDS)
    found = session.get_credentials()
    assert found is not None
    for _ in range(2):
        assert found.get_frozen_credentials().secret_key == SECRET_KEY
        time.sleep(READ_AGAIN_SECONDS)


def test_the_block_is_not_read_more_often_than_asked() -> None:
    asked: list[float] = []

    def reload() -> AwsCredentials:
        asked.append(time.monotonic())
        return keys()

    found = aws_session(keys(), reload, read_again_seconds=60).get_credentials()
    assert found is not None
    for _ in range(10):
        found.get_frozen_credentials()
    assert len(asked) == 1


@pytest.mark.parametrize("seconds, asked", [(3600, {1}), (900, {2, 3, 4})])
def test_an_assumed_role_is_assumed_again_before_its_end(
    seconds: int, asked: set[int], aws: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore renews 15 minutes before the end: one that lasts no longer is asked for at every use."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", aws.emulator.direct)
    account = AwsAccount(
        credentials=keys(
            assume_role_arn=ROLE,
            assume_role_kwargs={"DurationSeconds": seconds},
            aws_client_parameters=AwsClientParameters(endpoint_url=aws.emulator.endpoint),
        ),
        settings=aws.emulator.config(),
    )
    driver = account.driver()
    assert aws.emulator.calls["AssumeRole"] == 0
    assert {"assumed-role/holdfast-machine/holdfast" in whoever(driver) for _ in range(2)} == {True}
    assert aws.emulator.calls["AssumeRole"] in asked


def test_a_role_that_may_not_be_assumed_is_a_finding_and_not_a_traceback(
    aws: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", aws.emulator.direct)
    aws.emulator.deny("AssumeRole")
    role = keys(assume_role_arn=ROLE, aws_client_parameters=AwsClientParameters(endpoint_url=aws.emulator.endpoint))
    told = AwsAccount(credentials=role, settings=aws.emulator.config()).check()
    assert "MISSING  credentials" in told and "sts:AssumeRole" in told
    bucket = CheckpointStore.load("bucket").s3_bucket
    bucket.credentials.assume_role_arn = ROLE
    told = CheckpointStore(s3_bucket=bucket).check()
    assert "MISSING  store write" in told and "AssumeRole" in told
    assert [secret for secret in (SECRET_KEY, SESSION_TOKEN) if secret in told] == []


def test_a_store_uses_the_keys_that_somebody_has_saved_since(aws: Account) -> None:
    with Wire(aws.open_store().url.partition("endpoint=")[2]) as wire:

        def save(key: str) -> None:
            credentials = keys(aws_access_key_id=key, aws_client_parameters=AwsClientParameters(endpoint_url=wire.url))
            CheckpointStore(s3_bucket=S3Bucket(bucket_name=BUCKET, credentials=credentials)).save(
                "renewed", overwrite=True
            )

        save("AKIABEFORE")
        store: ObjectStore = load_store("renewed").store(READ_AGAIN_SECONDS)
        store.put("key", b"value")
        save("AKIAAFTER")
        time.sleep(READ_AGAIN_SECONDS)
        store.put("key", b"value")
        used = [re.findall(r"Credential=(\w+)", request.headers["authorization"]) for request in wire.requests]
        assert used == [["AKIABEFORE"], ["AKIAAFTER"]]
