"""Where a store is, who may use it, and what is said when somebody may not."""

from __future__ import annotations

import base64
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import botocore.credentials
import botocore.session
import google.auth.credentials
import pytest

from holdfast.drivers.local.metadata import Facts, serve
from holdfast.errors import ConfigError, CredentialsError, TransientError
from holdfast.storage import ObjectStore, cloud_clients, open_store
from holdfast.storage.address import Address
from holdfast.storage.cloud import CloudStore
from tests.emulated.gcs import GcsEmulator
from tests.emulated.object_stores import ACCESS_KEY, SECRET_KEY, S3Emulator
from tests.emulated.wire import Wire

VERBS: dict[str, Callable[[ObjectStore], object]] = {
    "put": lambda store: store.put("k", b"x"),
    "create": lambda store: store.create("k", b"x"),
    "get": lambda store: store.get("k"),
    "list": lambda store: store.list(""),
    "delete": lambda store: store.delete("k"),
}


@pytest.fixture(autouse=True)
def no_credentials_of_this_computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    monkeypatch.setenv("GCE_METADATA_IP", "127.0.0.1:9")


@pytest.fixture
def s3() -> Iterator[S3Emulator]:
    with S3Emulator("bucket") as emulator:
        yield emulator


@pytest.fixture
def gcs() -> Iterator[GcsEmulator]:
    with GcsEmulator("bucket") as emulator:
        yield emulator


@pytest.fixture
def key_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


class GoogleCredentials(google.auth.credentials.Credentials):
    """An account whose tokens the emulator gives out."""

    def __init__(self, gcs: GcsEmulator) -> None:
        super().__init__()
        self._gcs = gcs

    def refresh(self, request: Any) -> None:
        self.token = self._gcs.new_token()
        self.expiry = (datetime.now(UTC) + timedelta(hours=1)).replace(tzinfo=None)  # google-auth's are naive UTC


# -- the URL ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("s3://bucket", "s3://bucket/"),
        ("s3://bucket/", "s3://bucket/"),
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        ("s3://bucket.of.mine/a b", "s3://bucket.of.mine/a%20b"),
        ("s3://bucket/100%25", "s3://bucket/100%25"),
        (
            "s3://bucket/p?endpoint=https%3A%2F%2Fminio:9000/&region=eu-west-1",
            "s3://bucket/p?region=eu-west-1&endpoint=https://minio:9000",
        ),
        ("s3://bucket/p?checksum=none", "s3://bucket/p?checksum=none"),
        ("gs://bucket_1/p?endpoint=http://127.0.0.1:4443", "gs://bucket_1/p?endpoint=http://127.0.0.1:4443"),
    ],
)
def test_a_url_says_where_the_store_is_and_is_written_in_one_way(url: str, canonical: str) -> None:
    address = Address.parse(url, environment={})
    assert address.url == canonical
    assert Address.parse(canonical, environment={}) == address


def test_what_the_environment_adds_is_in_the_url_that_a_machine_is_given() -> None:
    environment = {"AWS_DEFAULT_REGION": "eu-west-1", "AWS_ENDPOINT_URL": "http://minio:9000"}
    url = Address.parse("s3://bucket/p", environment).url
    assert url == "s3://bucket/p?region=eu-west-1&endpoint=http://minio:9000"
    assert Address.parse(url, {"AWS_REGION": "us-west-2", "AWS_ENDPOINT_URL_S3": "http://other"}).url == url
    assert Address.parse("gs://bucket", {"STORAGE_EMULATOR_HOST": "h:1"}).options == {"endpoint": "http://h:1"}


def test_the_url_wins_over_the_environment(
    s3: S3Emulator, gcs: GcsEmulator, key_in_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "GOOGLE_BASE_URL", "STORAGE_EMULATOR_HOST"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("AWS_BUCKET", "AWS_BUCKET_NAME", "GOOGLE_BUCKET", "GOOGLE_BUCKET_NAME"):
        monkeypatch.setenv(name, "another")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    for emulator, credentials in ((s3, None), (gcs, GoogleCredentials(gcs))):
        open_store(emulator.url("bucket"), credentials).create("k", b"x")
        assert emulator.contents("bucket") == {"k": b"x"}


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3:///prefix", "no name of a bucket"),
        ("s3://Bucket/p", "no name of a bucket"),
        ("gs://b", "no name of a bucket"),
        ("s3://bucket/a//b", "no prefix"),
        ("s3://bucket/a/../b", "no prefix"),
        ("s3://bucket/a#b", "no prefix"),
        ("s3://bucket?regoin=eu-west-1", "'regoin'.*region, endpoint, checksum"),
        ("gs://bucket?region=eu-west-1", "'region'.*only endpoint"),
        ("s3://bucket?region=", "one value"),
        ("s3://bucket?region=a&region=b", "one value"),
        ("s3://bucket?endpoint=ftp://host", "no endpoint"),
        ("s3://bucket?endpoint=https://user:word@host", "no endpoint"),
        ("s3://bucket?checksum=md5", "'md5'.*sha256"),
    ],
)
def test_a_url_that_can_t_be_meant_is_refused(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_store(url)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="no credentials") as refused:
        open_store("s3://AKIAKEY:hush@bucket/p")
    assert "hush" not in str(refused.value) and "AKIAKEY" not in str(refused.value)


def test_without_obstore_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(ConfigError, match=r"pip install 'obstore>=0\.12'"):
        open_store("s3://bucket/p")


def test_a_forked_child_is_told_so_instead_of_hanging(gcs: GcsEmulator) -> None:
    store = open_store(gcs.url("bucket"), credentials=GoogleCredentials(gcs))
    store.put("k", b"x")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            for use in (lambda: store.get("k"), lambda: open_store(gcs.url("bucket"))):
                with pytest.raises(ConfigError, match=r"forked.*spawn"):
                    use()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# -- credentials ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [boto3.Session, botocore.session.Session])
def test_a_session_of_boto3_or_botocore_opens_s3(s3: S3Emulator, kind: type) -> None:
    if kind is boto3.Session:
        session = boto3.Session(aws_access_key_id="AKIAOFSESSION", aws_secret_access_key=SECRET_KEY)
    else:
        session = botocore.session.Session()
        session.set_credentials("AKIAOFSESSION", SECRET_KEY)
    with Wire(s3.endpoint) as wire:
        open_store(s3.url("bucket", endpoint=wire.url), credentials=session).put("k", b"x")
        assert "AKIAOFSESSION" in wire.requests[-1].headers["authorization"]


def test_a_session_s_short_lived_key_is_asked_for_again(s3: S3Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an assumed role: a key that obstore kept to itself for half an hour would end in the middle of a run."""
    assert botocore.credentials.RefreshableCredentials._mandatory_refresh_timeout > cloud_clients.CREDENTIALS_SECONDS
    monkeypatch.setattr(cloud_clients, "CREDENTIALS_SECONDS", 0.2)
    issued = []

    def refresh() -> dict[str, str]:
        issued.append(f"AKIA{len(issued)}")
        expiry = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()  # so near that botocore renews at every call
        return {"access_key": issued[-1], "secret_key": SECRET_KEY, "token": "t", "expiry_time": expiry}

    session = botocore.session.Session()
    session._credentials = botocore.credentials.RefreshableCredentials.create_from_metadata(
        refresh(), refresh_using=refresh, method="test"
    )
    with Wire(s3.endpoint) as wire:
        store = open_store(s3.url("bucket", endpoint=wire.url), credentials=session)
        for _ in range(3):
            store.put("k", b"x")
            time.sleep(0.3)
        used = [request.headers["authorization"].split("Credential=")[1].split("/")[0] for request in wire.requests]
        assert len(set(used)) == 3 and set(used) <= set(issued)


def test_a_machine_uses_its_own_role_found_where_botocore_finds_it(
    s3: S3Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = serve(Facts("i-1", "aws", "eu-west-1a", "eu-west-1", "c7i.large", ""))  # IMDSv2 alone
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{metadata.server_address[1]}/")
    try:
        with Wire(s3.endpoint) as wire:
            open_store(s3.url("bucket", endpoint=wire.url)).put("k", b"x")
            assert wire.requests[-1].headers["x-amz-security-token"] == "local-cloud-token"
    finally:
        metadata.shutdown()
        metadata.server_close()


def test_a_person_s_profile_opens_s3(s3: S3Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "credentials"
    path.write_text(f"[team]\naws_access_key_id = AKIAOFPROFILE\naws_secret_access_key = {SECRET_KEY}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(path))
    monkeypatch.setenv("AWS_PROFILE", "team")
    with Wire(s3.endpoint) as wire:
        open_store(s3.url("bucket", endpoint=wire.url)).put("k", b"x")
        assert "AKIAOFPROFILE" in wire.requests[-1].headers["authorization"]
    monkeypatch.setenv("AWS_PROFILE", "no-such")
    with pytest.raises(ConfigError, match="'no-such'"):
        open_store(s3.url("bucket"))


def test_google_credentials_open_gcs_and_their_token_is_kept_while_it_is_good(gcs: GcsEmulator) -> None:
    store = open_store(gcs.url("bucket"), credentials=GoogleCredentials(gcs))
    for _ in range(3):
        store.put("k", b"x")
    assert len(gcs.tokens) == 1 and gcs.bearers_seen == set(gcs.tokens)


def test_nobody_s_credentials_are_waited_for_and_then_named(s3: S3Emulator, gcs: GcsEmulator) -> None:
    for url in (s3.url("bucket"), gcs.url("bucket")):
        with pytest.raises(CredentialsError, match="give the machine a role"):
            CloudStore(Address.parse(url), retry_seconds=0.5).get("k")


def test_a_session_that_can_t_renew_says_why(s3: S3Emulator) -> None:
    class Ended(botocore.credentials.Credentials):
        def get_frozen_credentials(self) -> Any:
            raise RuntimeError("the SSO session has ended")

    session = botocore.session.Session()
    session._credentials = Ended("a", "b")
    with pytest.raises(CredentialsError, match="SSO session has ended"):
        open_store(s3.url("bucket"), credentials=session).get("k")


@pytest.mark.parametrize("verb", VERBS)
def test_an_expired_token_is_the_credentials_fault_and_passes(
    s3: S3Emulator, key_in_environment: None, verb: str
) -> None:
    body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    with Wire(s3.endpoint) as wire:
        store = open_store(s3.url("bucket", endpoint=wire.url))
        wire.inject("error", status=400, body=body)
        with pytest.raises(CredentialsError, match=r"renew them.*ExpiredToken, The provided token has expired"):
            VERBS[verb](store)
        store.put("k", b"x")
        store.delete("k")
        VERBS["put" if verb == "get" else verb](store)


@pytest.mark.parametrize("verb", VERBS)
def test_a_revoked_token_is_the_credentials_fault(gcs: GcsEmulator, verb: str) -> None:
    store = open_store(gcs.url("bucket"), credentials=GoogleCredentials(gcs))
    gcs.valid_tokens = set()
    with pytest.raises(CredentialsError, match="renew them"):
        VERBS[verb](store)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_bucket_that_is_not_there_is_named(
    s3: S3Emulator, gcs: GcsEmulator, key_in_environment: None, verb: str
) -> None:
    for store in (open_store(s3.url("absent")), open_store(gcs.url("absent"), credentials=GoogleCredentials(gcs))):
        with pytest.raises(ConfigError, match="no bucket 'absent'"):
            VERBS[verb](store)


NEEDED = {
    "put": ("s3:PutObject", "storage.objects.create"),
    "create": ("s3:PutObject", "storage.objects.create"),
    "get": ("s3:GetObject", "storage.objects.get"),
    "list": ("s3:ListBucket", "storage.objects.list"),
    "delete": ("s3:DeleteObject", "storage.objects.delete"),
}


@pytest.mark.parametrize("verb", VERBS)
def test_who_may_not_is_told_what_to_grant(
    s3: S3Emulator, gcs: GcsEmulator, key_in_environment: None, verb: str
) -> None:
    body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
    for emulator, credentials, needed in (
        (s3, None, f'"Action": "{NEEDED[verb][0]}", "Resource": "arn:aws:s3:::bucket'),
        (gcs, GoogleCredentials(gcs), f"{NEEDED[verb][1]}.*roles/storage.objectUser"),
    ):
        with Wire(emulator.endpoint) as wire:
            store = open_store(emulator.url("bucket", "team/runs", wire.url), credentials)
            wire.inject("error", status=403, body=body)
            with pytest.raises(ConfigError, match=needed) as refused:
                VERBS[verb](store)
            if emulator is s3:
                assert ('arn:aws:s3:::bucket/team/runs/*"' in str(refused.value)) == (verb != "list")


def test_a_bucket_of_another_region_is_named(s3: S3Emulator, key_in_environment: None) -> None:
    body = b"<Error><Code>AuthorizationHeaderMalformed</Code><Message>expecting 'eu-west-1'</Message></Error>"
    with Wire(s3.endpoint) as wire:
        store = open_store(s3.url("bucket", endpoint=wire.url))
        for status in (400, 301):
            wire.inject("error", status=status, body=body)
            with pytest.raises(ConfigError, match=r"another region than 'us-east-1'.*\?region="):
                store.get("k")


def test_a_store_out_of_reach_is_transient_and_says_why(key_in_environment: None) -> None:
    store = CloudStore(Address.parse("s3://bucket/p?endpoint=http://127.0.0.1:9"), retry_seconds=0.3)
    for call in VERBS.values():
        with pytest.raises(TransientError, match="Connection refused"):
            call(store)


def test_a_busy_store_is_not_taken_for_bad_credentials_whatever_its_objects_are_called(
    s3: S3Emulator, gcs: GcsEmulator, key_in_environment: None
) -> None:
    for emulator, credentials in ((s3, None), (gcs, GoogleCredentials(gcs))):
        with Wire(emulator.endpoint) as wire:
            address = Address.parse(emulator.url("bucket", "latest/oauth2", wire.url))
            store = CloudStore(address, credentials, retry_seconds=0.3)
            wire.inject("throttle", count=math.inf)
            for verb in VERBS.values():
                with pytest.raises(TransientError) as busy:
                    verb(store)
                assert type(busy.value) is TransientError


def test_an_object_damaged_on_its_way_is_sent_again_by_the_caller(s3: S3Emulator, key_in_environment: None) -> None:
    body = b"<Error><Code>BadDigest</Code><Message>checksum</Message></Error>"
    with Wire(s3.endpoint) as wire:
        store = open_store(s3.url("bucket", endpoint=wire.url))
        wire.inject("error", status=400, body=body)
        store.put("k", b"x")
        assert wire.calls()["PutObject"] == 2 and store.get("k") == b"x"


# -- what is sent along -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checksum", "header"),
    [("", "x-amz-checksum-crc64nvme"), ("sha256", "x-amz-checksum-sha256"), ("none", "")],
)
def test_uploads_to_s3_carry_a_checksum_that_the_store_can_verify(
    s3: S3Emulator, key_in_environment: None, checksum: str, header: str
) -> None:
    with Wire(s3.endpoint) as wire:
        url = s3.url("bucket", endpoint=wire.url) + (f"&checksum={checksum}" if checksum else "")
        store = CloudStore(Address.parse(url), part_bytes=5 << 20)
        store.put("small", b"x")
        store.create("created", b"x")
        store.put("large", b"x" * (6 << 20))
        sent = [request for request in wire.requests if request.action in ("PutObject", "UploadPart")]
    assert len(sent) == 4
    for request in sent:
        assert [name for name in request.headers if name.startswith("x-amz-checksum-")] == ([header] if header else [])
        signed = request.headers["x-amz-content-sha256"]
        assert len(signed) == 64 if checksum == "sha256" else signed == "UNSIGNED-PAYLOAD"
    if header == "x-amz-checksum-sha256":
        assert base64.b64decode(sent[0].headers[header]) == hashlib.sha256(b"x").digest()
    assert open_store(s3.url("bucket")).get("large") == b"x" * (6 << 20)


def test_keys_are_stored_as_they_are_written(s3: S3Emulator, gcs: GcsEmulator, key_in_environment: None) -> None:
    wanted = ["a b", "a%20b", "a~b", "a#b", "é/ü", "a*b", "a?b=c&d", "[a]", "a\\b", "a+b", "日本/語"]
    for emulator, credentials in ((s3, None), (gcs, GoogleCredentials(gcs))):
        store = open_store(emulator.url("bucket", "p q"), credentials)
        for key in wanted:
            store.put(key, key.encode())
        assert [info.key for info in store.list("")] == sorted(wanted)
        assert [store.get(key).decode() for key in wanted] == wanted
        assert sorted(emulator.contents("bucket")) == sorted(f"p q/{key}" for key in wanted)
