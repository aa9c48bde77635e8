"""A state as one image, in the layout that the safetensors library reads and writes."""

from __future__ import annotations

from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from holdfast.checkpoint.image import ITEM_BYTES, Spec, plan, read_places
from holdfast.checkpoint.snapshot import Snapshot, Snapshots
from holdfast.checkpoint.state import TrainingState
from holdfast.checkpoint.tensors import as_bytes, dtype_names, dtypes
from holdfast.errors import ConfigError, DamagedCheckpointError

DTYPES = list(dtype_names())


def encoded(named: dict[str, torch.Tensor]) -> bytes:
    """The image that a snapshot of these makes."""
    offered: list[Snapshot] = []
    snapshots = Snapshots(TrainingState({}, dict(named)), offered.append, lambda slots: None)
    snapshots.take(1, {})
    slot = offered[0].slot
    slot.take(wait=True)
    return bytes(slot.image())


def decode(data: bytes) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, place in read_places(data, len(data)).items():
        raw = torch.tensor(list(data[place.start : place.stop]), dtype=torch.uint8)
        tensors[name.removeprefix("user.")] = raw.view(dtypes()[place.spec.dtype]).reshape(place.spec.shape)
    return tensors


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern that fits, so that no conversion goes unseen."""
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    if dtype is torch.bool:
        return (torch.arange(count) % 3 == 0).reshape(shape)
    return (torch.arange(count) * 37 % 251).to(torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    raw = as_bytes(tensor.contiguous()).numpy().tobytes() if tensor.numel() else b""
    return tensor.dtype, tensor.shape, raw


def test_every_dtype_of_torch_that_holds_parameters_is_known() -> None:
    assert set(dtypes()) == set(ITEM_BYTES)
    assert all(torch.empty(0, dtype=dtype).element_size() == ITEM_BYTES[name] for name, dtype in dtypes().items())
    assert {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool} <= set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_we_write_the_safetensors_library_reads_to_the_bit(dtype: torch.dtype) -> None:
    written = {"vector": of(dtype, 5), "matrix": of(dtype, 3, 4), "scalar": of(dtype, *()), "empty": of(dtype, 0, 3)}
    read = safetensors.torch.load(encoded(written))
    assert {name: bits(tensor) for name, tensor in read.items()} == {
        f"user.{name}": bits(tensor) for name, tensor in written.items()
    } | {"random.torch": bits(torch.get_rng_state())}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_safetensors_library_writes_we_read_to_the_bit(dtype: torch.dtype) -> None:
    written = {"b": of(dtype, 2, 3, 2), "a": of(dtype, 7), "scalar": of(dtype, *())}
    read = decode(safetensors.torch.save(written))
    assert {name: bits(tensor) for name, tensor in read.items()} == {name: bits(t) for name, t in written.items()}


def test_what_another_tool_says_about_its_file_is_no_tensor() -> None:
    data = safetensors.torch.save({"a": torch.ones(2)}, metadata={"format": "pt"})
    assert list(decode(data)) == ["a"]


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.tuples(st.sampled_from(sorted(ITEM_BYTES)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=8,
    )
)
def test_no_element_is_crooked_and_no_byte_is_left_out(named: dict[str, Any]) -> None:
    specs = {name: Spec(dtype, tuple(shape)) for name, (dtype, shape) in named.items()}
    image = plan(specs)
    assert len(image.header) % 64 == 0
    end = len(image.header)
    for name, place in sorted(image.places.items(), key=lambda item: (item[1].start, item[1].stop)):
        assert place.start == end and place.start % ITEM_BYTES[specs[name].dtype] == 0
        end = place.stop
    assert end == image.size_bytes
    assert read_places(image.header, image.size_bytes) == dict(image.places)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:5],
        lambda data: data[:40],
        lambda data: data[:-1],
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data.replace(b'"F32"', b'"F99"'),
        lambda data: data.replace(b"[3]", b"[4]"),
        lambda data: b"\x02\0\0\0\0\0\0\0[]",
        lambda data: b"\x07\0\0\0\0\0\0\0{\"a\":1}",
    ],
)  # fmt: skip
def test_a_damaged_file_is_said_to_be_one(damage: Any) -> None:
    data = encoded({"a": torch.ones(3)})
    with pytest.raises(DamagedCheckpointError):
        decode(damage(data))


def test_a_tensor_that_no_file_can_hold_is_refused_when_it_is_attached() -> None:
    """Not in the background after the first hour, again and again."""
    for tensor in (torch.ones(2, dtype=torch.complex128), torch.ones(2, 2).to_sparse()):
        with pytest.raises(ConfigError, match=r"user\.mask"):
            TrainingState({}, {"mask": tensor}).collect()
