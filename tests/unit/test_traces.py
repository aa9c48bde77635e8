"""Traces are read as they are published, and what is no trace is refused with its file and the reason."""

import json

import pytest

from holdfast.errors import ConfigError
from holdfast.market.traces import Trace, read_trace, read_traces


def written(folder, name="zone_a100_1.json", *, gap_seconds=600, data=(1, 1, 0, 1)):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": {"gap_seconds": gap_seconds}, "data": list(data)}))
    return path


def test_a_trace_file_says_tick_by_tick_whether_the_pool_was_available(tmp_path):
    trace = read_trace(written(tmp_path))
    assert (trace.name, trace.gap_seconds, trace.available) == ("zone_a100_1", 600.0, b"\x01\x01\x00\x01")
    assert trace.seconds == 2400
    assert [trace.at(seconds) for seconds in (0, 1199.9, 1200, 2399)] == [True, True, False, True]


def test_a_folder_gives_the_traces_in_and_below_it_by_name(tmp_path):
    written(tmp_path, "2023/b.json"), written(tmp_path, "2022/a.json")
    (tmp_path / "README.md").write_text("not a trace")
    assert [trace.name for trace in read_traces(tmp_path)] == ["a", "b"]
    assert [trace.name for trace in read_traces(tmp_path / "2023" / "b.json")] == ["b"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 0]", "is no trace"),
        ("{", "is no JSON"),
        ('{"metadata": {"gap_seconds": 0}, "data": [1]}', "metadata.gap_seconds is 0"),
        ('{"metadata": {}, "data": [1]}', "metadata.gap_seconds is None"),
        ('{"metadata": {"gap_seconds": 600}, "data": []}', "at least one 0 or 1"),
        ('{"metadata": {"gap_seconds": 600}, "data": [1, 2]}', r"data\[1\] is 2"),
        ('{"metadata": {"gap_seconds": 600}, "data": [1, null]}', r"data\[1\] is None"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_reason(tmp_path, content, reason):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"bad\.json: .*{reason}"):
        read_trace(path)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read"):
        read_traces(tmp_path / "none.json")
    with pytest.raises(ConfigError, match=r"has no \*\.json file"):
        read_traces(tmp_path)


def test_a_trace_can_be_seen_on_another_tick():
    trace = Trace(195.0, bytes([1, 0, 0, 1, 1, 1, 1]), "t")
    assert trace.on_ticks_of(600.0).available == bytes([1, 1])  # at 0 s, and at 600 s: tick 3 of 195 s
    assert trace.on_ticks_of(195.0) == trace
    assert trace.on_ticks_of(65.0).available == bytes(value for value in trace.available for _ in range(3))


def test_losses_count_the_ends_of_availability_over_the_seconds_available():
    trace = Trace(600.0, bytes([0, 1, 1, 0, 1, 0, 0, 1]), "t")
    assert trace.losses() == (2, 4 * 600.0)
    assert trace.runs() == [(False, 1), (True, 2), (False, 1), (True, 1), (False, 2), (True, 1)]
