"""Training state as JSON and tensors. Nothing is pickled: what is neither is refused, by its path.

JSON alone loses tuples, integer keys and the bits of floats, and optimizers have all three. So every value that JSON
would change is wrapped in an object with one reserved key.
"""

from __future__ import annotations

import base64
import math
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from holdfast.errors import ConfigError, DamagedCheckpointError

TENSOR, TUPLE, PAIRS, FLOAT, BYTES, ARRAY = "$tensor", "$tuple", "$pairs", "$float", "$bytes", "$array"
COUNTER = "$counter"  # MultiStepLR asks its milestones for `elements`, which a dict does not have
PLAIN = frozenset({type(None), bool, int})
RESERVED = frozenset({TENSOR, TUPLE, PAIRS, FLOAT, BYTES, ARRAY, COUNTER})


def flatten(value: Any, path: str, take_tensor: Callable[[str, Any], str]) -> Any:
    """`value` as JSON. `take_tensor(path, leaf)` keeps a leaf that is a tensor; the name it is kept under, or "".

    Two leaves may have one path (`{"a": {"b": x}, "a.b": y}`); their names must differ.

    Raises ConfigError naming the path and type of a leaf that can't be stored.
    """
    kind = type(value)
    if kind in PLAIN or isinstance(value, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {FLOAT: repr(value)}
    if isinstance(value, bytes):
        return {BYTES: base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [flatten(item, f"{path}.{index}", take_tensor) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return {TUPLE: [flatten(item, f"{path}.{index}", take_tensor) for index, item in enumerate(value)]}
    if isinstance(value, dict):
        is_counter = isinstance(value, Counter)
        if not is_counter and all(isinstance(key, str) for key in value) and not RESERVED & value.keys():
            return {key: flatten(item, f"{path}.{key}", take_tensor) for key, item in value.items()}
        pairs = []
        for key, item in value.items():
            if not isinstance(key, str | int | bool | float | tuple) and key is not None:
                raise ConfigError(f"{path} has a key of type {type(key).__name__}, which a checkpoint can't hold")
            pairs.append([flatten(key, f"{path}.<key>", take_tensor), flatten(item, f"{path}.{key}", take_tensor)])
        return {COUNTER if is_counter else PAIRS: pairs}
    if name := take_tensor(path, value):
        return {TENSOR: name}
    if (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.ndarray | numpy.generic):
        return _flatten_numpy(value, path, isinstance(value, numpy.generic))
    raise ConfigError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint can't hold; keep numbers, "
        "text, tensors, and lists, tuples and dicts of these"
    )


def unflatten(value: Any, tensor: Callable[[str], Any]) -> Any:
    """The inverse of `flatten`; `tensor(name)` returns the tensor that was kept under this name."""
    if isinstance(value, list):
        return [unflatten(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (kind := next(iter(value))) in RESERVED:
        content = value[kind]
        match kind:
            case "$tensor":
                return tensor(content)
            case "$tuple":
                return tuple(unflatten(item, tensor) for item in content)
            case "$pairs":
                return {unflatten(key, tensor): unflatten(item, tensor) for key, item in content}
            case "$counter":
                return Counter({unflatten(key, tensor): unflatten(count, tensor) for key, count in content})
            case "$float":
                return float(content)
            case "$bytes":
                return base64.b64decode(content)
            case "$array":
                return _unflatten_numpy(content)
    return {key: unflatten(item, tensor) for key, item in value.items()}


def _flatten_numpy(value: Any, path: str, scalar: bool) -> Any:
    if value.dtype.hasobject:
        raise ConfigError(f"{path} is a NumPy array of Python objects, which a checkpoint can't hold")
    if value.dtype.names:
        raise ConfigError(f"{path} is a NumPy array with fields, which a checkpoint can't hold; keep one array a field")
    data = base64.b64encode(value.tobytes()).decode()
    return {ARRAY: {"dtype": value.dtype.str, "shape": list(value.shape), "scalar": scalar, "data": data}}


def _unflatten_numpy(content: dict[str, Any]) -> Any:
    import numpy

    dtype = numpy.dtype(content["dtype"])
    if dtype.hasobject:
        raise DamagedCheckpointError("a NumPy array of Python objects is in no checkpoint of ours")
    array = numpy.frombuffer(base64.b64decode(content["data"]), dtype=dtype).reshape(content["shape"]).copy()
    return array[()] if content["scalar"] else array
