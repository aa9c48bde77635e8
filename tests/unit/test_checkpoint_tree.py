"""Training state as JSON and back: not a bit, a type or a key is lost, and nothing is pickled."""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from holdfast.checkpoint.tree import RESERVED, flatten, unflatten
from holdfast.errors import ConfigError, DamagedCheckpointError


@dataclass(frozen=True)
class Tensor:
    """Stands for a tensor: a leaf that JSON does not hold."""

    content: int


def there_and_back(value: Any) -> Any:
    kept: dict[str, Tensor] = {}

    def take(path: str, leaf: Any) -> str:
        if not isinstance(leaf, Tensor):
            return ""
        while path in kept:
            path += "+"
        kept[path] = leaf
        return path

    text = json.dumps(flatten(value, "state", take), allow_nan=False)
    return unflatten(json.loads(text), kept.__getitem__)


def same(one: Any, other: Any) -> bool:
    """Equal in type, in bits and in order; any NaN equals any other."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, numpy.ndarray | numpy.generic):
        return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one), list(other)) and same(list(one.values()), list(other.values()))
    return one == other


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=40)
arrays = st_numpy.arrays(
    st_numpy.boolean_dtypes()
    | st_numpy.integer_dtypes(endianness="?")
    | st_numpy.floating_dtypes(endianness="?")
    | st_numpy.complex_number_dtypes()
    | st_numpy.datetime64_dtypes(),
    st_numpy.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
plain_keys = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
keys = plain_keys | st.sampled_from(sorted(RESERVED)) | st.tuples(plain_keys, plain_keys)
values = st.recursive(
    scalars | arrays | st.builds(Tensor, st.integers(0, 9)),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5) | st.sampled_from(sorted(RESERVED)), inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
    ),
    max_leaves=20,
)


@given(values)
def test_any_state_comes_back_as_it_was(value: Any) -> None:
    assert same(there_and_back(value), value)


@given(st.floats())
def test_a_float_comes_back_to_the_bit(value: float) -> None:
    assert same(there_and_back({"loss": value}), {"loss": value})


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), -0.0, 5e-324, 0.1 + 0.2, 1.7976931348623157e308])
def test_the_awkward_floats_come_back_too(value: float) -> None:
    assert struct.pack("d", there_and_back(value)) == struct.pack("d", value)
    assert math.isnan(there_and_back(float("nan")))


def test_what_optimizers_have_and_json_has_not_comes_back() -> None:
    state = {
        "state": {0: {"exp_avg": Tensor(1), "step": 3}, 1: {"exp_avg": Tensor(2), "step": 4}},
        "param_groups": [{"betas": (0.9, 0.999), "params": [0, 1]}],
    }
    assert same(there_and_back(state), state)


def test_the_number_1_and_the_text_1_stay_two_keys() -> None:
    assert there_and_back({1: "number", "1": "text"}) == {1: "number", "1": "text"}


def test_a_dict_that_looks_like_our_own_marks_is_taken_as_it_is() -> None:
    for mark in RESERVED:
        assert there_and_back({mark: [1, 2]}) == {mark: [1, 2]}


def test_tensors_whose_paths_look_alike_stay_apart() -> None:
    state = {"a": {"b": Tensor(1)}, "a.b": Tensor(2), 0: Tensor(3), "0": Tensor(4)}
    assert there_and_back(state) == state


def test_a_numpy_array_shares_no_memory_and_may_be_written() -> None:
    array = numpy.arange(4)
    back = there_and_back(array)
    back[0] = 9
    assert list(array) == [0, 1, 2, 3]


def test_an_ordered_dict_keeps_its_order() -> None:
    assert list(there_and_back(OrderedDict(z=1, a=2))) == ["z", "a"]


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({"model": {"hook": print}}, "state.model.hook is a builtins.builtin_function_or_method"),
        ({"a": [1, {2, 3}]}, "state.a.1 is a builtins.set"),
        ({"a": (0, object())}, "state.a.1 is a builtins.object"),
        ({"a": numpy.array([object()])}, "state.a is a NumPy array of Python objects"),
        ({"a": {b"key": 1}}, "state.a has a key of type bytes"),
        ({"a": 1j}, "state.a is a builtins.complex"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_its_path(value: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        there_and_back(value)
    assert named in str(caught.value)


def test_a_checkpoint_that_smuggles_in_python_objects_is_refused() -> None:
    array = {"$array": {"dtype": "|O", "shape": [1], "scalar": False, "data": "AAAAAAAAAAA="}}
    with pytest.raises(DamagedCheckpointError):
        unflatten(array, lambda path: None)
