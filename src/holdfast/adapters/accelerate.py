"""Loops written with Hugging Face Accelerate, on machines that are taken away.

run = attach(accelerator, model, optimizer, loader, scheduler)
for batch in run.batches(epochs=3):               # goes on after the last committed step
    with accelerator.accumulate(model):
        ...
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import get_sampler

import holdfast
from holdfast.adapters.order import order_of, put_back
from holdfast.errors import ConfigError


def attach(
    accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, scheduler: Any = None, **parts: Any
) -> AcceleratedRun:
    """Restore the newest checkpoint into what `accelerator.prepare` returned, and save from now on. The scaler and what
    `register_for_checkpointing` was given are saved too. `parts`: further parts of the state, and options of
    `holdfast.attach`. Without an agent nothing is restored or saved. Raises ConfigError as `holdfast.attach`.
    """
    if accelerator.dataloader_config.use_stateful_dataloader:
        raise ConfigError("use_stateful_dataloader=True: leave it off; the position in the epoch is saved anyway")
    parts |= {f"registered{number}": one for number, one in enumerate(accelerator._custom_objects)}
    parts |= {"scheduler": scheduler} if scheduler else {}
    parts |= {"scaler": accelerator.scaler} if accelerator.scaler else {}
    optimizer = getattr(optimizer, "optimizer", optimizer)  # the one in Accelerate's wrapper
    return AcceleratedRun(accelerator, loader, model=accelerator.unwrap_model(model), optimizer=optimizer, **parts)


class AcceleratedRun:
    """Returned by `attach`; what it has beside `batches` is what `holdfast.attach` returns."""

    def __init__(self, accelerator: Accelerator, loader: Any, **parts: Any) -> None:
        self._accelerator, self._loader = accelerator, loader
        self._epoch = self._batch = 0
        self._order: dict[str, Any] = {}
        self._resumed, self._stopped, self._run = False, False, None
        self._run = holdfast.attach(**parts, position=self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._run, name)

    def stop(self) -> None:
        """End after this batch, as if it were the last (early stopping)."""
        self._stopped = True

    def batches(self, epochs: int) -> Iterator[Any]:
        """The batches still to do, of all epochs. A step is the optimizer's, as `accelerator.accumulate` counts.

        On an interruption notice it leaves the program, and it returns when all is durable, as `steps` does.
        """
        begun = stepped = False
        total = epochs * math.ceil(len(self._loader) / self._accelerator.gradient_accumulation_steps)
        for batch in self._rest(epochs):
            if not begun:
                self._run.begin(total)  # puts the random states back: the batch in hand was drawn before
            elif stepped:
                self._run.complete()
            begun = True
            yield batch
            self._batch, stepped = self._batch + 1, self._accelerator.sync_gradients
            if self._stopped:
                break
        if not begun:  # everything was trained before
            self._run.begin(total)
        elif stepped:
            self._run.complete()
        self._run.finish()

    def _rest(self, epochs: int) -> Iterator[Any]:
        sampler = get_sampler(self._loader)
        for epoch in range(self._epoch, epochs):
            if self._resumed:
                put_back(self._order["drawn"], [self._loader, sampler])
                if self._order["seed"] is not None:
                    sampler.initial_seed = self._order["seed"]
            else:
                seed = getattr(sampler, "initial_seed", None)
                self._order = {"drawn": order_of([self._loader, sampler]), "seed": seed}
                self._epoch, self._batch = epoch, 0
            if hasattr(self._loader, "set_epoch"):
                self._loader.set_epoch(epoch)
            yield from skip_first_batches(self._loader, self._batch) if self._resumed else self._loader
            self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "batch": self._batch, "order": self._order}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._epoch, self._batch, self._order, self._resumed = saved["epoch"], saved["batch"], saved["order"], True
