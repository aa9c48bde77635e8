"""A plan cuts every input into batches, says the same of the same inputs, and is refused where another job's is."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from holdfast.batch.plan import batches, line_ranges, make_plan
from holdfast.batch.settings import WorkerSettings, write_settings
from holdfast.batch.sources import Reader
from holdfast.errors import ConfigError
from holdfast.storage import DirectoryStore
from tests.contract.test_object_store import STORES
from tests.unit.batch_runs import PREFIX, BatchRun, write_jsonl


def plan(tmp_path: Path, *inputs: str, size: int = 10, format: str = "auto", name: str = "store"):
    store = DirectoryStore(tmp_path / name)
    summary = make_plan(store, PREFIX, list(inputs), size, format)
    return summary, list(batches(store, PREFIX))


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=40),
    ends=st.booleans(),
    size=st.integers(1, 7),
    cut=st.integers(1, 30),
)
@settings(deadline=None)
def test_ranges_hold_every_line_once_wherever_the_reads_are_cut(lines, ends, size, cut):
    data = b"\n".join(lines) + (b"\n" if ends and lines else b"")
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    chunks = [data[start : start + cut] for start in range(0, len(data), cut)]
    found, position = [], 0
    for _, start, stop, count in line_ranges(chunks, size):
        assert start == position and count <= size
        piece = data[start:stop].split(b"\n")
        if not piece[-1]:
            piece.pop()
        assert len(piece) == count
        found += piece
        position = stop
    assert found == expected and position == len(data)


def test_folders_globs_and_files_are_taken_in_their_order_and_by_name(tmp_path):
    for name in (
        "in/b.jsonl",
        "in/a/z.jsonl",
        "in/_SUCCESS",
        "in/.part.crc",
        "in/empty.jsonl",
        "more/2.txt",
        "more/1.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("" if "empty" in name else '"x"\n' * 3)
    summary, specs = plan(tmp_path, f"{tmp_path}/more/*.txt", f"{tmp_path}/in", size=2)
    names = list(dict.fromkeys(Path(spec.source).name for spec in specs))
    assert names == ["1.txt", "2.txt", "b.jsonl", "z.jsonl"]
    assert [spec.format for spec in specs][:4] == ["text"] * 4
    assert (summary.sources, summary.records, summary.batches) == (5, 12, 8)
    assert [Path(one).name for one in summary.empty_sources] == ["empty.jsonl"]
    assert [spec.first_record for spec in specs] == [0, 2, 3, 5, 6, 8, 9, 11]
    assert [spec.first_line for spec in specs[:3]] == [1, 3, 1]


def test_a_batchs_id_is_of_its_content_and_not_of_its_plan(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", range(25))
    other = write_jsonl(tmp_path / "before.jsonl", range(5))
    _, first = plan(tmp_path, str(source))
    _, again = plan(tmp_path, str(other), str(source), name="elsewhere")
    assert [spec.id for spec in first] == [spec.id for spec in again[1:]]
    source.write_text(source.read_text().replace("1", "2"))
    _, changed = plan(tmp_path, str(source), name="third")
    assert not {spec.id for spec in first} & {spec.id for spec in changed}


def test_a_plan_that_is_there_is_taken_even_when_its_inputs_have_changed(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", range(25))
    first = plan(tmp_path, str(source))
    source.unlink()
    assert plan(tmp_path, str(source)) == first


@pytest.mark.parametrize(
    ("content", "format", "said"),
    [
        (None, "auto", "names no file"),
        ({"in.jsonl": ""}, "auto", "have no records"),
        ({"in.csv": "a"}, "auto", "its name tells no format"),
        ({"in.jsonl.gz": "a"}, "auto", "can't be split"),
        ({"in.parquet": "no parquet"}, "auto", "is no Parquet file"),
        ({"in.jsonl": "a"}, "csv", "format 'csv'"),
    ],
)
def test_inputs_that_can_t_be_planned_are_refused_by_name(tmp_path, content, format, said):
    (tmp_path / "in").mkdir()
    for name, text in (content or {}).items():
        (tmp_path / "in" / name).write_text(text)
    with pytest.raises(ConfigError, match=said):
        plan(tmp_path, f"{tmp_path}/in", format=format)


def test_a_place_with_another_jobs_plan_results_or_function_is_refused(tmp_path):
    source = str(write_jsonl(tmp_path / "in.jsonl", range(25)))
    plan(tmp_path, source)
    with pytest.raises(ConfigError, match="another job's: its batch_size is 10"):
        plan(tmp_path, source, size=20)
    store = DirectoryStore(tmp_path / "bare")
    store.put(f"{PREFIX}/results/00000/00000000-aa.jsonl", b"")
    with pytest.raises(ConfigError, match="has results and no plan"):
        make_plan(store, PREFIX, [source], 10)
    mine = WorkerSettings(queue="sqlite:///q", queue_name="q", prefix=PREFIX, function="embed:embed")
    assert write_settings(store, mine) == write_settings(store, mine) == f"{PREFIX}/worker.json"
    theirs = WorkerSettings(queue="sqlite:///q", queue_name="q", prefix=PREFIX, function="other:embed")
    with pytest.raises(ConfigError, match="its function is 'embed:embed'"):
        write_settings(store, theirs)


@pytest.mark.parametrize("kind", STORES)
def test_inputs_in_every_store_are_planned_read_and_known_when_they_change(tmp_path, monkeypatch, kind):
    with STORES[kind](tmp_path, monkeypatch) as store:
        for number in range(3):
            text = "".join(json.dumps({"id": 10 * number + one}) + "\n" for one in range(10))
            store.put(f"in/{number}.jsonl", text.encode())
        table = pa.table({"id": list(range(30, 60))})
        parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=12)
        store.put("in/rows.parquet", (tmp_path / "rows.parquet").read_bytes())
        store.put("in/empty.jsonl", b"")
        place, query, options = store.url.partition("?")
        here = place.replace("%20", " ").removeprefix("file://")
        inputs = [f"{here}/in/*.jsonl{query}{options}", f"{here}/in/rows.parquet{query}{options}"]
        summary = make_plan(store, PREFIX, inputs, 8)
        specs = list(batches(store, PREFIX))
        assert (summary.records, summary.sources) == (60, 5)
        assert [one.partition("?")[0].rpartition("/")[2] for one in summary.empty_sources] == ["empty.jsonl"]
        assert [spec.records for spec in specs] == [8, 2] * 3 + [8, 4, 8, 4, 6]
        reader = Reader()
        assert reader.read(specs[1]) == b'{"id": 8}\n{"id": 9}\n'
        rows = pa.ipc.open_stream(reader.read(specs[7])).read_all()
        assert rows.column("id").to_pylist() == [38, 39, 40, 41]
        store.put("in/0.jsonl", b'{"id": 0}\n' * 10)
        store.delete("in/1.jsonl")
        for spec, said in ((specs[1], "has changed"), (specs[3], "not there any more")):
            with pytest.raises(Exception, match=said):
                Reader().read(spec)


def test_parquet_in_and_out_with_a_poison_record(tmp_path):
    rows = [{"id": number, "wants": "an error" if number == 13 else ""} for number in range(40)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=25)
    run = BatchRun(tmp_path, "bad_of_each_kind", results_format="parquet").plan(tmp_path / "in.parquet")
    audited = run.work()
    assert audited.whole and (audited.records_out, audited.records_failed) == (39, 1)
    parts = [part["key"] for part in json.loads(run.store.get(f"{PREFIX}/manifest.json"))["parts"]]
    table = pa.concat_tables(parquet.read_table(run.store.root / part) for part in parts)
    assert table.column("result").to_pylist() == [number for number in range(40) if number != 13]
    assert table.column("key").to_pylist()[:2] == ["0", "1"]
    assert run.failed()[0]["input"] == {"id": 13, "wants": "an error"}


def test_every_line_of_a_text_is_a_record_empty_ones_too(tmp_path):
    (tmp_path / "in.txt").write_bytes("one\r\n\nthree ü\n".encode())
    run = BatchRun(tmp_path).plan(tmp_path / "in.txt")
    assert run.work().records_out == 3
    assert [row["result"] for row in run.results()] == [len(json.dumps(text)) for text in ("one", "", "three ü")]
