"""One batch of the plan: which records, of which version of which input."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Literal

Format = Literal["jsonl", "text", "parquet"]
GROUP = 1000
"""Batches whose objects share a folder: a list of one group is one page of a list in S3 and GCS."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSpec:
    id: str
    index: int
    """Its place in the order of all batches, from 0."""
    source: str
    """Absolute path of a file, or s3:// or gs:// URL."""
    version: str
    """Of the source when it was planned: ETag, or size and time of change."""
    source_bytes: int
    format: Format
    start: int
    stop: int
    """Bytes of the source, or rows of the row group."""
    row_group: int
    """-1: the source has none."""
    first_record: int
    """The number of its first record among all records of the plan, from 0."""
    first_line: int
    """The number of its first line or row in the source, from 1."""
    records: int
    """Lines or rows; blank lines count."""

    @property
    def body(self) -> bytes:
        """As it stands in the plan and in the queue."""
        return spec_body(
            source=json.dumps(self.source), version=json.dumps(self.version), source_bytes=self.source_bytes, format=self.format, index=self.index,
            start=self.start, stop=self.stop, row_group=self.row_group, first_record=self.first_record,
            first_line=self.first_line, records=self.records, batch_id=self.id,
        )  # fmt: skip

    @property
    def name(self) -> str:
        """What its objects are called: they sort in the order of the records."""
        return f"{self.index // GROUP:05d}/{self.index:08d}-{self.id}"


def batch_id(source: str, version: str, format: str, row_group: int, start: int, stop: int) -> str:
    """A function of the content: the same range of the same version of the same input has the same id in every plan."""
    words = f"{source}\0{version}\0{format}\0{row_group}\0{start}\0{stop}"
    return hashlib.blake2b(words.encode(), digest_size=8).hexdigest()


def spec_body(
    *, source: str, version: str, source_bytes: int, format: str, index: int, start: int, stop: int, row_group: int, first_record: int,
    first_line: int, records: int, batch_id: str,
) -> bytes:  # fmt: skip
    """`source` and `version` are JSON already: a plan writes millions of bodies of the same source."""
    return (
        f'{{"id":"{batch_id}","index":{index},"source":{source},"version":{version},"source_bytes":{source_bytes},"format":"{format}",'
        f'"start":{start},"stop":{stop},"row_group":{row_group},"first_record":{first_record},'
        f'"first_line":{first_line},"records":{records}}}'
    ).encode()


def parse_spec(body: bytes) -> BatchSpec:
    """Raises ValueError or TypeError for what is no batch."""
    return BatchSpec(**json.loads(body))
