"""A small network that reads handwritten digits, in TensorFlow, checkpointed with tf.train.CheckpointManager.

Runs as it is (`pip install tensorflow-cpu`), and on spot machines without a change:
    python examples/adapters/tensorflow/train.py
    python -m flows train examples/adapters/tensorflow/job.yaml

Each folder holds one checkpoint; that only the newest three are kept, as the manager would, is the job's max_to_keep.
"""

import argparse
import hashlib
import os
import signal
import tempfile
from pathlib import Path

import tensorflow as tf
from sklearn.datasets import load_digits

FOLDER = Path(os.environ.get("HOLDFAST_CHECKPOINT_DIRECTORY") or tempfile.mkdtemp())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    arguments = options.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.keras.utils.set_random_seed(0)
    tf.config.experimental.enable_op_determinism()

    digits = load_digits()
    images, labels = tf.constant(digits.data / 16, tf.float32), tf.constant(digits.target)
    model = tf.keras.Sequential([tf.keras.layers.Dense(128, "relu"), tf.keras.layers.Dense(10)])
    model.build((None, 64))
    optimizer = tf.keras.optimizers.Adam(2e-3)
    optimizer.build(model.trainable_variables)
    done = tf.Variable(0, dtype=tf.int64)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer, done=done)
    if folder := os.environ.get("HOLDFAST_RESUME_DIRECTORY"):
        checkpoint.restore(tf.train.latest_checkpoint(folder)).assert_consumed()

    def save(step: int) -> None:
        staged = FOLDER / f"{step}.tmp"
        tf.train.CheckpointManager(checkpoint, str(staged), max_to_keep=3).save(step)
        staged.rename(FOLDER / str(step))  # the rename says: complete

    @tf.function
    def train(step: tf.Tensor) -> tf.Tensor:
        # Everything random is a function of the step: after a resume, what comes is what would have come.
        seed = tf.stack([tf.constant(1, tf.int64), step])
        chosen = tf.random.stateless_uniform([32], seed, 0, 1500, tf.int32)
        keep = tf.cast(tf.random.stateless_uniform([32, 128], seed + 1) < 0.8, tf.float32) / 0.8
        with tf.GradientTape() as tape:
            scores = model.layers[1](model.layers[0](tf.gather(images, chosen)) * keep)
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.gather(labels, chosen), scores)
            loss = tf.reduce_mean(losses)
        variables = model.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        done.assign_add(1)
        return loss

    asked_to_leave: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_leave.append(number))
    while (step := int(done)) < arguments.steps:
        loss, step = train(tf.constant(step, tf.int64)), step + 1
        if step % arguments.every == 0 or step == arguments.steps or asked_to_leave:
            print(f"step {step}: loss {loss:.3f}", flush=True)
            save(step)
        if asked_to_leave:
            raise SystemExit(0)

    right = tf.equal(tf.argmax(model(images[1500:]), 1), labels[1500:])
    digest = hashlib.sha256(b"".join(variable.numpy().tobytes() for variable in model.variables))
    print(f"test accuracy {tf.reduce_mean(tf.cast(right, tf.float32)):.3f} after {step} steps")
    print(f"weights {digest.hexdigest()}")


if __name__ == "__main__":
    main()
