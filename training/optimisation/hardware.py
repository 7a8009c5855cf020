"""Device, precision and data parallelism: Lightning Fabric, with the choices that `auto` stands for."""

from __future__ import annotations

import ctypes
import logging
import os
import warnings

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import Precision
from torch import distributed
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from training import logger
from training.config import Config
from training.errors import ConfigError

# glibc's mallopt(): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_TOP_PAD.
_MALLOC = {-3: 2**25, -1: 2**31 - 1, -2: 2**26}


class _Rank(logging.Filter):
    """Sets `record.rank`. All processes log the same lines, so the others than the first log errors only."""

    def __init__(self, rank: int):
        super().__init__()
        self._rank = rank

    def filter(self, record: logging.LogRecord) -> bool:
        record.__dict__["rank"] = self._rank
        return self._rank == 0 or record.levelno >= logging.ERROR


def launch(config: Config) -> Fabric:
    """Launch Fabric on the chosen device, or join the processes that torchrun has started.

    Raises:
        ConfigError: the device is not available, or --devices differs from what torchrun has started.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but torch sees no GPU: check the driver, or use --device cpu.")
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    devices, machines = _started_by_torchrun(config) or (config.devices, 1)
    if device == "cuda" and devices > torch.cuda.device_count():
        raise ConfigError(f"{devices} devices are asked for, but this machine has {torch.cuda.device_count()}.")
    if devices * machines > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        _join("nccl" if device == "cuda" else "gloo")
    bf16 = config.precision == "bf16" or (config.precision == "auto" and _computes_in_bf16(device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Fabric's hints about GPUs that are not used
        logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # `describe` reports it instead
        fabric = Fabric(
            accelerator=device,
            devices=devices,
            num_nodes=machines,
            strategy="ddp" if devices * machines > 1 else "auto",
            precision="bf16-mixed" if bf16 else "32-true",
        )
        fabric.launch()
    _log_once(fabric.global_rank)
    if device == "cpu":
        keep_memory()
    return fabric


def _started_by_torchrun(config: Config) -> tuple[int, int] | None:
    """Processes on this machine, and machines; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    here, all_ = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if config.devices not in (1, here):
        raise ConfigError(
            f"--devices {config.devices}, but torchrun has started {here} processes on this machine. Leave out --devices."
        )
    return here, all_ // here


def _join(backend: str) -> None:
    """Join the other processes, before Fabric would.

    Processes that torchrun has started again find the addresses of those before them in its store, and wait for them
    in vain (torch 2.14 with gloo). So each start uses a part of the store of its own.
    """
    if distributed.is_initialized():
        return
    get = os.environ.__getitem__
    store = TCPStore(
        get("MASTER_ADDR"),
        int(get("MASTER_PORT")),
        is_master=os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and get("RANK") == "0",
    )
    own = PrefixStore(f"modepath-{get('TORCHELASTIC_RESTART_COUNT')}", store)
    distributed.init_process_group(backend, store=own, rank=int(get("RANK")), world_size=int(get("WORLD_SIZE")))


def _log_once(rank: int) -> None:
    for earlier in [f for f in logger.filters if isinstance(f, _Rank)]:
        logger.removeFilter(earlier)
    logger.addFilter(_Rank(rank))


def keep_memory() -> None:
    """Stop glibc from returning freed tensor memory to the system after every step.

    Faulting it in again took a third of the time of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries do not have it
        for option, value in _MALLOC.items():
            mallopt(option, value)


def describe(fabric: Fabric) -> str:
    """Description of hardware and precision, for the log and the manifest."""
    name = torch.cuda.get_device_name() if fabric.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return f"{name}, {fabric._precision.precision}, {fabric.world_size} process{'es' if fabric.world_size > 1 else ''}"


def is_reduced(fabric: Fabric) -> bool:
    """Returns whether Fabric computes in less than float32."""
    return fabric._precision.precision != "32-true"


def use_float32(fabric: Fabric) -> None:
    """Switch a launched Fabric, with which nothing is set up yet, to float32."""
    # Its processes exist already, so launching another Fabric would not help.
    fabric._precision = fabric.strategy.precision = Precision()


def _computes_in_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Without these instructions, bf16 on a CPU is emulated and slower than float32. With them, steps took 0.55 of the
    # time.
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)
