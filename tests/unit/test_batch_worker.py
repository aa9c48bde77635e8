"""A worker does every record once; what a function or an input does wrong costs the records that it touches, and no other."""

from __future__ import annotations

import json
import time

import pytest

from holdfast.batch import results
from holdfast.batch.audit import audit, finish
from holdfast.batch.plan import batches
from holdfast.storage import DirectoryStore
from tests.unit.batch_runs import PREFIX, BatchRun, during, wait_for, write_jsonl


def test_results_keep_the_inputs_order_and_keys(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ({"id": f"d{number}"} for number in range(1234)))
    run = BatchRun(tmp_path, batch_size=100).plan(source)
    audited = run.work()
    assert audited.whole and (audited.records_in, audited.records_out, audited.records_failed) == (1234, 1234, 0)
    rows = run.results()
    assert [row["record"] for row in rows] == list(range(1234))
    assert [row["key"] for row in rows] == [f"d{number}" for number in range(1234)]
    assert rows[5]["result"] == len('{"id": "d5"}')


def test_setup_is_called_once_and_its_result_is_the_second_argument(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ({"id": number} for number in range(30)))
    run = BatchRun(tmp_path, "with_context", "prepare").plan(source)
    run.work()
    assert [row["result"] for row in run.results()] == [number * 10 for number in range(30)]


def test_poison_records_cost_themselves_alone(tmp_path):
    wants = {3: "an error", 17: "no JSON", 25: "to exit", 42: "to die", 59: "to hang"}
    source = write_jsonl(tmp_path / "in.jsonl", ({"id": n, "wants": wants.get(n, "")} for n in range(100)))
    run = BatchRun(tmp_path, "bad_of_each_kind", batch_time_limit_seconds=2.0).plan(source)
    audited = run.work()
    assert audited.whole and (audited.records_out, audited.records_failed) == (95, 5)
    failed = {row["record"]: row for row in run.failed()}
    assert sorted(failed) == sorted(wants)
    assert failed[3]["error"] == "ValueError: this record is poison"
    assert "in bad_of_each_kind" in failed[3]["traceback"] and failed[3]["traceback"].count("Traceback") == 1
    assert failed[3]["line"] == 4 and failed[3]["input"] == {"id": 3, "wants": "an error"}
    assert "is no JSON" in failed[17]["error"]
    assert failed[25]["error"] == "SystemExit: 3"
    assert "killed by signal 9" in failed[42]["error"]
    assert "longer than 2 s" in failed[59]["error"]
    assert run.progress[0].restarts >= 2


def test_records_with_another_number_of_results_than_one_cost_themselves_alone(tmp_path):
    odd = {4: 0, 11: 2, 26: 3}
    source = write_jsonl(tmp_path / "in.jsonl", ({"id": n, "results": odd.get(n, 1)} for n in range(40)))
    run = BatchRun(tmp_path, "as_many_as_asked").plan(source)
    audited = run.work()
    assert audited.whole and (audited.records_out, audited.records_failed) == (37, 3)
    assert all(row["key"] == row["result"] for row in run.results())
    failed = {row["record"]: row["error"] for row in run.failed()}
    assert failed == {
        n: f"WrongCountError: the function returned {count} results for 1 records" for n, count in odd.items()
    }


def test_a_function_may_change_its_records_and_be_asked_again(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ({"id": number} for number in range(10)))
    run = BatchRun(tmp_path, "changes_its_records").plan(source)
    assert run.work().records_failed == 0
    assert [(row["key"], row["result"]) for row in run.results()] == [(number, number) for number in range(10)]


def test_numbers_that_are_none_become_null_and_long_ones_stay_whole(tmp_path):
    run = BatchRun(tmp_path, "not_a_number").plan(write_jsonl(tmp_path / "in.jsonl", [{"id": 1}]))
    run.work()
    assert run.results()[0]["result"] == {"value": None, "big": 2**70, "id": 1}


@pytest.mark.parametrize(
    ("function", "setup", "said"),
    [
        ("too_few", "", "0 results for 1 records"),
        ("dies_at_once", "", "no record has succeeded"),
        ("asynchronous", "", "is async"),
        ("missing", "", "has no 'missing'"),
        ("length", "broken_setup", "no model here"),
    ],
)
def test_a_function_that_fails_on_everything_ends_the_worker_and_gives_nothing_up(
    tmp_path, capsys, function, setup, said
):
    source = write_jsonl(tmp_path / "in.jsonl", ({"id": number} for number in range(100)))
    run = BatchRun(tmp_path, function, setup).plan(source)
    assert run.worker().run() == 1
    assert said in capsys.readouterr().err
    audited = audit(run.store, PREFIX)
    assert (audited.records_out, audited.records_failed, audited.missing) == (0, 0, 100)
    assert run.waiting() == 10  # all of them can be had at once


def test_a_small_input_that_fails_as_a_whole_goes_to_the_dead_letters(tmp_path):
    run = BatchRun(tmp_path, "too_few").plan(write_jsonl(tmp_path / "in.jsonl", [{"id": 1}, {"id": 2}]))
    audited = run.work()
    assert audited.whole and audited.records_failed == 2


def test_broken_lines_go_to_the_dead_letters_by_their_number_and_blank_ones_are_no_records(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n{"id": \n\n  \n{"id": 2}\n\xff\xfe\n{"id": 3}')
    run = BatchRun(tmp_path, batch_size=2).plan(source)
    audited = run.work()
    assert audited.whole
    assert (audited.records_in, audited.records_out, audited.records_failed, audited.blank) == (7, 3, 2, 2)
    assert [(row["line"], row["input"]) for row in run.failed()] == [(2, '{"id": '), (6, "\ufffd\ufffd")]
    assert [row["key"] for row in run.results()] == [1, 2, 3]


def test_a_file_that_has_changed_or_gone_since_the_plan_is_named_in_the_dead_letters(tmp_path):
    sources = [
        write_jsonl(tmp_path / f"{name}.jsonl", ({"id": f"{name}{number}"} for number in range(25)))
        for name in ("changed", "gone", "kept")
    ]
    run = BatchRun(tmp_path).plan(*sources)
    sources[0].write_text(sources[0].read_text() + '{"id": "new"}\n')
    sources[1].unlink()
    audited = run.work()
    assert audited.whole and (audited.records_out, audited.records_failed) == (25, 50)
    assert {row["key"] for row in run.results()} == {f"kept{number}" for number in range(25)}
    said = [row["error"] for row in run.failed()]
    assert all("changed.jsonl has changed since the plan" in error for error in said[:25])
    assert all("gone.jsonl is not there any more" in error for error in said[25:])


def test_of_two_workers_that_did_the_same_batches_the_second_drops_its_own(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ({"id": number} for number in range(50)))
    run = BatchRun(tmp_path).plan(source)
    first = run.work()
    queue = run.queue()
    queue.put([spec.body for spec in batches(run.store, PREFIX)])  # as a broker does that lost what it was told
    queue.close()
    assert run.work() == first
    assert run.progress[1].dropped == 5 and run.progress[1].records == 0


def test_workers_that_disagree_about_a_failure_leave_one_truth(tmp_path):
    run = BatchRun(tmp_path).plan(write_jsonl(tmp_path / "in.jsonl", ({"id": number} for number in range(10))))
    spec = next(batches(run.store, PREFIX))
    # The first worker failed record 3, told so, and died before its result.
    key = results.failed_key(PREFIX, spec, [3])
    run.store.create(key, b'{"record":3,"key":3,"error":"only here"}\n')
    audited = run.work()
    assert audited.whole and (audited.records_out, audited.records_failed) == (10, 0)
    assert run.failed() == []


def test_a_batch_that_is_given_up_is_failed_and_not_missing(tmp_path):
    run = BatchRun(tmp_path).plan(write_jsonl(tmp_path / "in.jsonl", ({"id": number} for number in range(15))))
    bodies = [spec.body for spec in batches(run.store, PREFIX)]
    assert results.give_up(run.store, PREFIX, bodies[0], "its workers died 5 times")
    assert [spec.index for spec in results.undone(run.store, PREFIX)] == [1]
    audited = run.work()
    assert audited.whole and (audited.records_out, audited.records_failed) == (5, 10)
    assert not results.give_up(run.store, PREFIX, bodies[1], "too late")
    assert finish(run.store, PREFIX) == audited


def test_the_audit_sees_what_is_missing_double_and_foreign(tmp_path):
    run = BatchRun(tmp_path).plan(write_jsonl(tmp_path / "in.jsonl", ({"id": number} for number in range(40))))
    assert run.work().whole
    keys = [results.result_key(PREFIX, spec, "jsonl") for spec in batches(run.store, PREFIX)]
    store: DirectoryStore = run.store
    store.delete(keys[0])
    lines = store.get(keys[1]).splitlines(keepends=True)
    store.put(keys[1], b"".join([lines[0], *lines]))
    store.put(keys[2], b"".join(reversed(store.get(keys[2]).splitlines(keepends=True))))
    store.put(keys[3].replace("00000003-", "00000009-"), store.get(keys[3]))
    audited = audit(store, PREFIX)
    assert not audited.whole
    assert (audited.missing, audited.duplicates, audited.out_of_order, audited.foreign) == (10, 1, 9, 1)


def test_a_batch_longer_than_its_visibility_timeout_keeps_its_lease_and_says_so(tmp_path):
    record = {"id": 1, "seconds": 3.5, "began": str(tmp_path / "began")}
    run = BatchRun(tmp_path, "slow", visibility_seconds=2.0).plan(write_jsonl(tmp_path / "in.jsonl", [record]))
    worker = run.worker()

    def look() -> None:
        wait_for(tmp_path / "began")
        time.sleep(2.5)  # longer than the timeout: without an extension it could be had
        queue = run.queue()
        assert queue.lease() == [] or results.exists(run.store, PREFIX, next(batches(run.store, PREFIX)), "jsonl")
        queue.close()

    assert during(worker, look) == 0
    assert "longer than its visibility timeout" in worker.progress.warnings[0]
    told = json.loads(run.store.get(f"{PREFIX}/workers/worker.json"))
    assert told["phase"] == "finished" and told["records"] == 1 and told["warnings"] == worker.progress.warnings
