"""Activations, canaries, roll-backs and deaths of workers under load, and three bad versions: does any caller notice?

    python -m benchmarks.faults.roll_outs [--rounds 50] [--deaths 20]

Two workers with API keys and required signatures; eight callers, each with its own key, ask without pause and without retries, and compare every answer
with the one of the version that it names. Then a corrupt, an unsigned and a failing version are published. Only requests on the connections of a killed
worker may fail. The table goes to benchmarks/results/roll_outs.md.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
from tabulate import tabulate

from models_store import signing
from models_store.records.rollout import RollOut, Rule
from models_store.store import Store, Version
from service.access import keys
from tests.onnx_members import SHAPE, linear, linear_logits, nan_on_white, publish
from tests.service.conftest import Server, workers_of

RESULT = Path(__file__).parents[1] / "results/roll_outs.md"
CALLERS = 8
AFTER_DEATH_SECONDS = 2.0  # in which requests on the connections of a dead worker fail
RULE = Rule(errors=0.05, disagreement=None, slowdown=None, requests=100)
IMAGES = np.concatenate([np.random.default_rng(0).random((9, *SHAPE), np.float32), np.ones((1, *SHAPE), np.float32)])


class Callers:
    """Eight callers, and what they saw."""

    def __init__(self, url: str, secrets: list[str]):
        self.right: dict[int, np.ndarray] = {}  # by version: probabilities of IMAGES
        self.answers: Counter[int] = Counter()
        self.failures: list[tuple[float, str, bool]] = []  # when, what, whether the connection broke
        self.wrong = 0
        self.mixed: Counter[tuple[int, int]] = Counter()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, secret), daemon=True) for secret in secrets]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, url: str, secret: str) -> None:
        chance = random.Random(secret)
        with httpx.Client(headers={"Authorization": f"Bearer {secret}"}, timeout=30) as client:
            while not self._stop.is_set():
                number = chance.randrange(len(IMAGES))
                try:
                    answer = client.post(f"{url}/predict", json={"inputs": IMAGES[number : number + 1].tolist()})
                except httpx.TransportError as error:
                    self.failures.append((time.monotonic(), repr(error), True))
                    continue
                if answer.status_code != 200:
                    self.failures.append((time.monotonic(), f"{answer.status_code} {answer.text}", False))
                    continue
                found = answer.json()
                self.answers[found["version"]] += 1
                probs = np.array(found["predictions"][0]["probs"])
                self.wrong += int(np.abs(probs - self.right[found["version"]][number]).max() > 1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--deaths", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, private, public = Store(folder / "store"), folder / "key.pem", folder / "key.pub.pem"
        subprocess.run(["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", private], check=True)
        subprocess.run(["openssl", "ec", "-in", private, "-pubout", "-out", public], check=True, capture_output=True)
        secrets = [keys.add(folder / "keys.json", f"caller-{i}", ["predict"]) for i in range(CALLERS)]
        right = {}
        for seeds in ((0, 1, 2), (3, 4, 5)):
            version = publish(store, "e", seeds)
            signing.sign(store, version, private)
            right[version.manifest.version] = expected(seeds)
        server = Server(
            store, folder, MODEPATH_WORKERS="2", MODEPATH_KEYS_FILE=str(folder / "keys.json"), MODEPATH_SIGNED_BY=f'["{public}"]',
        )  # fmt: skip
        try:
            server.until(200)
            wait(lambda: server.log.read_text().count("serving e@2") == 2)
            callers = Callers(server.url, secrets)
            callers.right = right
            with callers:
                deaths = good(store, server, args)
                bad = bad_versions(store, server, callers, private)
        finally:
            server.stop()
    text = report(callers, deaths, bad, args)
    print(text)
    if args.rounds >= 50:
        RESULT.write_text(f"# Roll-outs under load\n\n`python -m benchmarks.faults.roll_outs`\n\n{text}\n")


def expected(seeds: tuple[int, ...]) -> np.ndarray:
    logits = np.stack([linear_logits(linear(seed), IMAGES) for seed in seeds]).astype(np.float64)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return (shares / shares.sum(-1, keepdims=True)).mean(0)


def wait(holds, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not come about in time"
        time.sleep(0.05)


def good(store: Store, server: Server, args: argparse.Namespace) -> list[float]:
    """Activations, canaries and ends of roll-outs in turn; returns when workers were killed."""
    chance, deaths = random.Random(0), []
    for number in range(args.rounds):
        active = store.active("e")
        other = 3 - active
        kind = number % 4
        if kind == 0:
            store.begin_roll_out(
                "e", RollOut(version=other, share=0.5, shadow=0.5, rule=Rule(disagreement=None, slowdown=None))
            )
        elif kind == 1:
            store.end_roll_out("e", "the operator wants so")
        elif kind == 2:
            store.begin_roll_out("e", RollOut(version=other, share=0.25, rule=Rule(disagreement=None, slowdown=None)))
        else:
            store.activate("e", other)
        time.sleep(0.7)
        if number * args.deaths // args.rounds != (number + 1) * args.deaths // args.rounds:
            living = workers_of(server)
            victim = chance.choice(living)
            os.kill(victim.pid, signal.SIGKILL)
            deaths.append(time.monotonic())
            wait(lambda victim=victim: len([one for one in workers_of(server) if one.pid != victim.pid]) == 2)
            count = 2 + len(deaths)
            wait(lambda count=count: server.log.read_text().count("worker(s), of") >= count)
            time.sleep(1)
    return deaths


def bad_versions(store: Store, server: Server, callers: Callers, private: Path) -> list[tuple[str, str]]:
    """Publish a corrupt, an unsigned and a failing version; returns what the service did."""
    store.activate("e", 1)
    wait(lambda: (before := callers.answers[1], time.sleep(0.5)) and callers.answers[1] > before)
    found = []
    damaged = publish(store, "e", (6,), activate=False)
    signing.sign(store, damaged, private)
    member = damaged.folder / "members/000.onnx"
    member.write_bytes(member.read_bytes()[:-1])
    store.activate("e", damaged.manifest.version)
    found.append(("corrupt", refused(server, damaged, "is not the file that was published")))
    unsigned = publish(store, "e", (7,))
    found.append(("unsigned", refused(server, unsigned, "is not signed")))
    time.sleep(2)
    store.activate("e", 1)
    failing = publish(store, "e", (8,), member=nan_on_white, activate=False)
    signing.sign(store, failing, private)
    callers.right[failing.manifest.version] = expected((8,))
    store.begin_roll_out("e", RollOut(version=failing.manifest.version, share=0.7, rule=RULE))
    wait(lambda: (plan := store.roll_out("e")) is not None and plan.ended is not None)
    plan = store.roll_out("e")
    assert plan is not None
    found.append(("fails on one image of ten", f"rolled back: {plan.ended}"))
    time.sleep(2)
    return found


def refused(server: Server, version: Version, why: str) -> str:
    wait(lambda: re.search(rf"{version.name}.*{why}", server.log.read_text()) is not None)
    return "refused; the version before went on"


def report(callers: Callers, deaths: list[float], bad: list[tuple[str, str]], args: argparse.Namespace) -> str:
    lost = [
        what
        for when, what, broken in callers.failures
        if broken and any(0 <= when - death < AFTER_DEATH_SECONDS for death in deaths)
    ]
    others = len(callers.failures) - len(lost)
    kinds = [number % 4 for number in range(args.rounds)]
    rows = [
        ("canaries begun", kinds.count(0) + kinds.count(2)), ("roll-outs ended", kinds.count(1)), ("activations", kinds.count(3)),
        ("workers killed", len(deaths)), ("answers", callers.answers.total()), ("wrong answers", callers.wrong),
        ("requests lost with a killed worker", len(lost)), ("other failures", others),
    ]  # fmt: skip
    first = [what for when, what, broken in callers.failures if what not in lost][:2]
    table = tabulate(rows, tablefmt="pipe", headers=("", "count"))
    return f"{table}\n\n{tabulate(bad, headers=('bad version', 'what happened'), tablefmt='pipe')}\n" + (
        f"\nOthers: {first}\n" if others else ""
    )


if __name__ == "__main__":
    main()
