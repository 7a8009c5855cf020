"""Trains the chains of a plan as tasks of Ray, and collects what they have trained in the run's folder.

A task gets the options, the data, the user's own files and objects, and the weights that its legs start from, so a node needs no shared disk; packages must be installed
there, and are compared (code.py). After each epoch it sends its checkpoint, and what it has collected since, to an actor beside this process, which writes them into the run's folder. So a
task whose node is lost begins again after its last finished epoch, and so does a command that is repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training import logger
from training.cluster import code
from training.cluster.chains import chains
from training.config import Config
from training.data import Data
from training.errors import ConfigError, TrainingError
from training.geometry.vertices import State
from training.optimisation import hardware, loop
from training.optimisation.loop import Leg
from training.optimisation.session import Session
from training.runs import Progress, Run, save_state, write_whole

CHECKPOINT = "checkpoint.safetensors"
SHOWN_SECONDS = 1.0  # until the last lines of tasks have arrived
RETRIES = 20  # of a task whose node or process is lost


@dataclass(frozen=True)
class _Task:
    """What a node needs to train one chain."""

    module: str  # of the method
    plan: str  # name of its function
    options: Mapping[str, Any]
    code: Mapping[str, bytes]  # the user's, by option
    expected: Mapping[str, Any]  # see code.check
    threads: int
    legs: Sequence[int]
    steps: int  # iterations in an epoch


class _Sending(Run):
    """A run's folder on a node, which sends what is new in it after each epoch."""

    def __init__(self, folder: Path, send: Callable[[Mapping[str, bytes]], None]):
        super().__init__(folder, "a task")
        self._send = send
        self._sent: set[str] = set()

    def save_checkpoint(self, state: State, progress: Progress) -> None:
        """See Run."""
        super().save_checkpoint(state, progress)
        found = {str(file.relative_to(self.folder)): file for file in sorted(self.folder.rglob("*.safetensors"))}
        self._send(
            {name: file.read_bytes() for name, file in found.items() if name == CHECKPOINT or name not in self._sent}
        )
        self._sent |= found.keys()

    def has(self, files: Mapping[str, bytes]) -> None:
        """Put files there that need not be sent again."""
        for name, content in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, content)
        self._sent |= files.keys()


class _Keeper:
    """Writes what tasks send into the run's folder. It is an actor, on the node of the command."""

    def __init__(self, folder: str):
        self._folder = Path(folder)

    def put(self, chain: int, files: Mapping[str, bytes]) -> None:
        """Keep files of a chain: the checkpoint last, so that what it counts as collected is there."""
        for name, content in sorted(files.items(), key=lambda one: one[0] == CHECKPOINT):
            target = self._place(chain, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, content)

    def files(self, chain: int, legs: Sequence[int]) -> dict[str, bytes]:
        """What a task that begins needs: weights to start from, and if it has begun before, what it has trained."""
        own = [self._folder / "starts" / file.name for file in (self._folder / "starts").glob("*.safetensors")]
        own += [file for leg in legs for file in (self._folder / "vertices").glob(f"{leg:02d}-*.safetensors")]
        found = {str(file.relative_to(self._folder)): file.read_bytes() for file in own}
        with contextlib.suppress(FileNotFoundError):
            found[CHECKPOINT] = self._place(chain, CHECKPOINT).read_bytes()
        return found

    def _place(self, chain: int, name: str) -> Path:
        return self._folder / "chains" / f"{chain:03d}.safetensors" if name == CHECKPOINT else self._folder / name


def train(session: Session, run: Run, legs: Sequence[Leg], plan: Callable[..., Any]) -> float:
    """Train all legs on the cluster that --ray names, resuming each chain after its last finished epoch.

    Args:
        session: this process's session; its data and options are sent to the nodes.
        run: the run.
        legs: of the plan.
        plan: the method's function that returns the plan; the nodes call it again.

    Returns:
        Seconds of training, summed over the chains and all sessions of the run.

    Raises:
        ConfigError: Ray is not installed, or the cluster does not answer.
        DivergenceError: the loss of a chain is NaN or infinite.
    """
    config = session.config
    if run.progress().leg >= len(legs):
        return session.train(run, legs)
    ray = _connected(config)
    try:
        strategies = importlib.import_module("ray.util.scheduling_strategies")
        here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        keeper = ray.remote(_Keeper).options(num_cpus=0, scheduling_strategy=here).remote(str(run.folder.resolve()))
        submit = ray.remote(_trained).options(
            num_cpus=config.ray_cpus, num_gpus=config.ray_gpus, max_retries=RETRIES, retry_exceptions=False
        )
        data = ray.put(session.data)
        groups = chains(legs)
        module = sys.modules[type(config).__module__]
        name = module.__spec__.name if module.__name__ == "__main__" and module.__spec__ else module.__name__
        options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
        options["precision"] = "bf16" if hardware.is_reduced(session.fabric) else "32"  # what was found to run here
        if not config.ray_gpus:
            options["device"] = "cpu"  # else all tasks of a node would share its first GPU
        own, expected = code.packed(options), code.of_command(session)
        _warn_of_resources(ray, config)
        logger.info(f"{len(groups)} tasks on the Ray cluster, of {config.ray_cpus:g} CPUs each")
        waiting = {}
        for number, group in enumerate(groups):
            task = _Task(
                name, plan.__name__, options, own, expected, max(1, int(config.ray_cpus)), group, session.steps_per_epoch
            )  # fmt: skip
            waiting[submit.remote(task, data, keeper, number)] = group
        seconds, finished = 0.0, 0
        while waiting:
            (ready,), _ = ray.wait([*waiting], num_returns=1)
            seconds += ray.get(ready)
            finished += 1
            labels = ", ".join(dict.fromkeys(legs[leg].label for leg in waiting.pop(ready)))
            logger.info(f"finished {finished} of {len(groups)} tasks: {labels}")
        time.sleep(SHOWN_SECONDS)
    except SystemError as error:  # a signal arrived in Ray's own code, which wraps what its handler raised
        raise (error if error.__cause__ is None else error.__cause__) from None
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, TrainingError) else error from None
    finally:
        ray.shutdown()  # it stops the tasks of this command
    last = Progress(len(legs), 0, seconds)
    save_state(run.folder / CHECKPOINT, {}, {"leg": str(last.leg), "epoch": "0", "seconds": str(seconds)})
    return session.train(run, legs)  # it prepares the network as after any training


def _connected(config: Config) -> Any:
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # lines of different tasks are alike, and each is wanted
    try:
        ray: Any = importlib.import_module("ray")  # few need it, and it is not installed with the rest
    except ImportError:
        raise ConfigError("--ray needs the package ray: pip install 'modepath[ray]'.") from None
    local = config.ray == "local"
    in_main = threading.current_thread() is threading.main_thread()
    on_terminate = signal.getsignal(signal.SIGTERM)  # Ray replaces it
    try:
        if not local and (place := re.fullmatch(r"([^:/]+):(\d+)", str(config.ray))):
            # Ray itself would try for minutes.
            socket.create_connection((place[1], int(place[2])), timeout=5).close()
        ray.init(address=config.ray, logging_level=logging.WARNING, include_dashboard=False if local else None)
    except Exception as error:  # ConnectionError, ValueError and others
        raise ConfigError(
            f"The Ray cluster {config.ray!r} does not answer ({(str(error).splitlines() or [type(error).__name__])[0]}). Give --ray local, or HOST:PORT of a cluster that "
            "this machine is a node of (ray start). If its nodes were started with RAY_AUTH_MODE=token, set that here, too."
        ) from None
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, on_terminate)
    return ray


def _warn_of_resources(ray: Any, config: Config) -> None:
    having = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(one.get("CPU", 0) >= config.ray_cpus and one.get("GPU", 0) >= config.ray_gpus for one in having):
        largest = ", ".join(f"{one.get('CPU', 0):g} CPUs and {one.get('GPU', 0):g} GPUs" for one in having)
        logger.warning(
            f"no node of the cluster has the {config.ray_cpus:g} CPUs and {config.ray_gpus:g} GPUs that a task asks for (--ray-cpus, --ray-gpus); they have: "
            f"{largest}. The tasks wait until such a node joins."
        )


def _trained(task: _Task, data: Data, keeper: Any, chain: int) -> float:
    """Train one chain on this node. Returns its seconds of training."""
    ray: Any = importlib.import_module("ray")
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler(sys.stdout))  # Ray shows it where the command runs
        logger.setLevel(logging.INFO)
        logger.propagate = False
    torch.set_num_threads(task.threads)
    module = importlib.import_module(task.module)
    with tempfile.TemporaryDirectory(prefix="modepath-") as folder:
        config: Config = module.Config(**code.unpacked(task.options, task.code, Path(folder) / "code"))
        session = Session.of(config, data)
        code.check(session, task.expected)
        run = _Sending(Path(folder), lambda files: ray.get(keeper.put.remote(chain, files)))
        run.has(ray.get(keeper.files.remote(chain, task.legs)))
        legs = getattr(module, task.plan)(config, run, task.steps).legs
        return loop.train(config, session.fabric, run, session.network, session.data_on_device, legs, task.legs)
