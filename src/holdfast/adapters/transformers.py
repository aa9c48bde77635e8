"""Hugging Face's Trainer on machines that are taken away.

trainer.add_callback(HoldfastCallback(trainer))
trainer.train()                                   # goes on after the last committed step
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState

import holdfast
from holdfast.adapters.order import order_of, put_back
from holdfast.checkpoint.reporting import Surroundings
from holdfast.errors import ConfigError

LOGGING = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "current_flos")
"""Trainer's sums between two lines of its log: without them the first loss after a resume is another mean."""


class HoldfastCallback(TrainerCallback):
    """Commits `trainer`'s steps, and lets `trainer.train()` go on from there. Without an agent it does nothing.

    Step n is complete when step n + 1 begins: what is evaluated after it belongs to it. `parts`: further parts of the
    state, and options of `holdfast.attach`. Trainer's own checkpoints are left alone, on the machine's disk.
    """

    def __init__(self, trainer: Trainer, **parts: Any) -> None:
        self._trainer, self._parts = trainer, parts
        self._run: holdfast.Attached | None = None
        self._begun, self._order = False, order_of()
        if Surroundings.from_environment():
            self._train, trainer.train = trainer.train, self._resume

    def _resume(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        trainer = self._trainer
        if self._run or trainer.model_init or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError("HoldfastCallback: Trainer(model=...), without FSDP and DeepSpeed, and train() only once")
        trainer.create_optimizer()
        parts = {"model": trainer.model, "optimizer": trainer.optimizer, "trainer": self, **self._parts}
        self._run = holdfast.attach(**parts, **({"scaler": one} if (one := trainer.accelerator.scaler) else {}))
        if not self._run.resumed_step:
            return self._train(resume_from_checkpoint, **options)
        self._groups = [{**group} for group in trainer.optimizer.param_groups]
        trainer.args.restore_callback_states_from_checkpoint = True
        trainer._load_from_checkpoint = lambda *_: None  # the weights are back already
        with tempfile.TemporaryDirectory() as folder:  # where Trainer reads how far it was
            TrainerState(**self._saved["state"]).save_to_json(str(Path(folder, TRAINER_STATE_NAME)))
            return self._train(folder, **options)

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer
        others = [*trainer.callback_handler.callbacks, trainer.control]
        stateful = [one for one in others if isinstance(one, ExportableState)]
        return {
            "state": dict(vars(dataclasses.replace(trainer.state, stateful_callbacks=stateful))),
            "scheduler": trainer.lr_scheduler.state_dict() if trainer.lr_scheduler else None,
            "logging": {name: vars(trainer)[name] for name in LOGGING if name in vars(trainer)},
            "order": self._order,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._saved, self._order = saved, saved["order"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._run and self._run.resumed_step:
            self._trainer.lr_scheduler.load_state_dict(self._saved["scheduler"])
            for group, saved in zip(self._trainer.optimizer.param_groups, self._groups, strict=True):
                group.update({**saved, "params": group["params"]})  # a new scheduler has set the first step's rates
            for name, value in self._saved["logging"].items():
                setattr(self._trainer, name, value.to(args.device) if hasattr(value, "to") else value)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._run and self._run.resumed_step and not self._begun:
            put_back(self._order)  # the epoch's order is drawn from it
        self._order = order_of()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._run and self._begun:
            self._run.complete()
        elif self._run:  # begin() puts the random states back: the batches in hand were drawn before
            self._run.begin(max(1, self._run.resumed_step + state.max_steps - state.global_step))
            self._begun = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if self._run:
            self._run.report(**{name: logs[name] for name in ("loss", "grad_norm", "eval_loss") if name in logs})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._run:
            self._run.stop()  # Trainer may have decided so early: a notice now must not have it go on
            self.on_step_begin(args, state, control)
            self._run.finish()
