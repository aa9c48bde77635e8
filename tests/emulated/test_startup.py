"""A machine's whole start-up: the user data is run by a host, the bundle lies in an emulated S3 or GCS, the agent runs."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from holdfast.clock import FastClock, clock_to_text
from holdfast.drivers.local.config import Fate
from holdfast.drivers.local.metadata import ROLE, Facts, serve
from holdfast.errors import NotFoundError
from holdfast.model import TrainingJob
from holdfast.runtime import contract, fetch
from holdfast.runtime.startup import SHUTDOWN_SCRIPT, startup_script
from holdfast.storage import ObjectStore, open_store
from holdfast.supervision.bundle import Bundle, Vendored, obstore, pack, upload_bundle
from tests.emulated.gcs import GcsEmulator
from tests.emulated.machine_host import Life, MachineHost
from tests.emulated.object_stores import S3Emulator
from tests.emulated.wire import Wire

T = TypeVar("T")
POOLS = {"aws": ("eu-west-1", "eu-west-1a", "g5.xlarge"), "gcp": ("europe-west4", "europe-west4-a", "g2-standard-4")}
WORTHLESS = {"AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST", "AWS_SECRET_ACCESS_KEY": "the-orchestrator's-own"}
ON_ONE_CLOUD = pytest.mark.parametrize("cloud", ["aws"], indirect=True)
"""For what no cloud has a part in."""
PROGRAM = """
import json, os, sys
import obstore
seen = {name: os.environ.get(name) for name in ("GREETING", "PYTHONPATH", "HOLDFAST_RUN")}
print("program:", json.dumps({**seen, "obstore": obstore.__file__, "arguments": sys.argv[1:]}), flush=True)
"""


class Cloud:
    """A store that a machine reaches with its role alone, and the host that runs the machine."""

    def __init__(self, tmp_path: Path, dialect: Any, store: ObjectStore, wire: Wire) -> None:
        self.dialect, self.store, self.wire = dialect, store, wire
        self.host = MachineHost(tmp_path / "machines", dialect)
        self.code = tmp_path / "code"
        self.code.mkdir()
        self.write("train.py", PROGRAM)

    def write(self, name: str, text: str) -> None:
        (self.code / name).write_text(text)

    def job(self, **changes: Any) -> TrainingJob:
        asked = {
            "name": "gpt",
            "script": "train.py",
            "code": str(self.code),
            "env": {"GREETING": "it's $HOME"},
            **changes,
        }
        return TrainingJob.model_validate(asked)

    def boot(self, bundle: Bundle, fate: Fate | None = None, **changes: str) -> str:
        """The machine's id."""
        environment = {
            contract.STORE: self.store.url,
            contract.RUN: "run",
            contract.ATTEMPT: "1",
            contract.BUNDLE: bundle.url,
            contract.BUNDLE_SHA256: bundle.sha256,
            **changes,
        }
        region, zone, kind = POOLS[self.dialect]
        # Of this process alone: processes are ended by their machine's id, and other tests run beside this one.
        machine = f"i-{os.getpid()}-{len(self.host.ids()):04d}"
        self.host.start(
            machine,
            region=region,
            zone=zone,
            instance_type=kind,
            provisioning_model="spot",
            startup_script=startup_script(environment),
            shutdown_script=SHUTDOWN_SCRIPT,
            fate=fate,
        )
        return machine

    def run(self, bundle: Bundle, **changes: str) -> str:
        """The console of a machine that was booted, and is over."""
        machine = self.boot(bundle, **changes)
        self.ended(machine)
        return self.host.console(machine)

    def ended(self, machine: str) -> Life:
        return wait_for(lambda: life if (life := self.host.life(machine)).state == "terminated" else None)

    @property
    def ending(self) -> dict[str, Any] | None:
        return stored(self.store, "runs/run/attempts/0001/end.json")


def wait_for(condition: Callable[[], T | None], seconds: float = 60.0) -> T:
    give_up_at = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < give_up_at, "timed out"
        time.sleep(0.02)
    return found


def said(console: str, beginning: str = "program: ") -> Any:
    lines = [line for line in console.splitlines() if line.startswith(beginning)]
    assert lines, console
    return json.loads(lines[-1].removeprefix(beginning))


@pytest.fixture(params=["aws", "gcp"])
def cloud(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    if request.param == "aws":
        for name, value in WORTHLESS.items():
            monkeypatch.setenv(name, value)
        with S3Emulator("bucket") as s3, Wire(s3.endpoint) as wire:
            cloud = Cloud(tmp_path, "aws", open_store(s3.url("bucket", "some prefix", wire.url)), wire)
            try:
                yield cloud
            finally:
                cloud.host.stop_all()
    else:
        with GcsEmulator("bucket") as gcs, Wire(gcs.endpoint) as wire:
            monkeypatch.setenv("GCE_METADATA_HOST", gcs.host)
            cloud = Cloud(tmp_path, "gcp", open_store(gcs.url("bucket", "some prefix", wire.url)), wire)
            try:
                yield cloud
            finally:
                cloud.host.stop_all()


@pytest.fixture
def bare_python(tmp_path: Path) -> str:
    """An interpreter of an image that has no package at all."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    return str(tmp_path / "bare" / "bin" / "python")


# -- it comes up ------------------------------------------------------------------------------------------------------


def test_a_machine_fetches_its_bundle_with_its_role_and_runs_the_program(cloud: Cloud) -> None:
    console = cloud.run(upload_bundle(cloud.job(args=["--lr", "0.1 "]), cloud.store, "run"))
    seen = said(console)
    assert seen["GREETING"] == "it's $HOME" and seen["HOLDFAST_RUN"] == "run" and seen["arguments"] == ["--lr", "0.1 "]
    assert cloud.ending and cloud.ending["outcome"] == "finished"
    marks = [datetime.fromisoformat(cloud.ending["report"]["marks"][name]) for name in MARKS]
    assert marks == sorted(marks)
    assert [line.split()[2] for line in console.splitlines() if line.startswith("holdfast: boot ")] == PHASES


MARKS = ["boot-started", "bundle-fetched", "agent-started", "environment-ready", "program-started"]
PHASES = ["boot", "fetch", "unpack", "agent", "environment"]


def test_a_store_that_has_a_bad_minute_delays_the_boot(cloud: Cloud) -> None:
    bundle = upload_bundle(cloud.job(), cloud.store, "run")
    gets = [lambda request: request.method == "GET" and "bundles" in request.path] * 3
    for kind, when in zip(("error", "reset", "throttle"), gets, strict=True):
        cloud.wire.inject(kind, when=when)  # type: ignore[arg-type]
    console = cloud.run(bundle)
    assert console.count("again in") == 3
    assert cloud.ending and cloud.ending["outcome"] == "finished"


def test_an_image_without_obstore_uses_the_bundle_s(cloud: Cloud, bare_python: str) -> None:
    console = cloud.run(upload_bundle(cloud.job(), cloud.store, "run"), HOLDFAST_PYTHON=bare_python)
    assert "/work/vendor/" in said(console)["obstore"]
    assert cloud.ending and cloud.ending["outcome"] == "finished"


@ON_ONE_CLOUD
def test_an_image_with_obstore_uses_its_own(cloud: Cloud) -> None:
    console = cloud.run(upload_bundle(cloud.job(), cloud.store, "run"))
    assert "/vendor/" not in said(console)["obstore"] and "/vendor/" not in said(console)["PYTHONPATH"]


def for_another_platform() -> Vendored:
    """What an orchestrator of another kind of computer sends: its own obstore, of no use to the machine."""
    entries = io.BytesIO()
    with tarfile.open(fileobj=entries, mode="w") as archive:
        info = tarfile.TarInfo("vendor/macosx-11.0-arm64/obstore/__init__.py")
        archive.addfile(info, io.BytesIO())
        end = archive.offset
    return Vendored(obstore().version, gzip.compress(entries.getvalue()[:end]))


def upload(cloud: Cloud, data: bytes) -> Bundle:
    cloud.store.put("runs/run/bundles/own.tar.gz", data)
    return Bundle(fetch.object_url(cloud.store.url, "runs/run/bundles/own.tar.gz"), hashlib.sha256(data).hexdigest())


@ON_ONE_CLOUD
def test_a_machine_of_another_platform_installs_the_orchestrator_s_version(
    cloud: Cloud, bare_python: str, tmp_path: Path
) -> None:
    """From a folder in place of PyPI: pip is the real one, the wheel is made of the obstore that is installed here."""
    subprocess.run([bare_python, "-m", "ensurepip"], check=True, capture_output=True)
    (tmp_path / "index").mkdir()
    info = f"obstore-{obstore().version}.dist-info"
    package = Path(importlib.util.find_spec("obstore").origin).parent  # type: ignore[union-attr, arg-type]
    with zipfile.ZipFile(tmp_path / "index" / f"obstore-{obstore().version}-py3-none-any.whl", "w") as archive:
        for path in (path for path in package.rglob("*") if path.suffix in (".py", ".so")):
            archive.write(path, f"obstore/{path.relative_to(package)}")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: obstore\nVersion: {obstore().version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    cloud.host.environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "index")}
    bundle = upload(cloud, pack(cloud.job(), for_another_platform()))
    assert "/work/vendor-pip/" in said(cloud.run(bundle, HOLDFAST_PYTHON=bare_python))["obstore"]


@ON_ONE_CLOUD
def test_a_machine_that_can_have_no_obstore_says_why(cloud: Cloud, bare_python: str) -> None:
    bundle = upload(cloud, pack(cloud.job(), for_another_platform()))
    console = cloud.run(bundle, HOLDFAST_PYTHON=bare_python)
    assert "boot failed in phase agent" in console and "program: " not in console
    assert cloud.ending and cloud.ending["outcome"] == "program-failed"
    assert "needs the package obstore" in cloud.ending["log_tail"] and "No module named pip" in cloud.ending["log_tail"]


# -- it does not ------------------------------------------------------------------------------------------------------


def test_another_checksum_is_said_and_stored(cloud: Cloud) -> None:
    bundle = upload_bundle(cloud.job(), cloud.store, "run")
    console = cloud.run(Bundle(bundle.url, "0" * 64))
    assert f"boot failed in phase fetch: the bundle's SHA-256 is {bundle.sha256}, expected {'0' * 64}" in console
    assert cloud.ending and cloud.ending["outcome"] == "program-failed"
    assert bundle.sha256 in cloud.ending["log_tail"] and "phase fetch" in cloud.ending["detail"]


def test_a_missing_bundle_is_said_and_stored(cloud: Cloud) -> None:
    console = cloud.run(Bundle(fetch.object_url(cloud.store.url, "runs/run/bundles/none.tar.gz"), "0" * 64))
    assert "boot failed in phase fetch: GET " in console and "404 NoSuchKey" in console
    assert cloud.ending and "none.tar.gz" in cloud.ending["log_tail"]


def test_a_role_that_may_not_read_is_told_what_it_needs(cloud: Cloud) -> None:
    denied = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
    bundle = upload_bundle(cloud.job(), cloud.store, "run")
    cloud.wire.inject("error", when=lambda request: True, count=math.inf, status=403, body=denied)
    began = time.monotonic()
    console = cloud.run(bundle)
    needed = f"the role {ROLE} needs s3:GetObject on arn:aws:s3:::bucket/*"
    if cloud.dialect == "gcp":
        needed = f"the service account {ROLE}@local.invalid needs roles/storage.objectUser on the bucket bucket"
    assert "403 AccessDenied Access Denied: " + needed in console
    assert time.monotonic() - began < 15
    cloud.wire.heal()
    assert cloud.ending is None


def test_a_machine_without_a_role_says_so(cloud: Cloud) -> None:
    bundle = upload_bundle(cloud.job(), cloud.store, "run")
    with metadata_without_role() as address:
        cloud.host.environment = {
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://{address}/",
            "GCE_METADATA_HOST": address,
        }
        console = cloud.run(bundle)
    remedy = "instance_profile" if cloud.dialect == "aws" else "service_account"
    assert (
        "the machine has no " in console and f"give the account a{'n' * (cloud.dialect == 'aws')} {remedy}" in console
    )


class metadata_without_role:
    """A metadata service of a machine that was given no role: tokens of IMDSv2, and 404 for the rest."""

    def __enter__(self) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_PUT(self) -> None:
                self.answer(200, b"token")

            def do_GET(self) -> None:
                self.answer(404, b"")

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return f"127.0.0.1:{self._server.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


# -- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize("endpoint", ["", "https://minio.example:9000", "https://host.example/path"])
@pytest.mark.parametrize("bucket", ["bucket", "bucket.with.dots"])
def test_requests_are_signed_as_botocore_signs_them(
    method: str, endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = Facts("i-1", "aws", "eu-west-1a", "eu-west-1", "c7i.large", "")
    server = serve(facts)
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}/")
    try:
        options = {"region": "eu-west-1", **({"endpoint": endpoint} if endpoint else {})}
        role, address, headers = fetch.s3_request(method, bucket, "a b/é+%41~/x.tar.gz", options, b"body")
        key = fetch.aws_identity()[1]
    finally:
        server.shutdown()
        server.server_close()
    assert role == ROLE
    signer = S3SigV4Auth(Credentials(key["AccessKeyId"], key["SecretAccessKey"], key["Token"]), "s3", "eu-west-1")
    signed = {name: value for name, value in headers.items() if name.startswith("x-amz-") or name == "host"}
    request = AWSRequest(method, address, headers=signed)
    request.context["timestamp"] = headers["x-amz-date"]
    text = signer.string_to_sign(request, signer.canonical_request(request))
    assert headers["authorization"].endswith("Signature=" + signer.signature(text, request))


# -- the environment of the program -----------------------------------------------------------------------------------

PACKAGED = """
import json, os, sys, thing
print("program:", json.dumps({"thing": thing.__file__, "executable": sys.executable}), flush=True)
"""


def wheel(folder: Path) -> str:
    """A package `thing` of one line below `folder`; its SHA-256."""
    folder.mkdir()
    path = folder / "thing-1.0-py3-none-any.whl"
    info = "thing-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("thing.py", "VALUE = 7\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "thing.py,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lock(cloud: Cloud, sha256: str = "") -> TrainingJob:
    found = wheel(cloud.code / "wheels")
    cloud.write("lock.txt", f"--no-index --find-links ./wheels\nthing==1.0 --hash=sha256:{sha256 or found}\n")
    return cloud.job(environment={"requirements": "lock.txt"})


@ON_ONE_CLOUD
@pytest.mark.parametrize("image", ["with packages", "bare"])
def test_a_lock_file_is_installed_on_top_of_the_image_s_packages(cloud: Cloud, image: str, bare_python: str) -> None:
    """`with packages`: an image whose Python is an environment itself, as AWS's /opt/pytorch; the program needs both."""
    cloud.write("train.py", PACKAGED + ("import hypothesis\n" if image == "with packages" else ""))
    python = sys.executable if image == "with packages" else bare_python
    console = cloud.run(upload_bundle(lock(cloud), cloud.store, "run"), HOLDFAST_PYTHON=python)
    assert "/work/env/" in said(console)["thing"] and "/work/env/" in said(console)["executable"]
    assert "Successfully installed thing-1.0" in console
    assert cloud.ending and cloud.ending["outcome"] == "finished", cloud.ending


@ON_ONE_CLOUD
def test_a_lock_file_whose_hash_is_another_ends_the_run_with_pip_s_words(cloud: Cloud) -> None:
    console = cloud.run(upload_bundle(lock(cloud, "0" * 64), cloud.store, "run"))
    assert "program: " not in console
    assert cloud.ending and cloud.ending["outcome"] == "program-failed"
    assert "environment.requirements: lock.txt can't be installed" in cloud.ending["log_tail"]
    assert "DO NOT MATCH THE HASHES" in cloud.ending["log_tail"]


DOCKER = """#!{python}
import json, os, signal, subprocess, sys, time
from pathlib import Path

containers, command = Path("{folder}"), sys.argv[1:]
with open(containers / "calls", "a") as calls:
    calls.write(json.dumps(command) + "\\n")
if command[0] == "pull":
    if {pull_seconds}:
        print("holdfast: step 1 {{}}", flush=True)  # the test's fate is due
        time.sleep({pull_seconds})
    sys.exit("no such image" if "unknown" in command[1] else 0)
if command[0] == "kill":
    os.killpg(int((containers / command[1]).read_text()), signal.SIGKILL)
if command[0] != "run":
    sys.exit()
options, environment, rest = {{}}, {{"PATH": os.environ["PATH"]}}, command[1:]
while rest[0].startswith("--"):
    name = rest.pop(0)
    if name not in ("--rm", "--init"):
        value = rest.pop(0)
        options[name] = value
        if name == "--env":
            environment.update([value.split("=", 1)])
        if name == "--volume" and value.endswith(":/dev/holdfast-console"):
            console = value.partition(":")[0]
if "HOLDFAST_CONSOLE" in environment:
    environment["HOLDFAST_CONSOLE"] = console
inner = subprocess.Popen(rest[1:], cwd=options.get("--workdir"), env=environment, start_new_session=True)
(containers / options.get("--name", "unnamed")).write_text(str(inner.pid))
signal.signal(signal.SIGTERM, lambda *_: inner.send_signal(signal.SIGTERM))
status = inner.wait()
sys.exit(status if status >= 0 else 128 - status)
"""


class Docker:
    """A program `docker` on the machine's path, in place of the real one, for which a test has no daemon.

    It keeps its arguments and runs the container's command on the host, in a session of its own as a daemon would: it
    outlives a client that is killed, and only what is passed with --env is in its environment.
    """

    def __init__(self, cloud: Cloud, folder: Path, pull_seconds: float = 0.0) -> None:
        self.folder = folder
        folder.mkdir()
        program = folder / "docker"
        program.write_text(DOCKER.format(python=sys.executable, folder=folder, pull_seconds=pull_seconds))
        program.chmod(0o755)
        cloud.host.environment = {
            "PATH": f"{folder}:{Path(sys.executable).parent}:/usr/bin:/bin",
            "A_SECRET": "hidden",
        }

    def calls(self, verb: str) -> list[list[str]]:
        lines = (self.folder / "calls").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call[0] == verb]


@ON_ONE_CLOUD
def test_a_program_in_a_container_sees_the_job_s_variables_and_the_machine_s_folder(
    cloud: Cloud, tmp_path: Path
) -> None:
    docker = Docker(cloud, tmp_path / "docker")
    cloud.write(
        "train.py", "import json, os\nprint('program:', json.dumps([os.getcwd(), dict(os.environ)]), flush=True)\n"
    )
    job = cloud.job(environment={"container": "registry.example/torch:2"}, args=["a b"])
    console = cloud.run(upload_bundle(job, cloud.store, "run"))
    folder, seen = said(console)
    assert folder.endswith("/work/code")
    assert seen["GREETING"] == "it's $HOME" and seen["HOLDFAST_STORE"] == cloud.store.url
    assert "A_SECRET" not in seen and "HOME" not in seen
    assert docker.calls("pull") == [["pull", "registry.example/torch:2"]]
    (run,) = [call for call in docker.calls("run") if "--name" in call]
    work = str(Path(folder).parent)
    assert run[: run.index("--volume")][:6] == ["run", "--rm", "--init", "--name", "holdfast-run-0001", "--network"]
    assert run[run.index("--volume") + 1] == f"{work}:{work}" and run[run.index("--workdir") + 1] == folder
    assert run[-4:] == ["registry.example/torch:2", "python3", "train.py", "a b"]
    assert "--gpus" not in run
    assert cloud.ending and cloud.ending["outcome"] == "finished"


@ON_ONE_CLOUD
def test_a_machine_with_gpus_gives_them_to_the_container(cloud: Cloud, tmp_path: Path) -> None:
    docker = Docker(cloud, tmp_path / "docker")
    (tmp_path / "docker" / "nvidia-smi").symlink_to("/bin/true")
    job = cloud.job(environment={"container": "torch"})
    cloud.run(upload_bundle(job, cloud.store, "run"))
    run = docker.calls("run")[-1]
    assert run[run.index("--gpus") + 1] == "all"


SAVING = """
import os, signal, sys, time
def save(*_):
    print("program: saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("holdfast: step 1 {}", flush=True)
time.sleep(600)
"""


def test_a_program_in_a_container_hears_of_the_interruption(cloud: Cloud, tmp_path: Path) -> None:
    Docker(cloud, tmp_path / "docker")
    cloud.write("train.py", SAVING)
    job = cloud.job(environment={"container": "torch"}, notice_poll_seconds=0.2)
    machine = cloud.boot(upload_bundle(job, cloud.store, "run"), Fate(at_step=1))
    assert cloud.ended(machine).reason == "preempted"
    assert "program: saved" in cloud.host.console(machine)
    assert cloud.ending and cloud.ending["outcome"] == "preempted"


DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("program: deaf", flush=True)
time.sleep(600)
"""


@ON_ONE_CLOUD
def test_a_container_that_does_not_listen_is_killed_by_its_name(cloud: Cloud, tmp_path: Path) -> None:
    docker = Docker(cloud, tmp_path / "docker")
    cloud.write("train.py", DEAF)
    clock = FastClock(datetime.now(UTC), 20.0)
    bundle = upload_bundle(cloud.job(environment={"container": "torch"}), cloud.store, "run")
    machine = cloud.boot(bundle, HOLDFAST_CLOCK=clock_to_text(clock))
    wait_for(lambda: "program: deaf" in cloud.host.console(machine))
    lease = {"attempt": 1, "expires_at": (clock.now() + timedelta(seconds=5)).isoformat()}
    cloud.store.put("runs/run/lease", json.dumps(lease).encode())
    cloud.ended(machine)
    assert ["kill", "holdfast-run-0001"] in docker.calls("kill")
    assert cloud.ending and cloud.ending["report"]["notice"]["kind"] == "lease"


@ON_ONE_CLOUD
def test_a_machine_without_docker_says_so(cloud: Cloud, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bash", "tar", "gzip", "tee", "date", "uname", "cat", "mkdir", "rm", "awk", "sleep", "wc"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name) or name)
    cloud.host.environment = {"PATH": str(tmp_path / "bin")}
    cloud.run(upload_bundle(cloud.job(environment={"container": "torch"}), cloud.store, "run"))
    assert cloud.ending and cloud.ending["outcome"] == "program-failed"
    assert "environment.container is 'torch', and the machine's image has no docker" in cloud.ending["log_tail"]


@ON_ONE_CLOUD
def test_an_image_that_can_t_be_pulled_is_said_with_docker_s_words(cloud: Cloud, tmp_path: Path) -> None:
    Docker(cloud, tmp_path / "docker")
    cloud.run(upload_bundle(cloud.job(environment={"container": "unknown"}), cloud.store, "run"))
    assert cloud.ending and cloud.ending["outcome"] == "program-failed"
    assert "environment.container: unknown can't be pulled" in cloud.ending["log_tail"]
    assert "no such image" in cloud.ending["log_tail"]


def test_a_machine_that_is_taken_while_it_prepares_was_preempted(cloud: Cloud, tmp_path: Path) -> None:
    Docker(cloud, tmp_path / "docker", pull_seconds=600)
    job = cloud.job(environment={"container": "torch"}, notice_poll_seconds=0.2)
    machine = cloud.boot(upload_bundle(job, cloud.store, "run"), Fate(at_step=1))
    heartbeat = wait_for(lambda: stored(cloud.store, "runs/run/attempts/0001/heartbeat.json"))
    assert "agent-started" in heartbeat["marks"] and "environment-ready" not in heartbeat["marks"]
    cloud.ended(machine)
    assert cloud.ending and cloud.ending["outcome"] == "preempted"


def stored(store: ObjectStore, key: str) -> dict[str, Any] | None:
    try:
        return json.loads(store.get(key))
    except NotFoundError:
        return None
