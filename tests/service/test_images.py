import numpy as np
import pytest

from service.errors import BadRequestError, MediaTypeError, TooLargeError
from service.images import as_images, read_request

SHAPE = (1, 2, 2)
good = [[[[0.0, 1.0], [0.5, 0.25]]]]


def test_lists_become_float32_images():
    found = as_images(good, SHAPE, 10)
    assert found.dtype == np.float32
    assert found.tolist() == good


def test_whole_numbers_are_numbers():
    assert as_images([[[[0, 1], [1, 0]]]], SHAPE, 10).dtype == np.float32


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        ([], "at least one image"),
        (good[0], "batch axis"),
        ([[[[0.0, 1.0]]]], "shape"),
        ([[[[0.0, 1.0], [0.5]]]], "ragged"),
        ([[[[0.0, 1.0], [0.5, None]]]], "no number"),
        ([[[[0.0, 1.0], [0.5, "x"]]]], "no number"),
        ([[[[True, False], [True, True]]]], "no number"),
        ([[[[0.0, 1.0], [0.5, {}]]]], "no number"),
        ([[[[0.0, 255.0], [0.5, 0.5]]]], "Divide bytes by 255"),
        ([[[[0.0, -0.1], [0.5, 0.5]]]], r"\[0, 1\]"),
        ([[[[0.0, 10**400], [0.5, 0.5]]]], "."),
        ([[[[0.0, float("nan")], [0.5, 0.5]]]], r"\[0, 1\]"),
        ([[[[0.0, float("inf")], [0.5, 0.5]]]], r"\[0, 1\]"),
        (["abc"], "no number"),
    ],
)
def test_every_other_input_is_refused_with_the_reason(inputs, told):
    with pytest.raises(BadRequestError, match=told):
        as_images(inputs, SHAPE, 10)


def test_too_many_images_are_refused():
    with pytest.raises(TooLargeError, match="at most 2"):
        as_images(good * 3, SHAPE, 2)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"inputs": NaN}', "not JSON"),
        (b"[1]", "JSON list"),
        (b"null", "JSON NoneType"),
        (b"{}", "'inputs'"),
        (b'{"inputs": [], "extra": 1}', "'extra'"),
        (b'{"inputs": [], "mode": "random"}', "'mode'"),
        (b'{"inputs": [], "members": "yes"}', "'members'"),
        (b'{"inputs": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "not JSON"),
    ],
)
def test_bodies_that_are_no_request_are_refused(body, told):
    with pytest.raises(BadRequestError, match=told):
        read_request("application/json", body)


def test_parameters_of_the_media_type_are_ignored():
    assert read_request("Application/JSON; charset=utf-8", b'{"inputs": [1]}').inputs == [1]


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/vnd.bentoml+pickle"])
def test_other_media_types_are_refused(content_type):
    with pytest.raises(MediaTypeError):
        read_request(content_type, b"{}")
