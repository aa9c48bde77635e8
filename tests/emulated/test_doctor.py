"""The doctor and `check` on emulated clouds: one screen that says what works, what is missing, and who grants it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks import AwsAccount, CheckpointStore, load_account
from flows.train import train
from holdfast.drivers.protocol import Finding
from holdfast.errors import ConfigError
from holdfast.storage import open_store
from holdfast.supervision.doctor import examine_account, examine_store
from tests.emulated.gce import GceEmulator
from tests.emulated.runs import ACCOUNTS, BUCKET, SMALL, Account, aws_account, gcp_account, small_job
from tests.emulated.wire import Wire

REPOSITORY = Path(__file__).parents[2]
CLI_SECONDS = 120.0
"""Beside a server that runs already: 5 to 12 s on two busy cores, most of it imports; a hang is far longer."""


def doctor(folder: Path, api: str, account: Account | None, *arguments: str) -> tuple[int, str]:
    began = time.monotonic()
    told = subprocess.run(
        [sys.executable, "-m", "holdfast", "doctor", *arguments],
        env={
            **os.environ,
            "PREFECT_API_URL": api,
            "PYTHONPATH": str(REPOSITORY),
            **(account.environment if account else {}),
        },
        cwd=folder,
        capture_output=True,
        text=True,
    )
    print(f"{time.monotonic() - began:.1f} s\n{told.stdout}{told.stderr}")
    assert "Traceback" not in told.stderr
    assert time.monotonic() - began < CLI_SECONDS
    return told.returncode, told.stdout + told.stderr


def write_job(folder: Path, kinds: list[str]) -> None:
    (folder / "train.py").write_text("")
    (folder / "job.yaml").write_text(
        f"{{name: mine, script: train.py, max_run_hours: 2, resources: {{instance_types: {kinds}}}}}"
    )


def missing(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("MISSING")]


@pytest.mark.parametrize("name", ACCOUNTS)
def test_everything_works_and_nothing_is_launched(name: str, folder: Path, prefect_api: str) -> None:
    with ACCOUNTS[name](folder) as account:
        account.blocks()
        write_job(folder, [SMALL[name]])
        status, text = doctor(folder, prefect_api, account, "job.yaml", "--account", name, "--store", "bucket")
        assert status == 0, text
        assert text.rstrip().endswith("everything works")
        subjects = ["credentials", "image", "prices", "store conditional write", "code", "spot pools", "cost"]
        assert [subject for subject in subjects if f"ok       {subject} " not in text] == []
        assert "an hour in" in text and "max_run_hours 2" in text
        assert len(text.splitlines()) < 40
        assert [secret for secret in account.secrets if secret in text] == []
        assert account.host.ids() == []

        write_job(folder, ["g5.xlargest"])
        status, text = doctor(folder, prefect_api, account, "job.yaml", "--account", name, "--store", "bucket")
        assert status == 1
        assert [line.split()[1] for line in missing(text)] == ["pools"]


def test_two_accounts_are_examined_as_the_one_that_a_run_uses(folder: Path, prefect_api: str) -> None:
    with aws_account(folder) as aws, gcp_account(folder) as gcp:
        gcp.blocks()
        aws.blocks()  # its bucket last: the runs' store
        write_job(folder, list(SMALL.values()))
        accounts = ["job.yaml", "--account", "aws", "--account", "gcp", "--store", "bucket"]
        status, text = doctor(folder, prefect_api, gcp, *accounts)
        assert status == 1
        [line] = missing(text)
        assert "machines of gcp have no way into s3://" in line and "set machine_role" in line
        assert "ok       aws credentials " in text and "ok       gcp credentials " in text

        bucket = CheckpointStore.load("bucket")
        bucket.machine_role = "arn:aws:iam::123456789012:role/holdfast-machine"
        bucket.save("bucket", overwrite=True)
        status, text = doctor(folder, prefect_api, gcp, *accounts)
        assert status == 0, text
        assert aws.host.ids() == gcp.host.ids() == []

        status, text = doctor(folder, prefect_api, None, "--account", "aws", "--account", "aws")
        assert status == 1 and "one account of each cloud" in text


def test_bad_input_is_refused_in_one_line(folder: Path, prefect_api: str) -> None:
    (folder / "job.yaml").write_text("{name: mine, scirpt: train.py}")
    for arguments, words in [
        (["nowhere.yaml"], "job file nowhere.yaml: No such file"),
        (["job.yaml"], "'script'"),
        (["--account", "lokal"], "account: no block is called 'lokal'; did you mean 'local'?"),
        (["--store", "nobodys"], "store: no block is called 'nobodys'; save one in the UI under Blocks"),
    ]:
        status, text = doctor(folder, prefect_api, None, *arguments)
        assert status == 2, text
        assert words in text, text
        assert len([line for line in text.splitlines() if line.startswith("refused: ")]) == 1
    assert doctor(folder, prefect_api, None)[0] == 0  # the local cloud and the folder .holdfast


def test_a_folder_as_the_store_of_a_cloud_s_machines_is_missing(folder: Path, prefect_api: str) -> None:
    with aws_account(folder) as aws:
        aws.blocks()
        status, text = doctor(folder, prefect_api, aws, "--account", "aws")
        assert status == 1
        assert "which machines of aws can't reach; name the block of a store in a bucket (--store)" in missing(text)[0]


# -- what is missing --------------------------------------------------------------------------------------------------


def not_ok(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.subject: finding.detail for finding in findings if not finding.ok}


def test_a_missing_permission_on_aws_is_named_with_the_line_that_grants_it(folder: Path, prefect_api: str) -> None:
    with aws_account(folder) as aws:
        aws.blocks()
        block = load_account("aws")
        assert not_ok(block.driver().examine()) == {}
        aws.emulator.deny("RunInstances")
        told = block.check()
        [line] = missing(told)
        assert "ec2:RunInstances us-east-1" in line
        assert '{"Effect": "Allow", "Action": "ec2:RunInstances", "Resource": "*"}' in line
        assert "deployments/aws-orchestrator-policy.json" in line
        assert told.endswith("are missing") or "1 of" in told.splitlines()[-1]
        aws.emulator.front.denied.clear()
        aws.emulator.refuse("GetCallerIdentity", "ExpiredToken", "expired", count=9)
        told = block.check()
        assert len(missing(told)) == 1 and "does not accept the account's credentials" in told


def test_a_missing_permission_on_gcp_is_named_with_the_role_that_grants_it(tmp_path: Path) -> None:
    with GceEmulator(tmp_path) as gce:
        gce.denied.add("compute.instances.create")
        found = not_ok(examine_account(gce.driver))
        assert list(found) == ["permissions"]
        assert (
            "missing: compute.instances.create; grant this account the role in deployments/gcp-role.yaml"
            in found.values()
        )
        gce.denied.clear()
        gce.expired = True
        assert "renew" in not_ok(examine_account(gce.driver))["credentials"]


def test_an_account_without_any_credentials_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    began = time.monotonic()
    told = AwsAccount(settings={"regions": ["us-east-1"]}).check()
    assert missing(told)[0].startswith("MISSING  credentials")
    assert "there are no usable AWS credentials" in told and "log in" in told
    assert time.monotonic() - began < 10
    told = CheckpointStore(url="s3://runs?region=us-east-1").check()
    assert len(missing(told)) == 1 and "has no credentials; log in" in told


@pytest.mark.parametrize(
    "code, status, words",
    [
        ("AccessDenied", 403, "s3:PutObject"),
        ("NoSuchBucket", 404, f"there is no bucket '{BUCKET}'; create it"),
        ("InvalidAccessKeyId", 403, "renew them"),
    ],
)
def test_a_store_that_refuses_says_why(code: str, status: int, words: str, folder: Path, prefect_api: str) -> None:
    with aws_account(folder) as aws:
        url = aws.open_store().url
        endpoint = url.partition("endpoint=")[2]
        with Wire(endpoint) as wire:
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            wire.inject("error", count=99, status=status, body=body)
            store = open_store(url.replace(endpoint, wire.url), credentials=aws.emulator.session())
            found = not_ok(examine_store(lambda: store))
        assert list(found) == ["store write"]
        assert words in found["store write"], found


def test_a_store_whose_rights_are_partly_missing_names_each(folder: Path, prefect_api: str) -> None:
    with aws_account(folder) as aws:
        url = aws.open_store().url
        endpoint = url.partition("endpoint=")[2]
        with Wire(endpoint) as wire:
            body = b"<Error><Code>AccessDenied</Code><Message>no</Message></Error>"
            wire.inject(
                "error",
                count=99,
                status=403,
                body=body,
                when=lambda one: one.action in ("ListObjectsV2", "DeleteObject"),
            )
            store = open_store(url.replace(endpoint, wire.url), credentials=aws.emulator.session())
            found = not_ok(examine_store(lambda: store))
        assert list(found) == ["store list", "store delete"]
        assert "s3:ListBucket" in found["store list"] and "s3:DeleteObject" in found["store delete"]


def test_a_run_whose_machines_could_not_reach_its_store_is_refused_before_one_is_bought(
    folder: Path, prefect_api: str
) -> None:
    with aws_account(folder) as account:
        account.blocks()
        with pytest.raises(ConfigError, match="machines of aws can't reach; name the block of a store in a bucket"):
            train(small_job(account, folder), account="aws")
        assert account.host.ids() == []
