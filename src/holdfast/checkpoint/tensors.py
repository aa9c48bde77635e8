"""Elements of tensors by the names that the safetensors layout has for them."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def dtype_names() -> dict[Any, str]:
    """torch.dtype -> name."""
    import torch

    names = {
        "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
        "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8",
        "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64",
    }  # fmt: skip
    return {getattr(torch, torch_name): name for torch_name, name in names.items() if hasattr(torch, torch_name)}


@functools.cache
def dtypes() -> dict[str, Any]:
    """Name -> torch.dtype."""
    return {name: dtype for dtype, name in dtype_names().items()}


def can_encode(tensor: Any) -> bool:
    """Is it dense, and of a type that the layout knows?"""
    import torch

    return tensor.layout is torch.strided and tensor.dtype in dtype_names()


def as_bytes(tensor: Any) -> Any:
    """The same memory as uint8[size_bytes], of a contiguous tensor."""
    import torch

    return tensor.reshape(-1).view(torch.uint8)
