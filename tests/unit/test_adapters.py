"""Machines that are taken away after each single step leave no trace in what other libraries' loops train."""

from __future__ import annotations

import gc
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch import Trainer as LightningTrainer
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from holdfast.adapters import accelerate as accelerate_adapter
from holdfast.adapters.lightning import HoldfastCallback as LightningCallback
from holdfast.adapters.order import order_of, put_back
from holdfast.adapters.transformers import HoldfastCallback as TrainerCallback
from holdfast.checkpoint.reader import read_metrics
from holdfast.errors import ConfigError
from holdfast.runtime import contract
from holdfast.storage import DirectoryStore

ADAPTERS = Path(__file__).parents[2] / "src/holdfast/adapters"
Outcome = dict[str, Any]
Program = Callable[[], Outcome]
STEPS = 12
"""Three epochs of 7 batches, two for each step: an epoch's last step has one."""


@pytest.fixture
def one_step_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Program], Outcome]]:
    """Runs a program as on machines whose notice is there before they are: none trains more than one step.

    What the last of them returned, and so does one more, on which everything is trained already.
    """
    monkeypatch.chdir(tmp_path)

    def run(program: Program, stops_at: int = 0) -> Outcome:
        notice = tmp_path / "notice.json"
        notice.write_text(json.dumps({"kind": "preemption"}))
        for name, value in ((contract.STORE, (tmp_path / "store").as_uri()), (contract.RUN, "run")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(contract.NOTICE, str(notice))
        gc.freeze()  # Trainer collects garbage whenever it begins: everything the tests have imported, each time
        for attempt in range(1, 100):
            monkeypatch.setenv(contract.ATTEMPT, str(attempt))
            try:
                outcome = program()
            except SystemExit as left:
                assert left.code == contract.EXIT_PREEMPTED_COMMITTED
                continue
            assert attempt >= (stops_at or STEPS)
            if stops_at:
                return outcome
            notice.unlink()
            monkeypatch.setenv(contract.ATTEMPT, str(attempt + 1))
            assert program() == outcome
            return outcome
        raise AssertionError("it got nowhere")

    yield run
    gc.unfreeze()


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())).hexdigest()


def samples(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    inputs = torch.randn(count, 8, generator=draw)
    return inputs, inputs[:, :3].argmax(1)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


class Shuffling(Sampler[int]):
    """As people write them."""

    def __len__(self) -> int:
        return 52

    def __iter__(self) -> Iterator[int]:
        order = list(range(52))
        random.shuffle(order)
        return iter(order)


class ShufflingTrainer(Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
        return Shuffling()


class Words(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int) -> None:
        self.inputs, self.labels = samples(count)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.layers(inputs)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def train_with_transformers(kind: type[Trainer] = Trainer, patience: int = 100, rate: float = 1e-2) -> Outcome:
    torch.manual_seed(0)
    random.seed(0)
    trainer = kind(
        model=Classifier(),
        args=TrainingArguments(
            output_dir="trainer",
            num_train_epochs=3,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            learning_rate=rate,
            warmup_steps=5,
            lr_scheduler_type="cosine",
            logging_steps=3,
            eval_strategy="steps",
            eval_steps=4,
            metric_for_best_model="eval_loss",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Words(52),
        eval_dataset=Words(20),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=patience)],
    )
    trainer.add_callback(TrainerCallback(trainer))
    trainer.train()
    [early] = [one for one in trainer.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
    shown = ("step", "loss", "learning_rate", "eval_loss")
    log = [line for line in trainer.state.log_history if "train_runtime" not in line]
    return {
        "weights": digest(trainer.model),
        "log": [{name: line[name] for name in shown if name in line} for line in log],
        "step": trainer.state.global_step,
        "epoch": trainer.state.epoch,
        "flos": trainer.state.total_flos,
        "patience": early.early_stopping_patience_counter,
    }


def test_trainer_goes_on_after_every_step(one_step_each: Callable[..., Outcome], tmp_path: Path) -> None:
    steady = train_with_transformers()
    spot = one_step_each(train_with_transformers)
    assert spot == steady
    assert spot["step"] == STEPS
    losses = read_metrics(DirectoryStore(tmp_path / "store"), "run")
    assert [step for step, metrics in losses.items() if "loss" in metrics] == [3, 6, 9, 12]


def test_a_sampler_may_draw_from_python_s_random_numbers(one_step_each: Callable[..., Outcome]) -> None:
    steady = train_with_transformers(ShufflingTrainer)
    assert one_step_each(lambda: train_with_transformers(ShufflingTrainer)) == steady


def test_trainer_stops_early_at_a_notice_too(one_step_each: Callable[..., Outcome]) -> None:
    """Every step has a notice, also the one at which Trainer decides that it is the last."""
    steady = train_with_transformers(patience=1, rate=3.0)
    assert steady["step"] == 8
    assert one_step_each(lambda: train_with_transformers(patience=1, rate=3.0), stops_at=8) == steady


class Lit(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss = nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        self.log("validation", nn.functional.cross_entropy(self.layers(batch[0]), batch[1]))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "validation"}}


class Annealed(Lit):
    """What an epoch is trained with is set where it begins."""

    def on_train_epoch_start(self) -> None:
        self.weight = 0.5**self.current_epoch

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.weight * super().training_step(batch, batch_idx)


def train_with_lightning(
    kind: type[Lit] = Lit, loader: dict[str, Any] | None = None, patience: int = 100, **options: Any
) -> Outcome:
    seed_everything(0, verbose=False)
    stopping = EarlyStopping("validation", patience=patience, min_delta=1.0 if patience == 0 else 0.0)
    trainer = LightningTrainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[stopping, *options.pop("callbacks", []), LightningCallback()],
        **options,
    )
    train, validate = torch.utils.data.random_split(TensorDataset(*samples(72)), [52, 20])
    model = kind()
    trainer.fit(model, DataLoader(train, **(loader or {"batch_size": 8, "shuffle": True})), DataLoader(validate, 10))
    loop = trainer.fit_loop
    return {
        "weights": digest(model),
        "rate": trainer.optimizers[0].param_groups[0]["lr"],
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "batches": loop.epoch_loop.batch_progress.state_dict(),
        "logged": loop.epoch_loop._batches_that_stepped,
        "stopping": {name: str(value) for name, value in stopping.state_dict().items()},
    }


@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 2},
        {"max_epochs": 3, "accumulate_grad_batches": 2, "val_check_interval": 3},
        {"max_steps": 12, "check_val_every_n_epoch": None, "val_check_interval": 3},
    ],
    ids=["epochs", "accumulation", "steps"],
)
def test_lightning_goes_on_after_every_step(options: dict[str, Any], one_step_each: Callable[..., Outcome]) -> None:
    steady = train_with_lightning(**options)
    spot = one_step_each(lambda: train_with_lightning(**options))
    assert spot == steady


@pytest.mark.parametrize(
    "options",
    [
        lambda: {"loader": {"batch_size": 8, "sampler": Shuffling()}},
        lambda: {"loader": {"batch_size": 8, "shuffle": True, "generator": torch.Generator().manual_seed(3)}},
        lambda: {"kind": Annealed, "callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]},
    ],
    ids=["python's random numbers", "own generator", "what an epoch begins with"],
)
def test_lightning_s_epochs_are_what_they_were(
    options: Callable[[], dict[str, Any]], one_step_each: Callable[..., Outcome]
) -> None:
    steady = train_with_lightning(max_epochs=3, **options())
    assert one_step_each(lambda: train_with_lightning(max_epochs=3, **options())) == steady


def test_lightning_stops_early_at_a_notice_too(one_step_each: Callable[..., Outcome]) -> None:
    steady = train_with_lightning(patience=0, max_epochs=3)
    assert steady["step"] == 14
    assert one_step_each(lambda: train_with_lightning(patience=0, max_epochs=3), stops_at=14) == steady


def train_with_accelerate(**options: Any) -> Outcome:
    torch.manual_seed(0)
    random.seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = DataLoader(TensorDataset(*samples(52)), **(options or {"batch_size": 8, "shuffle": True}))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    run = accelerate_adapter.attach(accelerator, model, optimizer, loader, scheduler)
    run.state.setdefault("batches", 0)
    for inputs, labels in run.batches(epochs=3):
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.state["batches"] += 1
        run.report(loss=loss.detach())
    rate = optimizer.param_groups[0]["lr"]
    return {"weights": digest(model), "rate": rate, "batches": run.state["batches"]}


@pytest.mark.parametrize(
    "options",
    [
        dict,
        lambda: {"batch_size": 8, "shuffle": True, "generator": torch.Generator().manual_seed(3)},
        lambda: {"batch_size": 8, "sampler": Shuffling()},
    ],
    ids=["global generator", "own generator", "python's random numbers"],
)
def test_accelerate_goes_on_after_every_step(
    options: Callable[[], dict[str, Any]], one_step_each: Callable[..., Outcome]
) -> None:
    steady = train_with_accelerate(**options())
    spot = one_step_each(lambda: train_with_accelerate(**options()))
    assert spot == steady
    assert spot["batches"] == 21


def test_a_loader_that_lost_its_generator_is_refused() -> None:
    data = TensorDataset(torch.zeros(8))
    order = order_of([DataLoader(data, shuffle=True, generator=torch.Generator())])
    with pytest.raises(ConfigError, match="have 0 generators, and had 1 at the checkpoint"):
        put_back(order, [DataLoader(data, shuffle=True)])


def test_a_stateful_loader_of_accelerate_s_is_refused() -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
    with pytest.raises(ConfigError, match="use_stateful_dataloader=True: leave it off"):
        accelerate_adapter.attach(accelerator, network(), None, [])


def test_a_trainer_that_can_t_go_on_is_refused(one_step_each: Callable[..., Outcome]) -> None:
    def program() -> Outcome:
        options = TrainingArguments(output_dir="trainer", report_to=[], use_cpu=True)
        trainer = Trainer(model_init=Classifier, args=options, train_dataset=Words(8))
        trainer.add_callback(TrainerCallback(trainer))
        trainer.train()
        return {}

    with pytest.raises(ConfigError, match=r"Trainer\(model=\.\.\.\)"):
        one_step_each(program)


def test_a_fit_without_an_end_is_refused(one_step_each: Callable[..., Outcome]) -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        one_step_each(lambda: train_with_lightning(max_epochs=-1))


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("[a-z]*.py")), ids=lambda path: path.name)
def test_an_adapter_has_fewer_than_a_hundred_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 100
