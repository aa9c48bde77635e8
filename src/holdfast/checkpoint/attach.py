"""The three lines around a training loop.

run = holdfast.attach(model=model, optimizer=optimizer)     # resumes here
for step in run.steps(1000):                                # goes on after the last committed step
    ...
    run.report(loss=loss)
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from holdfast.checkpoint import tensors as tensor_file
from holdfast.checkpoint.commits import CheckpointId, Checkpoints
from holdfast.checkpoint.committer import Committer, Snapshot
from holdfast.checkpoint.folders import FILES, plain_files
from holdfast.checkpoint.policy import CheckpointPolicy
from holdfast.checkpoint.reader import STATE, TREE
from holdfast.checkpoint.reporting import HeardNotice, NoticeFile, Reporter, Surroundings
from holdfast.checkpoint.state import TrainingState, describe_environment, set_random_states
from holdfast.errors import ConfigError, DamagedCheckpointError, TransientError
from holdfast.runtime.contract import EXIT_PREEMPTED_COMMITTED, EXIT_PREEMPTED_UNCOMMITTED
from holdfast.storage import open_store

FINAL_COMMIT_SECONDS = 300.0
"""How long the end of the program waits for its last commit, on the wall."""
DEFAULT_WINDOW_SECONDS = 25.0
# As in holdfast.model, which needs pydantic: a machine may not have it.
INTERVAL = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*(steps?|s|seconds?|minutes?|min)\s*$")


def attach(
    *, every: str | None = None, max_to_keep: int | None = None, directory: str | Path | None = None, **components: Any
) -> Attached:
    """Tie a training loop to its run: restore the newest checkpoint, and save from now on.

    `components`: everything whose state must survive, under names of your choice: model, optimizer, scheduler, scaler,
    data loader or sampler, generators. The random states of Python, NumPy and torch are saved without being named.
    `directory`: a folder whose files are saved as a whole with every checkpoint; needs no PyTorch.
    `every`: '100 steps', '30 s', '5 minutes' or 'auto'; None: as the job says. `max_to_keep`: checkpoints kept; None: as the job says.

    Without an agent (the program was started by hand) nothing is restored or saved, and the loop runs as written.
    Raises ConfigError for bad arguments and for a checkpoint that does not fit the program.
    """
    policy = _policy(every, max_to_keep)
    around = Surroundings.from_environment()
    ranks = os.environ.get("WORLD_SIZE", "1")
    if around and ranks != "1":
        raise ConfigError(
            f"WORLD_SIZE is {ranks}: a checkpoint is one process's so far, and several ranks would overwrite each other's; "
            "run one process, or checkpoint by folders ($HOLDFAST_CHECKPOINT_DIRECTORY) from rank 0"
        )
    return Attached(around, policy, components, Path(directory) if directory else None)


class Attached:
    """Returned by `attach`."""

    def __init__(
        self,
        around: Surroundings | None,
        policy: CheckpointPolicy | None,
        components: dict[str, Any],
        folder: Path | None,
    ) -> None:
        self._state: dict[str, Any] = {}
        self.resumed_step = 0
        """Steps that were done before this process; 0 at a fresh start."""
        self._training = TrainingState(components, self._state)
        self._folder = folder
        self._around = around
        self._stop = self._looping = False
        self._step, self._total = 0, 0
        self._metrics: dict[str, float] = {}
        self._last_metrics: dict[str, float] = {}
        self._random_states: dict[str, Any] | None = None
        if around is None:
            return
        self._policy = policy or around.policy
        self._clock = around.clock
        self._reporter = Reporter(around)
        self._notice = NoticeFile(around.notice)
        self._store = open_store(around.store_url)
        self._reporter.event("attached")
        self._training.copy()  # what can't be stored is said now, not after the first hour
        parent = self._resume()
        self._committer = Committer(
            self._store, around.run_id, around.attempt, self._policy.max_to_keep, self._reporter, self._clock, parent
        )
        self._saved_step = self.resumed_step
        self._saved_at = time.monotonic()
        self._snapshot_seconds = 0.0

    @property
    def state(self) -> dict[str, Any]:
        """Anything else that must survive: numbers, text, tensors, and lists, tuples and dicts of these."""
        return self._state

    @state.setter
    def state(self, values: dict[str, Any]) -> None:
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
            yield step
            self.complete()
        self.finish()

    def begin(self, total: int) -> int:
        """For a loop of another library, instead of `steps`: the steps that are done already; call `complete` after
        each of the rest, and `finish` after the last. Raises ConfigError as `steps` does.
        """
        if not isinstance(total, int) or total < 1:
            raise ConfigError(f"steps(total={total!r}): total must be a whole number above zero")
        if self._looping:
            raise ConfigError(
                "steps() was called before: let one loop run over all steps of all epochs, and call it once"
            )
        self._looping = True
        self._step, self._total = self.resumed_step, total
        if self._random_states is not None:
            set_random_states(self._random_states)  # here: what ran since attach() must not have used them up
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
                self._metrics[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"report({name}={value!r}): not a number: {error}") from error

    def stop(self) -> None:
        """End the loop after this step, as if it were the last (early stopping)."""
        self._stop = True

    # -- after every step ---------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        self._reporter.step(self._step, self._total, self._metrics)
        if self._metrics:
            self._committer.add_metrics(self._step, self._metrics)
        if self._step == self.resumed_step + 1:
            self._reporter.event("first-step", step=self._step)
        if notice := self._notice.news():
            self._obey(notice)
        if self._committer.fenced:
            self._leave(committed=False)
        elif self._is_due() and self._step < self._total:
            self._save()

    def _is_due(self) -> bool:
        seconds = (time.monotonic() - self._saved_at) * self._clock.speed
        cost = self._committer.commit_seconds
        return self._policy.is_due(
            self._step - self._saved_step, seconds, None if cost is None else self._snapshot_seconds + 0.1 * cost
        )

    def _save(self) -> None:
        """Copy the state; the training goes on while the copy is made durable."""
        assert self._around
        began = time.monotonic()
        self._reporter.phase("snapshot", self._step)
        tree, tensors = self._training.copy()
        folder = _copy_folder(self._folder) if self._folder else None
        self._snapshot_seconds = (time.monotonic() - began) * self._clock.speed
        self._saved_step, self._saved_at = self._step, time.monotonic()
        metadata = {
            "run": self._around.run_id,
            "attempt": self._around.attempt,
            "step": self._step,
            "total_steps": self._total,
            "created_at": self._clock.now().isoformat(),
            "learning_rates": self._training.learning_rates(),
            "batch_size": self._training.batch_size(),
            "environment": describe_environment(),
        }
        self._committer.offer(
            Snapshot(
                step=self._step,
                tree=tree,
                tensors=tensors,
                folder=folder,
                metadata=metadata,
                seconds=self._snapshot_seconds,
            )
        )

    def _obey(self, notice: HeardNotice) -> None:
        if notice.kind == "rebalance":
            self._save()
            return
        if self._saved_step != self._step:
            self._save()
        window = DEFAULT_WINDOW_SECONDS
        if notice.reclaim_at:
            window = (notice.reclaim_at - self._clock.now()) / timedelta(seconds=self._clock.speed)
        self._leave(committed=self._committer.wait(self._step, max(0.0, window)))

    def _leave(self, committed: bool) -> None:
        self._reporter.event("preempting", step=self._step, committed=committed)
        sys.stdout.flush()
        raise SystemExit(EXIT_PREEMPTED_COMMITTED if committed else EXIT_PREEMPTED_UNCOMMITTED)

    def _finish(self) -> None:
        if self._committer.committed_step < self._step:
            if self._saved_step != self._step or self._step == 0:
                self._save()
            if not self._committer.wait(self._step, FINAL_COMMIT_SECONDS):
                if self._committer.fenced:
                    self._leave(committed=False)
                raise TransientError(
                    f"the last step ({self._step}) could not be made durable in {FINAL_COMMIT_SECONDS:.0f} s; "
                    f"the last committed one is {max(0, self._committer.committed_step)}"
                )
        self._reporter.event("finished", step=self._step, metrics=dict(self._last_metrics))

    # -- resuming -----------------------------------------------------------------------------------------------------

    def _resume(self) -> CheckpointId | None:
        assert self._around
        checkpoints = Checkpoints(self._store, self._around.run_id)
        began = time.monotonic()
        loaded: CheckpointId | None = checkpoints.newest_valid(
            lambda checkpoint, manifest: self._load(checkpoints, checkpoint, manifest),
            lambda checkpoint, error: self._reporter.event("damaged", checkpoint=str(checkpoint), error=error),
        )
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

    def _load(self, checkpoints: Checkpoints, checkpoint: CheckpointId, manifest: dict[str, Any]) -> CheckpointId:
        if manifest.get("kind") != "state":
            raise ConfigError(
                f"checkpoint {checkpoint} is of kind {manifest.get('kind')!r}, made by another program; use another run id"
            )
        self._reporter.phase("resume", checkpoint.step)
        data = {name: checkpoints.read(checkpoint, manifest, name) for name in manifest["objects"]}
        try:
            tree = json.loads(data[TREE])
        except (KeyError, ValueError) as error:
            raise DamagedCheckpointError(f"{checkpoint}/{TREE} can't be read: {error!r}") from error
        tensors = tensor_file.decode(data[STATE]) if STATE in data else {}
        self._random_states = self._training.load(tree, tensors)
        if self._folder:
            _restore_folder(self._folder, {name: body for name, body in data.items() if name.startswith(FILES)})
        return checkpoint


def _policy(every: str | None, max_to_keep: int | None) -> CheckpointPolicy | None:
    """None: the job's own."""
    if every is None and max_to_keep is None:
        return None
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
    return CheckpointPolicy(
        every_steps=steps,
        every_seconds=seconds,
        max_to_keep=keep,
        mean_seconds_between_preemptions=job.mean_seconds_between_preemptions,
    )


def _copy_folder(folder: Path) -> Path:
    copy = Path(tempfile.mkdtemp(prefix="holdfast-snapshot-"))
    for name, path in plain_files(folder):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return copy


def _restore_folder(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, body in files.items():
        relative = PurePosixPath(name.removeprefix(FILES))
        if relative.is_absolute() or ".." in relative.parts:
            raise DamagedCheckpointError(f"a file outside its folder: {name!r}")
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
