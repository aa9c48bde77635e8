"""Lightning's Trainer on machines that are taken away.

Trainer(..., callbacks=[HoldfastCallback()]).fit(model, loader)     # goes on after the last committed step
"""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback, Trainer
except ImportError:
    from pytorch_lightning import Callback, Trainer

import holdfast
from holdfast.adapters.order import order_of, put_back
from holdfast.checkpoint.reporting import Surroundings
from holdfast.errors import ConfigError


class HoldfastCallback(Callback):
    """Commits the optimizer's steps, and lets `fit` go on from there. Without an agent it does nothing.

    Step n is complete when the next batch begins: what is validated after it belongs to it. `parts`: further parts of
    the state, and options of `holdfast.attach`. Lightning's own checkpoints are left alone, on the machine's disk.
    """

    def __init__(self, **parts: Any) -> None:
        self._parts, self._begun, self._steps, self._run, self.order = parts, False, 0, None, order_of()

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if Surroundings.from_environment():
            optimizers = {f"optimizer{n or ''}": one for n, one in enumerate(trainer.optimizers)}
            schedulers = {f"scheduler{n or ''}": one.scheduler for n, one in enumerate(trainer.lr_scheduler_configs)}
            parts = {"model": pl_module, "precision": trainer.precision_plugin, "position": _Position(trainer, self)}
            parts |= {"datamodule": trainer.datamodule} if trainer.datamodule else {}
            self._run, self._begun = holdfast.attach(**parts, **optimizers, **schedulers, **self._parts), False

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._run and self._run.resumed_step:
            loop, batches = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
            put_back(self.order, trainer.fit_loop._combined_loader.flattened)  # the epoch's order is drawn from it
            trainer.current_epoch and iter(batches)  # made already, out of other random numbers
            for _ in range(loop.batch_progress.current.ready):
                next(batches)
            batches.fetched = 0  # the loop adds what it has had
            loop._should_check_val_fx = lambda _: False  # what was due after the last step is done
            if trainer.fit_loop.restarted_mid_epoch:  # Lightning takes the epoch for begun
                for one in trainer.callbacks:
                    one is self or one.on_train_epoch_start(trainer, pl_module)
                pl_module.on_train_epoch_start()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.order = order_of(trainer.fit_loop._combined_loader.flattened)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._run and self._begun and trainer.global_step > self._steps:  # else gradients are being accumulated
            self._run.report(**trainer.callback_metrics)
            self._run.complete()
        elif self._run and not self._begun:
            vars(trainer.fit_loop.epoch_loop).pop("_should_check_val_fx", None)
            total, self._begun = trainer.estimated_stepping_batches, True
            if not 0 < total < float("inf"):
                raise ConfigError("HoldfastCallback can't tell when this fit() ends: pass Trainer(max_steps=...)")
            self._run.begin(int(total))  # puts the random states back: the batch in hand was drawn before
        self._steps = trainer.global_step

    def on_train_end(self, trainer: Trainer, *_: Any) -> None:
        if self._run:
            self._run.stop()  # as early as Lightning decided: a notice at this step must not have it go on
            self.on_train_batch_start(trainer)
            self._run.finish()

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        if not self._begun:  # everything was trained before
            self.on_train_end(trainer)


class _Position:
    """How far the loops and the other callbacks are, asked for only when a snapshot is made."""

    def __init__(self, trainer: Trainer, own: HoldfastCallback) -> None:
        self._loop, self._own, self._fit = trainer.fit_loop, own, order_of()
        self._callbacks = {one.state_key: one for one in trainer.callbacks if one is not own}

    def state_dict(self) -> dict[str, Any]:
        callbacks = {key: state for key, one in self._callbacks.items() if (state := one.state_dict())}
        return {"loops": self._loop.state_dict(), "callbacks": callbacks, "fit": self._fit, "order": self._own.order}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for key in saved["callbacks"].keys() & self._callbacks.keys():
            self._callbacks[key].load_state_dict(saved["callbacks"][key])
        batches = saved["loops"]["epoch_loop.batch_progress"]
        batches["is_last_batch"] &= batches["current"]["ready"] == batches["current"]["completed"]
        for counter in (batches["total"], batches["current"]):
            counter["ready"] = counter["completed"]  # the batch that was in hand is fetched again
        self._loop.load_state_dict({**saved["loops"], "state_dict": {}})  # a loader's own position is one batch ahead
        self._fit, self._own.order = saved["fit"], saved["order"]
        put_back(self._fit)  # loaders are made, and the first epoch's order drawn, after this
