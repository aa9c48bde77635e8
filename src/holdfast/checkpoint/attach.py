"""The three lines around a training loop.

run = holdfast.attach(model=model, optimizer=optimizer)     # resumes here
for step in run.steps(1000):                                # goes on after the last committed step
    ...
    run.report(loss=loss)
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from holdfast.checkpoint import planner
from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.committer import Committer
from holdfast.checkpoint.elastic import LearningRateRule, learning_rate_factor
from holdfast.checkpoint.folders import FILES, copy_of, folder_given, replace_files
from holdfast.checkpoint.loading import StateContent, check_kind
from holdfast.checkpoint.policy import FIRST_SAVE_STEPS, CheckpointPolicy
from holdfast.checkpoint.ranks import Together, Vote
from holdfast.checkpoint.reporting import LOOK_SECONDS, HeardNotice, NoticeFile, Reporter, Surroundings
from holdfast.checkpoint.snapshot import Snapshot, Snapshots
from holdfast.checkpoint.state import TrainingState, describe_environment, names_in, set_random_states
from holdfast.errors import ConfigError, DamagedCheckpointError, NotFoundError, TransientError
from holdfast.runtime.contract import EXIT_PREEMPTED_COMMITTED, EXIT_PREEMPTED_UNCOMMITTED, NoticeKind
from holdfast.storage import open_store

log = logging.getLogger(__name__)

FINAL_COMMIT_SECONDS = 300.0
"""How long the end of the program waits for its last commit, on the wall."""
BUDGET_SECONDS = 600.0
"""A save that is not durable after so long is said to be late, unless the policy's own interval is shorter."""
FOLDER_TRIES, LONGEST_PAUSE_SECONDS = 3, 30.0
"""At a notice, and between tries while the training goes on."""
RECENT = 16
"""Measurements of each kind that plans are made from."""
NOTICES: dict[NoticeKind, float] = {"rebalance": 1.0, "lease": 2.0, "shutdown": 3.0, "preemption": 4.0}
# As in holdfast.model, which needs pydantic: a machine may not have it.
INTERVAL = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(steps?|s|seconds?|minutes?|min)\s*$")


def attach(
    *,
    every: str | None = None,
    max_to_keep: int | None = None,
    directory: str | Path | None = None,
    low_memory: bool = False,
    learning_rate_scaling: LearningRateRule = "none",
    **components: Any,
) -> Attached:
    """Tie a training loop to its run: restore the newest checkpoint, and save from now on.

    `components`: everything whose state must survive, under names of your choice: model, optimizer, scheduler, scaler,
    data loader or sampler, generators. The random states of Python, NumPy and torch are saved without being named.
    `directory`: a folder whose files are saved as a whole with every checkpoint; needs no PyTorch.
    `every`: '100 steps', '30 s', '5 minutes' or 'auto'; None: as the job says. `max_to_keep`: checkpoints kept; None: as the job says.
    `low_memory`: one copy of the state in shared memory instead of two; a save that is due while another is being made
    durable waits for it.
    `learning_rate_scaling`: what happens to learning rates when the global batch is another than the checkpoint's:
    'none', 'linear' or 'sqrt'.

    With several ranks, every rank calls it, after torch.distributed.init_process_group, with the same names; what is
    sharded is saved as shards. Without an agent (the program was started by hand) nothing is restored or saved, and the
    loop runs as written. Raises ConfigError for bad arguments and for a checkpoint that does not fit the program.
    """
    policy = _policy(every, max_to_keep)
    folder = folder_given(directory)
    learning_rate_factor(learning_rate_scaling, 1, 1)
    around = Surroundings.from_environment()
    return Attached(
        around,
        policy,
        components,
        folder,
        1 if low_memory else 2,
        learning_rate_scaling,
    )


class Attached:
    """Returned by `attach`."""

    def __init__(
        self,
        around: Surroundings | None,
        policy: CheckpointPolicy | None,
        components: dict[str, Any],
        folder: Path | None,
        slots: int,
        learning_rate_scaling: LearningRateRule,
    ) -> None:
        self._state: dict[str, Any] = {}
        self.resumed_step = 0
        """Steps that were done before this process; 0 at a fresh start."""
        self._folder = folder
        self._around = around
        self._stop = self._wants_stop = self._looping = False
        self._step, self._total = 0, 0
        self._metrics: dict[str, float] = {}
        self._last_metrics: dict[str, float] = {}
        self._random_states: dict[str, Any] | None = None
        if around is None:
            self._training = TrainingState(components, self._state)
            return
        self._together = Together()
        ranks = self._together.ranks
        self._training = TrainingState(components, self._state, ranks.rank, ranks.world_size, learning_rate_scaling)
        self._policy = policy or around.policy
        self._clock = around.clock
        self._reporter = Reporter(around if ranks.tells else replace(around, telemetry=None, console=None))
        self._notice_file = NoticeFile(around.notice)
        self._notice: HeardNotice | None = None
        self._step_at_notice = 0
        self._store = open_store(around.store_url)
        self._reporter.event("attached")
        self._training.collect()  # what can't be stored is said now, not after the first hour
        self._together.check_alike(self._training.layout())
        budget_seconds = min(self._policy.every_seconds or BUDGET_SECONDS, BUDGET_SECONDS) / self._clock.speed
        log_file = around.telemetry.with_name(f"persist-{ranks.rank}.log") if around.telemetry else None
        self._committer = Committer(
            around.attempt, ranks, self._policy, max(1.0, budget_seconds), self._reporter, log_file
        )
        self._committer.begin(self._resume())
        self._snapshots = Snapshots(self._training, self._offer, self._committer.renew, slots, self._committer.announce)
        self._saved_step = self.resumed_step
        self._saved_at = self._stepped_at = time.monotonic()
        self._completed_at = self._saved_at
        self._look_at, self._look_at_step = 0.0, 0
        self._began = self._saved_at  # the machine is as old as its program, but for the boot
        self._folder_failures, self._not_before = 0, 0.0
        self._copies: deque[float] = deque(maxlen=RECENT)
        self._hold_seconds = 0.0
        self._steps: deque[float] = deque(maxlen=RECENT)

    @property
    def state(self) -> dict[str, Any]:
        """Anything else that must survive: numbers, text, tensors, and lists, tuples and dicts of these.

        Each rank has its own; in a world of another size, all begin with the first rank's.
        """
        return self._state

    @state.setter
    def state(self, values: dict[str, Any]) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"run.state = {values!r:.100}: it must be a dict; put the value into it under a name")
        kept = dict(values)
        self._state.clear()
        self._state.update(kept)

    # -- for the loop -------------------------------------------------------------------------------------------------

    def steps(self, total: int) -> Iterator[int]:
        """The numbers of the steps still to do, up to `total`; step n is complete when the loop asks for the next.

        On an interruption notice it commits and leaves the program with the agreed exit status (SystemExit). When all
        steps are done, it returns once the last state is durable. Raises ConfigError unless `total` is a whole number
        above zero, TransientError when the last commit fails for five minutes.
        """
        for step in range(self.begin(total) + 1, total + 1):
            if self._stop:
                break
            try:
                yield step
            except GeneratorExit:
                self._let_go()
                raise
            self.complete()
        self.finish()

    def _let_go(self) -> None:
        """The loop was left by `break` or an exception: what has been begun is made durable, and the memory is free."""
        if self._around and not sys.is_finalizing():  # its threads are gone then
            self._snapshots.close()
            self._committer.close()

    def begin(self, total: int) -> int:
        """For a loop of another library, instead of `steps`: the steps that are done already; call `complete` after
        each of the rest, and `finish` after the last. Raises ConfigError as `steps` does.
        """
        if not isinstance(total, int) or isinstance(total, bool) or total < 1:
            raise ConfigError(f"steps(total={total!r}): total must be a whole number above zero")
        if self._looping:
            raise ConfigError(
                "steps() was called before: let one loop run over all steps of all epochs, and call it once"
            )
        self._looping = True
        if self._around:
            self._training.collect()  # the user's own state is there by now
        self._step, self._total = self.resumed_step, total
        if self._random_states is not None:
            set_random_states(self._random_states)  # here: what ran since attach() must not have used them up
        if self._around:
            self._stepped_at = time.monotonic()
        return self._step

    def complete(self) -> None:
        """One more step is done. On an interruption notice it commits and leaves the program (SystemExit)."""
        self._step += 1
        if self._around:
            self._after_step()
        self._last_metrics, self._metrics = self._metrics, {}

    def finish(self) -> None:
        """All steps are done: returns once the last state is durable. Raises TransientError as `steps` does."""
        if self._around:
            self._finish()

    def report(self, **metrics: Any) -> None:
        """Numbers of this step, for the display, the loss curve and the comparison: floats, or tensors of one element."""
        for name, value in metrics.items():
            try:
                self._metrics[name] = float(value.detach() if hasattr(value, "detach") else value)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ConfigError(f"report({name}={value!r:.100}): not a number: {error}") from error

    def stop(self) -> None:
        """End the loop after this step, as if it were the last (early stopping); of several ranks, one is enough, and
        all end after the same step, a moment later.
        """
        self._wants_stop = True
        self._stop = self._around is None or self._together.world_size == 1

    # -- after every step ---------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        now = self._completed_at = time.monotonic()
        self._steps.append(now - self._stepped_at)
        self._stepped_at = now
        if self._metrics and self._together.is_first:
            self._committer.add_metrics(self._step, self._metrics)
        if now < self._look_at and self._step < self._look_at_step:
            return
        self._look_around()
        if self._together.world_size == 1 and not self._notice and not self._reporter.shows_every_step:
            self._look_at, self._look_at_step = now + LOOK_SECONDS, self._next_save_by_steps()

    def _next_save_by_steps(self) -> int:
        """The step after which a save may be due however little time has passed, or the last one."""
        every = self._policy.every_steps
        at = self._saved_step + (every or FIRST_SAVE_STEPS)
        return min(at, self._total) if every or at > self._step else self._total

    def _look_around(self) -> None:
        """What came from the persist process, the agent and the other ranks, and what is due. Beside the shortest steps it
        takes too long: the checkpoint benchmark's `bookkeeping_seconds_per_step`.
        """
        self._reporter.step(self._step, self._total, self._metrics)
        if self._step == self.resumed_step + 1:
            self._reporter.event("first-step", step=self._step)
            self._snapshots.prepare()  # now: an optimizer has its state from the first step on
        self._snapshots.poll()
        self._committer.poll()
        self._say_failure()
        if news := self._notice_file.news():
            self._hear(news.kind, news.reclaim_at)
        agreed = self._together.agree(self._step, self._vote(), self._policy.every_steps)
        if agreed is None:
            return
        if agreed.notice:
            at = datetime.fromtimestamp(-agreed.reclaim_at, UTC) if agreed.reclaim_at > -float("inf") else None
            self._hear(next(kind for kind, strength in NOTICES.items() if strength == agreed.notice), at)
        self._stop = self._stop or agreed.stop > 0
        if agreed.fenced:
            self._leave(committed=False)
        elif self._notice and self._step < self._total and not self._stop:
            self._obey()
        elif agreed.save and not agreed.busy and self._step < self._total:
            self._save()
        self._stepped_at = time.monotonic()

    def _vote(self) -> Vote:
        """With one rank a newer snapshot may take a waiting one's place; several would lose track of each other."""
        together = self._together.world_size > 1
        notice = self._notice
        return Vote(
            save=float(self._is_due()),
            stop=float(self._wants_stop),
            fenced=float(self._committer.fenced),
            busy=float(together and (self._committer.busy or self._snapshots.in_progress)),
            notice=NOTICES[notice.kind] if notice else 0.0,
            reclaim_at=-notice.reclaim_at.timestamp() if notice and notice.reclaim_at else -float("inf"),
            step_seconds=max(self._steps) if together else 0.0,
            saved_step=-float(self._saved_step),
        )

    def _is_due(self) -> bool:
        if time.monotonic() < self._not_before:
            return False
        steps, speed = self._step - self._saved_step, self._clock.speed
        seconds = (time.monotonic() - self._saved_at) * speed
        if not self._policy.is_automatic:
            return self._policy.is_due(steps, seconds)
        cost = self._committer.commit_seconds
        return self._policy.is_due(
            steps,
            seconds,
            None if cost is None else (self._hold_seconds + 0.1 * cost) * speed,
            age_seconds=(time.monotonic() - self._began) * speed,
            commit_seconds=self._seconds_to_be_safe() * speed,
        )

    def _seconds_to_be_safe(self) -> float:
        """Wall seconds from a notice until a commit is surely durable, the step under way included; inf: not known."""
        if not (self._committer.commits and self._copies and self._steps):
            return float("inf")
        measured = (self._steps, self._copies, self._committer.commits)
        return planner.MARGIN_SECONDS / self._clock.speed + sum(planner.Spread.of(one).safe for one in measured)

    def _save(self, wait: bool = False) -> None:
        """Copy the state while the training goes on; what is copied is made durable by another process."""
        assert self._around
        self._snapshots.settle()  # the one before: if it came to nothing, that is not this one's failure
        self._say_failure()
        if wait and self._together.world_size > 1:
            # Nobody has voted on it: a newer snapshot must not take the place of one whose parts others wait for.
            reclaim_at = self._notice.reclaim_at if self._notice else None
            self._committer.wait_until_idle(
                self._wall_seconds_until(reclaim_at) if reclaim_at else FINAL_COMMIT_SECONDS
            )
        self._reporter.phase("snapshot", self._step)
        words = {
            "run": self._around.run_id,
            "attempt": self._around.attempt,
            "total_steps": self._total,
            "created_at": self._clock.now().isoformat(),
            "learning_rates": self._training.learning_rates(),
            "batch_size": self._training.batch_size(),
            "kinds": self._training.kinds(),
            "environment": {**describe_environment(), "world_size": self._together.world_size},
            "metrics": self._committer.metrics_until(self._step),
        }
        folder = None
        if self._folder and self._together.is_first:
            try:
                folder = copy_of(self._folder)
                self._folder_failures = 0
            except (OSError, ConfigError) as error:
                self._say_folder_failure(error)
                return
        wait |= self._together.world_size > 1  # what the others save, this one must
        if self._snapshots.take(self._step, words, folder, wait) is None:
            if folder:
                shutil.rmtree(folder, ignore_errors=True)
            return  # its only slot is being made durable: the save stays due
        self._saved_step, self._saved_at = self._step, time.monotonic()
        self._say_failure()

    def _offer(self, snapshot: Snapshot) -> None:
        self._copies.append(snapshot.copy_seconds)
        self._hold_seconds = snapshot.hold_seconds
        self._committer.offer(snapshot)

    def _say_failure(self) -> None:
        """A snapshot came to nothing: it is said, and taken again after this step."""
        failure, self._snapshots.failure = self._snapshots.failure, None
        if failure is not None:
            log.warning("snapshot failed step=%s error=%s", self._saved_step, failure)
            self._reporter.event("commit-failed", step=self._saved_step, error=str(failure))
            self._saved_step = max(self._committer.committed_step, self.resumed_step)
            self._saved_at = -float("inf")

    def _say_folder_failure(self, error: Exception) -> None:
        """The files could not be copied: the save stays due, is tried again after a while, and the training goes on."""
        self._folder_failures += 1
        log.warning("the files of %s could not be copied step=%s error=%s", self._folder, self._step, error)
        self._reporter.event("commit-failed", step=self._step, error=str(error) or repr(error))
        self._not_before = time.monotonic() + min(2.0**self._folder_failures / 2, LONGEST_PAUSE_SECONDS)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _hear(self, kind: NoticeKind, reclaim_at: datetime | None) -> None:
        if self._notice is None or NOTICES[kind] > NOTICES[self._notice.kind]:
            self._notice = HeardNotice(kind, reclaim_at)
            self._step_at_notice = self._step

    def _obey(self) -> None:
        """After every step from the notice on: what the plan says, on all ranks what the first one's plan says."""
        while True:
            decision = self._together.first_decides(self._plan)
            match decision:
                case planner.CommitNow():
                    self._save(wait=True)
                case planner.TrainUntil(at=at):
                    if at is None:
                        self._notice = None  # a recommendation, and it was followed
                    return
                case planner.WaitFor(step=step, until=until):
                    self._snapshots.settle()  # no optimizer comes to wait for it any more
                    self._say_failure()
                    self._committer.wait(step, self._wall_seconds_until(until) if until else FINAL_COMMIT_SECONDS)
                case planner.Leave():
                    self._leave(committed=True)
                case planner.Skip(reason=reason):
                    self._reporter.event("notice-skipped", step=self._step, reason=reason)
                    self._leave(committed=False)
            if self._committer.fenced:
                self._leave(committed=False)

    def _plan(self) -> planner.Decision:
        assert self._notice
        if self._folder_failures >= FOLDER_TRIES:
            return planner.Skip(f"the files of {self._folder} can't be copied")
        now, speed = self._clock.now(), self._clock.speed
        committer = self._committer
        saving = None
        if self._saved_step > max(committer.committed_step, self.resumed_step):
            waits = committer.in_work is not None and committer.in_work.step < self._saved_step
            began = committer.in_work.began if committer.in_work else time.monotonic()
            saving = planner.Saving(
                step=self._saved_step,
                began_at=now - timedelta(seconds=(time.monotonic() - began) * speed),
                saves=2 if waits else 1,
            )
        measured = None
        if committer.commits and self._copies and self._steps:
            spreads = [
                planner.Spread.of(one * speed for one in seconds)
                for seconds in (tuple(self._copies), committer.commits, self._steps)  # copies come from a thread
            ]
            measured = planner.Measured(
                copy_seconds=spreads[0], durable_seconds=spreads[1], step_seconds=spreads[2],
                size_bytes=committer.commit_bytes,
            )  # fmt: skip
        window = planner.Window(kind=self._notice.kind, now=now, reclaim_at=self._notice.reclaim_at)
        work = planner.Work(
            step=self._step,
            step_at_notice=self._step_at_notice,
            durable_step=max(committer.committed_step, self.resumed_step),
            saving=saving,
        )
        return planner.plan(measured, window, work)

    def _wall_seconds_until(self, instant: datetime) -> float:
        return max(0.0, (instant - self._clock.now()) / timedelta(seconds=self._clock.speed))

    def _leave(self, committed: bool) -> None:
        # Of several machines only the one with the notice goes; on the others the ranks are formed anew.
        kind = "preempting" if self._notice_file.seen or self._together.world_size == 1 else "reforming"
        self._reporter.event(kind, step=self._step, committed=committed, **self._last_step_at())
        sys.stdout.flush()
        self._committer.close()
        raise SystemExit(EXIT_PREEMPTED_COMMITTED if committed else EXIT_PREEMPTED_UNCOMMITTED)

    def _finish(self) -> None:
        self._snapshots.settle()
        self._say_failure()
        if self._committer.committed_step < self._step:
            for _ in range(2):  # a torn snapshot is taken once more
                if self._saved_step != self._step or self._step == 0:
                    self._save(wait=True)
                self._snapshots.settle()
                self._say_failure()
            if self._folder_failures:
                raise TransientError(
                    f"the last step ({self._step}) could not be saved: the files of {self._folder} can't be copied; the "
                    f"last committed one is {max(0, self._committer.committed_step)}"
                )
            if not self._committer.wait(self._step, FINAL_COMMIT_SECONDS):
                if self._committer.fenced:
                    self._leave(committed=False)
                raise TransientError(
                    f"the last step ({self._step}) could not be made durable in {FINAL_COMMIT_SECONDS:.0f} s; "
                    f"the last committed one is {max(0, self._committer.committed_step)}"
                    + (f": {self._committer.last_error}" if self._committer.last_error else "")
                )
        self._snapshots.close()
        self._committer.close()
        self._reporter.event("finished", step=self._step, metrics=dict(self._last_metrics), **self._last_step_at())

    def _last_step_at(self) -> dict[str, str]:
        """When the last step was complete, which may be some commits ago; nothing where none was trained here."""
        if self._step <= self.resumed_step:
            return {}
        ago = timedelta(seconds=(time.monotonic() - self._completed_at) * self._clock.speed)
        return {"last_step_at": (self._clock.now() - ago).isoformat()}

    # -- resuming -----------------------------------------------------------------------------------------------------

    def _resume(self) -> CheckpointId | None:
        assert self._around
        checkpoints = Checkpoints(self._store, self._around.run_id)
        began = time.monotonic()

        def use(checkpoint: CheckpointId, manifest: dict[str, Any]) -> CheckpointId:
            return self._load(checkpoints, checkpoint, manifest)

        def damaged(checkpoint: CheckpointId, error: str) -> None:
            self._reporter.event("damaged", checkpoint=str(checkpoint), error=error)

        loaded: CheckpointId | None
        if self._together.world_size == 1:
            loaded = checkpoints.newest_valid(use, damaged)
        else:
            loaded = self._newest_for_all(checkpoints, use, damaged)
        self.resumed_step = loaded.step if loaded else 0
        seconds = time.monotonic() - began
        self._reporter.phase("resumed", self.resumed_step)
        self._reporter.event(
            "resumed",
            step=self.resumed_step,
            checkpoint=str(loaded) if loaded else "",
            load_seconds=seconds * self._clock.speed,
            wall_load_seconds=seconds,
        )
        return loaded

    def _newest_for_all(self, checkpoints: Checkpoints, use: Any, damaged: Any) -> CheckpointId | None:
        """As `newest_valid`, but all ranks take the same: one that is whole for each of them."""
        assert self._around
        candidates = checkpoints.committed() if self._together.is_first else []
        tried = 0
        while True:
            newest = candidates.pop() if candidates else CheckpointId(-1, -1)
            attempt, step = self._together.first_says(newest.attempt, newest.step)
            if attempt < 0:
                break
            checkpoint, complaint = CheckpointId(int(attempt), int(step)), ""
            try:
                use(checkpoint, checkpoints.manifest(checkpoint))
            except (DamagedCheckpointError, NotFoundError) as error:
                complaint = str(error)
                damaged(checkpoint, complaint)
            if self._together.all_say(not complaint):
                return checkpoint
            tried += 1
        if not tried:
            return None
        raise ConfigError(
            f"run {self._around.run_id!r} has {tried} checkpoints and none is whole: restore them, or begin again under "
            "another run id"
        )

    def _load(self, checkpoints: Checkpoints, checkpoint: CheckpointId, manifest: dict[str, Any]) -> CheckpointId:
        check_kind(checkpoint, manifest)
        self._reporter.phase("resume", checkpoint.step)
        self._training.check_kinds(manifest.get("kinds") or {})
        content = StateContent(checkpoints, checkpoint, manifest)
        ranks = self._together.ranks
        same_world = content.world_size == ranks.world_size
        tree = content.trees[ranks.rank if same_world else 0]
        names = list(dict.fromkeys(names_in([tree[part] for part in ("components", "user", "random")])))
        places = self._training.places(tree, {name: stored.spec for name, stored in content.tensors.items()})
        tensors = content.read(places, names) if names else {}
        self._random_states = self._training.load(tree, tensors.__getitem__, manifest, content.world_size)
        if self._folder and ranks.tells:  # one rank of a machine: they share the folder
            listed = [name for name in manifest["objects"] if name.startswith(FILES)]
            replace_files(self._folder, {name: checkpoints.read(checkpoint, manifest, name) for name in listed})
        return checkpoint


def _policy(every: str | None, max_to_keep: int | None) -> CheckpointPolicy | None:
    """None: the job's own."""
    if every is None and max_to_keep is None:
        return None
    if every is not None and not isinstance(every, str):
        raise ConfigError(f"attach(every={every!r}): write '100 steps', '30 s', '5 minutes' or 'auto'")
    around = Surroundings.from_environment()
    job = around.policy if around else CheckpointPolicy()
    keep = job.max_to_keep if max_to_keep is None else max_to_keep
    steps, seconds = job.every_steps, job.every_seconds
    if every is not None:
        match = INTERVAL.match(every)
        if not match and every.strip() != "auto":
            raise ConfigError(f"attach(every={every!r}): write '100 steps', '30 s', '5 minutes' or 'auto'")
        steps = seconds = None
        if match:
            number = float(match[1])
            if number <= 0 or (match[2].startswith("step") and number != int(number)):
                raise ConfigError(f"attach(every={every!r}): the number must be above zero, and steps whole")
            if match[2].startswith("step"):
                steps = int(number)
            else:
                seconds = number * (60 if match[2].startswith("min") else 1)
    return replace(job, every_steps=steps, every_seconds=seconds, max_to_keep=keep)
