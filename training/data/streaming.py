"""A split that is read again in every epoch, because it is too large for memory or returns random images.

It is read by the training process or by workers. An error in a worker must neither hang training nor end in a
traceback: a worker checks what it reads, and returns an error instead of a batch. Workers pass images through shared
memory, or through a pipe if that is too small, as in a container with 64 MB of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Subset, get_worker_info

from training.data.contract import Batch, Contract
from training.errors import DataError

# A batch that takes longer than both comes from a worker that hangs.
SECONDS_PER_IMAGE = 10
SECONDS_PER_BATCH = 300


@dataclass(frozen=True)
class Streamed:
    """Images and labels of a map-style data set, checked as they are read."""

    dataset: Dataset[Any]
    workers: int
    contract: Contract
    labels: torch.Tensor | None = None  # int64 (N,), if they are known without reading the images
    new_labels: torch.Tensor | None = None  # int64 (classes of the data set,): the labels that are returned instead

    def __len__(self) -> int:
        return len(self.dataset)  # pyright: ignore[reportArgumentType]

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of every image."""
        assert self.contract.shape is not None
        return self.contract.shape

    def batches(self, order: torch.Tensor, size: int) -> Iterator[Batch]:
        """Images float32 (batch, C, H, W) in [0, 1] and labels int64 (batch,), in the given order of rows.

        Raises:
            DataError: a row cannot be read or violates the contract, or a worker died or hangs.
        """
        rows = [chunk.tolist() for chunk in order.split(size)]
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        loader = DataLoader(
            _Checked(self.dataset, self.contract), batch_sampler=rows, num_workers=self.workers, collate_fn=_as_it_is,
            generator=generator, pin_memory=torch.cuda.is_available(),
            timeout=max(SECONDS_PER_BATCH, SECONDS_PER_IMAGE * size) if self.workers else 0,
        )  # fmt: skip
        for batch in self._fetched(loader):
            if isinstance(batch, DataError):
                raise batch
            images, labels = (torch.as_tensor(part) for part in batch)
            yield scale(images), labels if self.new_labels is None else self.new_labels[labels]

    def take(self, rows: torch.Tensor) -> Streamed:
        """Returns a split with these rows only."""
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, dataset=_Rows(self.dataset, rows.tolist()), labels=labels)

    def _fetched(self, loader: DataLoader[Any]) -> Iterator[Any]:
        try:
            batches = iter(loader)
        except OSError as error:
            raise DataError(
                f"The {self.workers} worker processes that read the data cannot be started: {error}. Is /dev/shm full (docker: --shm-size), or the "
                "number of processes limited? --workers 0 does not need them."
            ) from error
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if not self.workers:
                    raise
                raise DataError(
                    f"{self.contract.what}: a process that reads it died or hangs: {error} Is memory short (fewer --workers, a smaller "
                    "--batch-size), or does a library that the data set uses not survive a fork? --workers 0 does not need such processes."
                ) from error
            yield batch


def scale(images: torch.Tensor) -> torch.Tensor:
    """uint8 0 … 255 -> float32 0 … 1; floats are unchanged."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


class _Rows(Subset[Any]):
    """Some rows of a data set. Errors give row numbers of the whole data set."""


@dataclass(frozen=True)
class _Checked(Dataset[Any]):
    dataset: Any
    contract: Contract

    def __getitems__(self, rows: list[int]) -> Any:
        dataset = self.dataset
        while isinstance(dataset, _Rows):
            rows = [dataset.indices[row] for row in rows]
            dataset = dataset.dataset
        try:
            images, labels = self.contract.read(dataset, rows)
        except DataError as error:
            return error
        if get_worker_info() is None:
            return images, labels
        # The queue's thread would share the tensors too, but if it fails, the batch never arrives. So they are shared
        # here.
        try:
            images.share_memory_()
        except RuntimeError:
            return images.numpy(), labels.numpy()
        return images, labels.numpy()


def _as_it_is(batch: Any) -> Any:
    return batch
