"""The example of batch inference: a real model over real documents, through the queue, as in a plain loop."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
from pyarrow import parquet

from examples import documents, embed
from holdfast.model import load_batch_job
from tests.unit.batch_runs import BatchRun, write_jsonl

EXAMPLES = Path(embed.__file__).parent


def test_every_document_has_a_name_of_its_own_and_something_to_say():
    found = list(islice(documents.documents(), 1000))
    assert len({one["id"] for one in found}) == 1000
    assert min(len(one["text"]) for one in found) >= documents.SHORTEST_CHARACTERS


def test_a_worker_embeds_documents_as_a_plain_loop_does_and_by_what_they_mean(tmp_path):
    job = load_batch_job(EXAMPLES / "embed.yaml")
    assert (job.inputs, job.code) == ([str(EXAMPLES / "documents.jsonl")], str(EXAMPLES))
    chosen = sorted(islice(documents.documents(), 400), key=lambda one: len(one["text"]))[:40]
    source = write_jsonl(tmp_path / "documents.jsonl", chosen)
    run = BatchRun(
        tmp_path,
        f"examples.{job.function}",
        f"examples.{job.setup}",
        results_format=job.results_format,
        batch_time_limit_seconds=job.batch_time_limit_seconds,
    ).plan(source)
    audited = run.work()
    assert audited.whole and (audited.records_out, audited.records_failed) == (40, 0)

    tables = [parquet.read_table(path) for path in sorted((tmp_path / "store").rglob("results/**/*.parquet"))]
    keys = [key for table in tables for key in table.column("key").to_pylist()]
    vectors = np.array([vector for table in tables for vector in table.column("result").to_pylist()], np.float32)
    assert keys == [one["id"] for one in chosen]
    encoder = embed.load()
    loop = np.concatenate([embed.embed(chosen[at : at + 10], encoder) for at in range(0, 40, 10)])
    np.testing.assert_allclose(vectors, loop, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)

    texts = ["A kitten naps on the sofa.", "The cat is asleep on the couch.", "Taxes are due in April."]
    kitten, cat, taxes = embed.embed([{"text": text} for text in texts], encoder)
    assert kitten @ cat > 0.5 > kitten @ taxes
