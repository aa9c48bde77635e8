"""A small network that reads scikit-learn's handwritten digits, in plain JAX, checkpointed as folders.

Runs as it is, and on spot machines without a change:
    python examples/adapters/jax/train.py
    python -m flows train examples/adapters/jax/job.yaml
"""

import argparse
import hashlib
import os
import signal
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy
from sklearn.datasets import load_digits

Weights = dict[str, jax.Array]
FOLDER = Path(os.environ.get("HOLDFAST_CHECKPOINT_DIRECTORY") or tempfile.mkdtemp())


def save(step: int, state: Weights) -> None:
    staged = FOLDER / f"{step}.tmp"
    staged.mkdir()
    numpy.savez(staged / "state.npz", **state)
    staged.rename(FOLDER / str(step))  # the rename says: complete


def resume() -> tuple[int, Weights]:
    if folder := os.environ.get("HOLDFAST_RESUME_DIRECTORY"):
        with numpy.load(Path(folder, "state.npz")) as file:
            return int(os.environ["HOLDFAST_RESUME_STEP"]), {name: jnp.asarray(file[name]) for name in file.files}
    first, second = jax.random.split(jax.random.key(0))
    weights = {
        "first": jax.random.normal(first, (64, 128)) / 8,
        "second": jax.random.normal(second, (128, 10)) / 11,
    }
    return 0, {**weights, **{f"{name}_momentum": jnp.zeros_like(array) for name, array in weights.items()}}


@jax.jit
def train(step: int, state: Weights, images: jax.Array, labels: jax.Array) -> tuple[Weights, jax.Array]:
    # Everything random is a function of the step: after a resume, what comes is what would have come.
    choice, dropout = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
    batch = jax.random.randint(choice, (32,), 0, 1500)

    def loss(weights: Weights) -> jax.Array:
        hidden = jax.nn.relu(images[batch] @ weights["first"])
        hidden *= jax.random.bernoulli(dropout, 0.8, hidden.shape) / 0.8
        scores = jax.nn.log_softmax(hidden @ weights["second"])
        return -scores[jnp.arange(len(batch)), labels[batch]].mean()

    weights = {name: state[name] for name in ("first", "second")}
    value, slopes = jax.value_and_grad(loss)(weights)
    momenta = {name: 0.9 * state[f"{name}_momentum"] + slopes[name] for name in weights}
    changed = {name: weights[name] - 0.05 * momenta[name] for name in weights}
    return {**changed, **{f"{name}_momentum": array for name, array in momenta.items()}}, value


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    arguments = options.parse_args()

    digits = load_digits()
    images, labels = jnp.asarray(digits.data / 16, dtype=jnp.float32), jnp.asarray(digits.target)
    asked_to_leave: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_leave.append(number))

    step, state = resume()
    while step < arguments.steps:
        state, loss = train(step, state, images, labels)
        step += 1
        if step % arguments.every == 0 or step == arguments.steps or asked_to_leave:
            print(f"step {step}: loss {loss:.3f}")
            save(step, state)
        if asked_to_leave:
            raise SystemExit(0)

    guesses = (jax.nn.relu(images[1500:] @ state["first"]) @ state["second"]).argmax(1)
    digest = hashlib.sha256(b"".join(numpy.asarray(state[name]).tobytes() for name in sorted(state)))
    print(f"test accuracy {(guesses == labels[1500:]).mean():.3f} after {step} steps")
    print(f"weights {digest.hexdigest()}")


if __name__ == "__main__":
    main()
