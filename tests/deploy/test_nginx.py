"""deploy/nginx.conf with Debian's nginx in front of a real service: TLS, limits, and the caller's header."""

import datetime
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from models_store.store import Store
from tests.conftest import ROOT
from tests.onnx_members import SHAPE, publish
from tests.service.conftest import Server, free_port

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin")
pytestmark = [
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: apt install nginx)"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed"),
]
IMAGES = np.random.default_rng(0).random((2, *SHAPE), np.float32)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nginx")
    store = Store(folder / "store")
    publish(store, "e")
    server = Server(
        store,
        folder,
        MODEPATH_CALLER_HEADER="X-Caller",
        MODEPATH_HOSTS='["modepath.example"]',
        MODEPATH_POLICIES='{"*": {"modes": ["keyed"], "probabilities": "exact"}}',
    )
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=modepath.example", "-days", "2",
         "-keyout", folder / "server.key", "-out", folder / "server.pem"], check=True, capture_output=True,
    )  # fmt: skip
    port = free_port()
    ours = (ROOT / "deploy/nginx.conf").read_text()
    for before, after in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"), ("127.0.0.1:3000", server.url.removeprefix("http://")),
        ("/etc/modepath/server", str(folder / "server")),
    ):  # fmt: skip
        assert before in ours
        ours = ours.replace(before, after)
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log; events {{}} "
        f"http {{ access_log off; {places} {ours} }}"
    )
    assert NGINX is not None, "otherwise these tests are skipped"
    process = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf"], stderr=subprocess.DEVNULL)
    server.until(200)
    yield f"https://127.0.0.1:{port}", folder
    process.terminate()
    process.wait(10)
    server.stop()


def client(**more):
    return httpx.Client(verify=False, headers={"Host": "modepath.example"}, **more)


def predict(http, url, **headers):
    return http.post(url + "/predict", json={"inputs": IMAGES.tolist()}, headers=headers)


def test_requests_are_answered_over_tls_and_metrics_are_closed(proxy):
    url, _ = proxy
    with client() as http:
        for _ in range(100):
            try:
                if http.get(url + "/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                continue
        assert predict(http, url).status_code == 200
        assert http.get(url + "/metrics").status_code == 404
        assert http.get(url.replace("https", "http") + "/readyz").status_code == 400


def test_a_client_cannot_choose_its_caller(proxy):
    url, _ = proxy
    with client() as http:
        plain = predict(http, url).json()["predictions"]
        assert all(
            predict(http, url, **{"X-Caller": name}).json()["predictions"] == plain for name in ("a", "b", "c", "d")
        )


def test_a_body_that_is_too_large_does_not_reach_the_service(proxy):
    url, _ = proxy
    with client() as http:
        answer = http.post(url + "/predict", content=b"0" * (17 * 2**20), headers={"Content-Type": "application/x-npy"})
    assert answer.status_code == 413
    assert "nginx" in answer.text


def test_more_requests_than_the_limit_of_an_address_are_refused(proxy):
    url, _ = proxy

    def many(_):
        with client() as http:
            return [http.get(url + "/livez").status_code for _ in range(60)]

    with ThreadPoolExecutor(12) as pool:
        found = [status for statuses in pool.map(many, range(12)) for status in statuses]
    assert set(found) == {200, 429}
    began = datetime.datetime.now()
    with client() as http:
        while http.get(url + "/livez").status_code != 200:
            assert datetime.datetime.now() - began < datetime.timedelta(seconds=10)
