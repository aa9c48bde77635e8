"""A deleted large file's blocks are written over, and never those that somebody still reads."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest

from holdfast.errors import NotFoundError
from holdfast.storage import DirectoryStore

LARGE = 24 * 2**20


def content(letter: bytes, size: int = LARGE) -> list[bytes]:
    return [letter * 2**20] * (size // 2**20)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    store = DirectoryStore(tmp_path / "store")
    store.put("old", content(b"a"))
    return store


def grants_leases(path: Path) -> bool:
    with open(path, "r+b") as file:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        except (AttributeError, OSError):
            return False
    return True


def inode(store: DirectoryStore, key: str) -> int:
    return (store.root / key).stat().st_ino


def test_the_next_large_object_is_written_over_a_deleted_one(store: DirectoryStore) -> None:
    before = inode(store, "old")
    store.delete("old")
    assert store.list("") == []
    with pytest.raises(NotFoundError):
        store.get("old")
    store.put("small", b"x")
    store.put("folder/new", content(b"b"))
    if grants_leases(store.root / "small"):  # where nobody tells who reads a file, none is written over
        assert inode(store, "folder/new") == before
    assert store.get("folder/new") == b"b" * LARGE
    assert [info.key for info in store.list("")] == ["folder/new", "small"]


@pytest.mark.parametrize("size", [2**20 + 5, LARGE, 2 * LARGE + 4096 + 1])
def test_what_is_written_over_has_the_new_length(store: DirectoryStore, size: int) -> None:
    store.delete("old")
    data = os.urandom(size)
    store.put("new", data)
    assert store.get("new") == data


@pytest.mark.parametrize("mapped", [False, True])
def test_what_somebody_reads_stays_whole(store: DirectoryStore, mapped: bool) -> None:
    with open(store.root / "old", "rb") as file:
        reader = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if mapped else file
        store.delete("old")
        store.put("new", content(b"b"))
        assert reader.read() == b"a" * LARGE
    assert store.get("new") == b"b" * LARGE


def test_what_has_a_second_name_stays_whole(store: DirectoryStore, tmp_path: Path) -> None:
    os.link(store.root / "old", tmp_path / "second")
    store.delete("old")
    store.put("new", content(b"b"))
    assert (tmp_path / "second").read_bytes() == b"a" * LARGE


def test_nothing_is_left_of_it_at_the_process_s_end(tmp_path: Path) -> None:
    program = (
        "import sys; from holdfast.storage import DirectoryStore; store = DirectoryStore(sys.argv[1]);"
        "store.put('old', [b'a' * 2**20] * 24); store.delete('old')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "store")], check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
