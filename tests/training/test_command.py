"""What a user sees on an error: one line and exit code 2; the store is unchanged."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from models_store.store import Store
from training import logger
from training.optimisation import hardware

QUICK = ("training.fge", "--network", "mlp", "--epochs", "2", "--pretrain", "0.5", "--members", "2", "--name", "x")


def refused(done):
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stdout + done.stderr
    assert Store().names() == []
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--network", "resnet50"), "Unknown network"),
        (("--dataset", "mnist"), "Unknown data set"),
        (("--network", "nowhere:make"), "no module named"),
        (("--init", "missing.pt"), "does not exist"),
        (("--init", "text.pt"), "cannot be read"),
        (("--init", "other.pt"), "another network"),
        (("--lr", "1e20"), "The loss became"),
        (("--name", "../x"), "cannot name an ensemble"),
        (("--device", "cuda"), "no GPU"),
        (("--pretrain", "2"), "pre-training"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, arguments, told):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    assert told in refused(command(*QUICK, *arguments))


def test_a_store_that_cannot_be_written_is_told_before_training(command, tmp_path):
    (tmp_path / "file").write_text("")
    done = command(*QUICK, MODELS_STORE=str(tmp_path / "file" / "store"))
    assert "Cannot write to the store" in refused(done)
    assert "epoch" not in done.stdout


def test_a_full_disk_is_told(command, tmp_path):
    """A real full disk: a file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=1m tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        # The store fills up during publishing. The run is stored elsewhere, so it is kept and is published later.
        done = command(*QUICK, "--network-options", "hidden=400", MODELS_STORE=str(disk / "store"))
        line = refused(done)
        assert "disk is full" in line
        assert not [f for f in (disk / "store").rglob("*") if f.is_file() and not f.name.endswith(".lock")]
    finally:
        os.system(f"umount {disk}")
    done = command(*QUICK, "--network-options", "hidden=400")
    assert done.returncode == 0
    assert "epoch 1/" not in done.stdout


def test_help_explains_every_option(command):
    text = command("training.fge", "--help").stdout
    for option in ("--init", "--alpha-1", "--cycle", "--loss", "--precision", "--starts", "--split-seed", "--fresh"):
        assert option in text


def test_the_log_marks_warnings_and_keeps_its_level_for_programs_that_configure_logging(tmp_path):
    """In one program the log is shown as by a command; in another, which has configured logging, by that program's handlers alone."""
    lines = (
        "from training import command, logger; command.show_log(); logger.info('an epoch'); logger.warning('too few')"
    )
    shown = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert shown.stdout == "an epoch\nwarning: too few\n"
    configured = "import logging, sys; logging.basicConfig(level='WARNING', stream=sys.stdout, format='%(name)s %(levelname)s %(message)s');"
    theirs = subprocess.run([sys.executable, "-c", configured + lines], capture_output=True, text=True, check=True)
    assert theirs.stdout == "modepath WARNING too few\n"


def test_only_the_first_process_logs_what_all_processes_log():
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        for rank in (1, 0):
            hardware._log_once(rank)
            logger.info("line")
            logger.error("failure")
    finally:
        logger.removeHandler(handler)
    assert [(r.rank, r.levelname) for r in records] == [(1, "ERROR"), (0, "INFO"), (0, "ERROR")]
