"""Screenshots of the page for docs/ui.md: each view, light and dark, on a desktop and on a phone.

python -m benchmarks.serving.screenshots NAME FOLDER      a published, calibrated ensemble; needs Debian's chromium

It also measures the time from a dropped picture to its answer on the page: results/page.md.

Of a curve with a bank: only the view along it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from benchmarks.serving.throughput import Arm, running, until_ready
from models_store.store import Store
from service.client import Client
from training import data
from training.config import data_options

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
ASKED = 600
DROPS = 30
DROP = """async ([bytes, type]) => {
    const place = document.querySelector("#answer");
    const answered = new Promise((done) => {
        new MutationObserver(() => { if (place.querySelector(".label")) requestAnimationFrame(() => done(performance.now())); }).observe(place, { childList: true });
    });
    const given = new DataTransfer();
    given.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type }));
    const began = performance.now();
    dispatchEvent(new DragEvent("drop", { dataTransfer: given, bubbles: true, cancelable: true }));
    return (await answered) - began;
}"""


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    version = Store().resolve(name)
    images, labels = data.as_arrays(data.load(data_options(version.manifest.provenance.config)).test, ASKED)
    with tempfile.TemporaryDirectory() as place, sync_playwright() as browsers:
        own = Store(Path(place) / "store")
        for number in Store().versions(version.manifest.name):  # the page compares versions
            own.adopt(Store().load(version.manifest.name, number))
        own.activate(version.manifest.name, version.manifest.version)
        file = Path(place) / "picture.png"
        levels = np.rint(images[1] * 255).astype(np.uint8)
        Image.fromarray(levels[0] if len(levels) == 1 else np.moveaxis(levels, 0, -1)).save(file)
        shown = {"modes": ["average", "random"], "probabilities": "exact", "point": True}
        policies = {version.manifest.name: shown if version.manifest.bank else {"modes": ["average", "cascade"]}}
        arm = Arm(
            "modepath", ["bentoml", "serve", "--host", "127.0.0.1", "--port", "{port}"],
            {"MODEPATH_PORT": "{port}", "MODELS_STORE": str(own.root), "MODEPATH_FEEDBACK": f"sqlite:///{place}/feedback.db", "MODEPATH_POLICIES": json.dumps(policies)},
        )  # fmt: skip
        browser = browsers.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        with running(arm) as (url, _):
            until_ready(url)
            base = url.removesuffix("/predict")
            with Client(base) as client:
                for start in range(0, len(images), 60):
                    answer = client.predict(images[start : start + 60])
                    client.feedback(answer.request_id, labels[start : start + 60].tolist())
            if version.manifest.bank:
                page = browser.new_page(viewport={"width": 1280, "height": 900})
                page.goto(base + "/ui")
                page.wait_for_selector("#ensemble option", state="attached")
                page.set_input_files("#file", file)
                page.wait_for_selector(".curve")
                page.wait_for_timeout(500)
                _save(page, folder / "ui-path.png", whole=True)
                return
            for scheme in ("light", "dark"):
                for size, (width, height) in SIZES.items():
                    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                    page.goto(base + "/ui")
                    page.wait_for_selector("#ensemble option", state="attached")
                    if (scheme, size) == ("light", "desktop"):
                        _time(page, file, version.name, folder)
                    page.set_input_files("#file", file)
                    page.wait_for_selector(".label")
                    for view, wait in (("ask", 500), ("ensembles", 500), ("watch", 5000)):
                        page.evaluate(f"location.hash = '#{view}'")
                        page.wait_for_timeout(wait)
                        _save(page, folder / f"ui-{view}-{scheme}-{size}.png", whole=size == "phone")
                    page.close()


def _time(page: Page, file: Path, name: str, folder: Path) -> None:
    """Time from a dropped picture to the first frame with its answer: decoding, requests to the service, drawing."""
    milliseconds = [page.evaluate(DROP, [list(file.read_bytes()), "image/png"]) for _ in range(DROPS)]
    rows = [("first", milliseconds[0]), ("median", np.median(milliseconds)), ("largest", max(milliseconds))]
    lines = [
        f"# From a dropped picture to its answer on the page: {name}",
        "",
        f"`python -m benchmarks.serving.screenshots NAME FOLDER`, {len(os.sched_getaffinity(0))} cores: {DROPS} drops, one after another, in Chromium.",
        "",
    ]
    lines += ["| | ms |", "|---|---|", *(f"| {what} | {value:.0f} |" for what, value in rows), ""]
    Path("benchmarks/results/page.md").write_text("\n".join(lines))


def _save(page: Page, file: Path, *, whole: bool) -> None:
    page.screenshot(path=file, full_page=whole)
    Image.open(file).quantize(128).save(file, optimize=True)


if __name__ == "__main__":
    main()
