"""Commands of training in processes that are forked from one that has imported torch: real processes, which can be killed, without the start."""

import importlib
import multiprocessing
import os
import sys
from pathlib import Path

from training import command

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(
    [
        "tests.training.forked",
        "training.fge",
        "training.evaluate",
        "torch._dynamo",
        "torch.onnx",
        "onnxscript.optimizer",
    ]
)


def start(module: str, arguments: list[str], output: Path, **environment: str):
    """Start `python -m MODULE ARGUMENTS`; standard output and standard error go to the file `output`."""
    process = FORK.Process(target=_run, args=(module, arguments, str(output), {**os.environ, **environment}))
    process.start()
    return process


def _run(module: str, arguments: list[str], output: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    sys.argv = [module, *arguments]
    method = importlib.import_module(module)
    command.main(method.Config, method.run, method.__doc__)
