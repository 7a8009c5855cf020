import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from tests.training.data.test_contract import LATER, Later
from training.data.contract import Contract
from training.data.streaming import Streamed
from training.errors import DataError

ROOT = Path(__file__).parents[3]
CONTRACT = Contract("The train split of 'pets'", classes=2, shape=(1, 4, 4), dtype=torch.float32)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("fault", "cause"), LATER[:1] + LATER[7:8] + LATER[-3:-2])
def test_a_later_row_that_breaks_the_contract_is_named_by_whatever_process_reads_it(workers, fault, cause):
    split = Streamed(Later(**fault), workers, CONTRACT)
    taken = split.take(torch.tensor([0, 2, 4, 7, 9])).take(torch.tensor([0, 1, 3]))
    with pytest.raises(DataError, match=cause) as caught:
        list(taken.batches(torch.arange(3), 2))
    assert "Traceback" not in str(caught.value)


class Dies(Later):
    def __getitem__(self, row):
        os._exit(3) if row == 7 else None
        return super().__getitem__(row)


class Hangs(Later):
    def __getitem__(self, row):
        while row == 7:
            pass
        return super().__getitem__(row)


@pytest.mark.parametrize("dataset", [Dies(), Hangs()])
def test_a_worker_that_dies_or_hangs_ends_in_an_error_that_says_what_to_try(dataset, monkeypatch):
    monkeypatch.setattr("training.data.streaming.SECONDS_PER_BATCH", 2)
    monkeypatch.setattr("training.data.streaming.SECONDS_PER_IMAGE", 0)
    with pytest.raises(DataError, match=r"died or hangs.*--workers 0"):
        list(Streamed(dataset, 1, CONTRACT).batches(torch.arange(10), 4))


class Large(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, row):
        return torch.full((3, 224, 224), row / 24), row % 2


def read_with_workers():
    split = Streamed(Large(), 2, Contract("", classes=2, shape=(3, 224, 224), dtype=torch.float32))
    rows = []
    for images, labels in split.batches(torch.arange(24), 8):
        assert torch.equal(images, images[:, :1, :1, :1].expand_as(images))
        rows += [(round(float(image[0, 0, 0]) * 24), int(label)) for image, label in zip(images, labels, strict=True)]
    assert rows == [(row, row % 2) for row in range(24)]


def read_where_shared_memory_is_small():
    """Run in a process that may mount file systems; a batch has 4.8 MB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", "/dev/shm"], check=True)
    read_with_workers()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k,nr_inodes=1", "tmpfs", "/dev/shm"], check=True)
    with pytest.raises(DataError, match=r"cannot be started.*--shm-size.*--workers 0"):
        read_with_workers()
    print("both")


def test_workers_neither_hang_nor_lose_images_where_shared_memory_is_small():
    alone = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount"]
    try:
        subprocess.run([*alone, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system of its own is not permitted here")
    code = "from tests.training.data.test_streaming import *; read_where_shared_memory_is_small()"
    done = subprocess.run([*alone, sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "both\n", done.stderr
