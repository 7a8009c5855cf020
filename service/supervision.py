"""A worker that died is replaced at once. BentoML's supervisor (circus) by itself looks every ten seconds."""

from __future__ import annotations

import contextlib
import signal
from typing import Any

from circus.exc import ConflictError  # pyright: ignore[reportMissingTypeStubs] - BentoML's own dependency

DELAY_SECONDS = 0.5  # so that a worker that cannot start is not started in a frenzy


def replace_dead_workers() -> None:
    """In the process that starts the workers: tell its supervisor when a child ends."""
    signal.signal(signal.SIGCHLD, _tell)


def _tell(number: int, frame: object) -> None:
    # The supervisor has taken SIGTERM for itself; that is the way to it. Were it another one some day,
    # it would not be told, and would find out in its own time.
    supervisor: Any = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    controller = getattr(supervisor, "controller", None)
    if controller is not None:
        controller.loop.add_callback_from_signal(controller.loop.call_later, DELAY_SECONDS, _look, controller.arbiter)


async def _look(arbiter: Any) -> None:
    with contextlib.suppress(ConflictError):  # it is just starting or stopping workers
        await arbiter.manage_watchers()
