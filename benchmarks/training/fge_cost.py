"""What FGE costs compared with plain training: the whole command against as many plain epochs of the same loop, in one run.

    python -m benchmarks.training.fge_cost [--epochs 10] [--dataset fashion-mnist] [--network preresnet8]

Both are whole processes: start, data, training; FGE's also re-estimates batch norm, exports, checks, calibrates and publishes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

from tabulate import tabulate

PLAIN = """
import sys
from training.fge import Config
from training.optimisation.loop import Leg
from training.optimisation.schedules import plain_rate
from training.optimisation.session import Session
from training.runs import Run
config = Config(dataset=sys.argv[1], network=sys.argv[2], epochs=int(sys.argv[3]))
session = Session.open(config)
total = config.epochs * session.steps_per_epoch
with Run.open("plain", config.deciding(), {}, fresh=True) as run:
    session.train(run, [Leg("plain", total, lambda i: plain_rate(i, total, config.lr), collect=(total,))])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--dataset", default="fashion-mnist")
    parser.add_argument("--network", default="preresnet8")
    args = parser.parse_args()
    named = [args.dataset, args.network, str(args.epochs)]
    fge = ["-m", "training.fge", "--dataset", named[0], "--network", named[1], "--epochs", named[2]]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "MODELS_STORE": f"{folder}/store", "MODEPATH_RUNS": f"{folder}/runs"}
        seconds = {}
        for name, command in (("plain", ["-c", PLAIN, *named]), ("fge", fge)):
            began = time.monotonic()
            subprocess.run([sys.executable, *command], env=environment, check=True)
            seconds[name] = time.monotonic() - began
    rows = [[name, f"{value:.1f}", f"{value / seconds['plain']:.3f}"] for name, value in seconds.items()]
    print(tabulate(rows, ["process", "seconds", "ratio to plain"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
