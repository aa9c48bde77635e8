"""The judgement on a rehearsal: an interrupted run held against an uninterrupted one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from holdfast.checkpoint.planner import WINDOWS_SECONDS, size_text, window_bytes, window_warning
from holdfast.ledger.run_state import Attempt, RunState
from holdfast.ledger.summary import summarise
from holdfast.model import TrainingJob

TELLS_NO_STEPS = (
    "the program tells no steps. Wrap its loop in holdfast.attach, or write folders to $HOLDFAST_CHECKPOINT_DIRECTORY"
)


@dataclass(frozen=True, slots=True)
class Evidence:
    state: RunState
    metrics: Mapping[int, Mapping[str, float]]
    digest: str | None
    """SHA-256 over the newest checkpoint's content; None without one."""


@dataclass(frozen=True, slots=True)
class Finding:
    question: str
    good: bool
    answer: str
    decisive: bool = True
    """Does a bad answer fail the rehearsal?"""


@dataclass(frozen=True, slots=True)
class Verdict:
    job: str
    findings: list[Finding] = field(default_factory=list)
    steady: dict[str, Any] = field(default_factory=dict)
    interrupted: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return all(finding.good for finding in self.findings if finding.decisive)

    @property
    def headline(self) -> str:
        if self.passed:
            return f"PASS: {self.job} survives preemption"
        first = next(finding for finding in self.findings if finding.decisive and not finding.good)
        return f"FAIL: {self.job} does not survive preemption: {first.answer.splitlines()[0]}"

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "headline": self.headline,
            "findings": [asdict(finding) for finding in self.findings],
            "steady": self.steady,
            "interrupted": self.interrupted,
            "markdown": self.markdown(),
        }

    def markdown(self) -> str:
        lines = [f"# {self.headline}", "", "| question | | answer |", "| --- | --- | --- |"]
        for finding in self.findings:
            mark = "yes" if finding.good else ("NO" if finding.decisive else "no")
            lines.append(f"| {finding.question} | {mark} | {finding.answer.replace(chr(10), '<br>')} |")
        if self.interrupted:
            lines += [
                "",
                "| attempt | outcome | notice | steps | committed | lost |",
                "| ---: | --- | --- | --- | ---: | ---: |",
            ]
            for row in self.interrupted["attempts"]:
                steps = f"{row['first_step']}–{row['last_step']}" if row["first_step"] else "–"
                lines.append(
                    f"| {row['number']} | {row['outcome']} | {row['notice'] or 'none'} | {steps} | "
                    f"{row['last_committed_step'] or '–'} | {_lost(row)} |"
                )
        return "\n".join(lines)


def _lost(row: Mapping[str, Any]) -> object:
    return "unknown" if row["last_step"] is None else row["lost_steps"]


def judge(job: TrainingJob, preemptions: int, steady: Evidence, interrupted: Evidence | None, problem: str) -> Verdict:
    """`problem`: what stopped one of the two runs, in words; empty when both finished."""
    if problem or interrupted is None:
        which = "the interrupted run" if interrupted else "the uninterrupted run"
        findings = [Finding("Does it run to its end?", False, f"{which} stopped: {problem}")]
        return Verdict(job.name, findings, summarise(steady.state), summarise(interrupted.state) if interrupted else {})
    state = interrupted.state
    taken = state.interruptions
    findings = [
        Finding(
            "Was it preempted as asked?",
            taken >= preemptions,
            f"{taken} of {preemptions} preemptions happened"
            + ("" if taken >= preemptions else f"; {_why_not_taken(state)}"),
        ),
        _resumes(state),
        _same_metrics(steady, interrupted),
        Finding(
            "Is the final state the same, bit for bit?",
            steady.digest is not None and steady.digest == interrupted.digest,
            f"SHA-256 {(interrupted.digest or 'none')[:16]} against {(steady.digest or 'none')[:16]} uninterrupted",
        ),
        _lost_steps(state),
        *_flushes(state, job.notice_poll_seconds),
        _checkpoint_cost(state),
    ]
    return Verdict(job.name, findings, summarise(steady.state), summarise(state))


def _why_not_taken(state: RunState) -> str:
    if all(attempt.last_step is None for attempt in state.attempts):
        return f"when the others were due is unknown: {TELLS_NO_STEPS}"
    return "the job was over (or never committed) before the others were due"


def _resumes(state: RunState) -> Finding:
    question = "Does it resume?"
    if not state.committed_step:
        return Finding(question, False, "the program committed no checkpoint, so every preemption loses everything")
    restarts = []
    for before, after in zip(state.attempts, state.attempts[1:], strict=False):
        if after.resumed_step is None or (before.committed_step or 0) == 0:
            continue
        restarts.append(f"attempt {after.number} from step {after.resumed_step}")
        if after.resumed_step < (before.committed_step or 0):
            return Finding(
                question,
                False,
                f"attempt {after.number} began at step {after.resumed_step}, though {before.committed_step} was committed",
            )
    return Finding(question, bool(restarts), ", ".join(restarts) or "no attempt followed a commit")


def _same_metrics(steady: Evidence, interrupted: Evidence) -> Finding:
    question = "Are the losses the same, bit for bit?"
    if not steady.metrics:
        return Finding(question, True, "the program reports none; the final state is compared alone", decisive=False)
    missing = sorted(set(steady.metrics) - set(interrupted.metrics))
    if missing:
        return Finding(
            question, False, f"{len(missing)} steps have none in the interrupted run, first step {missing[0]}"
        )
    for step in sorted(steady.metrics):
        expected, found = steady.metrics[step], interrupted.metrics[step]
        for name in expected:
            if not _same_bits(expected[name], found.get(name)):
                return Finding(
                    question, False, f"{name} differs first at step {step}: {found.get(name)!r}, not {expected[name]!r}"
                )
    return Finding(question, True, f"{len(steady.metrics)} steps compared")


def _same_bits(one: float, other: float | None) -> bool:
    if other is None:
        return False
    return one == other or (math.isnan(one) and math.isnan(other))


def _lost_steps(state: RunState) -> Finding:
    question = "Is nothing lost when there is a notice?"
    if all(attempt.last_step is None for attempt in state.attempts):
        return Finding(question, False, f"unknown: {TELLS_NO_STEPS}", decisive=False)
    noticed = [a for a in state.attempts if a.outcome == "preempted" and (a.report.get("notice") or {}).get("kind")]
    silent = [a for a in state.attempts if a.outcome == "preempted" and a not in noticed]
    total = sum(attempt.lost_steps for attempt in state.attempts)
    words = f"{total} steps were done again"
    if noticed:
        words += f"; with notice {sum(a.lost_steps for a in noticed)} (in {len(noticed)})"
    if silent:
        words += f"; without {sum(a.lost_steps for a in silent)} (in {len(silent)})"
    return Finding(question, not any(a.lost_steps for a in noticed), words)


def _flushes(state: RunState, poll_seconds: float) -> list[Finding]:
    flushes = [flush for attempt in state.attempts if (flush := _flush(attempt)) is not None]
    if not flushes:
        return []
    worst, words = max(flushes)
    found = []
    for cloud, window in WINDOWS_SECONDS.items():
        warning, link = _link(state, window)
        answer = f"{worst:.2f} s {words}, after up to {poll_seconds:g} s until it is heard"
        found.append(
            Finding(
                f"Does the flush fit {cloud}'s {window:.0f} s?",
                worst + poll_seconds <= window and not warning,
                "; ".join(part for part in (warning, answer, link) if part),
                decisive=cloud == "AWS",
            )
        )
    return found


def _flush(attempt: Attempt) -> tuple[float, str] | None:
    """Seconds at worst, and what they are.

    A program that is attached trains on in the window, so what counts is what one commit was seen to need. Of another,
    that does not tell when it stops: from the notice until the machine was off, rather too long.
    """
    longest = attempt.report.get("longest", {})
    if "attached" in attempt.marks and longest:
        saving = longest.get("stall_seconds", 0.0) + longest.get("commit_seconds", 0.0)
        return saving + (attempt.step_seconds or 0.0), "for the step under way, the copy, and until it was durable"
    notice = attempt.report.get("notice") or {}
    stopped = attempt.marks.get("preempting") or attempt.terminated_at
    if notice.get("kind") != "preemption" or not stopped:
        return None
    seconds = (stopped - datetime.fromisoformat(notice["seen_at"])).total_seconds()
    return max(0.0, seconds), "from hearing the notice to the end"


def _link(state: RunState, window_seconds: float) -> tuple[str, str]:
    """A warning when a checkpoint at the slowest speed that was measured does not fit; and what a store must bear."""
    known = [
        (seconds / attempt.report["bytes_per_commit"], attempt.report["bytes_per_commit"])
        for attempt in state.attempts
        if attempt.report.get("bytes_per_commit")
        and (seconds := attempt.report.get("longest", {}).get("wall_commit_seconds"))
    ]
    if not known:
        return "", ""
    seconds_per_byte, size = max(known)
    needed = size / window_bytes(1.0, window_seconds)
    return window_warning(size, 1 / seconds_per_byte, window_seconds) or "", (
        f"{size_text(1 / seconds_per_byte)}/s was measured with this computer's disk, and a store needs "
        f"{size_text(needed)}/s for the {size_text(size)}"
    )


def _checkpoint_cost(state: RunState) -> Finding:
    summary = summarise(state)["checkpoints"]
    commits, seconds = summary["commits"], summary["seconds"]
    if not commits:
        return Finding("What does a checkpoint cost?", False, "there was none", decisive=False)
    stall = seconds.get("wall_stall_seconds", 0.0) / commits
    commit = seconds.get("wall_commit_seconds", 0.0) / commits
    return Finding(
        "What does a checkpoint cost?",
        True,
        f"{stall * 1000:.1f} ms of training each, {commit * 1000:.0f} ms until durable, "
        f"{summary['bytes_per_commit'] / 1e6:.2f} MB, {commits} in all",
        decisive=False,
    )
