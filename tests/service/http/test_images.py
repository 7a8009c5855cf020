import io

import numpy as np
import pytest
from PIL import Image

from models_store.manifest import InputSpec
from service.http.errors import BadRequestError, TooLargeError
from service.http.images import Limits, from_lists, from_npy, open_encoded

SPEC = InputSpec(shape=(1, 2, 2))
LIMITS = Limits(rows=10, bytes=10**6, pixels=10_000)
good = [[[[0.0, 1.0], [0.5, 0.25]]]]


def from_encoded(files, where, spec, limits):
    return open_encoded(files, where, spec, limits).decode()


def saved(array, **options):
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def encoded(size=(2, 2), kind="PNG", value=51):
    stream = io.BytesIO()
    Image.new("L", size, value).save(stream, kind)
    return stream.getvalue()


def test_lists_become_float32_images():
    found = from_lists(good, SPEC, LIMITS)
    assert (found.dtype, found.tolist()) == (np.float32, good)


def test_whole_numbers_are_numbers():
    assert from_lists([[[[0, 1], [1, 0]]]], SPEC, LIMITS).dtype == np.float32


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([], "at least one image"),
        (good[0], "batch axis"),
        ([[[[0.0, 1.0]]]], "shape"),
        ([[[[0.0, 1.0], [0.5]]]], "ragged"),
        ([[[[0.0, 1.0], [0.5, None]]]], "not a number"),
        ([[[[0.0, 1.0], [0.5, "x"]]]], "not a number"),
        ([[[[True, False], [True, True]]]], "not a number"),
        ([[[[0.0, 1.0], [0.5, {}]]]], "not a number"),
        ([[[[0.0, 255.0], [0.5, 0.5]]]], "Divide bytes by 255"),
        ([[[[0.0, -0.1], [0.5, 0.5]]]], r"\[0, 1\]"),
        ([[[[0.0, 10**400], [0.5, 0.5]]]], "."),
        ([[[[0.0, float("nan")], [0.5, 0.5]]]], r"\[0, 1\]"),
        ([[[[0.0, float("inf")], [0.5, 0.5]]]], r"\[0, 1\]"),
        (["abc"], "not a number"),
    ],
)
def test_every_other_list_is_refused_with_the_reason(inputs, told):
    with pytest.raises(BadRequestError, match=told):
        from_lists(inputs, SPEC, LIMITS)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "f2", "f8", "u1", "i8"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_every_real_type_and_order_are_read(dtype, order):
    array = np.asarray(np.array([[[[0, 1], [1, 0]]], [[[1, 1], [0, 0]]]]), dtype=dtype, order=order)
    found = from_npy(saved(array), SPEC, LIMITS)
    assert (found.dtype, found.tolist(), found.flags.c_contiguous) == (np.float32, array.tolist(), True)


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_arrays_of_every_file_version_are_read(version):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.array(good, np.float32), version=version)
    assert from_npy(stream.getvalue(), SPEC, LIMITS).tolist() == good


array = np.array(good, np.float32)


def of_shape(shape, data=b""):
    """An .npy file whose header has a shape that numpy itself would not write."""
    header = str({"descr": "<f4", "fortran_order": False, "shape": shape}).ljust(500).encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not a file written by numpy.save"),
        (b"x" * 100, "not a file written by numpy.save"),
        (saved(array)[:30], "not a file written by numpy.save"),
        (saved(array)[:-1], "cut off"),
        (saved(array) + b"x", "cut off"),
        (saved(array).replace(b"(1, 1, 2, 2)", b"(9, 9, 9, 9)"), "cut off"),
        (saved(array).replace(b"(1, 1, 2, 2)", b"(-1,-1,2,2) "), "negative"),
        (
            b"\x93NUMPY\x01\x00\xd0\x0f"
            + (b"{'descr': '<f4', 'fortran_order': False, 'shape': (0x" + b"f" * 3900 + b",), }").ljust(4048),
            "absurd",
        ),
        (saved(array).replace(b"(1, 1, 2, 2)", b"(10**99,)   "), "not a file written by numpy.save"),
        (saved(array).replace(b"'<f4'", b"'<q9'"), "not a file written by numpy.save"),
        (saved(np.array([{}], object), allow_pickle=True), "Pickled objects are not read"),
        (saved(array.astype(bool)), "dtype is bool"),
        (saved(array.astype(complex)), "dtype is complex"),
        (saved(np.array(["a"])), "dtype is <U1"),
        (saved(np.zeros(2, [("a", "f4")])), "dtype is"),
        (saved(np.float32(1)), "shape"),
        (saved(array[0]), "batch axis"),
        (saved(array[:0]), "at least one image"),
        (of_shape((1,) * 65, bytes(4)), "has the shape"),
        (of_shape((0, 2**39, 2**39)), "has the shape"),
        (saved(array * 255), "Divide bytes by 255"),
        (saved(array * np.nan), r"\[0, 1\]"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"(" * 100, "longer than any array"),
        (b"\x93NUMPY\x01\x00\xff\x0f" + b"(" * 4095, "not a file written by numpy.save"),
    ],
)
def test_every_other_array_is_refused_with_the_reason(body, told):
    with pytest.raises(BadRequestError, match=told):
        from_npy(body, SPEC, LIMITS)


def test_encoded_images_become_floats():
    assert from_encoded([encoded(), encoded(kind="JPEG")], "", SPEC, LIMITS) == pytest.approx(
        np.full((2, 1, 2, 2), 0.2)
    )


def test_a_bad_file_is_told_by_its_number():
    with pytest.raises(BadRequestError, match=r"`images\[1\]`: not a readable PNG or JPEG"):
        from_encoded([encoded(), b"no"], "`images[{}]`", SPEC, LIMITS)
    with pytest.raises(BadRequestError, match="The body: the image cannot be decoded"):
        from_encoded([encoded((50, 50))[:60]], "The body", InputSpec(shape=(1, 2, 2), resize="stretch"), LIMITS)


def test_an_image_of_another_size_is_refused_before_it_is_decoded():
    with pytest.raises(BadRequestError, match="50 × 50 pixels"):
        from_encoded([encoded((50, 50))[:60]], "The body", SPEC, LIMITS)


def test_no_image_is_refused():
    with pytest.raises(BadRequestError, match="empty"):
        from_encoded([], "", SPEC, LIMITS)


def test_pixels_are_counted_over_all_images_before_any_is_decoded():
    with pytest.raises(TooLargeError, match="12000 pixels"):
        from_encoded([encoded((60, 100))[:60]] * 2, "", SPEC, LIMITS)


def test_too_many_images_are_refused_whatever_they_are():
    few = Limits(rows=2, bytes=10**6, pixels=10_000)
    for read, what in ((from_lists, good * 3), (from_npy, saved(np.array(good * 3)))):
        with pytest.raises(TooLargeError, match="at most 2"):
            read(what, SPEC, few)
    with pytest.raises(TooLargeError, match="at most 2"):
        from_encoded([b""] * 3, "", SPEC, few)


def test_images_that_would_grow_beyond_the_bytes_are_refused():
    with pytest.raises(TooLargeError, match="at most 2"):
        from_encoded([encoded()] * 3, "", SPEC, Limits(rows=10, bytes=32, pixels=10_000))
