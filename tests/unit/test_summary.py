"""What a run did and what it cost: numbers that add up to the cent, and text that says the same."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from holdfast.ledger.run_state import read_run_state
from holdfast.ledger.summary import headline, summarise, to_markdown
from tests.unit.attempts import Told, marks


def summary(told: Told) -> dict[str, Any]:
    return summarise(read_run_state("run", told.entries))


def story() -> Told:
    """Preempted after 250 of 1000 steps of 1 s, one refusal, then on demand to the end; an hour is a dollar there."""
    told = Told()
    told.attempt(
        "preempted",
        0,
        250,
        240,
        seconds=300,
        usd=0.0333,
        report={
            **marks(resumed=1050, first_step=1051, program_ended=1300),
            "commits": 24,
            "bytes_per_commit": 2_000_000,
        },
    )
    told.attempt("no-capacity", machine=False)
    told.attempt(
        "finished",
        240,
        1000,
        1000,
        seconds=800,
        usd=0.2222,
        model="on-demand",
        began=1320,
        report={
            **marks(resumed=1350, first_step=1351, finished=2110),
            "commits": 76,
            "bytes_per_commit": 2_000_000,
            "totals": {"stall_seconds": 1.01},
            "metrics": {"loss": 0.25},
        },
    )
    return told.add("closed", 2200, state="finished", detail="")


def test_the_story_s_numbers() -> None:
    told = summary(story())
    assert (told["state"], told["steps_total"], told["interruptions"], told["refusals"]) == ("finished", 1000, 1, 1)
    assert (told["lost_steps"], told["lost_seconds"]) == (10, 10.0)
    assert told["lost_usd"] == 0.0011  # 10 s at 0.4 $/h
    assert told["usd_total"] == 0.2555
    assert told["usd_on_demand_equivalent"] == 0.2917  # 50 s of start and 1000 steps of 1 s, at 1 $/h
    assert told["saving_usd"] == 0.0362
    assert told["saving_fraction"] == 0.1241
    assert told["instance_hours"] == {"spot": 0.0833, "on-demand": 0.2222}
    assert told["recovery_seconds"] == [51.0]  # from the machine's end to the next new step
    assert told["goodput"] == 0.9091  # 1000 of 1100 billed seconds
    assert told["checkpoints"]["commits"] == 100
    assert told["checkpoints"]["overhead_fraction"] == 0.001
    assert told["final_metrics"] == {"loss": 0.25}


def test_saves_in_trouble_are_counted_by_attempt() -> None:
    told = Told()
    told.attempt("preempted", 0, 100, 50, report={"commit_failures": 3})
    told.attempt("preempted", 50, 200, 200)
    told.attempt("finished", 200, 300, 300, report={"commit_failures": 1, "late_commits": 2})
    found = summary(told)
    assert [row["commit_failures"] for row in found["attempts"]] == [3, 0, 1]
    assert (found["checkpoints"]["commit_failures"], found["checkpoints"]["late_commits"]) == (4, 2)
    text = to_markdown(found)
    assert "- Tries to make a checkpoint durable that failed: 4 (attempt 1: 3, attempt 3: 1)" in text
    assert "- Checkpoints that were not durable within their budget: 2 (attempt 3: 2)" in text
    assert "durable" not in to_markdown(summary(story()))


def test_every_promised_key_is_there() -> None:
    told = json.loads(json.dumps(summary(story())))
    assert told.keys() >= {
        "state", "interruptions", "lost_steps", "steps_total", "usd_total", "usd_on_demand_equivalent",
        "saving_fraction", "attempts",
    }  # fmt: skip
    for row in told["attempts"]:
        assert row.keys() >= {
            "number", "cloud", "zone", "instance_type", "provisioning_model", "outcome", "billed_seconds", "usd",
            "first_step", "last_committed_step", "lost_steps",
        }  # fmt: skip
    assert [row["first_step"] for row in told["attempts"]] == [1, None, 241]
    assert [row["provisioning_model"] for row in told["attempts"]] == ["spot", "spot", "on-demand"]


usd = st.integers(0, 10**7).map(lambda hundredths: hundredths / 10_000)
seconds = st.integers(0, 10**8).map(lambda milliseconds: milliseconds / 1000)
lives = st.lists(
    st.tuples(
        st.sampled_from(["preempted", "lost", "program-failed", "no-capacity"]),
        st.integers(0, 50),
        st.integers(0, 50),
        usd,
        seconds,
        st.sampled_from(["spot", "on-demand"]),
    ),
    max_size=12,
)


def lived(lives: list[tuple[str, int, int, float, float, str]]) -> Told:
    told, here = Told(), 0
    for number, (outcome, back, forward, cost, life, model) in enumerate(lives):
        began = 1e6 * (number + 1)
        if outcome == "no-capacity":
            told.attempt(outcome, machine=False, model=model, began=began)
            continue
        resumed = max(0, here - back)
        here = resumed + forward
        report = marks(resumed=began + life / 4, first_step=began + life / 3)
        told.attempt(outcome, resumed, here, resumed, usd=cost, seconds=life, model=model, began=began, report=report)
    return told


@given(lives)
def test_totals_are_the_sums_of_the_attempts_to_the_hundredth_of_a_cent(lives: list[Any]) -> None:
    told = summary(lived(lives))
    rows = told["attempts"]
    for total, part in (("usd_total", "usd"), ("lost_usd", "lost_usd")):
        exact = sum((Decimal(f"{row[part]:.4f}") for row in rows), Decimal(0))
        assert Decimal(f"{told[total]:.4f}") == exact
    assert told["lost_steps"] == sum(row["lost_steps"] for row in rows)
    assert abs(told["billed_seconds"] - sum(row["billed_seconds"] for row in rows)) < 0.001
    assert abs(told["lost_seconds"] - sum(row["lost_seconds"] for row in rows)) < 0.001
    assert abs(sum(told["instance_hours"].values()) - told["billed_seconds"] / 3600) <= 0.0001
    assert told["interruptions"] == sum(row["outcome"] in ("preempted", "lost") for row in rows)
    assert told["refusals"] == sum(row["outcome"] == "no-capacity" for row in rows)
    difference = Decimal(f"{told['usd_on_demand_equivalent']:.4f}") - Decimal(f"{told['usd_total']:.4f}")
    assert Decimal(f"{told['saving_usd']:.4f}") == difference
    assert told["goodput"] is None or 0 <= told["goodput"] <= 1


@given(lives)
def test_the_table_that_people_read_adds_up_too(lives: list[Any]) -> None:
    text = to_markdown(summary(lived(lives)))
    *rows, total = [line for line in text.splitlines() if re.match(r"\| (\d+ )?\|", line)]
    dollars = [Decimal(row.rstrip(" |").rpartition(" ")[2].strip("*")) for row in [*rows, total]]
    assert len(rows) == len(lives)
    assert sum(dollars[:-1], Decimal(0)) == dollars[-1]


def test_the_headline_is_a_sentence_with_the_verdict() -> None:
    assert headline(summary(story())) == (
        "Finished: $0.2555, 12% less than $0.2917 on demand; 1 interruption, 10 of 1000 steps done again."
    )


def test_a_run_that_cost_more_than_on_demand_says_so() -> None:
    told = Told().attempt("finished", 0, 100, 100, usd=1.0, report=marks(resumed=1000, finished=1100))
    assert "more than $" in headline(summary(told))
    assert summary(told)["saving_fraction"] < 0


def test_a_run_without_a_step_is_summed_up_as_well() -> None:
    for told in (Told(), Told().attempt("no-capacity", machine=False), Told().attempt(None)):
        assert "no step was trained" in headline(summary(told))
        assert summary(told)["saving_fraction"] is None
        assert to_markdown(summary(told))


def test_useful_time_repeated_or_restarted_is_in_no_equivalent() -> None:
    """Twice the interruptions with the same useful steps: the on-demand price of the work stays the same."""
    calm = Told().attempt("finished", 0, 100, 100, report=marks(resumed=1010, finished=1110))
    restless = Told().attempt("lost", 0, 50, None, seconds=60, report=marks(resumed=1010))
    restless.attempt("finished", 0, 100, 100, report=marks(resumed=2080, finished=2180))
    assert summary(restless)["usd_on_demand_equivalent"] == summary(calm)["usd_on_demand_equivalent"]


def test_what_is_worth_knowing_is_said() -> None:
    told = story().add("taken-over", 2300, owner=2).add("warned", 2300, text="the program has committed no checkpoint")
    told.entries[0].fields["clock_speed"] = 60.0
    text = to_markdown(summary(told))
    assert "ran 60 times as fast as the wall's" in text
    assert "The orchestrator died 1 times" in text
    assert "- Warning: the program has committed no checkpoint" in text
