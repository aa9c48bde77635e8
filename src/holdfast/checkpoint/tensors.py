"""Tensors as one file in the safetensors layout: https://github.com/huggingface/safetensors#format

Eight bytes with the header's length, a JSON header with every tensor's type, shape and place, then the bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from holdfast.errors import DamagedCheckpointError

ALIGNMENT = 64


def _dtypes() -> dict[Any, str]:
    import torch

    names = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
        "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64",
    }  # fmt: skip
    return {getattr(torch, torch_name): name for torch_name, name in names.items() if hasattr(torch, torch_name)}


def can_encode(tensor: Any) -> bool:
    """Is it dense, and of a type that the layout knows?"""
    import torch

    return tensor.layout is torch.strided and tensor.dtype in _dtypes()


def encode(tensors: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """The file piece by piece, straight from the memory of contiguous CPU tensors."""
    import torch

    dtypes = _dtypes()
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} has dtype {tensor.dtype}, which the safetensors layout does not know")
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": dtypes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        if tensor.numel():
            yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def decode(data: bytes) -> dict[str, Any]:
    """Name -> tensor, each in memory of its own. Raises DamagedCheckpointError."""
    import torch

    by_name = {name: dtype for dtype, name in _dtypes().items()}
    try:
        (length,) = struct.unpack_from("<Q", data)
        header = json.loads(data[8 : 8 + length])
        body = memoryview(data)[8 + length :]
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":  # the layout's place for remarks; other tools make some
                continue
            start, end = entry["data_offsets"]
            raw = bytearray(body[start:end])
            flat = torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
            tensors[name] = flat.view(by_name[entry["dtype"]]).reshape(entry["shape"])
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedCheckpointError(f"not a safetensors file: {error}") from error
    return tensors
