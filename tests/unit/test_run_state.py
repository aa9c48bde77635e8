"""What the journal says of a run; above all, which steps were lost."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from holdfast.ledger.run_state import RunState, read_run_state
from tests.unit.attempts import Told, at, marks


def state(told: Told) -> RunState:
    return read_run_state("run", told.entries)


def lost(told: Told) -> list[int]:
    return [attempt.lost_steps for attempt in state(told).attempts]


def test_an_attempt_loses_what_it_trained_beyond_the_next_one_s_start() -> None:
    told = Told().attempt("preempted", 0, 250, 240).attempt("finished", 240, 1000, 1000)
    assert lost(told) == [10, 0]


def test_a_preemption_that_was_committed_loses_nothing() -> None:
    assert lost(Told().attempt("preempted", 0, 250, 250).attempt("finished", 250, 1000, 1000)) == [0, 0]


def test_refusals_and_machines_that_never_trained_lose_nothing_and_hide_nothing() -> None:
    told = Told().attempt("preempted", 0, 250, 240).attempt("no-capacity", machine=False).attempt("lost")
    assert lost(told.attempt("finished", 240, 1000, 1000)) == [10, 0, 0, 0]


def test_an_attempt_that_resumes_and_dies_before_its_first_step_loses_nothing_itself() -> None:
    told = Told().attempt("preempted", 0, 250, 240).attempt("preempted", 240, 240).attempt("finished", 240, 300, 300)
    assert lost(told) == [10, 0, 0]


def test_a_damaged_checkpoint_costs_the_steps_of_the_attempts_that_must_do_them_again() -> None:
    told = Told().attempt("preempted", 0, 100, 100).attempt("preempted", 60, 70, 70).attempt("finished", 40, 120, 120)
    assert lost(told) == [40, 30, 0]
    assert sum(lost(told)) == (100 + 10 + 80) - 120


def test_until_somebody_resumes_what_was_not_committed_counts_as_lost() -> None:
    assert lost(Told().attempt("preempted", 0, 250, 240)) == [10]
    assert lost(Told().attempt("program-failed", 240, 260, None)) == [20]
    assert lost(Told().attempt("preempted", 0, 250, 240).attempt(None)) == [10, 0]


def test_what_a_finished_run_did_after_its_last_commit_is_not_lost() -> None:
    assert lost(Told().attempt("finished", 0, 250, 240)) == [0]


chains = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.booleans()), min_size=1, max_size=8)


@given(chains)
def test_lost_steps_are_exactly_the_steps_trained_more_than_once(chain: list[tuple[int, int, bool]]) -> None:
    """Attempts that go back by some steps and forward by others, with machines between them that never trained."""
    told, trained, here = Told(), Counter[int](), 0
    for back, forward, idle in chain:
        resumed = max(0, here - back)
        here = resumed + forward
        trained.update(range(resumed + 1, here + 1))
        told.attempt("preempted", resumed, here, here)
        if idle:
            told.attempt("no-capacity", machine=False)
    resumed, total = max(0, here - 5), max([here, *trained], default=0) + 1
    trained.update(range(resumed + 1, total + 1))
    told.attempt("finished", resumed, total, total)
    assert sum(lost(told)) == sum(count - 1 for count in trained.values())
    assert min(lost(told)) >= 0


# -- the rest of the fold ---------------------------------------------------------------------------------------------


def test_a_run_is_what_its_journal_says_at_every_length() -> None:
    told = Told().attempt("preempted", 0, 250, 240, usd=0.1)
    told.add("taken-over", 1500, owner=2).attempt("lost", 240, 300, 290, usd=0.2)
    told.add("fallback", 2500, reason="3 spot attempts in a row failed").attempt(None, model="on-demand")
    for text in ("slow store", "slow store", "never checkpoints"):
        told.add("warned", 3100, text=text)
    found = state(told)
    assert (found.state, found.interruptions, found.usd_total, found.committed_step) == ("running", 2, 0.3, 290)
    assert (found.recoveries, found.warnings) == (1, ["slow store", "never checkpoints"])
    assert found.fallbacks == [(at(2500), "3 spot attempts in a row failed")]
    assert found.open_attempt is found.attempts[2] and found.open_attempt.machine == "i-3"
    assert found.started_at == at(0)
    assert [state_name(told, length) for length in (0, 1, 3)] == ["new", "running", "running"]


def state_name(told: Told, length: int) -> str:
    return read_run_state("run", told.entries[:length]).state


def test_a_closed_run_that_is_reopened_runs_again() -> None:
    told = Told().attempt("program-failed", 0, 10, 0).add("closed", 1200, state="failed", detail="status 1")
    assert (state(told).state, state(told).detail, state(told).closed_at) == ("failed", "status 1", at(1200))
    told.add("reopened", 1300, after="failed")
    assert (state(told).state, state(told).detail, state(told).closed_at) == ("running", "", None)


def test_a_reserved_attempt_without_a_machine_is_open() -> None:
    found = state(Told().attempt(None, machine=False))
    assert found.open_attempt and found.open_attempt.machine == "" and found.open_attempt.launched_at is None


def test_a_step_s_seconds_are_measured_from_the_resume_to_the_last_sign_of_the_program() -> None:
    killed = Told().attempt("preempted", 0, 40, 40, report=marks(resumed=1020))
    told = Told().attempt("finished", 0, 40, 40, report=marks(resumed=1020, finished=1060, program_ended=1090))
    assert state(told).attempts[0].step_seconds == 1.0
    assert state(killed).attempts[0].step_seconds == 2.0
    assert state(Told().attempt("preempted", 40, 40, report=marks(resumed=1020))).attempts[0].step_seconds is None


def test_new_committed_steps_are_those_since_the_resume() -> None:
    told = Told().attempt("preempted", 0, 250, 240).attempt("preempted", 240, 250, None).attempt("lost")
    assert [attempt.new_committed_steps for attempt in state(told).attempts] == [240, 0, 0]
    assert [attempt.trained_steps for attempt in state(told).attempts] == [250, 10, 0]
