"""The page in a real browser: what a person does on it, and that nothing leaves the machine."""

import json
import shutil
import time

import httpx
import numpy as np
import pytest
from PIL import Image

from models_store.decisions import calibrating
from models_store.manifest import InputSpec, TableField
from models_store.store import Store
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import bank, of_features, publish
from tests.service.conftest import Server

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("Chromium is not installed (apt install chromium)", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="the dev extra is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="the dev extra is not installed")
SHOWN = {"modes": ["average", "random"], "probabilities": "exact", "point": True}
POLICIES = {"animals": {"modes": ["average", "cascade"]}, "path": {"modes": ["random"]}, "curve": SHOWN}
T = np.linspace(0, 1, 6)
LINE = {"coefficients": np.stack([(1 - T) ** 2, 2 * T * (1 - T), T**2], axis=1)}  # of a Bezier curve


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def begun(folder):
    """Start a service with a calibrated ensemble and a defended one."""
    store = Store(folder / "store")
    x, y = labelled(2000, temperature=0.1)
    calibrating.calibrate(store, publish(store, "animals"), calibrating.Labelled(x, y, "these"))
    publish(store, "path", seeds=(5, 6), bank=bank(points=4, seed=9))
    publish(store, "curve", seeds=(11, 12), bank=bank(points=6, seed=4, **LINE), shape_of_path="bezier")
    colours = [
        "blue",
        "red",
        *(f"colour {number}" for number in range(18)),
    ]  # enough weights to be compared with others
    fields = [TableField(name="age"), TableField(name="colour", categories=colours)]
    table = InputSpec(kind="features", shape=(21,), fields=fields)
    publish(store, "table", spec=table, member=of_features)
    options = {"MODEPATH_POLICIES": json.dumps(POLICIES), "MODEPATH_DEFAULT": "animals"}
    found = Server(store, folder, MODEPATH_FEEDBACK=f"sqlite:///{folder}/feedback.db", **options)
    found.until(200)
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = begun(tmp_path_factory.mktemp("ui"))
    yield found
    found.stop()


class Page:
    """A page of the service, with all that its console says and all hosts that it asks."""

    def __init__(self, browser, server, view="", **options):
        self.page = browser.new_page(**options)
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(server.url + "/ui" + view)
        self.page.wait_for_selector("#ensemble option", state="attached")

    def answer(self):
        return self.page.inner_text("#answer")

    def until(self, text, place="#answer", seconds=15):
        self.page.wait_for_function(
            "([place, text]) => document.querySelector(place).innerText.includes(text)", arg=[place, text], timeout=1000 * seconds
        )  # fmt: skip


@pytest.fixture
def opened(browser, server):
    """Opens pages, and checks at the end that nothing went wrong on them."""
    pages = []

    def opened(view="", **options):
        pages.append(Page(browser, server, view, **options))
        return pages[-1]

    yield opened
    for one in pages:
        assert one.said == []
        assert {url.split("/")[2] for url in one.asked} == {server.url.split("/")[2]}
        one.page.close()


def picture(folder, name="picture.png"):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4), np.uint8)).save(folder / name)
    return folder / name


def test_a_chosen_file_is_answered_as_the_api_answers_it(server, opened, tmp_path):
    one = opened()
    file = picture(tmp_path)
    began = time.monotonic()
    one.page.set_input_files("#file", str(file))
    one.until("Uncertainty")
    assert time.monotonic() - began < 10
    query = {"members": "true", "coverage": "0.9", "percentiles": "true", "ensemble": "animals"}
    body = httpx.post(
        server.url + "/predict", params=query, content=file.read_bytes(), headers={"Content-Type": "image/png"}
    )
    row = body.json()["predictions"][0]
    shown = one.answer()
    assert f"{row['class_name']}, {100 * row['confidence']:.1f} %" in shown
    assert f"{row['uncertainty']['predictive_entropy']:.3f}" in shown
    assert one.page.locator(".members li").count() == 3
    assert "A cascade stopped after" in shown
    assert "Rely on it" in shown or "Ask a person" in shown
    widths = one.page.evaluate(
        "[...document.querySelectorAll('.fill')].map((one) => one.getBoundingClientRect().width)"
    )
    assert max(widths) > 10


def test_the_set_follows_the_slider_and_the_pad_is_drawn_on(opened):
    one = opened()
    box = one.page.locator("#pad").bounding_box()
    one.page.mouse.move(box["x"] + 40, box["y"] + 40)
    one.page.mouse.down()
    one.page.mouse.move(box["x"] + 200, box["y"] + 200, steps=5)
    one.page.mouse.up()
    one.until("at a coverage of 90 %")
    one.page.locator("#coverage").focus()
    for _ in range(9):
        one.page.keyboard.press("ArrowRight")
    one.until("at a coverage of 99 %")
    wide = one.answer().split("at a coverage of 99 %: ")[1].split(".")[0]
    one.page.locator("#coverage").focus()
    for _ in range(49):
        one.page.keyboard.press("ArrowLeft")
    one.until("at a coverage of 50 %")
    narrow = one.answer().split("at a coverage of 50 %: ")[1].split(".")[0]
    assert len(narrow.split(",")) <= len(wide.split(","))
    one.page.click("#clear")
    one.until("The answer appears here.")
    one.page.click("#example")
    one.until("Average of the members")


def test_a_dropped_file_is_answered_and_a_broken_one_is_told(opened, tmp_path):
    one = opened()
    data = picture(tmp_path, "picture.bmp").read_bytes()  # the browser reads it, the service does not
    drop = """([bytes, type]) => {
        const given = new DataTransfer();
        given.items.add(new File([new Uint8Array(bytes)], "dropped", { type }));
        window.dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
    }"""
    one.page.evaluate(drop, [list(data), "image/bmp"])
    one.until("Average of the members")
    one.page.evaluate(drop, [list(b"not an image"), "image/png"])
    one.until("is not an image that the browser can read")
    one.page.evaluate(drop, [list(data), "image/bmp"])
    one.until("Average of the members")


def test_of_a_defended_ensemble_it_shows_what_the_api_shows(opened):
    one = opened()
    one.page.select_option("#ensemble", "path")
    one.page.click("#example")
    one.until("mode random")
    shown = one.answer()
    assert "Uncertainty" not in shown
    assert one.page.locator(".members").count() == 0
    assert not one.page.is_visible("#deciding")


def test_the_answer_along_a_curve_follows_the_slider(server, opened):
    one = opened()
    one.page.select_option("#ensemble", "curve")
    one.page.click("#example")
    one.until("Along the curve")
    for position, t in ((0, "0.000"), (5, "1.000")):
        one.page.evaluate(
            f"(t) => {{ t.value = {position}; t.dispatchEvent(new Event('input')); }}", one.page.query_selector("#t")
        )
        assert f"t = {t}: this network alone has an error of" in one.answer()
        shown = one.page.inner_text(".point .classes tr:first-child")
        assert shown.endswith("%")
    assert one.page.locator(".curve .line").count() == 1


def test_a_row_with_named_fields_is_asked_as_json(server, opened):
    one = opened()
    one.page.select_option("#ensemble", "table")
    assert one.page.is_visible("#values")
    assert not one.page.is_visible("#pad")
    assert json.loads(one.page.input_value("#values")) == {"age": 0, "colour": "blue"}
    one.page.fill("#values", '{"age": 1.5, "colour": "red"}')
    one.page.click("#ask-values")
    one.until("Average of the members")
    body = httpx.post(server.url + "/predict", json={"ensemble": "table", "inputs": [{"age": 1.5, "colour": "red"}]})
    row = body.json()["predictions"][0]
    assert f"{row['class_name']}, {100 * row['confidence']:.1f} %" in one.answer()
    one.page.fill("#values", '{"age": 1.5')
    one.page.click("#ask-values")
    one.until("The input is not JSON")
    one.page.select_option("#ensemble", "animals")
    assert one.page.is_visible("#pad")


def test_it_says_that_the_service_went_away_and_recovers(store, serve, browser, tmp_path):
    publish(store, "animals")
    server = serve(store)
    server.until(200)
    one = Page(browser, server)
    one.until("connected", "#connection")
    server.stop()
    one.until("does not answer", "#connection")
    one.page.click("#example")
    one.until("The service does not answer")
    port = server.url.rsplit(":", 1)[1]
    again = serve(store, MODEPATH_PORT=port)
    again.url = server.url
    again.until(200)
    one.until("connected", "#connection", seconds=30)
    one.page.click("#example")
    one.until("Average of the members")
    one.page.close()


def test_the_view_of_ensembles_shows_reliability_and_what_differs_between_versions(server, opened):
    one = opened("#ensembles")
    one.until("Reliability", "#listed")
    one.until("Calibration images", "#listed")
    info = httpx.get(server.url + "/ensembles/animals").json()["calibration"]
    bins = info["reliability"]
    assert sum(each["images"] for each in bins) == info["images"]
    assert one.page.locator(".reliability .dot").count() == len(bins)
    titles = one.page.eval_on_selector_all(".reliability title", "all => all.map((one) => one.textContent)")
    first = bins[0]
    assert titles[0] == (
        f"Confidence {100 * first['confidence']:.1f} %, accuracy {100 * first['accuracy']:.1f} %, {first['images']} images"
    )
    card = one.page.locator("article", has_text="animals")
    row = card.locator(".versions tr", has_text="Calibration images").inner_text().split("\t")
    assert row[1:] == ["not calibrated", "1000", "differs"]
    card.get_by_label("First version of animals").select_option("2")
    assert card.locator(".versions tr", has_text="Calibration images").inner_text().split("\t")[1:] == [
        "1000",
        "1000",
        "",
    ]


def test_the_other_views_show_ensembles_and_live_numbers(browser, tmp_path):
    server = begun(tmp_path)  # the numbers of another one are those of all tests
    one = Page(browser, server, "#ensembles")
    one.until("Calibration", "#listed")
    listed = one.page.inner_text("#listed")
    assert "animals (answers when no ensemble is named)" in listed
    assert "1000 images; prediction sets up to a coverage of 99.90 %" in listed
    images, truth = labelled(200, seed=3, temperature=0.1)
    body = httpx.post(server.url + "/predict", json={"inputs": images.tolist()}).json()
    labels = [{"request_id": body["request_id"], "row": row, "label": int(label)} for row, label in enumerate(truth)]
    time.sleep(1.5)
    assert httpx.post(server.url + "/feedback", json=labels).json()["accepted"] == 200
    one.page.click("text=Watch")
    accuracy = np.mean([row["label"] == label for row, label in zip(body["predictions"], truth, strict=True)])
    one.until(f"accuracy {100 * accuracy:.1f} % of 200", "#watched")
    one.until("no alarm", "#watched")
    assert one.page.locator("#watched svg").count() == 5
    assert one.said == []
    one.page.close()
    server.stop()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_is_accessible_and_fits_the_screen(server, opened, scheme, width):
    one = opened(color_scheme=scheme, viewport={"width": width, "height": 800})
    one.page.click("#example")
    one.until("Average of the members")
    httpx.post(server.url + "/predict", json={"inputs": labelled(50, seed=3)[0].tolist()})
    for view in ("ask", "ensembles", "watch"):
        one.page.evaluate(f"location.hash = '#{view}'")
        one.page.wait_for_timeout(2500 if view == "watch" else 300)
        found = axe.Axe().run(one.page, options={"rules": {"region": {"enabled": False}}}).response["violations"]
        serious = [
            (rule["id"], rule["nodes"][0]["html"]) for rule in found if rule["impact"] in ("serious", "critical")
        ]
        assert serious == []
        assert one.page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_everything_is_reached_by_the_keyboard(opened):
    one = opened()
    reached = set()
    for _ in range(20):
        one.page.keyboard.press("Tab")
        reached.add(one.page.evaluate("document.activeElement.id || document.activeElement.textContent"))
    assert {"Ask", "Ensembles", "Watch", "ensemble", "pad", "choose", "example", "clear", "coverage", "risk"} <= reached


def test_pages_have_a_policy_that_allows_no_other_host_and_little_script(server):
    assert httpx.get(server.url + "/").headers["location"] == "/ui"
    page = httpx.get(server.url + "/ui")
    assert page.headers["content-security-policy"].startswith("default-src 'self';")
    assert "unsafe" not in page.headers["content-security-policy"]
    scripts = [
        httpx.get(f"{server.url}/ui/{name}.js") for name in ("app", "ask", "ensembles", "watch", "parts", "docs")
    ]
    assert {one.headers["content-type"] for one in scripts} == {"text/javascript; charset=utf-8"}
    assert sum(len(one.content) for one in scripts) < 150_000
    for name in ("nothing.js", "..%2fapp.py", "index.html"):
        assert httpx.get(f"{server.url}/ui/{name}").status_code == 404


def test_the_documentation_of_the_interface_opens_without_another_host(browser, server):
    page = browser.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url + "/docs")
    page.wait_for_selector(".opblock")
    routes = page.eval_on_selector_all(".opblock-summary-path", "all => all.map((one) => one.dataset.path)")
    assert {"/predict", "/feedback", "/ensembles", "/metrics"} <= set(routes)
    assert said == []
    assert {url.split("/")[2] for url in asked if not url.startswith("data:")} == {server.url.split("/")[2]}
    page.close()
