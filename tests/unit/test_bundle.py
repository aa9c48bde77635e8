"""What a machine fetches at boot: the user's code, its orders and Holdfast itself, and nothing else."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

import holdfast
from holdfast.errors import ConfigError
from holdfast.model import TrainingJob
from holdfast.storage import DirectoryStore
from holdfast.supervision import bundle
from holdfast.supervision.bundle import obstore, pack, upload_bundle


def job(code: Path, **changes: object) -> TrainingJob:
    return TrainingJob.model_validate({"name": "gpt", "script": "train.py", "code": str(code), **changes})


def tree(code: Path, *names: str) -> Path:
    for name in names:
        path = code / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return code


def opened(data: bytes) -> dict[str, tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return {member.name: member for member in archive.getmembers()}


def content(data: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        file = archive.extractfile(name)
        assert file
        return file.read()


def code_files(code: Path) -> list[str]:
    return [name.removeprefix("code/") for name in opened(pack(job(code))) if name.startswith("code/")]


def orders(code: Path, **changes: object) -> dict:
    return json.loads(content(pack(job(code, **changes)), "agent.json"))


def test_the_same_code_makes_the_same_bytes_wherever_and_whenever(tmp_path: Path) -> None:
    one, other = tree(tmp_path / "one", "train.py", "b/c.py", "a.txt"), tree(tmp_path / "x" / "y", "a.txt", "b/c.py")
    tree(other, "train.py")
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
    assert pack(job(one)) == pack(job(other))
    tree(other, "new.py")
    assert pack(job(one)) != pack(job(other))


def test_the_library_comes_along_whole(tmp_path: Path) -> None:
    packed = opened(pack(job(tree(tmp_path, "train.py"))))
    package = Path(holdfast.__file__).parent
    ours = {f"lib/holdfast/{path.relative_to(package)}" for path in package.rglob("*.py")}
    assert ours | {"lib/holdfast/runtime/startup.sh"} == {name for name in packed if name.startswith("lib/")}
    assert all(member.isfile() and member.uid == 0 and member.mtime == 0 for member in packed.values())


def test_hidden_and_made_files_and_what_the_ignore_file_names_stay_at_home(tmp_path: Path) -> None:
    tree(tmp_path, "train.py", "data/big.bin", "data/keep.txt", "sub/data.csv", "sub/out/x", "out/y", "wandb/z")
    tree(tmp_path, ".git/config", ".env", "sub/.secret", "__pycache__/t.pyc", "sub/node_modules/m.js", "a.egg-info/P")
    (tmp_path / ".holdfastignore").write_text("*.bin\n\n  out/  \nsub/*.csv\nwandb\n")
    assert code_files(tmp_path) == ["train.py", "data/keep.txt"]


def test_a_program_stays_executable(tmp_path: Path) -> None:
    tree(tmp_path, "train.py", "run.sh")
    (tmp_path / "run.sh").chmod(0o777)
    packed = opened(pack(job(tmp_path)))
    assert packed["code/run.sh"].mode == 0o755
    assert packed["code/train.py"].mode & 0o111 == 0


def test_a_folder_that_is_too_big_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "MAX_CODE_BYTES", 1 << 20)
    tree(tmp_path, "train.py")
    (tmp_path / "a.bin").write_bytes(b"x" * (1 << 19))
    (tmp_path / "b.bin").write_bytes(b"x" * (1 << 19))
    with pytest.raises(ConfigError, match=r"more than 1 MiB.*\.holdfastignore"):
        pack(job(tmp_path))
    (tmp_path / ".holdfastignore").write_text("b.bin")
    assert code_files(tmp_path) == ["a.bin", "train.py"]


def test_a_link_to_a_folder_outside_brings_nothing_in(tmp_path: Path) -> None:
    tree(tmp_path / "home", "secret")
    (tree(tmp_path / "code", "train.py") / "home").symlink_to(tmp_path / "home")
    assert code_files(tmp_path / "code") == ["train.py"]


def test_a_link_to_a_file_outside_is_refused_by_name(tmp_path: Path) -> None:
    tree(tmp_path / "home", "secret")
    (tree(tmp_path / "code", "train.py") / "notes").symlink_to(tmp_path / "home" / "secret")
    with pytest.raises(ConfigError, match=r"code: notes .*home/secret.*\.holdfastignore"):
        pack(job(tmp_path / "code"))
    (tmp_path / "code" / ".holdfastignore").write_text("notes")
    assert code_files(tmp_path / "code") == ["train.py"]


def test_a_link_within_the_folder_is_packed_as_the_file_it_means(tmp_path: Path) -> None:
    (tree(tmp_path, "train.py") / "main.py").symlink_to("train.py")
    assert content(pack(job(tmp_path)), "code/main.py") == b"train.py"


def test_pipes_and_broken_links_hold_nothing_up(tmp_path: Path) -> None:
    os.mkfifo(tree(tmp_path, "train.py") / "pipe")
    (tmp_path / "broken").symlink_to("nowhere")
    assert code_files(tmp_path) == ["train.py"]


def test_the_agent_s_orders_are_the_job_s(tmp_path: Path) -> None:
    tree(tmp_path, "train.py")
    script = orders(tmp_path, args=["--lr", "0.1 "], env={"A": "b"}, notice_poll_seconds=2)
    assert script == {
        "python": True,
        "command": ["train.py", "--lr", "0.1 "],
        "env": {"A": "b"},
        "notice_poll_seconds": 2.0,
        "requirements": "",
        "container": "",
        "obstore": "",
        "gang": False,
        "serving": None,
        "processes_per_machine": 1,
    }
    assert orders(tmp_path, script="", module="pkg.train", args=["x"])["command"] == ["-m", "pkg.train", "x"]
    command = orders(tmp_path, script="", command=["./run.sh", "1"], args=["2"])
    assert (command["python"], command["command"]) == (False, ["./run.sh", "1", "2"])


def test_a_bundle_is_stored_once_under_its_checksum(tmp_path: Path) -> None:
    code, store = tree(tmp_path / "code", "train.py"), DirectoryStore(tmp_path / "my store")
    one, again = upload_bundle(job(code), store, "run"), upload_bundle(job(code), store, "run")
    assert one == again
    (info,) = store.list("runs/run/bundles/")
    assert one.url == f"{store.url}/{info.key}" and one.sha256[:16] in info.key
    assert hashlib.sha256(store.get(info.key)).hexdigest() == one.sha256


def test_the_key_of_a_bundle_belongs_to_the_path_of_its_url(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    store.url = "s3://bucket/some/prefix/?region=eu-west-1&endpoint=http%3A%2F%2F127.0.0.1%3A1"
    found = upload_bundle(job(tree(tmp_path / "code", "train.py")), store, "run")
    (info,) = store.list("runs/run/bundles/")
    assert found.url == f"s3://bucket/some/prefix/{info.key}?region=eu-west-1&endpoint=http%3A%2F%2F127.0.0.1%3A1"


# -- what the machine may lack ----------------------------------------------------------------------------------------


def test_a_machine_of_a_cloud_is_sent_obstore_for_the_platform_it_was_made_for(tmp_path: Path) -> None:
    code, store = tree(tmp_path / "code", "train.py"), DirectoryStore(tmp_path / "store")
    store.url = "gs://bucket/prefix"
    sent = store.get(f"runs/run/bundles/{upload_bundle(job(code), store, 'run').sha256[:16]}.tar.gz")
    vendored = {name for name in opened(sent) if name.startswith("vendor/")}
    folder = f"vendor/{sysconfig.get_platform()}/obstore/"
    assert {folder + "__init__.py", folder + "_obstore.abi3.so"} <= vendored
    assert all(name.startswith(folder) for name in vendored)
    assert {"code/train.py", "lib/holdfast/__init__.py", "agent.json"} <= set(opened(sent))
    assert json.loads(content(sent, "agent.json"))["obstore"] == importlib.metadata.version("obstore")
    plain = pack(job(code))
    assert "vendor" not in {name.partition("/")[0] for name in opened(plain)} and len(plain) < 1 << 20


def test_tar_unpacks_both_parts_of_such_a_bundle_and_python_imports_them(tmp_path: Path) -> None:
    data = pack(job(tree(tmp_path / "code", "train.py")), obstore())
    work = tmp_path / "work"
    work.mkdir()
    subprocess.run(["tar", "-xz"], input=data, cwd=work, check=True)
    assert (work / "code" / "train.py").read_text() == "train.py"
    vendor = work / "vendor" / sysconfig.get_platform()
    command = [sys.executable, "-S", "-c", "import obstore; print(obstore.__file__, obstore.__version__)"]
    ran = subprocess.run(command, env={"PYTHONPATH": str(vendor)}, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [str(vendor / "obstore" / "__init__.py"), importlib.metadata.version("obstore")]


def test_the_same_code_makes_the_same_bundle_with_obstore_too(tmp_path: Path) -> None:
    code = tree(tmp_path, "train.py")
    first = pack(job(code), obstore())
    obstore.cache_clear()
    assert first == pack(job(code), obstore())


def test_the_agent_is_told_the_environment_of_the_program(tmp_path: Path) -> None:
    tree(tmp_path, "train.py", "env/lock.txt")
    assert orders(tmp_path, environment={"requirements": "./env/lock.txt"})["requirements"] == "./env/lock.txt"
    assert orders(tmp_path, environment={"container": "a/b@sha256:1"})["container"] == "a/b@sha256:1"


def test_a_lock_file_that_stays_at_home_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    tree(tmp_path, "train.py", "lock.txt")
    (tmp_path / ".holdfastignore").write_text("*.txt")
    with pytest.raises(ConfigError, match=r"environment.requirements: 'lock.txt' is not among.*\.holdfastignore"):
        pack(job(tmp_path, environment={"requirements": "lock.txt"}))
