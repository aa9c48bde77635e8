"""A small network that reads scikit-learn's handwritten digits, trained by Lightning.

Runs as it is, and on spot machines without a change:
    python examples/adapters/lightning/train.py
    python -m flows train examples/adapters/lightning/job.yaml
"""

import argparse
import hashlib

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from holdfast.adapters.lightning import HoldfastCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
        )

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.layers(images), labels)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.layers(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--epochs", type=int, default=10)
    options.add_argument("--batch", type=int, default=32)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)

    digits = load_digits()
    data = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train, test = torch.utils.data.random_split(data, [1500, 297])
    model = Digits()
    trainer = Trainer(
        max_epochs=arguments.epochs,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        enable_checkpointing=False,  # Holdfast keeps what must survive; Lightning's own files are the machine's
        enable_progress_bar=False,
        logger=False,
        callbacks=[EarlyStopping("accuracy", mode="max", patience=arguments.epochs), HoldfastCallback()],
    )
    trainer.fit(model, DataLoader(train, arguments.batch, shuffle=True), DataLoader(test, 99))
    accuracy = trainer.validate(model, DataLoader(test, 99), verbose=False)[0]["accuracy"]

    digest = hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in model.state_dict().values()))
    print(f"accuracy {accuracy:.3f} after {trainer.global_step} steps")
    print(f"weights {digest.hexdigest()}")


if __name__ == "__main__":
    main()
