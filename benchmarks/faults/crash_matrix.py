"""Every command of the store, killed at every system call that touches a file, and with an error from every such call.

    python -m benchmarks.faults.crash_matrix [--only publish] [--step 1]

For each point the store is copied, the command runs in a process of its own under strace, and the n-th call is replaced by a
SIGKILL, an EIO (the disk is broken) or an ENOSPC (it is full). After that, every version must verify, the old or the new version
must be active, and the next publication must succeed and leave no remains. Needs strace. The table goes to
benchmarks/results/crash_matrix.md.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from tabulate import tabulate

from models_store import upkeep
from models_store.decisions.calibrating import Labelled, calibrate
from models_store.errors import EnsembleNotFoundError
from models_store.importing import ImportOptions, import_members
from models_store.records.rollout import RollOut
from models_store.store import Store
from tests.onnx_members import SHAPE, bank, linear, publish

RESULT = Path(__file__).parents[1] / "results/crash_matrix.md"
# All calls that name a file, and those that read, write, list, lock or flush one.
CALLS = "%file,read,write,pread64,pwrite64,writev,getdents64,fsync,fdatasync,ftruncate,fallocate,flock,fchmod,sendfile,copy_file_range"
FAULTS = {"killed": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}
SECONDS = 60
IMAGES = np.random.default_rng(0).random((60, *SHAPE), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=COMMANDS, help="one command; the results file is not written")
    parser.add_argument("--step", type=int, default=1, help="only every n-th call; the results file is not written")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        prepared = Store(Path(folder) / "prepared")
        prepare(prepared, Path(folder))
        for name in [args.only] if args.only else COMMANDS:
            for fault in FAULTS:
                rows.append(row(name, fault, prepared, Path(folder), args.step))
                print(tabulate(rows[-1:], tablefmt="plain"), flush=True)
    headers = (
        "command",
        "fault",
        "calls",
        "old version active",
        "new version active",
        "none active",
        "ended with an error",
    )
    table = tabulate(rows, headers=headers, tablefmt="pipe")
    print(table)
    if not args.only and args.step == 1:
        version = subprocess.run(["strace", "--version"], capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )[0]
        RESULT.write_text(
            "# Every command, with a fault at every system call that touches a file\n\n"
            f"`python -m benchmarks.faults.crash_matrix`, {version}. After each point every version verified, the old or the new version "
            "was active, and the next publication succeeded and left no remains.\n\n"
            f"{table}\n\n{sum(r[2] for r in rows)} points.\n"
        )


def prepare(store: Store, folder: Path) -> None:
    """Three versions, of which the second is active, and a file to import."""
    for seed in (0, 1, 2):
        publish(store, "e", (seed, seed + 1), bank=bank(points=3))
    store.activate("e", 2)
    onnx.save(linear(9), folder / "member.onnx")


def _import(store: Store) -> None:
    import_members(store, "e", [store.root.parent / "member.onnx"], ImportOptions(classes=["cat", "dog", "bird"]))


def _calibrate(store: Store) -> None:
    labels = np.arange(len(IMAGES)) % 3
    calibrate(store, store.load("e", 1), Labelled(IMAGES, labels, "noise", None))


def _backup(store: Store) -> None:
    upkeep.copy_all(Store(store.root.parent / "from"), store)


# What it does, and the versions that may be active after it; the first one is active before.
COMMANDS: dict[str, tuple[Callable[[Store], object], tuple[int | None, ...]]] = {
    "publish": (lambda store: publish(store, "e", (7,), bank=bank(points=3)), (2, 4)),
    "activate": (lambda store: store.activate("e", 3), (2, 3)),
    "deactivate": (lambda store: store.deactivate("e"), (2, None)),
    "rollout": (lambda store: store.begin_roll_out("e", RollOut(version=3, share=0.5)), (2,)),
    "import": (_import, (2, 4)),
    "calibrate": (_calibrate, (2, 4)),
    "gc": (lambda store: upkeep.collect_garbage(store, 1), (2,)),
    "restore": (_backup, (2, 4)),
}


def row(name: str, fault: str, prepared: Store, folder: Path, step: int) -> list[object]:
    work, allowed = COMMANDS[name]
    found: Counter[object] = Counter()
    failed = number = 0
    while True:
        number += 1
        if (number - 1) % step:
            continue
        store = copied(prepared, folder, name)
        ended = under_strace(
            work, store, f"inject={CALLS}:{FAULTS[fault]}:when={number}", f"{fault} at {number} of {name}"
        )
        if ended is None:
            break
        failed += ended
        active = check(store, allowed, f"{name}, {fault} at call {number}")
        found[active] += 1
        recover(store, f"{name}, {fault} at call {number}")
    new = sum(count for active, count in found.items() if active != allowed[0] and active is not None)
    return [name, fault, sum(found.values()), found[2], new, found[None], failed]


def copied(prepared: Store, folder: Path, name: str) -> Store:
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(prepared.root, work / "store")
    shutil.copy(folder / "member.onnx", work)
    if name == "restore":
        shutil.copytree(prepared.root, work / "from")
        publish(Store(work / "from"), "e", (5,))
    return Store(work / "store")


def under_strace(work: Callable[[Store], object], store: Store, inject: str, what: str) -> bool | None:
    """Run in a forked process that strace attaches to. Returns whether it failed; None if no call was replaced."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    child = os.fork()
    if child == 0:
        code = 1
        sys.stderr = sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - the process ends soon
        with contextlib.suppress(BaseException):
            signal.sigwait({signal.SIGUSR1})
            work(store)
            code = 0
        os._exit(code)
    log = store.root.parent / "strace.log"
    tracer = subprocess.Popen(
        ["strace", "-p", str(child), "-o", str(log), "-e", f"trace={CALLS}", "-e", inject],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + SECONDS
    while "TracerPid:\t0" in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < deadline, f"{what}: strace did not attach"
        time.sleep(0.002)
    os.kill(child, signal.SIGUSR1)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"{what}: it hangs")
        time.sleep(0.002)
    tracer.wait(SECONDS)
    if os.WIFSIGNALED(status):
        return True
    if "(INJECTED)" not in log.read_text(errors="replace"):
        assert os.waitstatus_to_exitcode(status) == 0, f"{what}: it failed without a fault"
        return None
    return os.waitstatus_to_exitcode(status) != 0


def check(store: Store, allowed: tuple[int | None, ...], what: str) -> int | None:
    """Verify every version, and return the active one."""
    versions = store.versions("e")
    assert versions, what
    for version in versions:
        store.verify(store.load("e", version))
    try:
        active = store.active("e")
    except EnsembleNotFoundError:
        active = None
    assert active in allowed, f"{what}: {active} is active"
    assert active is None or active in versions, what
    plan = store.roll_out("e")
    assert plan is None or plan.version == 3, what
    return active


def recover(store: Store, what: str) -> None:
    """Publish as if nothing had happened."""
    new = publish(store, "e", (8,))
    assert store.active("e") == new.manifest.version, what
    for version in store.versions("e"):
        store.verify(store.load("e", version))
    remains = [str(one) for one in (store.root / "e").iterdir() if not one.name.isdecimal() and one.name != "active"]
    assert not remains, f"{what}: {remains}"


if __name__ == "__main__":
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        main()
    except AssertionError:
        traceback.print_exc()
        sys.exit(1)
