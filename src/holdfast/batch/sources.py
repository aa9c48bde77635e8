"""Where records come from: files, folders and globs on this machine, in S3 and in GCS; and reading a range of one."""

from __future__ import annotations

import fnmatch
import glob
import io
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from holdfast.batch.spec import BatchSpec, Format
from holdfast.errors import ConfigError, HoldfastError, TransientError
from holdfast.storage.address import Address

SUFFIXES: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
}
OPEN_FILES = 32
DECODED_ROW_GROUPS = 2
RETRY_SECONDS = 60.0


class SourceChangedError(HoldfastError):
    """An input is gone, or is not what the plan saw. Its records can't be had any more; plan anew to take what is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    url: str
    size_bytes: int
    version: str
    format: Format


def find_sources(inputs: Sequence[str], format: str, credentials: Any = None) -> Iterator[Source]:
    """Every file that the inputs name, in their order, those of a folder or a glob by name.

    Names that begin with '.' or '_' are passed over in folders, as Hadoop and Spark do. Raises ConfigError: an input
    that names nothing, a file whose name tells no format when `format` is 'auto'.
    """
    for one in inputs:
        found = False
        cloud = urlsplit(one).scheme in ("s3", "gs")
        for url, size, version in _in_cloud(one, credentials) if cloud else _on_disk(one):
            found = True
            yield Source(url=url, size_bytes=size, version=version, format=_format(url, format))
        if not found:
            raise ConfigError(f"input {one!r} names no file; give a file, a folder or a glob that has some")


def _format(url: str, format: str) -> Format:
    path = urlsplit(url).path if "://" in url else url
    suffix = os.path.splitext(path)[1].lower()
    if suffix in (".gz", ".zst", ".bz2", ".xz"):
        raise ConfigError(f"input {url!r} is compressed as a whole and can't be split; decompress it first")
    if format == "auto":
        if suffix not in SUFFIXES:
            raise ConfigError(
                f"input {url!r}: its name tells no format; name it {', '.join(SUFFIXES)}, say the format, or leave it out by a glob"
            )
        return SUFFIXES[suffix]
    if format not in ("jsonl", "text", "parquet"):
        raise ConfigError(f"format {format!r}: use 'auto', 'jsonl', 'text' or 'parquet'")
    return format  # type: ignore[return-value]


def _on_disk(name: str) -> Iterator[tuple[str, int, str]]:
    path = os.path.abspath(name.removeprefix("file://"))
    if os.path.isdir(path):
        paths: Iterator[str] | list[str] = _below(path)
    elif os.path.exists(path):
        paths = [path]
    elif glob.has_magic(path):
        paths = sorted(one for one in glob.iglob(path, recursive=True) if os.path.isfile(one))
    else:
        paths = []
    for one in paths:
        found = os.stat(one)
        yield one, found.st_size, _file_version(found)


def _below(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(one for one in folders if one[0] not in "._")
        yield from (os.path.join(parent, name) for name in sorted(names) if name[0] not in "._")


def _file_version(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}"


def _in_cloud(url: str, credentials: Any) -> Iterator[tuple[str, int, str]]:
    import obstore

    from holdfast.storage.cloud_errors import translated

    address = Address.parse(url)
    client = _client(address, credentials)
    path, query = address.prefix, url.partition("?")[1:]
    magic = re.search(r"[*\[]", path)
    folder = path[: magic.start()].rpartition("/")[0] if magic else path

    def named(entry: Any) -> tuple[str, int, str]:
        key = f"{address.scheme}://{address.bucket}/{entry['path']}{''.join(query)}"
        return key, entry["size"], (entry["e_tag"] or str(entry["last_modified"])).strip('"')

    try:
        if path and not magic:
            try:
                yield named(obstore.head(client, path))
                return
            except FileNotFoundError:
                pass
        for page in obstore.list(client, folder or None, chunk_size=1000):
            for entry in sorted(page, key=lambda one: one["path"]):
                inner = entry["path"][len(folder) :].strip("/")
                hidden = any(part[:1] in (".", "_") for part in inner.split("/"))
                if (fnmatch.fnmatchcase(entry["path"], path) if magic else not hidden) and not _is_marker(entry):
                    yield named(entry)
    except HoldfastError:
        raise
    except Exception as error:
        raise translated(error, "list", folder, address) from error


def _is_marker(entry: Any) -> bool:
    """Consoles make a folder by an empty object with its name; an empty file still has its suffix."""
    return not entry["size"] and os.path.splitext(entry["path"])[1].lower() not in SUFFIXES


def _client(address: Address, credentials: Any) -> Any:
    """Of the whole bucket."""
    from holdfast.storage.cloud_clients import client

    return client(address, credentials, RETRY_SECONDS)[0]


class Reader:
    """Reads ranges of sources; any number of threads may share it. A few files stay open."""

    def __init__(self, credentials: Any = None) -> None:
        self._credentials = credentials
        self._lock = threading.Lock()
        self._files: OrderedDict[tuple[str, str], _File] = OrderedDict()
        self._clients: dict[tuple[str, str, str], Any] = {}
        self._decoding = threading.Lock()
        self._row_groups: OrderedDict[tuple[str, str, int], Any] = OrderedDict()

    def read(self, spec: BatchSpec) -> bytes:
        """The batch's lines, or its rows as an Arrow stream. Raises SourceChangedError, TransientError, ConfigError."""
        if spec.format == "parquet":
            return self._rows(spec)
        return self.range(spec.source, spec.version, spec.start, spec.stop)

    def range(self, source: str, version: str, start: int, stop: int) -> bytes:
        if "://" in source:
            data = self._cloud_range(source, version, start, stop)
        else:
            data = self._file(source, version).read(start, stop - start)
        if len(data) != stop - start:
            raise SourceChangedError(f"input {source}: bytes {start} to {stop} are not there any more; plan anew")
        return data

    def _file(self, path: str, version: str) -> _File:
        try:
            found = _file_version(os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            raise SourceChangedError(f"input {path} is not there any more; put it back, or plan anew") from None
        except OSError as error:
            raise TransientError(f"input {path} can't be read: {error}") from error
        if found != version:
            raise SourceChangedError(
                f"input {path} has changed since the plan (size-time {found}, was {version}); plan anew"
            )
        with self._lock:
            file = self._files.get((path, version))
            if file is None:
                try:
                    file = self._files[path, version] = _File(path)
                except OSError as error:
                    raise TransientError(f"input {path} can't be opened: {error}") from error
                while len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end((path, version))
        return file

    def _cloud_range(self, source: str, version: str, start: int, stop: int) -> bytes:
        import obstore
        from obstore.exceptions import NotFoundError, PreconditionError

        from holdfast.storage.cloud_errors import translated

        address = Address.parse(source)
        where = (address.scheme, address.bucket, address.options.get("endpoint", ""))
        with self._lock:
            client = self._clients.get(where)
            if client is None:
                client = self._clients[where] = _client(address, self._credentials)
        try:
            options: dict[str, Any] = {"range": (start, stop), "if_match": f'"{version}"'}
            return bytes(obstore.get(client, address.prefix, options=options).bytes())
        except (FileNotFoundError, NotFoundError):
            raise SourceChangedError(f"input {source} is not there any more; put it back, or plan anew") from None
        except PreconditionError:
            raise SourceChangedError(
                f"input {source} has changed since the plan (its ETag was {version}); plan anew"
            ) from None
        except Exception as error:
            raise translated(error, "get", address.prefix, address) from error

    def open_parquet(self, source: str, version: str, size_bytes: int) -> Any:
        """A pyarrow ParquetFile. Raises ConfigError without pyarrow, and for what is no Parquet file."""
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ConfigError(f"input {source} needs pyarrow: pip install 'holdfast[batch]' ({error})") from error
        try:
            return parquet.ParquetFile(_RangeFile(self, source, version, size_bytes))
        except pyarrow.ArrowInvalid as error:
            raise ConfigError(f"input {source} is no Parquet file: {error}") from error

    def _rows(self, spec: BatchSpec) -> bytes:
        import pyarrow

        key = (spec.source, spec.version, spec.row_group)
        with self._decoding:  # batches of one row group come together, and it is decoded once for all of them
            table = self._row_groups.get(key)
            if table is None:
                file = self.open_parquet(spec.source, spec.version, spec.source_bytes)
                table = self._row_groups[key] = file.read_row_group(spec.row_group)
                while len(self._row_groups) > DECODED_ROW_GROUPS:
                    self._row_groups.popitem(last=False)
        rows = table.slice(spec.start, spec.stop - spec.start)
        sink = io.BytesIO()
        with pyarrow.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        return sink.getvalue()


class _File:
    """Open as long as somebody reads it: a reader may have taken it from the table just before it was closed there."""

    def __init__(self, path: str) -> None:
        self._number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, start: int, length: int) -> bytes:
        pieces = []
        while length > 0 and (piece := os.pread(self._number, length, start)):
            pieces.append(piece)
            start, length = start + len(piece), length - len(piece)
        return b"".join(pieces) if len(pieces) != 1 else pieces[0]

    def __del__(self) -> None:
        if hasattr(self, "_number"):
            os.close(self._number)


class _RangeFile(io.RawIOBase):
    """What pyarrow reads a source by."""

    def __init__(self, reader: Reader, source: str, version: str, size_bytes: int) -> None:
        self._reader, self._source, self._version, self._size = reader, source, version, size_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, length: int = -1) -> bytes:
        stop = self._size if length < 0 else min(self._size, self._at + length)
        data = self._reader.range(self._source, self._version, self._at, stop) if stop > self._at else b""
        self._at += len(data)
        return data
