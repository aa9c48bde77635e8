"""A small network that reads scikit-learn's handwritten digits, in a loop written with Hugging Face Accelerate.

Runs as it is, and on spot machines without a change:
    python examples/adapters/accelerate/train.py
    python -m flows train examples/adapters/accelerate/job.yaml
"""

import argparse
import hashlib

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from holdfast.adapters.accelerate import attach


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--epochs", type=int, default=10)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    set_seed(0)

    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    loader = DataLoader(TensorDataset(images[:1500], labels[:1500]), 32, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=24 * arguments.epochs)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    run = attach(accelerator, model, optimizer, loader, scheduler)
    for batch_images, batch_labels in run.batches(arguments.epochs):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(batch_images), batch_labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.report(loss=loss)

    model = accelerator.unwrap_model(model).eval().cpu()
    with torch.no_grad():
        accuracy = (model(images[1500:]).argmax(1) == labels[1500:]).float().mean()
    digest = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values()))
    print(f"test accuracy {accuracy:.3f} after {arguments.epochs} epochs")
    print(f"weights {digest.hexdigest()}")


if __name__ == "__main__":
    main()
