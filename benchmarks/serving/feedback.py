"""What feedback and drift tests cost, and what happens when their database stops or its disk is full.

    python -m benchmarks.serving.feedback NAME cost        a published, calibrated ensemble; wrk; writes results/feedback.md
    python -m benchmarks.serving.feedback NAME faults      needs PostgreSQL (Debian's package) and root, for a small file system

Cost: one image per request, npy; three servers, which take turns: a copy of the version without its calibration and MODEPATH_FEEDBACK=off (nothing is
kept, nothing is tested); the version with MODEPATH_FEEDBACK=off (novelty and drift tests); the version with feedback. Ratios of rates within a round; median and range.
Faults: four clients ask without a pause. PostgreSQL is stopped for 30 s (SIGSTOP: it hangs; then SIGQUIT: it is gone). SQLite's file system of 8 MiB fills up.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
from tabulate import tabulate

from benchmarks.serving.throughput import Arm, npy_script, running, until_ready, wrk
from models_store.manifest import CALIBRATION_FILE, NOVELTY_FILE, Draft
from models_store.store import Store, Version
from training import data
from training.config import data_options

RESULT = Path(__file__).parents[1] / "results/feedback.md"
CONNECTIONS = (1, 8, 64)
STOPPED_SECONDS = 30
ARMS = ("requests/s, plain", "calibrated", "with feedback")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("what", choices=["cost", "faults"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=4)
    args = parser.parse_args()
    version = Store().resolve(args.name)
    images = data.as_arrays(data.load(data_options(version.manifest.provenance.config)).test, 500)[0]
    kept = json.loads(RESULT.with_suffix(".json").read_text()) if RESULT.with_suffix(".json").exists() else {}
    kept[args.what] = cost(version, images, args) if args.what == "cost" else faults(images)
    RESULT.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    RESULT.write_text(report(kept))
    print(report(kept))


def report(kept: dict) -> str:
    """The results as Markdown."""
    lines = ["# Feedback and drift: cost and faults", ""]
    if "cost" in kept:
        lines += [
            f"`python -m benchmarks.serving.feedback NAME cost`: {kept['cost']['what']}", "",
            tabulate(kept["cost"]["rows"], ["connections", *ARMS, "feedback / calibrated", "feedback / plain"], tablefmt="github", disable_numparse=True), "",
        ]  # fmt: skip
    if "faults" in kept:
        headers = ["fault", "seconds", "requests", "failed", "p99, ms", "answers lost for feedback", "log says"]
        lines += [
            "`python -m benchmarks.serving.feedback NAME faults`: four clients, 2 cores shared with them.", "",
            tabulate(kept["faults"], headers, tablefmt="github", disable_numparse=True), "",
        ]  # fmt: skip
    return "\n".join(lines)


def cost(version, images: np.ndarray, args: argparse.Namespace) -> dict:
    """Rates of three servers that take turns."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        # Stores of their own, because looking at other ensembles takes time too.
        stores = Store(folder / "plain"), Store(folder / "calibrated")
        stores[1].adopt(version)
        _publish_plain(stores[0], version)
        script = npy_script(folder, "predict", images)
        places = [(stores[0], "off"), (stores[1], "off"), (stores[1], f"sqlite:///{folder}/feedback.db")]
        arms = [_arm(args.name, {"MODELS_STORE": str(store.root), "MODEPATH_FEEDBACK": kept}) for store, kept in places]
        rates: dict[int, list[list[float]]] = {connections: [[] for _ in arms] for connections in CONNECTIONS}
        with contextlib.ExitStack() as started:
            urls = [started.enter_context(running(arm))[0] for arm in arms]
            for url in urls:
                until_ready(url)
                wrk(url, script, 8, 2)
            for number in range(args.rounds):
                for connections in CONNECTIONS:
                    for arm in np.roll(np.arange(len(arms)), number).tolist():
                        rates[connections][arm].append(wrk(urls[arm], script, connections, args.seconds)["rate"])
            time.sleep(2)
            metrics = httpx.get(urls[-1].removesuffix("/predict") + "/metrics").text
            lost = [line for line in metrics.splitlines() if line.startswith("modepath_feedback_lost_total")]
    rows = []
    for connections, found in rates.items():
        plain, calibrated, with_ = map(np.array, found)
        ratios = [with_ / calibrated, with_ / plain]
        shown = [f"{np.median(ratio):.3f} ({ratio.min():.3f} to {ratio.max():.3f})" for ratio in ratios]
        rows.append([str(connections), *(f"{np.median(rate):.0f}" for rate in found), *shown])
    what = f"{len(version.manifest.members)} members, {args.rounds} rounds of {args.seconds} s, {len(os.sched_getaffinity(0))} cores shared with wrk. Answers lost: {lost[0].split()[-1]}."
    return {"what": what, "rows": rows}


def _publish_plain(store: Store, version: Version) -> None:
    """Publish a copy of a version without its calibration."""
    manifest = version.manifest
    with store.staging(manifest.name) as staged:
        for path in manifest.files:
            if path not in (CALIBRATION_FILE, NOVELTY_FILE):
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(version.folder / path, staged / path)
        draft = {name: getattr(manifest, name) for name in Draft.model_fields}
        store.publish(manifest.name, staged, Draft.model_validate({**draft, "calibration": None}))


def faults(images: np.ndarray) -> list[list[str]]:
    """What clients see while the database fails."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        folder.chmod(0o755)
        with _postgres(folder) as (url, stop, begin):
            rows.append(
                _during(
                    "PostgreSQL hangs", url, images, folder, lambda: stop(signal.SIGSTOP), lambda: stop(signal.SIGCONT)
                )
            )
            rows.append(_during("PostgreSQL is gone", url, images, folder, lambda: stop(signal.SIGQUIT), begin))
        small = folder / "small"
        small.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", small], check=True)
        try:
            fill = small / "fill"
            begin = lambda: fill.write_bytes(b"x" * (shutil.disk_usage(small).free))  # noqa: E731
            rows.append(_during("disk full", f"sqlite:///{small}/feedback.db", images, folder, begin, fill.unlink))
        finally:
            subprocess.run(["umount", "-l", small], check=True)
    return rows


def _during(name: str, database: str, images: np.ndarray, folder: Path, begin, end) -> list[str]:
    log = folder / f"{name.replace(' ', '-')}.log"
    arm = _arm(None, {"MODEPATH_FEEDBACK": database})
    seconds: list[float] = []
    failed: list[str] = []
    ended = threading.Event()

    def ask(url: str, number: int) -> None:
        array = io.BytesIO()
        np.save(array, images[number : number + 1])
        with httpx.Client(timeout=60) as client:
            while not ended.is_set():
                began = time.perf_counter()
                answer = client.post(url, content=array.getvalue(), headers={"Content-Type": "application/x-npy"})
                seconds.append(time.perf_counter() - began)
                if answer.status_code != 200:
                    failed.append(answer.text)

    with running(arm, log) as (url, _):
        until_ready(url)
        clients = [threading.Thread(target=ask, args=(url, number)) for number in range(4)]
        for client in clients:
            client.start()
        time.sleep(3)
        begin()
        started = len(seconds)
        time.sleep(STOPPED_SECONDS)
        during = seconds[started:]
        end()
        time.sleep(10)
        ended.set()
        for client in clients:
            client.join()
        metrics = httpx.get(url.removesuffix("/predict") + "/metrics").text
    lost = next(line.split()[-1] for line in metrics.splitlines() if line.startswith("modepath_feedback_lost_total"))
    text = log.read_text()
    said = f"{text.count('The database of answers fails')} × fails, {text.count('works again')} × works again"
    return [
        name,
        str(STOPPED_SECONDS),
        str(len(during)),
        str(len(failed)),
        f"{1000 * np.quantile(during, 0.99):.0f}",
        lost,
        said,
    ]


@contextmanager
def _postgres(folder: Path) -> Iterator[tuple]:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))[-1]
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    home = folder / "postgres"
    home.mkdir()
    shutil.chown(home, "postgres")
    data_folder = home / "data"
    subprocess.run([*as_user, programs / "initdb", "-D", data_folder, "--auth=trust", "--username=postgres"], check=True, capture_output=True)  # fmt: skip
    servers: list[subprocess.Popen] = []

    def begin() -> None:
        command = [*as_user, programs / "postgres", "-D", data_folder, "-k", home, "-h", ""]
        servers.append(
            subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        )

    def stop(number: int) -> None:
        # The server and its processes for connections form a session.
        if number == signal.SIGQUIT:
            servers[-1].send_signal(number)
            servers[-1].wait(20)
        else:
            subprocess.run(["pkill", f"-{number}", "-u", "postgres"], check=True)

    begin()
    time.sleep(3)
    try:
        yield f"postgresql+psycopg://postgres@/postgres?host={home}&connect_timeout=5", stop, begin
    finally:
        servers[-1].send_signal(signal.SIGQUIT)
        servers[-1].wait(20)


def _arm(name: str | None, environment: dict[str, str]) -> Arm:
    default = {} if name is None else {"MODEPATH_DEFAULT": name}
    return Arm(
        "modepath",
        ["bentoml", "serve", "--host", "127.0.0.1", "--port", "{port}"],
        {"MODEPATH_PORT": "{port}", **default, **environment},
    )


if __name__ == "__main__":
    main()
