import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http.errors import BadRequestError, TooLargeError
from service.oip import tensors
from service.oip.tensors import BYTES, DATATYPES, Tensor

utils = pytest.importorskip("tritonclient.utils")
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@given(st.sampled_from(sorted(DATATYPES)), shapes, st.data())
def test_raw_bytes_are_those_of_the_client_library(datatype, shape, data):
    count = int(np.prod(shape)) * DATATYPES[datatype].itemsize
    raw = data.draw(st.binary(min_size=count, max_size=count))
    if datatype == "BOOL":
        raw = bytes(one & 1 for one in raw)
    read = tensors.from_raw("x", datatype, shape, raw)
    assert isinstance(read.values, np.ndarray)
    assert read.values.dtype == utils.triton_to_np_dtype(datatype)
    assert Tensor.of("x", datatype, read.values).raw() == raw


@given(st.lists(st.binary(max_size=20), min_size=1, max_size=10))
def test_elements_of_bytes_are_those_of_the_client_library(elements):
    raw = utils.serialize_byte_tensor(np.array(elements, object)).item()
    read = tensors.from_raw("x", BYTES, (len(elements),), raw)
    assert read.values == elements
    assert read.raw() == raw


@given(st.lists(st.binary(max_size=5), max_size=5), st.binary(min_size=1, max_size=3), st.integers(0, 6))
def test_elements_that_do_not_fill_the_bytes_are_refused(elements, more, count):
    raw = b"".join(len(one).to_bytes(4, "little") + one for one in elements)
    with pytest.raises(BadRequestError, match="BYTES"):
        tensors.from_raw("x", BYTES, (count,), raw + more[:3])


@given(shapes, st.data())
def test_flat_and_nested_lists_are_the_same_tensor(shape, data):
    count = int(np.prod(shape))
    flat = data.draw(st.lists(st.floats(-1e6, 1e6, width=32) | st.integers(-100, 100), min_size=count, max_size=count))
    nested = np.array(flat, object).reshape(shape).tolist()
    one, other = (tensors.from_values("x", "FP32", shape, values) for values in (flat, nested))
    assert np.array_equal(one.values, other.values)
    assert np.array_equal(one.values, np.array(flat, np.float32).reshape(shape))


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("INT8", [128]),
        ("UINT8", [-1]),
        ("INT64", [2**63]),
        ("UINT64", [2**64]),
        ("BOOL", [1]),
        ("INT32", [0.5]),
        ("FP32", [True]),
    ],
)
def test_a_value_that_its_type_cannot_hold_is_refused(datatype, values):
    with pytest.raises(BadRequestError, match=datatype):
        tensors.from_values("x", datatype, (1,), values)


def test_elements_are_bounded_before_they_are_read():
    tensors.check_form("x", BYTES, [5], 5)
    tensors.check_form("x", "FP32", [6, 2], 5)  # numbers are bounded by their bytes
    with pytest.raises(TooLargeError, match="at most 5"):
        tensors.check_form("x", BYTES, [6], 5)
