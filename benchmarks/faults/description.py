"""Requests that schemathesis makes of the OpenAPI description, valid and invalid, with and without API keys.

    python -m benchmarks.faults.description [--examples 1500]

All of its checks are on: no status 5xx, no status or body that the description lacks, no invalid request that is accepted, no valid one that is refused. The
table goes to benchmarks/results/description.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

from models_store.decisions.calibrating import Labelled, calibrate
from models_store.store import Store
from service.access import keys
from tests.conftest import ROOT
from tests.models_store.decisions.test_calibrating import labelled
from tests.onnx_members import publish
from tests.service.conftest import Server

RESULT = Path(__file__).parents[1] / "results/description.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=1500, help="for each operation and phase")
    args = parser.parse_args()
    rows = [run(with_keys, args.examples) for with_keys in (False, True)]
    table = tabulate(
        rows, headers=("API keys", "operations", "requests", "failures", "seconds"), floatfmt=".0f", tablefmt="pipe"
    )
    print(table)
    if sum(row[2] for row in rows) >= 20_000:
        version = subprocess.run(
            [schemathesis(), "--version"], capture_output=True, text=True, check=True
        ).stdout.strip()
        RESULT.write_text(
            f"# The description, by schemathesis\n\n`python -m benchmarks.faults.description --examples {args.examples}`, {version}, all checks.\n\n{table}\n"
        )
    if any(row[3] for row in rows):
        sys.exit(1)


def schemathesis() -> str:
    return str(Path(sys.executable).parent / "schemathesis")


def run(with_keys: bool, examples: int) -> tuple[str, int, int, int, float]:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, file, report = Store(folder / "store"), folder / "keys.json", folder / "report.json"
        calibrate(store, publish(store, "animals"), Labelled(*labelled(2000, temperature=0.1), "these"))
        store.remove("animals", 1)  # an activation over HTTP would serve a version that is not calibrated
        secret = keys.add(file, "admin", ["admin"])
        environment = {"MODEPATH_KEYS_FILE": str(file)} if with_keys else {}
        server = Server(store, folder, MODEPATH_WORKERS="2", MODEPATH_MAX_ROWS="4", **environment)
        try:
            server.until(200)
            command = [
                schemathesis(), "--config-file", str(ROOT / "tests/service/schemathesis.toml"), "run", server.url + "/docs.json", "--checks", "all",
                "--max-examples", str(examples), "--seed", "1", "--continue-on-failure", "--no-color", "--report-json-path", str(report),
                *(["--header", f"Authorization: Bearer {secret}"] if with_keys else []),
            ]  # fmt: skip
            done = subprocess.run(
                command, env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.service.schemathesis_hooks"}, cwd=ROOT, capture_output=True, text=True, check=False,
            )  # fmt: skip
        finally:
            code = server.stop()
        assert code == 0
        assert "Traceback" not in server.log.read_text()
        if done.returncode:
            print(done.stdout[-20000:], done.stderr[-2000:])
        found = json.loads(report.read_text())
    failures = 0 if done.returncode == 0 else 1
    return (
        "yes" if with_keys else "no",
        found["operations"]["tested"],
        found["test_cases"]["generated"],
        failures,
        time.monotonic() - began,
    )


if __name__ == "__main__":
    main()
