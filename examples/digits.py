"""A small convolutional network that reads scikit-learn's handwritten digits.

Runs as it is (`python examples/digits.py`), and on spot machines without a change (`examples/digits.yaml`).
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import holdfast


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16  # [1797, 1, 8, 8]
    labels = torch.tensor(digits.target)
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = shuffled[:1437], shuffled[1437:]

    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = holdfast.ShuffledBatches(len(train), batch_size=32, seed=arguments.seed)

    run = holdfast.attach(model=model, optimizer=optimizer, batches=batches)
    for _ in run.steps(arguments.steps):
        chosen = train[batches.next()]
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.report(loss=loss)

    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean()
    print(f"test accuracy {accuracy.item():.3f} after {arguments.steps} steps")


if __name__ == "__main__":
    main()
