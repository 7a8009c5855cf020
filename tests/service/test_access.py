"""API keys, scopes, quotas, CORS and activation over HTTP, on a real service of two workers."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from models_store.store import Store
from service.access import keys
from service.client import Client, RefusedError
from service.http import errors
from tests.onnx_members import SHAPE, publish
from tests.service.conftest import Server

IMAGES = np.random.default_rng(0).random((4, *SHAPE), np.float32)
ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def secured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secured")
    store = Store(folder / "store")
    publish(store, "e", (0, 1, 2))
    publish(store, "e", (3, 4), activate=False)
    file = folder / "keys.json"
    secrets = {scope: keys.add(file, f"the-{scope}", [scope]) for scope in keys.SCOPES}
    secrets["limited"] = keys.add(file, "limited", ["predict"], 100)
    secrets["revoked"] = keys.add(file, "revoked", ["predict"])
    keys.revoke(file, "revoked")
    server = Server(
        store, folder, MODEPATH_KEYS_FILE=str(file), MODEPATH_WORKERS="2", MODEPATH_ACCESS_LOG="true",
        MODEPATH_CORS_ORIGINS=json.dumps([ORIGIN]), MODEPATH_POLICIES='{"*": {"modes": ["average", "keyed"], "probabilities": "exact"}}',
        MODEPATH_FEEDBACK=f"sqlite:///{folder / 'feedback.db'}",
    )  # fmt: skip
    server.until(200)
    yield server, secrets, file
    server.stop()


def bearer(secret):
    return {"Authorization": f"Bearer {secret}"}


def predict(server, secret, images=IMAGES, **options):
    return httpx.post(
        server.url + "/predict", json={"inputs": images.tolist(), **options}, headers=bearer(secret) if secret else {}
    )


def test_the_clients_send_the_key(secured):
    server, secrets, _ = secured
    with Client(server.url, key=secrets["predict"]) as client:
        assert client.predict(IMAGES).probs.shape == (4, 3)
    with Client(server.url, key="x", attempts=1) as client, pytest.raises(RefusedError, match="401: The API key"):
        client.predict(IMAGES)


def routes(server, secret):
    document = httpx.get(server.url + "/docs.json", headers=bearer(secret)).json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path.replace("{name}", "e"), operation


def test_each_route_of_the_document_is_closed_to_all_but_the_keys_that_it_names(secured):
    server, secrets, _ = secured
    seen = 0
    with httpx.Client(base_url=server.url) as client:
        for method, path, operation in routes(server, secrets["admin"]):
            needed = re.search(r"Needs an API key with the scope (\w+)", operation.get("description", ""))
            if path in ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready"):
                assert needed is None
                assert client.request(method, path).status_code == 200
                continue
            seen += 1
            assert {"401", "403"} <= operation["responses"].keys()
            for wrong in (None, "x", secrets["revoked"], secrets["admin"] + "0", secrets["admin"][:-1]):
                answer = client.request(method, path, headers=bearer(wrong) if wrong else {})
                assert answer.status_code == 401, (method, path)
                assert answer.headers["WWW-Authenticate"] == "Bearer"
                assert "API key" in answer.json()["error"]
            for scope in keys.SCOPES:
                answer = client.request(method, path, headers=bearer(secrets[scope]))
                allowed = scope in (needed[1], "admin")
                assert (answer.status_code == 403 and "has the scope" in answer.text) == (not allowed), (
                    method,
                    path,
                    scope,
                )
                assert answer.status_code != 401
    assert seen >= 8


@pytest.mark.parametrize("path", ["/ui", "/docs", "/", "/nothing", "/ui/page.js", "/metrics"])
def test_pages_and_unknown_paths_are_closed_too(secured, path):
    server, secrets, _ = secured
    assert httpx.get(server.url + path).status_code == 401
    assert httpx.get(server.url + path, headers=bearer(secrets["read"])).status_code in (200, 302, 404)


def test_a_browser_asks_for_the_key_and_sends_it_as_a_password(secured):
    server, secrets, _ = secured
    refused = httpx.get(server.url + "/ui", headers={"Accept": "text/html,*/*"})
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"].startswith("Basic")
    assert httpx.get(server.url + "/ui", auth=("anybody", secrets["read"])).status_code == 200
    assert httpx.get(server.url + "/ui", auth=("anybody", "wrong")).status_code == 401
    assert httpx.get(server.url + "/ui", headers={"Authorization": "Basic ?"}).status_code == 401


def test_a_key_that_is_made_or_revoked_works_or_not_within_two_seconds(secured):
    server, _, file = secured
    secret = keys.add(file, "late", ["predict"])

    def until(status):
        deadline = time.monotonic() + 5
        while {predict(server, secret).status_code for _ in range(8)} != {status}:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    until(200)
    keys.revoke(file, "late")
    until(401)


def test_a_quota_of_rows_holds_exactly_over_several_workers(secured):
    server, secrets, _ = secured
    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: predict(server, secrets["limited"]), range(60)))
    seconds = time.monotonic() - began
    answered = sum(answer.status_code == 200 for answer in answers)
    assert {answer.status_code for answer in answers} == {200, 429}
    assert 25 <= answered <= 25 + seconds * 100 / 60 / 4
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["Retry-After"]) <= 60
    assert "100 rows a minute" in refused.json()["error"]
    assert predict(server, secrets["predict"]).status_code == 200  # others are not concerned
    large = predict(server, secrets["limited"], np.zeros((101, *SHAPE), np.float32))
    assert large.status_code in (413, 429)


def test_keyed_draws_by_the_name_of_the_key(secured):
    server, secrets, file = secured
    second = keys.add(file, "the-predict", ["predict"])
    time.sleep(1.5)
    many = np.random.default_rng(1).random((60, *SHAPE), np.float32)
    probs = [
        [row["probs"] for row in predict(server, secret, many, mode="keyed").json()["predictions"]]
        for secret in (secrets["predict"], second, secrets["admin"])
    ]
    assert probs[0] == probs[1]
    assert probs[0] != probs[2]


def test_the_access_log_names_the_key_and_never_holds_it(secured):
    server, secrets, _ = secured
    predict(server, secrets["predict"])
    time.sleep(0.5)
    log = server.log.read_text()
    assert '"key":"the-predict"' in log
    assert '"status":401' in log
    for secret in secrets.values():
        assert secret not in log


def test_a_version_is_activated_by_an_admin_and_served(secured):
    server, secrets, _ = secured
    url = server.url + "/ensembles/e/activate"

    def activate(version):
        return httpx.post(url, json={"version": version}, headers=bearer(secrets["admin"]))

    assert activate(2).json() == {"ensemble": "e", "version": 2, "previous": 1}
    deadline = time.monotonic() + 10
    while {predict(server, secrets["predict"]).json()["version"] for _ in range(8)} != {2}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert activate(1).status_code == 200
    missing = activate(7)
    assert missing.status_code == 404
    assert "no published version 7" in missing.json()["error"]
    for body, status in (({"version": "1"}, 400), ({}, 400), ({"version": 1, "x": 2}, 400), ({"version": 0}, 400)):
        assert httpx.post(url, json=body, headers=bearer(secrets["admin"])).status_code == status
    assert httpx.post(url, content=b"1", headers=bearer(secrets["admin"])).status_code == 415
    other = httpx.post(server.url + "/ensembles/..%2Fe/activate", json={"version": 1}, headers=bearer(secrets["admin"]))
    assert other.status_code == 404
    assert "activated by the key the-admin" in server.log.read_text()


def test_pages_of_the_named_origin_may_ask_and_others_not(secured):
    server, secrets, _ = secured
    ask = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = httpx.options(server.url + "/predict", headers={"Origin": ORIGIN, **ask})
    assert allowed.status_code == 200
    assert allowed.headers["Access-Control-Allow-Origin"] == ORIGIN
    refused = httpx.options(server.url + "/predict", headers={"Origin": "https://evil.example", **ask})
    assert refused.status_code == 400
    assert "Access-Control-Allow-Origin" not in refused.headers
    answer = httpx.post(
        server.url + "/predict",
        json={"inputs": IMAGES.tolist()},
        headers={"Origin": ORIGIN, **bearer(secrets["predict"])},
    )
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    without = httpx.post(server.url + "/predict", json={}, headers={"Origin": ORIGIN})
    assert without.status_code == 401
    assert without.headers["Access-Control-Allow-Origin"] == ORIGIN


def test_every_answer_has_the_headers_that_protect_browsers(secured):
    server, secrets, _ = secured
    for path in ("/livez", "/ensembles", "/ui", "/nothing"):
        headers = httpx.get(server.url + path, headers=bearer(secrets["read"])).headers
        assert headers.get_list("X-Content-Type-Options") == ["nosniff"]
        assert headers["X-Frame-Options"] == "DENY"
        assert len(headers.get_list("Cache-Control")) == 1


def test_a_service_that_is_open_without_keys_says_so_loudly(tmp_path):
    store = Store(tmp_path / "store")
    publish(store, "e")
    open_one = Server(store, tmp_path, MODEPATH_HOST="0.0.0.0")
    open_one.until(200)
    refused = httpx.post(open_one.url + "/ensembles/e/activate", json={"version": 1})
    cors = httpx.options(open_one.url + "/predict", headers={"Origin": ORIGIN, "Access-Control-Request-Method": "POST"})
    open_one.stop()
    assert open_one.log.read_text().count("OPEN TO THE NETWORK") == 1
    assert refused.status_code == 404  # versions are activated over HTTP only with keys
    assert "Access-Control-Allow-Origin" not in cors.headers


@pytest.mark.parametrize("content", [None, "{"])
def test_a_service_does_not_start_without_the_keys_it_was_told_to_use(tmp_path, content):
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    server = Server(Store(tmp_path / "store"), tmp_path, MODEPATH_KEYS_FILE=str(file))
    assert server.process.wait(60) != 0
    assert "keys.json" in server.log.read_text()


def test_every_error_of_the_tree_in_the_docstring_exists():
    named = set(re.findall(r"── (\w+)", errors.__doc__))
    assert named == {one.__name__ for one in errors.ServiceError.__subclasses__()}


@pytest.mark.parametrize("ending", ["%0A", "%0a", "%0D", "%09", "%00", "%7F"])
def test_a_control_character_in_a_path_opens_no_route(secured, ending):
    """A route's pattern ends before a line break; the table of scopes must not be evaded by that."""
    server, secrets, _ = secured
    for method, path in [
        ("PUT", "/ensembles/e/rollout"),
        ("DELETE", "/ensembles/e/rollout"),
        ("POST", "/ensembles/e/activate"),
        ("POST", "/predict"),
    ]:
        for scope in ("read", "admin"):
            answer = httpx.request(
                method, server.url + path + ending, headers=bearer(secrets[scope]), json={"version": 2, "share": 1}
            )
            assert answer.status_code == 404, (method, path, scope, answer.text)


def test_methods_that_no_route_has_need_the_widest_scope(secured):
    server, secrets, _ = secured
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert (
            httpx.request(method, server.url + "/ensembles/e/anything", headers=bearer(secrets["read"])).status_code
            == 403
        )
