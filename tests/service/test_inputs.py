"""Tables, signals and texts over HTTP, against the published ONNX files."""

import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

import modepath
from models_store.graphs.runtime import EnsembleSession
from models_store.inputs import fields, kinds
from models_store.manifest import InputSpec, TableField
from service.client import Client
from tests.onnx_members import of_features, of_tokens, publish
from tests.service.conftest import Server

FIELDS = [TableField(name="age"), TableField(name="colour", categories=["blue", "red"]), TableField(name="size")]
NAMED = [
    TableField(name="photo", shape=(1, 2, 2), low=0, high=1),
    TableField(name="file"),
    TableField(name="kind", categories=["a", "b"]),
]
SPECS = {
    "named": InputSpec(kind="features", shape=(7,), fields=NAMED),
    "table": InputSpec(kind="features", shape=(4,), low=-100, high=100, fields=FIELDS),
    "signal": InputSpec(kind="features", shape=(6, 50), missing="mean"),
    "text": InputSpec(kind="tokens", shape=(12,), vocabulary=30, open_length=True, tokenizer=True),
    "ids": InputSpec(kind="tokens", shape=(12,), vocabulary=30, open_length=True),
}
RNG = np.random.default_rng(0)
TABLE = [{"age": 31.5, "colour": "red", "size": 2}, {"age": -4, "colour": "blue", "size": 0.5}]
SIGNALS = RNG.normal(size=(5, 6, 50)).astype(np.float32)
TEXTS = [RNG.integers(1, 30, length).tolist() for length in (1, 12, 5, 3)]
POLICY = {"modes": ["average", "random", "keyed"], "probabilities": "exact"}


def of_letters():
    """A tokenizer whose words are a, b, …, with the ids 2, 3, …"""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"[PAD]": 0, "[UNK]": 1} | {chr(ord("a") + i): 2 + i for i in range(26)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return made.to_str().encode()


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    from models_store.store import Store

    store = Store(tmp_path_factory.mktemp("inputs") / "store")
    return {
        name: publish(
            store, name, spec=spec, member=of_tokens if spec.kind == "tokens" else of_features,
            tokenizer=of_letters() if spec.tokenizer else None,
        )
        for name, spec in SPECS.items()
    }  # fmt: skip


@pytest.fixture(scope="module")
def server(versions, tmp_path_factory):
    store = versions["table"].folder.parents[1]
    policies = {"*": {"modes": ["average", "random"], "probabilities": "exact"}, "text": POLICY}
    from models_store.store import Store

    found = Server(Store(store), tmp_path_factory.mktemp("served"), MODEPATH_POLICIES=json.dumps(policies))
    found.until(200)
    yield found
    found.stop()


def expected(version, inputs):
    session = EnsembleSession(version.folder, version.manifest, "cpu")
    return session.combine(session.member_probs(kinds.arranged(version.manifest.input, inputs))).mean_probs


def ask(server, name, inputs, **options):
    return httpx.post(server.url + "/predict", json={"inputs": inputs, "ensemble": name, **options})


def npy(server, name, array):
    content = io.BytesIO()
    np.save(content, array)
    headers = {"Content-Type": "application/x-npy"}
    return httpx.post(f"{server.url}/predict?ensemble={name}", content=content.getvalue(), headers=headers)


def probs(response):
    assert response.status_code == 200, response.text
    return np.array([row["probs"] for row in response.json()["predictions"]])


def test_a_row_with_named_fields_is_answered_as_its_features_are(server, versions):
    rows = fields.encode(TABLE, SPECS["table"])
    wanted = expected(versions["table"], rows)
    assert probs(ask(server, "table", TABLE)) == pytest.approx(wanted, abs=1e-5)
    assert probs(ask(server, "table", rows.tolist())) == pytest.approx(wanted, abs=1e-5)
    assert probs(npy(server, "table", rows)) == pytest.approx(wanted, abs=1e-5)
    with Client(server.url) as client:
        assert client.predict(TABLE, ensemble="table").probs == pytest.approx(wanted, abs=1e-5)
    assert modepath.ensemble.of_version(versions["table"]).predict(TABLE).probs == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"colour": "green"}, "row 1, field 'colour', has the unknown category 'green'"),
        ({"size": None}, "row 1, field 'size', is missing"),
        ({"age": "old"}, "row 1, field 'age', is 'old'; it must be a number"),
        ({"age": 101}, "row 1, field 'age', is 101; it must be a number from -100 to 100"),
        ({"extra": 1}, "row 1 has the unknown field 'extra'"),
    ],
)
def test_what_is_wrong_with_a_row_is_a_400_that_names_the_field(server, change, told):
    answer = ask(server, "table", [TABLE[0], {**TABLE[1], **change}])
    assert answer.status_code == 400
    assert told in answer.json()["error"]


def test_a_missing_field_and_rows_of_two_kinds_are_refused(server):
    answer = ask(server, "table", [{"age": 1, "size": 2}])
    assert (answer.status_code, "field 'colour', is missing" in answer.json()["error"]) == (400, True)
    assert ask(server, "table", [TABLE[0], [1, 2, 3, 4]]).status_code == 400
    assert "has no named fields" in ask(server, "signal", [{"a": 1}]).json()["error"]


def test_many_rows_in_a_large_body_are_answered_in_order(server, versions):
    rows = [{"age": age / 20, "colour": "red" if age % 2 else "blue", "size": 1} for age in range(1024)]
    assert len(json.dumps({"inputs": rows})) > 2**15
    assert probs(ask(server, "table", rows)) == pytest.approx(
        expected(versions["table"], fields.encode(rows, SPECS["table"])), abs=1e-5
    )
    more = RNG.normal(size=(60, 6, 50)).astype(np.float32)
    assert probs(ask(server, "signal", more.tolist())) == pytest.approx(expected(versions["signal"], more), abs=1e-5)


def test_signals_are_answered_and_missing_numbers_are_allowed_where_the_version_says_so(server, versions):
    gaps = SIGNALS.copy()
    gaps[0, 0, :3] = np.nan
    assert probs(npy(server, "signal", gaps)) == pytest.approx(expected(versions["signal"], gaps), abs=1e-5)
    assert probs(ask(server, "signal", SIGNALS.tolist())) == pytest.approx(
        expected(versions["signal"], SIGNALS), abs=1e-5
    )
    infinite = SIGNALS.copy()
    infinite[2, 1, 0] = np.inf
    answer = npy(server, "signal", infinite)
    assert (answer.status_code, "infinite (row 2, feature 1, 0)" in answer.json()["error"]) == (400, True)
    assert npy(server, "table", np.full((1, 4), np.nan, np.float32)).status_code == 400


def test_texts_of_several_lengths_are_answered_as_each_of_them_alone(server, versions):
    wanted = np.concatenate([expected(versions["text"], np.array([text])) for text in TEXTS])
    assert probs(ask(server, "text", TEXTS)) == pytest.approx(wanted, abs=1e-5)
    padded = kinds.from_texts(SPECS["text"], TEXTS)
    assert probs(npy(server, "text", padded)) == pytest.approx(wanted, abs=1e-5)
    with Client(server.url) as client:
        assert client.predict(TEXTS, ensemble="text").probs == pytest.approx(wanted, abs=1e-5)
    loaded = modepath.ensemble.of_version(versions["text"])
    assert loaded.predict(TEXTS).probs == pytest.approx(wanted, abs=1e-5)


def test_texts_of_many_clients_that_run_together_keep_their_answers(server, versions):
    texts = [RNG.integers(1, 30, 1 + number % 12).tolist() for number in range(120)]
    wanted = [expected(versions["text"], np.array([text]))[0] for text in texts]
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(lambda text: probs(ask(server, "text", [text]))[0], texts))
    assert np.array(found) == pytest.approx(np.array(wanted), abs=1e-5)


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ([[1, 30]], "they go from 1 to 29"),
        ([[]], "(batch, length) with a length from 1 to 12"),
        ([[1] * 13], "a length from 1 to 12"),
        ([[1.5]], "whole numbers"),
        ([[0, 1]], "before a token"),
        ([["a"]], "not a number"),
    ],
)
def test_what_is_no_text_is_refused(server, texts, told):
    answer = ask(server, "text", texts)
    assert answer.status_code == 400
    assert told in answer.json()["error"]


def test_the_same_text_draws_the_same_network_in_keyed_however_it_is_filled_up(server):
    one = ask(server, "text", [TEXTS[2]], mode="keyed").json()["predictions"][0]["probs"]
    again = ask(server, "text", [TEXTS[2], TEXTS[1]], mode="keyed").json()["predictions"][0]["probs"]
    assert one == pytest.approx(again, abs=1e-6)
    assert probs(ask(server, "signal", SIGNALS.tolist(), mode="random")).shape == (5, 3)


def test_the_description_has_the_fields_and_the_schema_of_each_input(server):
    jsonschema = pytest.importorskip("jsonschema")
    listed = {one["name"]: one for one in httpx.get(server.url + "/ensembles").json()["ensembles"]}
    assert [(one["name"], one["categories"], one["shape"]) for one in listed["table"]["fields"]] == [
        ("age", None, None), ("colour", ["blue", "red"], None), ("size", None, None),
    ]  # fmt: skip
    assert (listed["text"]["input_kind"], listed["text"]["input_shape"], listed["text"]["vocabulary"]) == (
        "tokens",
        [12],
        30,
    )
    document = httpx.get(server.url + "/docs.json").json()
    schema = document["components"]["schemas"]["PredictRequest"]
    whole = {**schema, "components": document["components"]}
    for inputs in (TABLE, SIGNALS.tolist(), TEXTS):
        jsonschema.validate({"inputs": inputs}, whole)
    for inputs in ([{**TABLE[0], "colour": "green"}], [[0]], [{"age": 1}], [[1] * 13]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"inputs": inputs}, whole)


def test_one_long_text_among_many_short_ones_costs_no_memory(server):
    answer = ask(server, "text", [[1] * 30_000, *([[1]] * 1000)])
    assert (answer.status_code, "a length from 1 to 12" in answer.json()["error"]) == (400, True)


def test_names_without_letters_are_unknown_fields(server):
    assert "unknown field ''" in ask(server, "table", [{**TABLE[0], "": 1}]).json()["error"]


def test_an_image_is_refused_by_an_ensemble_that_takes_none(server):
    headers = {"Content-Type": "image/png"}
    answer = httpx.post(server.url + "/predict?ensemble=table", content=b"\x89PNG", headers=headers)
    assert (answer.status_code, "takes features" in answer.json()["error"]) == (400, True)


def test_texts_are_answered_as_their_token_ids_are(server, versions):
    texts = ["a b z", "q", "c  c\nd é"]
    ids = [[2, 3, 27], [18], [4, 4, 5, 1]]
    wanted = expected(versions["text"], kinds.from_texts(SPECS["text"], ids))
    sent = {"texts": texts, "ensemble": "text"}
    assert probs(httpx.post(server.url + "/predict", json=sent)) == pytest.approx(wanted, abs=1e-5)
    many = {"texts": texts * 20, "ensemble": "text", "mode": "average"}
    assert probs(httpx.post(server.url + "/predict", json=many)) == pytest.approx(np.tile(wanted, (20, 1)), abs=1e-5)
    marks = ['a, "b" [z] {' + ",[{" * 300, "q \\\\", "é\\"] * 100  # a large body whose texts look like JSON
    with Client(server.url) as client:
        assert len(client.predict(marks, ensemble="text").probs) == len(marks)
    blank = ["a" + " " * 800 + '"', "\\" + " " * 800 + "[", ", " + " " * 800 + "b"] * 60
    with Client(server.url) as client:
        found = client.predict(blank, ensemble="text").probs
    assert found[:3] == pytest.approx(
        expected(versions["text"], kinds.from_texts(SPECS["text"], [[2, 1], [1, 1], [1, 3]])), abs=1e-5
    )
    assert probs(ask(server, "text", ids)) == pytest.approx(wanted, abs=1e-5)
    with Client(server.url) as client:
        assert client.predict(texts, ensemble="text").probs == pytest.approx(wanted, abs=1e-5)
    assert modepath.ensemble.of_version(versions["text"]).predict(texts).probs == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match="has no tokenizer"):
        modepath.ensemble.of_version(versions["ids"]).predict(texts)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"texts": ["a", " "], "ensemble": "text"}, "text 1 has no token"),
        ({"texts": ["a " * 13], "ensemble": "text"}, "text 0 has 13 tokens; at most 12"),
        ({"texts": ["a" * 100_000], "ensemble": "text"}, "text 0 has 100000 characters"),
        ({"texts": [], "ensemble": "text"}, "`texts` is empty"),
        ({"texts": ["a"], "ensemble": "ids"}, "takes token ids and has no tokenizer"),
        ({"texts": ["a"], "ensemble": "table"}, "takes features and has no tokenizer"),
        ({"texts": [1], "ensemble": "text"}, "texts.0"),
        ({"texts": "a", "ensemble": "text"}, "texts"),
        ({"texts": ["a"], "inputs": [[2]], "ensemble": "text"}, "one of `inputs`, `images` and `texts`"),
    ],
)
def test_a_text_that_cannot_be_answered_is_refused_with_the_cause(server, body, told):
    response = httpx.post(server.url + "/predict", json=body)
    assert response.status_code == 400
    assert told in response.json()["error"]


def test_which_ensembles_take_texts_is_shown(server):
    shown = {one["name"]: one["texts"] for one in httpx.get(server.url + "/ensembles").json()["ensembles"]}
    assert shown == {"named": False, "table": False, "signal": False, "text": True, "ids": False}


PHOTOS = RNG.random((40, 1, 2, 2)).astype(np.float32)
COLUMNS = {"photo": PHOTOS, "file": np.arange(40.0), "kind": ["a", "b"] * 20}


def test_named_tensors_are_answered_by_row_by_column_and_from_an_npz_file(server, versions):
    wanted = expected(versions["named"], fields.from_columns(COLUMNS, SPECS["named"]))
    lists = {"photo": PHOTOS.tolist(), "file": list(range(40)), "kind": COLUMNS["kind"]}
    rows = [{name: column[i] for name, column in lists.items()} for i in range(40)]
    assert probs(ask(server, "named", rows)) == pytest.approx(wanted, abs=1e-5)
    assert probs(ask(server, "named", lists)) == pytest.approx(wanted, abs=1e-5)
    with Client(server.url) as client:
        assert client.predict(COLUMNS, ensemble="named").probs == pytest.approx(wanted, abs=1e-5)
        assert client.predict(rows, ensemble="named").probs == pytest.approx(wanted, abs=1e-5)
    found = httpx.post(
        server.url + "/predict",
        content=json.dumps({"inputs": lists, "ensemble": "named"}) + " " * 70_000,
        headers={"Content-Type": "application/json"},
    )
    assert probs(found) == pytest.approx(wanted, abs=1e-5)
    assert modepath.ensemble.of_version(versions["named"]).predict(COLUMNS).probs == pytest.approx(wanted, abs=1e-5)


def npz(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


COMPRESSED = io.BytesIO()
np.savez_compressed(COMPRESSED, photo=PHOTOS, kind=np.array(COLUMNS["kind"]))


def overlapping():
    """A zip file whose entries lie in each other."""
    inner = b"x" * 1000
    for number in range(3):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as file:
            file.writestr(f"{number}.npy", inner)
        inner = content.getvalue()
    entry, end = inner[inner.rindex(b"PK\x01\x02") : -22], bytearray(inner[-22:])
    body = inner[:-22] + entry.replace(b"2.npy", b"9.npy")
    end[8:12], end[12:16] = b"\2\0\2\0", (2 * len(entry)).to_bytes(4, "little")
    return body + bytes(end)


def with_header(**changes):
    header = {"descr": "<f4", "fortran_order": False, "shape": (40,), **changes}
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, header)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as file:
        file.writestr("file.npy", content.getvalue() + b"\xff\xff\xff\xff" * 40)
        file.writestr("photo.npy", b"")
        file.writestr("kind.npy", b"")
    return made.getvalue()


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (npz(photo=PHOTOS, kind=np.array(COLUMNS["kind"])), "the field 'file' is missing"),
        (npz(photo=PHOTOS + 2, kind=np.array(COLUMNS["kind"])), "'file' is missing"),
        (npz(photo=PHOTOS, other=PHOTOS), "the field 'other' is unknown"),
        (npz(photo=np.array([{}], object)), "holds object"),
        (COMPRESSED.getvalue(), "compressed"),
        (npz(photo=PHOTOS)[:-40], "not a file written by numpy.savez"),
        (b"PK\x03\x04", "not a file written by numpy.savez"),
        (overlapping(), "its entries overlap"),
        (npz(**{f"f{i}": np.zeros(1) for i in range(500)}), "more than 4 arrays"),
        (with_header(descr="<U0"), "holds <U0"),
        (with_header(descr="<U1"), "are not Unicode"),
        (with_header(shape=(1,) * 70), "The array 'file' holds"),
        (with_header(shape=(0, 2**39, 2**39)), "The array 'file' holds"),
        (b"", "not a file written by numpy.savez"),
    ],
)
def test_another_npz_body_is_refused_with_the_cause(server, body, told):
    headers = {"Content-Type": "application/x-npz"}
    response = httpx.post(server.url + "/predict?ensemble=named", content=body, headers=headers)
    assert response.status_code == 400
    assert told in response.json()["error"]


@pytest.mark.parametrize(
    ("inputs", "name", "told"),
    [
        (
            {"photo": (PHOTOS + 1).tolist(), "file": [1] * 40, "kind": ["a"] * 40},
            "named",
            "field 'photo', has the value",
        ),
        ({"photo": PHOTOS.tolist(), "file": [1] * 39, "kind": ["a"] * 40}, "named", "different numbers of rows"),
        ({"photo": [], "file": [], "kind": []}, "named", "field 'photo', has rows of the shape ()"),
        ({}, "named", "is missing"),
        ({"photo": [[1]]}, "signal", "has no named fields"),
        ([{"photo": [[0.1]], "file": 1, "kind": "a"}], "named", "row 0, field 'photo', has rows of the shape"),
    ],
)
def test_named_tensors_that_do_not_fit_are_refused_with_the_cause(server, inputs, name, told):
    response = ask(server, name, inputs)
    assert response.status_code == 400
    assert told in response.json()["error"]


def test_more_text_than_can_be_read_in_a_second_is_refused_at_once(server):
    response = httpx.post(server.url + "/predict", json={"texts": ["a " * 50_000] * 25, "ensemble": "text"}, timeout=30)
    assert response.status_code == 413
    assert "characters in one request" in response.json()["error"]


def test_a_single_text_is_not_taken_for_a_list_of_them(server):
    with Client(server.url) as client, pytest.raises(TypeError, match="give a list of texts"):
        client.predict("a b", ensemble="text")
    with Client(server.url) as client:
        assert len(client.predict(np.array(["a b", "c"]), ensemble="text").probs) == 2
