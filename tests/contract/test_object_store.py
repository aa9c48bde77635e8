"""What Holdfast asks of an object store. Every store of STORES passes this: a folder, S3 and GCS."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from zlib import crc32

import pytest

from holdfast.errors import AlreadyExistsError, ConfigError, NotFoundError, TransientError
from holdfast.storage import DirectoryStore, ObjectStore, open_store
from holdfast.storage.keys import STAGED_SUFFIX
from tests.emulated.gcs import GcsEmulator
from tests.emulated.object_stores import ACCESS_KEY, SECRET_KEY, S3Emulator


@contextmanager
def a_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    yield DirectoryStore(folder / "objects")


@contextmanager
def s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    with S3Emulator("contract") as emulator:
        yield open_store(emulator.url("contract", "team a/runs"))


@contextmanager
def gcs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("HOME", str(folder))  # a person's own credentials would come before the machine's
    with GcsEmulator("contract") as emulator:
        monkeypatch.setenv("GCE_METADATA_HOST", emulator.host)
        yield open_store(emulator.url("contract", "team a/runs"))


Opener = Callable[[Path, pytest.MonkeyPatch], AbstractContextManager[ObjectStore]]
STORES: dict[str, Opener] = {"directory": a_directory, "s3": s3, "gcs": gcs}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with STORES[request.param](tmp_path, monkeypatch) as opened:
        yield opened


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key for info in store.list(prefix)]


def in_another_process(program: str, store: ObjectStore, *arguments: str) -> subprocess.Popen[str]:
    """`program` sees `store` and its own arguments from sys.argv[2] on."""
    head = "import sys; from holdfast.errors import *; from holdfast.storage import open_store\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + "store = open_store(sys.argv[1])\n" + program, store.url, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


# -- reading and writing ----------------------------------------------------------------------------------------------


def test_what_was_put_is_got_and_may_be_replaced(store: ObjectStore) -> None:
    store.put("runs/a/weights", b"one")
    store.put("runs/a/weights", [b"tw", bytearray(b"o"), memoryview(b"!")])
    assert store.get("runs/a/weights") == b"two!"
    store.put("runs/a/weights", b"")
    assert store.get("runs/a/weights") == b""


@pytest.mark.parametrize("count", [0, 1, 3])
def test_pieces_with_their_sums_make_one_object(store: ObjectStore, count: int) -> None:
    pieces = [os.urandom(5 << 20) for _ in range(count)] + [b"the end"]
    store.put_summed("image", ((memoryview(piece), crc32(piece)) for piece in pieces))
    assert store.get("image") == b"".join(pieces)


def test_memory_of_any_element_size_is_written_byte_by_byte(store: ObjectStore) -> None:
    store.put("floats", [memoryview(b"\x01\x02\x03\x04\x05\x06\x07\x08").cast("d")])
    assert store.get("floats") == b"\x01\x02\x03\x04\x05\x06\x07\x08"


def test_create_takes_a_free_key_and_never_an_occupied_one(store: ObjectStore) -> None:
    store.create("journal/000001.json", b"first")
    with pytest.raises(AlreadyExistsError, match=r"journal/000001\.json"):
        store.create("journal/000001.json", b"second")
    assert store.get("journal/000001.json") == b"first"


def test_what_is_not_there_is_not_found(store: ObjectStore) -> None:
    store.put("folder/object", b"x")
    for key in ("nothing", "folder", "folder/object/below"):
        with pytest.raises(NotFoundError, match=key):
            store.get(key)
        with pytest.raises(NotFoundError, match=key):
            store.get_range(key, 0, 1)


def test_a_range_is_cut_at_the_end_of_the_object(store: ObjectStore) -> None:
    store.put("digits", b"0123456789")
    assert store.get_range("digits", 0, 4) == b"0123"
    assert store.get_range("digits", 6, 100) == b"6789"
    assert store.get_range("digits", 10, 4) == b""
    assert store.get_range("digits", 3, 0) == b""


def test_an_opened_store_sees_what_another_wrote(store: ObjectStore) -> None:
    store.put("a", b"1")
    assert open_store(store.url).get("a") == b"1"


# -- listing and deleting ---------------------------------------------------------------------------------------------


def test_list_gives_keys_in_order_with_their_sizes(store: ObjectStore) -> None:
    for key, size in (("b", 3), ("a/b/c", 1), ("a-b", 0), ("a/b.txt", 2), ("a/10", 1), ("a/9", 1)):
        store.put(key, b"x" * size)
    assert keys(store) == ["a-b", "a/10", "a/9", "a/b.txt", "a/b/c", "b"]
    assert [info.size_bytes for info in store.list("")] == [0, 1, 1, 2, 1, 3]


def test_a_prefix_is_text_and_need_not_end_at_a_slash(store: ObjectStore) -> None:
    for key in ("run-1/x", "run-10/x", "run-2/x", "other"):
        store.put(key, b"")
    assert keys(store, "run-1") == ["run-1/x", "run-10/x"]
    assert keys(store, "run-1/") == ["run-1/x"]
    assert keys(store, "run-1/x") == ["run-1/x"]
    assert keys(store, "no-such/folder/") == []


def test_a_prefix_never_leads_out_of_the_store(store: ObjectStore, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("outside")
    store.put("inside", b"")
    for prefix in ("../", "../secret", "/", f"{tmp_path}/", "./", "a/../"):
        assert keys(store, prefix) == [], prefix


def test_deleting_twice_or_what_never_was_is_no_error(store: ObjectStore) -> None:
    store.put("runs/a/object", b"x")
    for _ in range(2):
        store.delete("runs/a/object")
    for never in ("nothing", "runs/a/other", "no/such/folder"):
        store.delete(never)
    assert keys(store) == []


def test_deleting_a_key_leaves_those_below_and_above_it(store: ObjectStore) -> None:
    store.put("a/b", b"x")
    store.delete("a")
    store.delete("a/b/c")
    assert keys(store) == ["a/b"]


def test_the_last_object_of_a_folder_may_go_and_come_back(store: ObjectStore) -> None:
    for content in (b"1", b"2"):
        store.create("a/b/c", content)
        assert store.get("a/b/c") == content
        store.delete("a/b/c")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../b", "a//b", "a/", "./a", ".", "a\0b"])
def test_a_bad_key_is_refused_by_every_verb(store: ObjectStore, key: str) -> None:
    for verb in (
        lambda: store.put(key, b""),
        lambda: store.create(key, b""),
        lambda: store.get(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.delete(key),
    ):
        with pytest.raises(ConfigError, match="no key"):
            verb()


def test_a_store_that_nobody_here_speaks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'ftp'.*file://"):
        open_store("ftp://example/bucket")


# -- several processes ------------------------------------------------------------------------------------------------


def test_of_processes_that_create_the_same_keys_at_once_exactly_one_wins_each(store: ObjectStore) -> None:
    racers = [
        in_another_process(
            """
input()
for number in range(50):
    try:
        store.create(f"journal/{number:06d}", sys.argv[2].encode())
        print(number)
    except AlreadyExistsError:
        pass
""",
            store,
            name,
        )
        for name in ("ann", "bob", "cid", "dee")
    ]
    wins = []
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for name, racer in zip(("ann", "bob", "cid", "dee"), racers, strict=True):
        output, _ = racer.communicate(timeout=60)
        assert racer.returncode == 0
        wins += [(int(number), name.encode()) for number in output.split()]
    assert sorted(wins) == [(number, store.get(f"journal/{number:06d}")) for number in range(50)]
    assert len(wins) == 50


def test_a_reader_sees_one_version_or_the_other_never_a_mixture(store: ObjectStore) -> None:
    store.put("object", b"a" * 300_000)
    writer = in_another_process(
        "for n in range(60): store.put('object', [b'ab'[n % 2 : n % 2 + 1] * 100_000] * 3)\nprint('done')", store
    )
    seen = set()
    while writer.poll() is None:
        content = store.get("object")
        assert content in (b"a" * 300_000, b"b" * 300_000)
        seen.add(content[:1])
    assert writer.communicate()[0] == "done\n"
    assert seen == {b"a", b"b"}


@pytest.mark.parametrize("verb", ["put", "create"])
def test_a_writer_killed_in_the_middle_leaves_nothing_to_see(store: ObjectStore, verb: str) -> None:
    store.put("checkpoints/old", b"whole")
    target = "checkpoints/old" if verb == "put" else "checkpoints/new"
    writer = in_another_process(
        """
def pieces():
    yield b"half" * 100_000
    print("half", flush=True)
    input()
getattr(store, sys.argv[2])(sys.argv[3], pieces())
""",
        store,
        verb,
        target,
    )
    assert writer.stdout and writer.stdout.readline() == "half\n"
    assert keys(store) == ["checkpoints/old"]
    os.kill(writer.pid, signal.SIGKILL)
    writer.communicate()
    assert keys(store) == ["checkpoints/old"]
    assert store.get("checkpoints/old") == b"whole"
    getattr(store, verb)(target, b"after")  # what the dead one left is in nobody's way
    assert store.get(target) == b"after"


def test_a_source_that_fails_in_the_middle_leaves_the_old_object(store: ObjectStore) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"half"
        raise RuntimeError("the GPU fell off the bus")

    store.put("object", b"whole")
    with pytest.raises(RuntimeError, match="fell off"):
        store.put("object", pieces())
    assert store.get("object") == b"whole"
    assert keys(store) == ["object"]


# -- a directory's own troubles ---------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user of this computer may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def without_privileges(action: Callable[[], object]) -> None:
    """Run `action` in a child that no file permission makes an exception for (root's do)."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            action()
            status = 0
        except BaseException as error:
            os.write(2, f"{error!r}\n".encode())
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def raises_transient(action: Callable[[], object]) -> None:
    with pytest.raises(TransientError):
        action()


def test_a_full_disk_is_transient_and_leaves_the_old_object_whole(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("object", b"whole")
    full = in_another_process(
        """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
for write in (store.put, store.create):
    try:
        write("object" if write == store.put else "new", [b"x" * 50_000, b"y" * 50_000])
    except TransientError as error:
        print(error)
""",
        store,
    )
    output, _ = full.communicate(timeout=60)
    assert full.returncode == 0
    assert [line.split(":")[2].strip() for line in output.splitlines()] == ["can't write object", "can't write new"]
    assert store.get("object") == b"whole"
    assert [path.name for path in tmp_path.rglob("*")] == ["object"]  # the half that was written takes no room


def test_a_folder_that_may_not_be_written_is_transient_by_every_verb(open_folder: Path) -> None:
    store = DirectoryStore(open_folder)
    store.put("object", b"x")
    open_folder.chmod(0o555)
    without_privileges(lambda: raises_transient(lambda: store.put("object", b"y")))
    without_privileges(lambda: raises_transient(lambda: store.create("new", b"y")))
    without_privileges(lambda: raises_transient(lambda: store.delete("object")))
    assert store.get("object") == b"x"


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(open_folder: Path) -> None:
    """Else a run whose store has a bad hour would find no checkpoint and begin again at step 0."""
    store = DirectoryStore(open_folder)
    store.put("checkpoints/manifest", b"x")
    (open_folder / "checkpoints").chmod(0o000)
    without_privileges(lambda: raises_transient(lambda: store.list("checkpoints/")))
    without_privileges(lambda: raises_transient(lambda: store.get("checkpoints/manifest")))
    without_privileges(lambda: raises_transient(lambda: store.create("checkpoints/manifest", b"y")))
    (open_folder / "checkpoints").chmod(0o755)
    assert keys(store) == ["checkpoints/manifest"]


def test_what_a_killed_writer_left_is_removed_after_a_day(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("a/object", b"whole")
    young, old = tmp_path / f"a/b.1{STAGED_SUFFIX}", tmp_path / f"a/b.2{STAGED_SUFFIX}"
    young.write_bytes(b"half")
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert [info.key for info in store.list("")] == ["a/object"]
    assert young.exists() and not old.exists()
