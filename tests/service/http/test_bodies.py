import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from models_store.manifest import InputSpec
from service.http import bodies
from service.http.errors import BadRequestError, MediaTypeError, TooLargeError
from service.http.images import Encoded, Limits

SPEC = InputSpec(shape=(1, 2, 2))
LIMITS = Limits(rows=10, bytes=10**6, pixels=10_000)
pixels = np.array([[0, 51], [102, 255]], np.uint8)


def read_request(content_type, query, body):
    return bodies.read_request(content_type, query, body, [SPEC], LIMITS.rows)


def images_of(asked):
    found = asked.open(SPEC, LIMITS)
    return found.decode() if isinstance(found, Encoded) else found


def png():
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def npy():
    stream = io.BytesIO()
    np.save(stream, (pixels / 255)[None, None])
    return stream.getvalue()


def json_of(field, value):
    import orjson

    return orjson.dumps({field: value})


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", json_of("inputs", (pixels / 255)[None, None].tolist())),
        ("Application/JSON; charset=utf-8", json_of("images", [base64.b64encode(png()).decode()])),
        ("application/x-npy", npy()),
        ("image/png", png()),
    ],
)
def test_the_same_pixels_are_the_same_images_in_every_form(content_type, body):
    found = images_of(read_request(content_type, [], body))
    assert found.tolist() == (pixels / 255).astype(np.float32)[None, None].tolist()


def test_options_come_in_the_json_body_or_in_the_query():
    body = b'{"inputs": [1], "ensemble": "a", "mode": "average", "members": true}'
    for asked in (
        read_request("application/json", [], body),
        read_request("image/png", [("ensemble", "a"), ("mode", "average"), ("members", "true")], png()),
    ):
        assert (asked.options.ensemble, asked.options.mode, asked.options.members) == ("a", "average", True)
    plain = read_request("application/x-npy", [], npy()).options
    assert (plain.ensemble, plain.mode, plain.members) == (None, None, False)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"inputs": NaN}', "not JSON"),
        (b'{"inputs": [1]} x', "not JSON"),
        (b'\xff{"inputs": [1]}', "not JSON"),
        (b"[1]", "JSON list"),
        (b"null", "JSON NoneType"),
        (b"{}", "one of `inputs`, `images` and `texts`"),
        (b'{"inputs": [1], "images": ["a"]}', "one of `inputs`, `images` and `texts`"),
        (b'{"inputs": null}', "one of `inputs`, `images` and `texts`"),
        (b'{"inputs": [], "extra": 1}', "'extra'"),
        (b'{"inputs": 1}', "'inputs'"),
        (b'{"inputs": [], "mode": "any"}', "'mode'"),
        (b'{"inputs": [], "members": "yes"}', "'members'"),
        (b'{"inputs": [], "members": 1}', "'members'"),
        (b'{"inputs": [], "ensemble": 5}', "'ensemble'"),
        (b'{"inputs": [], "ensemble": "' + b"a" * 65 + b'"}', "'ensemble'"),
        (b'{"inputs": [1], "inputs": [2]}', "'inputs' is given twice"),
        (b'{"inputs": [1], "\\u0069nputs": [2]}', "'inputs' is given twice"),
        (b'{"ensemble": "a", "inputs": [2], "ensemble": "b"}', "'ensemble' is given twice"),
        (b'{"inputs": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "not JSON"),
        (b'{"inputs": ' + b'{"a":' * 1_000 + b"1" + b"}" * 1_001, "."),
        (b'{"inputs": [[[[0.5, "' + b"a" * 300_000 + b'"]]]]}', "not a number"),
        (b'{"inputs": [[[[0.5, true]]]]}', "not a number"),
        (b'{"inputs": [[[[0.5, {"a": 1}]]]]}', "not a number"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(1_000)) + b"}", "'0' is unknown"),
        (b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}", "more strings than 10"),
        (b'{"inputs": [' + b",".join([b"[[]]"] * 100_000) + b"]}", "more lists than a request"),
        (b'{"inputs": ' + b" " * 100_000 + b"[[[[0.5, 0.5], [0.5, 0.5]]]", "not closed"),
        (b'{"inputs": [0' + b", 0" * 100_000 + b"]}", "not a list of images"),
        (b'{"images": [' + b"1," * 100_000 + b"1]}", "an array in a field other"),
        (b'{"images": "abcd"}', "'images'"),
        (b'{"images": [1]}', r"'images\.0'"),
        (b'{"images": ["http://127.0.0.1/a.png"]}', "URLs are not fetched"),
        (b'{"images": ["data:image/png;base64,AAAA"]}', "not base64"),
        (b'{"images": ["\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9"]}', "not base64"),
    ],
)
def test_bodies_that_are_no_request_are_refused(body, told):
    with pytest.raises(BadRequestError, match=told):
        read_request("application/json", [], body)


def test_words_and_quotes_elsewhere_are_no_pixels():
    body = b'{"inputs": [1], "members": true, "ensemble": "true-false"}'
    assert read_request("application/json", [], body).options.ensemble == "true-false"


def test_a_colon_in_a_name_is_no_duplicate():
    assert read_request("application/json", [], b'{"inputs": [1], "ensemble": "a:b"}').options.ensemble == "a:b"


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ([("extra", "1")], "'extra'"),
        ([("members", "perhaps")], "'members'"),
        ([("mode", "any")], "'mode'"),
        ([("members", "true"), ("members", "false")], "given twice"),
    ],
)
def test_queries_that_are_no_options_are_refused(query, told):
    with pytest.raises(BadRequestError, match=told):
        read_request("image/png", query, png())


def test_a_json_request_has_no_query():
    with pytest.raises(BadRequestError, match="go into the body"):
        read_request("application/json", [("ensemble", "a")], b'{"inputs": [1]}')


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/vnd.bentoml+pickle", "image/gif"])
def test_other_media_types_are_refused(content_type):
    with pytest.raises(MediaTypeError, match="application/x-npy"):
        read_request(content_type, [], b"{}")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b'{"texts": [' + b"[" * 100_000, "more lists than a request with `texts`"),
        (b'{"texts": ["' + b"a" * 100_000 + b'"' + b',"b"' * 1000 + b"]}", "texts in one request"),
        (b'{"texts": ["' + b"a" * 100_000 + b'"], "x": ' + b'{"a":' * 1000 + b"1" + b"}" * 1001, "more lists"),
    ],
)
def test_a_large_body_with_texts_is_bounded_before_it_is_parsed(body, told):
    with pytest.raises((BadRequestError, TooLargeError), match=told):
        read_request("application/json", [], body)


def test_marks_within_texts_do_not_count():
    texts = ['[{,"' * 10_000 + "\\", '\\\\"[', 'x"' * 3] * 2
    asked = read_request("application/json", [], json.dumps({"texts": texts}).encode())
    assert asked.texts == texts


def test_a_form_is_answered_with_what_to_send_instead():
    with pytest.raises(MediaTypeError, match=r"curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg'"):
        read_request("multipart/form-data; boundary=x", [], b"--x")


def encoded(kind):
    content = io.BytesIO()
    Image.new("L", (2, 2), 100).save(content, kind, lossless=True)
    return content.getvalue()


@pytest.mark.parametrize(("kind", "media_types"), [
    ("PNG", ["image/png", "image/x-png"]), ("JPEG", ["image/jpeg", "image/jpg", "image/pjpeg"]), ("WEBP", ["image/webp"]),
])  # fmt: skip
def test_an_image_is_read_under_every_name_of_its_type_and_without_one(kind, media_types):
    for media_type in [*media_types, "application/octet-stream"]:
        found = read_request(media_type, [], encoded(kind)).open(SPEC, LIMITS).decode()
        assert found == pytest.approx(np.full((1, 1, 2, 2), 100 / 255), abs=0.02)


def test_an_array_is_read_without_the_name_of_its_type():
    content = io.BytesIO()
    np.save(content, np.full((1, 1, 2, 2), 0.5, np.float32))
    assert read_request("application/octet-stream", [], content.getvalue()).open(SPEC, LIMITS).shape == (1, 1, 2, 2)
    with pytest.raises(MediaTypeError, match="application/octet-stream"):
        read_request("application/octet-stream", [], b"GIF89a")
