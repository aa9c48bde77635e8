"""Elements of tensors by the names that the safetensors layout has for them."""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

HUGE_PAGE_BYTES = 2 * 1024 * 1024
MADV_HUGEPAGE = 14  # linux/mman.h


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


def fresh(shape: tuple[int, ...], dtype: Any) -> Any:
    """CPU memory for a tensor, in huge pages where the kernel has them: their first touch takes a third of the time."""
    import torch

    tensor = torch.empty(shape, dtype=dtype)
    if sys.platform == "linux":
        begin = -(-tensor.data_ptr() // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        size = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - begin) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if size > 0:  # a kernel that refuses is no error
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), ctypes.c_int(MADV_HUGEPAGE))
    return tensor
