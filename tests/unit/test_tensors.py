"""One file of tensors, in the layout that the safetensors library reads and writes."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

from holdfast.checkpoint import tensors
from holdfast.checkpoint.state import TrainingState
from holdfast.errors import ConfigError, DamagedCheckpointError

DTYPES = list(tensors._dtypes())


def encoded(named: dict[str, torch.Tensor]) -> bytes:
    return b"".join(bytes(piece) for piece in tensors.encode(named))


def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern that fits, so that no conversion goes unseen."""
    count = torch.Size(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    if dtype is torch.bool:
        return (torch.arange(count) % 3 == 0).reshape(shape)
    return (torch.arange(count) * 37 % 251).to(torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return tensor.dtype, tensor.shape, raw


def test_every_dtype_of_torch_that_holds_parameters_is_known() -> None:
    assert len(DTYPES) == 16
    assert {torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool} <= set(DTYPES)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_we_write_the_safetensors_library_reads_to_the_bit(dtype: torch.dtype) -> None:
    written = {"vector": of(dtype, 5), "matrix": of(dtype, 3, 4), "scalar": of(dtype, *()), "empty": of(dtype, 0, 3)}
    read = safetensors.torch.load(encoded(written))
    assert {name: bits(tensor) for name, tensor in read.items()} == {name: bits(t) for name, t in written.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_the_safetensors_library_writes_we_read_to_the_bit(dtype: torch.dtype) -> None:
    written = {"b": of(dtype, 2, 3, 2), "a": of(dtype, 7), "scalar": of(dtype, *())}
    read = tensors.decode(safetensors.torch.save(written))
    assert {name: bits(tensor) for name, tensor in read.items()} == {name: bits(t) for name, t in written.items()}


def test_what_another_tool_says_about_its_file_is_no_tensor() -> None:
    data = safetensors.torch.save({"a": torch.ones(2)}, metadata={"format": "pt"})
    assert list(tensors.decode(data)) == ["a"]


def test_no_tensors_make_a_file_too() -> None:
    assert tensors.decode(encoded({})) == {}
    assert safetensors.torch.load(encoded({})) == {}


def test_the_data_begins_at_a_multiple_of_64_bytes() -> None:
    for name in ("a", "a" * 17, "ä"):
        header, *_ = tensors.encode({name: torch.ones(3)})
        assert len(header) % 64 == 0


def test_tensors_that_were_read_share_no_memory() -> None:
    data = encoded({"a": torch.zeros(4), "b": torch.zeros(4)})
    read = tensors.decode(data)
    read["a"].fill_(1)
    assert read["b"].sum() == 0
    assert tensors.decode(data)["a"].sum() == 0


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
def test_a_damaged_file_is_said_to_be_one(damage) -> None:
    data = encoded({"a": torch.ones(3)})
    with pytest.raises(DamagedCheckpointError):
        tensors.decode(damage(data))


def test_a_tensor_that_no_file_can_hold_is_refused_when_it_is_attached() -> None:
    """Not in the background after the first hour, again and again."""
    for tensor in (torch.ones(2, dtype=torch.complex128), torch.ones(2, 2).to_sparse()):
        with pytest.raises(ConfigError, match=r"user\.mask"):
            TrainingState({}, {"mask": tensor}).copy()


def test_a_copy_shares_no_memory_with_the_training() -> None:
    model = torch.nn.Linear(2, 2)
    tree, copies = TrainingState({"model": model}, {"t": torch.zeros(2, 3).T}).copy()
    before = {name: bits(tensor) for name, tensor in copies.items()}
    with torch.no_grad():
        model.weight.fill_(7)
    assert {name: bits(tensor) for name, tensor in copies.items()} == before
    assert "components.model.weight" in copies and tree["user"] == {"t": {"$tensor": "user.t"}}
