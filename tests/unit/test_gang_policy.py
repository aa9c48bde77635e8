"""When a gang forms, and when a formation is over."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from holdfast.placement.gang_policy import (
    FIRST_CALL_SECONDS,
    LAST_CALL_SECONDS,
    STAND_STILL_SECONDS,
    Dissolve,
    Form,
    GangSituation,
    Ready,
    decide_formation,
    failed_program,
    is_to_move,
)

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


def ready(*members: str, outcome: str | None = None, seconds: float = 0) -> dict[str, Ready]:
    at = NOON + timedelta(seconds=seconds)
    return {
        name: Ready(member=name, address="10.0.0.1", port=1, at=at, outcome=outcome, detail=f"{name} says")
        for name in members
    }


def situation(**changes: Any) -> GangSituation:
    """Three machines wanted, at least two; a, b and c live, and nothing was formed yet."""
    known: dict[str, Any] = {
        "now": NOON,
        "machines": 3,
        "min_machines": 2,
        "members": (),
        "is_over": True,
        "living": {"a", "b", "c"},
        "finished": set(),
        "on_demand": set(),
        "ready": {},
    }
    return GangSituation(**{**known, **changes})


def after(seconds: float) -> datetime:
    return NOON + timedelta(seconds=seconds + 0.1)


def test_the_first_formation_waits_for_all_and_not_for_ever() -> None:
    assert decide_formation(situation(ready=ready("a", "b", "c"))) == Form(members=("a", "b", "c"), host="a")
    two = ready("a", "b")
    assert decide_formation(situation(ready=two)) is None
    late = situation(ready=two, now=after(FIRST_CALL_SECONDS))
    assert decide_formation(late) == Form(members=("a", "b"), host="a")


def test_fewer_than_the_least_never_form() -> None:
    assert decide_formation(situation(ready=ready("a"), living={"a"}, now=after(3600))) is None


def test_they_meet_on_a_machine_that_is_not_taken() -> None:
    decision = decide_formation(situation(ready=ready("a", "b", "c"), on_demand={"c"}))
    assert decision == Form(members=("a", "b", "c"), host="c")


def test_more_than_are_wanted_do_not_form() -> None:
    decision = decide_formation(situation(ready=ready("a", "b", "c", "d"), living={"a", "b", "c", "d"}))
    assert isinstance(decision, Form) and len(decision.members) == 3


def test_who_dies_dissolves_the_formation_and_the_rest_forms_at_once() -> None:
    going = situation(members=("a", "b", "c"), is_over=False, living={"a", "b"})
    assert decide_formation(going) == Dissolve(gracious=False, why="c gone")
    over = situation(members=("a", "b", "c"), living={"a", "b"}, ready=ready("a", "b", outcome="program-failed"))
    assert decide_formation(over) == Form(members=("a", "b"), host="a")
    assert failed_program(over) is None


def test_a_machine_that_boots_is_not_waited_for_by_those_that_have_trained_together() -> None:
    over = situation(members=("a", "b", "c"), living={"a", "b", "new"}, ready=ready("a", "b", outcome="preempted"))
    assert decide_formation(over) == Form(members=("a", "b"), host="a")


def test_a_machine_that_runs_and_does_not_answer_is_waited_for_a_while() -> None:
    over = {"members": ("a", "b", "c"), "ready": ready("a", "b", outcome="program-failed")}
    assert decide_formation(situation(**over)) is None
    assert decide_formation(situation(**over, now=after(LAST_CALL_SECONDS))) == Form(members=("a", "b"), host="a")


def test_who_leaves_alone_takes_the_others_along() -> None:
    left = situation(members=("a", "b", "c"), is_over=False, ready=ready("b", outcome="program-failed"))
    assert decide_formation(left) == Dissolve(gracious=False, why="b left it")


def test_a_newcomer_is_taken_in_graciously_with_others_that_boot() -> None:
    two = {"members": ("a", "b"), "is_over": False, "machines": 4, "ready": ready("c")}
    assert decide_formation(situation(**two)) == Dissolve(gracious=True, why="c joined")
    boots = situation(**two, living={"a", "b", "c", "d"})
    assert decide_formation(boots) is None
    waited = situation(**two, living={"a", "b", "c", "d"}, now=after(FIRST_CALL_SECONDS))
    assert decide_formation(waited) == Dissolve(gracious=True, why="c joined")


def test_a_whole_gang_and_one_that_is_finishing_take_nobody_in() -> None:
    whole = situation(members=("a", "b", "c"), is_over=False, living={"a", "b", "c", "d"}, ready=ready("d"))
    assert decide_formation(whole) is None
    finishing = situation(
        members=("a", "b"), is_over=False, living={"b", "c"}, finished={"a"}, ready=ready("c"), machines=3
    )
    assert decide_formation(finishing) is None


def test_a_program_is_to_blame_when_all_of_its_machines_are_there() -> None:
    reports = {
        **ready("b", outcome="program-failed", seconds=1),
        **ready("a", "c", outcome="program-failed", seconds=2),
    }
    over = situation(members=("a", "b", "c"), ready=reports)
    failed = failed_program(over)
    assert failed and failed.member == "b"
    assert failed.detail == "b says\nmachine a: a says\nmachine c: c says"  # it may be that one of them is the cause
    assert failed_program(situation(members=("a", "b", "c"), living={"a", "b"}, ready=reports)) is None
    waiting = {name: one for name, one in reports.items() if name != "c"}
    assert failed_program(situation(members=("a", "b", "c"), ready=waiting)) is None
    agreed = ready("a", "b", "c", outcome="preempted")
    assert failed_program(situation(members=("a", "b", "c"), ready=agreed)) is None


def test_too_few_that_get_no_company_give_up_their_place() -> None:
    few = situation(living={"a"}, now=after(STAND_STILL_SECONDS))
    assert is_to_move(few, NOON)
    assert not is_to_move(few, NOON + timedelta(seconds=1))
    assert not is_to_move(few, None)
    assert not is_to_move(situation(living={"a", "b"}, now=after(STAND_STILL_SECONDS)), NOON)
    training = situation(living={"a"}, members=("a",), is_over=False, now=after(STAND_STILL_SECONDS))
    assert not is_to_move(training, NOON)
