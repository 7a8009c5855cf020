"""A real `bentoml serve` for a store in which most versions are bad."""

import os
import shutil
import signal
import subprocess
import time

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models_store import examples, signing
from models_store.manifest import EXAMPLES_FILE
from tests.onnx_members import SHAPE, bank, point_logits, publish, publish_broken
from tests.service.conftest import workers_of

images = np.random.default_rng(0).random((2, *SHAPE), dtype=np.float32)


def answered(server, count=20):
    """Send `count` requests, each over a new connection that any worker may accept; returns the last response."""
    answers = [httpx.post(server.url + "/predict", json={"inputs": images.tolist()}) for _ in range(count)]
    assert [answer.status_code for answer in answers] == [200] * count, answers[-1].text
    return answers[-1].json()


def until(true, server):
    """Send requests, all of which must succeed, until `true()` holds."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, server.log.read_text()
        answered(server, 1)
        time.sleep(0.1)


def versions(server):
    return {httpx.get(server.url + "/ensembles").json()["ensembles"][0]["version"] for _ in range(12)}


def test_a_good_ensemble_answers_beside_five_bad_ones_and_each_of_those_is_named_once(store, serve):
    publish(store, "good")
    publish_broken(store, "hangs", loop=2**62)
    publish_broken(store, "devours", allocated=2**29)
    publish_broken(store, "nan", nan=True)
    publish_broken(store, "surrogate", surrogate=True)
    publish(store, "fifo")
    (store.root / "fifo" / "active").unlink()
    os.mkfifo(store.root / "fifo" / "active")
    bad = ["hangs", "devours", "nan", "surrogate", "fifo"]
    server = serve(store, MODEPATH_WORKERS="2", MODEPATH_LOAD_SECONDS="12", MODEPATH_LOAD_BYTES=str(2**29))
    server.until(200)
    assert answered(server)["ensemble"] == "good"
    until(lambda: sum("is not served" in line for line in server.log.read_text().splitlines()) >= len(bad), server)
    answered(server)
    named = [line for line in server.log.read_text().splitlines() if "is not served" in line]
    for name in bad:
        assert len([line for line in named if f"{name}@1" in line or f" {name} " in line]) == 1, (name, named)
    assert len(named) == len(bad)
    assert [one["name"] for one in httpx.get(server.url + "/ensembles").json()["ensembles"]] == ["good"]
    # A new version of the good ensemble is still picked up.
    publish(store, "good", seeds=(7,))
    until(lambda: versions(server) == {2}, server)


def test_a_version_that_hangs_while_another_serves_is_passed_over(store, serve, tmp_path):
    publish(store, "animals")
    server = serve(store, MODEPATH_LOAD_SECONDS="2")
    server.until(200)
    publish_broken(store, "animals", loop=2**62)
    until(lambda: "animals@2" in server.log.read_text(), server)
    assert versions(server) == {1}
    publish(store, "animals", seeds=(5,))
    until(lambda: versions(server) == {3}, server)
    # The store disappears for a while; only the log mentions it.
    store.root.rename(tmp_path / "away")
    until(lambda: "Loaded ensembles keep answering" in server.log.read_text(), server)
    assert answered(server)["version"] == 3
    assert httpx.get(server.url + "/readyz").status_code == 200
    shutil.move(tmp_path / "away", store.root)
    server.stop()
    assert "Traceback" not in server.log.read_text()


def test_a_version_that_does_not_reproduce_its_examples_never_serves(store, serve, monkeypatch):
    """What a provider that computes wrongly looks like: the answers of now are not those of the publication."""
    publish(store, "e", (0,))
    server = serve(store)
    server.until(200)
    write = examples.write

    def other(folder, draft):
        write(folder, draft)
        tensors = load_file(folder / EXAMPLES_FILE)
        (folder / EXAMPLES_FILE).unlink()
        save_file({**tensors, "members": tensors["members"][:, :, ::-1].copy()}, folder / EXAMPLES_FILE)

    monkeypatch.setattr(examples, "write", other)
    publish(store, "e", (0,))
    deadline = time.monotonic() + 30
    while "does not pass its self-test: member 0" not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert httpx.get(server.url + "/ensembles/e").json()["version"] == 1


def test_a_service_that_requires_signatures_serves_only_what_a_trusted_key_signed(store, serve, tmp_path):
    pytest.importorskip("model_signing.signing")
    ours, theirs = tmp_path / "ours.pem", tmp_path / "theirs.pem"
    for key in (ours, theirs):
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key], check=True)
    public = tmp_path / "ours.pub.pem"
    subprocess.run(["openssl", "ec", "-in", ours, "-pubout", "-out", public], check=True, capture_output=True)
    signing.sign(store, publish(store, "e", (0,)), ours)
    server = serve(store, MODEPATH_SIGNED_BY=f'["{public}"]', MODEPATH_WORKERS="2")
    server.until(200)
    until(lambda: server.log.read_text().count("serving e@1") == 2, server)
    publish(store, "e", (1,))
    until(lambda: "e@2 is not signed" in server.log.read_text(), server)
    signing.sign(store, publish(store, "e", (2,)), theirs)
    until(lambda: "e@3 was signed by none of the keys that are trusted" in server.log.read_text(), server)
    assert versions(server) == {1}
    signing.sign(store, store.load("e", 2), ours)
    store.activate("e", 2)
    until(lambda: versions(server) == {2}, server)


def test_a_worker_that_starts_while_the_active_version_is_refused_serves_the_one_before(store, serve):
    publish(store, "e", (0,))
    server = serve(store, MODEPATH_WORKERS="2")
    server.until(200)
    until(lambda: server.log.read_text().count("serving e@1") == 2, server)
    member = publish(store, "e", (1,)).folder / "members/000.onnx"
    member.write_bytes(member.read_bytes()[:-1])
    until(
        lambda: "e@2" in server.log.read_text() and "is not the file that was published" in server.log.read_text(),
        server,
    )
    for _ in range(2):
        before = {worker.pid for worker in workers_of(server)}
        os.kill(min(before), signal.SIGKILL)
        deadline = time.monotonic() + 60
        while len({worker.pid for worker in workers_of(server)} - before) < 1:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    until(lambda: server.log.read_text().count("serving the one before, e@1") == 2, server)
    assert versions(server) == {1}


@pytest.mark.parametrize("harm", ["truncated", "changed", "deleted", "removed"])
def test_what_happens_to_files_of_a_loaded_version_changes_no_answer(store, serve, harm):
    """Also of a bank of which only a part is ready, so that networks are opened while it serves."""
    networks = bank(points=40)
    version = publish(store, "e", (0, 1), bank=networks)
    policies = '{"e": {"modes": ["average", "random"], "probabilities": "exact", "point": true}}'
    server = serve(store, MODEPATH_POLICIES=policies, MODEPATH_POOL_BYTES=str(10 * 2**17))
    server.until(200)
    before = answered(server)["predictions"]
    for file in [path for path in version.folder.rglob("*") if path.is_file()]:
        if harm == "truncated":
            os.truncate(file, 7)
        elif harm == "changed":
            file.write_bytes(bytes(file.stat().st_size))
        elif harm == "deleted":
            file.unlink()
    if harm == "removed":
        shutil.rmtree(version.folder)
    points = set()
    for _ in range(150):
        answer = httpx.post(server.url + "/predict", json={"inputs": images[:1].tolist(), "mode": "random"})
        assert answer.status_code == 200, answer.text
        [row] = answer.json()["predictions"]
        logits = point_logits(networks, row["point"], images[:1])[0] / networks.temperature[row["point"]]
        shares = np.exp(logits - logits.max())
        np.testing.assert_allclose(row["probs"], shares / shares.sum(), atol=1e-4)
        points.add(row["point"])
        time.sleep(0.01)
    assert len(points) > 10  # more than were ready at once
    assert answered(server)["predictions"] == before
    assert "Traceback" not in server.log.read_text()
