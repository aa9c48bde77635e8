"""Compressed images come back to the bit, and are made only where they shorten the time to durable."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint import compression
from holdfast.checkpoint.commits import PIECE_BYTES, CheckpointId, Checkpoints
from holdfast.checkpoint.compression import Gain
from holdfast.errors import DamagedCheckpointError
from holdfast.storage import DirectoryStore


def weights(size_bytes: int) -> memoryview:
    """As a trained layer has them: small numbers around zero."""
    torch.manual_seed(0)
    return memoryview(torch.randn(size_bytes // 4).mul_(0.02).numpy()).cast("B")


@given(st.binary(max_size=4000))
def test_any_bytes_come_back(data: bytes) -> None:
    back = bytearray(len(data))
    compression.decompress(compression.compress(data), memoryview(back))
    assert bytes(back) == data


def test_an_image_of_several_pieces_comes_back_and_takes_less_room(tmp_path: Path) -> None:
    image, checkpoint = weights(2 * PIECE_BYTES + 4004), CheckpointId(1, 10)
    store = DirectoryStore(tmp_path)
    checkpoints = Checkpoints(store, "run")
    ((name, entry),) = checkpoints.write_image(checkpoint, "state", image, compressed=True).items()
    assert len(entry["crc32"]) == 3 and entry["size_bytes"] < 0.9 * len(image) == 0.9 * entry["image_bytes"]
    # What it holds is summed up, not how it is stored: a run is compared with another whose link was faster.
    plain = checkpoints.write_image(checkpoint, "state", image)
    assert entry["crc32"] == plain["state"]["crc32"]
    for objects in ({name: entry}, plain):  # neither was written over the other
        checkpoints.publish(CheckpointId(1, 10), objects, {"kind": "state"})
        (written,) = objects
        assert checkpoints.read(checkpoint, checkpoints.manifest(checkpoint), written) == image
        store.delete(f"runs/run/checkpoints/{checkpoint}/manifest.json")


@pytest.mark.parametrize("place", [0, 100, 5000, -1])
def test_a_flipped_bit_is_found_and_its_piece_named(tmp_path: Path, place: int) -> None:
    store, checkpoint = DirectoryStore(tmp_path), CheckpointId(1, 10)
    checkpoints = Checkpoints(store, "run")
    objects = checkpoints.write_image(checkpoint, "state", weights(PIECE_BYTES), compressed=True)
    checkpoints.publish(checkpoint, objects, {"kind": "state"})
    (name,) = objects
    key = f"runs/run/checkpoints/{checkpoint}/{name}"
    data = bytearray(store.get(key))
    data[place] ^= 4
    store.put(key, bytes(data))
    with pytest.raises(DamagedCheckpointError, match=r"piece 0"):
        checkpoints.read(checkpoint, checkpoints.manifest(checkpoint), name)


def test_it_pays_on_slow_links_only() -> None:
    gain = Gain(ratio=1.24, bytes_per_second=780e6)
    assert [gain.pays(speed) for speed in (50e6, 150e6, 750e6, 3e9)] == [True, True, False, False]
    assert not Gain(ratio=1.02, bytes_per_second=2e9).pays(10e6)


def test_what_is_measured_is_the_state_s_own() -> None:
    assert compression.measure(weights(3 * PIECE_BYTES), PIECE_BYTES).ratio > 1.1
    noise = compression.measure(memoryview(os.urandom(PIECE_BYTES)), PIECE_BYTES)
    assert noise.ratio < 1.01 and noise.bytes_per_second > 0
