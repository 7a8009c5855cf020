"""Canaries and their roll-back on a real service of several workers."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models_store.records.rollout import RollOut, Rule
from service.access import keys
from tests.onnx_members import SHAPE, linear, linear_logits, nan_on_white, publish

RNG = np.random.default_rng(0)
IMAGES = RNG.random((60, *SHAPE), np.float32)
WHITE = np.ones((1, *SHAPE), np.float32)
CALLER = "x-caller"


def softmax(logits):
    scaled = np.exp(logits - logits.max(-1, keepdims=True))
    return scaled / scaled.sum(-1, keepdims=True)


def expected(seed, images):
    return softmax(linear_logits(linear(seed), images))


def ask(server, images, **headers):
    answer = httpx.post(server.url + "/predict", json={"inputs": images.tolist()}, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()


def metrics_of(server):
    found = Counter()
    for family in text_string_to_metric_families(httpx.get(server.url + "/metrics").text):
        for sample in family.samples:
            if "canary" in sample.name or "shadow" in sample.name or "rollback" in sample.name:
                key = sample.labels.get("outcome") or sample.labels.get("reason") or sample.labels.get("of")
                found[sample.name, key] += sample.value
    return found


def until(holds, seconds=30):
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def asked_by(server, caller):
    return ask(server, IMAGES[:1], **{CALLER: caller})["version"]


@pytest.fixture
def served(store, serve):
    publish(store, "e", (0,))
    publish(store, "e", (1,), activate=False)
    server = serve(store, MODEPATH_WORKERS="3", MODEPATH_CALLER_HEADER=CALLER)
    server.until(200)
    return store, server


def loaded(server, version):
    """Wait until every worker answers some callers with the canary."""
    until(lambda: server.log.read_text().count(f"canary e@{version} ") >= 3)


def test_a_canary_answers_its_share_of_the_callers_and_each_caller_sees_one_version(served):
    store, server = served
    store.begin_roll_out("e", RollOut(version=2, share=0.3))
    loaded(server, 2)
    with ThreadPoolExecutor(8) as pool:
        callers = [f"caller-{i}" for i in range(200)]
        rounds = [list(pool.map(lambda name: asked_by(server, name), callers)) for _ in range(3)]
    assert rounds[0] == rounds[1] == rounds[2]
    assert 0.15 < rounds[0].count(2) / 200 < 0.45
    until(lambda: metrics_of(server)["modepath_canary_requests_total", "answered"] == 3 * rounds[0].count(2))
    chosen = {name for name, version in zip(callers, rounds[0], strict=True) if version == 2}
    store.begin_roll_out("e", RollOut(version=2, share=0.6))  # a larger share keeps those that it had
    until(lambda: sum(asked_by(server, name) == 2 for name in callers) > 90)
    assert all(asked_by(server, name) == 2 for name in chosen)
    for seed, version in ((0, 1), (1, 2)):  # the answers are those of the version that they name
        name = (
            callers[rounds[0].index(version)] if version == 2 else next(n for n in callers if asked_by(server, n) == 1)
        )
        answer = ask(server, IMAGES, **{CALLER: name})
        assert answer["version"] == version
        np.testing.assert_allclose([row["probs"] for row in answer["predictions"]], expected(seed, IMAGES), atol=1e-5)


def test_a_canary_that_fails_costs_no_answer_and_is_rolled_back_in_all_workers_within_the_stated_number(served):
    store, server = served
    version = publish(store, "e", (5,), member=nan_on_white, activate=False).manifest.version
    plan = RollOut(version=version, share=1, rule=Rule(errors=0.1, requests=100))
    store.begin_roll_out("e", plan)
    loaded(server, version)
    for i in range(300):
        images = WHITE if i % 5 == 0 else IMAGES[i % 60 : i % 60 + 1]
        answer = ask(server, images, **{CALLER: str(i)})
        seed = 5 if answer["version"] == version else 0
        np.testing.assert_allclose(answer["predictions"][0]["probs"], expected(seed, images)[0], atol=1e-5)
    found = metrics_of(server)
    assert found["modepath_canary_requests_total", "failed"] == 11  # the first that is more than 0.1 of 100
    assert found["modepath_canary_requests_total", "answered"] == 40
    assert found["modepath_rollbacks_total", "errors"] == 1
    ended = until(lambda: store.roll_out("e").ended)
    assert "it failed 11 of 51 requests" in ended
    assert "ROLLED BACK: e@3, because it failed" in server.log.read_text()
    assert store.active("e") == 1


def test_a_shadow_is_compared_and_never_returned(served):
    store, server = served
    store.begin_roll_out("e", RollOut(version=2, shadow=1, rule=Rule(disagreement=None, slowdown=None)))
    loaded(server, 2)
    for i in range(len(IMAGES)):
        assert ask(server, IMAGES[i : i + 1], **{CALLER: str(i)})["version"] == 1
        time.sleep(0.01)
    old, new = expected(0, IMAGES), expected(1, IMAGES)
    rows = ("same", "different", "failed", "skipped")
    found = until(
        lambda: (
            (found := metrics_of(server))
            and sum(found["modepath_shadow_rows_total", row] for row in rows) == 60
            and found
        )
    )
    compared = 60 - found["modepath_shadow_rows_total", "skipped"]
    assert compared == 60
    assert found["modepath_shadow_rows_total", "different"] == (old.argmax(1) != new.argmax(1)).sum()
    entropies = [-(p * np.log(p)).sum(1) for p in (new, old)]
    assert found["modepath_shadow_entropy_difference_sum", None] == pytest.approx(
        (entropies[0] - entropies[1]).sum(), abs=1e-3
    )
    assert found["modepath_shadow_seconds_total", "canary"] > 0
    assert found["modepath_shadow_seconds_total", "active"] > 0


def test_a_shadow_that_disagrees_is_rolled_back(served):
    store, server = served
    store.begin_roll_out("e", RollOut(version=2, shadow=1, rule=Rule(disagreement=0.05, requests=60)))
    loaded(server, 2)
    for _ in range(3):
        for i in range(len(IMAGES)):
            ask(server, IMAGES[i : i + 1], **{CALLER: str(i)})
    ended = until(lambda: store.roll_out("e").ended)
    assert "it labelled 4 of" in ended
    assert metrics_of(server)["modepath_rollbacks_total", "disagreement"] == 1


def test_a_damaged_canary_never_answers_and_the_active_version_answers_all(served):
    store, server = served
    version = publish(store, "e", (7,), activate=False)
    member = version.folder / "members/000.onnx"
    content = bytearray(member.read_bytes())
    content[len(content) // 2] ^= 1
    member.write_bytes(content)
    store.begin_roll_out("e", RollOut(version=3, share=1))
    until(lambda: "is not the file that was published" in server.log.read_text())
    assert {asked_by(server, str(i)) for i in range(20)} == {1}
    store.begin_roll_out("e", RollOut(version=2, share=1))  # and a good one after it does
    until(lambda: asked_by(server, "a") == 2)


def test_activating_the_canary_serves_it_to_all_at_once(served):
    store, server = served
    store.begin_roll_out("e", RollOut(version=2, share=0.01))
    loaded(server, 2)
    assert asked_by(server, "caller-0") == 1
    store.activate("e", 2)
    until(lambda: {asked_by(server, str(i)) for i in range(30)} == {2}, 5)
    assert server.log.read_text().count("serving e@2 ") == 0  # it was loaded already


def test_the_route_needs_a_key_with_the_scope_admin_and_does_what_the_command_does(store, serve, tmp_path):
    publish(store, "e", (0,))
    publish(store, "e", (1,), activate=False)
    file = tmp_path / "keys.json"
    admin, reader = (keys.add(file, scope, [scope]) for scope in ("admin", "read"))
    server = serve(store, MODEPATH_KEYS_FILE=str(file))
    server.until(200)
    url = server.url + "/ensembles/e/rollout"
    with httpx.Client(headers={"Authorization": f"Bearer {reader}"}) as client:
        assert [client.request(method, url).status_code for method in ("GET", "PUT", "DELETE")] == [403] * 3
    with httpx.Client(headers={"Authorization": f"Bearer {admin}"}) as client:
        assert client.get(url).status_code == 404
        begun = client.put(url, json={"version": 2, "share": 0.5, "rule": {"errors": 0.02}})
        assert begun.status_code == 200, begun.text
        assert begun.json()["rule"]["errors"] == 0.02
        assert store.roll_out("e").share == 0.5
        for wrong, status in [
            ({"version": 1, "share": 0.5}, 409), ({"version": 9, "share": 0.5}, 404), ({"version": 2}, 400), ({"version": 2, "share": 2}, 400),
            ({"version": 2, "id": "00000000", "share": 1}, 400), ([], 400),
        ]:  # fmt: skip
            refused = client.put(url, content=json.dumps(wrong), headers={"Content-Type": "application/json"})
            assert refused.status_code == status, refused.text
        assert client.put(url, content=b"{}").status_code == 415
        assert client.get(server.url + "/ensembles/nothing/rollout").status_code == 404
        assert client.delete(url).json()["canary"] is None
        assert store.roll_out("e") is None


def test_inputs_on_which_every_version_fails_roll_nothing_back(store, serve):
    publish(store, "e", (5,), member=nan_on_white)
    publish(store, "e", (6,), member=nan_on_white, activate=False)
    server = serve(store, MODEPATH_CALLER_HEADER=CALLER)
    server.until(200)
    store.begin_roll_out("e", RollOut(version=2, share=1, shadow=1, rule=Rule(disagreement=None)))
    until(lambda: "canary e@2" in server.log.read_text())
    for i in range(20):
        answer = httpx.post(server.url + "/predict", json={"inputs": WHITE.tolist()}, headers={CALLER: str(i)})
        assert answer.status_code == 500
        assert ask(server, IMAGES[:1], **{CALLER: str(i)})["version"] == 2
    assert store.roll_out("e").ended is None


def test_a_file_that_makes_the_active_version_its_own_canary_is_ignored(served):
    store, server = served
    (store.root / "e" / ".rollout").write_text(RollOut(version=1, share=1).model_dump_json())
    time.sleep(2)
    assert {asked_by(server, str(i)) for i in range(20)} == {1}
    assert server.log.read_text().count("e@1 (manifest") == 3  # loaded once by each worker


def test_a_canary_of_other_inputs_in_the_file_never_answers(served):
    store, server = served
    publish(store, "e", (0,), shape=(3, 4, 4), activate=False)
    (store.root / "e" / ".rollout").write_text(RollOut(version=3, share=1).model_dump_json())
    until(lambda: "cannot be a canary: it has other inputs" in server.log.read_text())
    assert {asked_by(server, str(i)) for i in range(20)} == {1}


def test_in_keyed_a_client_cannot_choose_the_version_by_a_request_id(store, serve):
    publish(store, "e", (0, 1, 2))
    publish(store, "e", (3, 4, 5), activate=False)
    server = serve(store, MODEPATH_POLICIES='{"e": {"modes": ["keyed"]}}')
    server.until(200)
    store.begin_roll_out("e", RollOut(version=2, share=0.5))
    until(lambda: "canary e@2" in server.log.read_text())
    assert {ask(server, IMAGES[:1], **{"x-request-id": f"id-{i}"})["version"] for i in range(30)} == {1}


def test_a_deactivated_version_does_not_come_back_when_the_next_one_is_refused(served):
    store, server = served
    store.deactivate("e")
    # Every worker has seen it: one that had not would keep the old version, because the next one is refused.
    row, caller = {"inputs": IMAGES[:1].tolist()}, {CALLER: "a"}
    until(
        lambda: {httpx.post(server.url + "/predict", json=row, headers=caller).status_code for _ in range(30)} == {503}
    )
    member = store.load("e", 2).folder / "members/000.onnx"
    member.write_bytes(member.read_bytes()[:-1])
    store.activate("e", 2)
    until(lambda: "is not the file that was published" in server.log.read_text())
    time.sleep(2)
    answer = httpx.post(server.url + "/predict", json=row, headers=caller)
    assert answer.status_code == 503
