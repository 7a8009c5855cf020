"""Wide residual networks (Zagoruyko & Komodakis 2016): pre-activation basic blocks, depth 6n+4, width times `widen`."""

from __future__ import annotations

from torch import nn

from training.errors import NetworkError
from training.networks.preresnet import Basic, PreResNet


def make(num_classes: int, input_shape: tuple[int, int, int], *, depth: int, widen: int) -> nn.Module:
    """WRN-`depth`-`widen`.

    Raises:
        NetworkError: the depth does not exist.
    """
    if depth < 10 or (depth - 4) % 6 or widen < 1:
        raise NetworkError(
            f"wrn-{depth}-{widen} does not exist: the depth is 6n+4 (10, 16, 22, 28, 40, …), the width at least 1."
        )
    network = PreResNet(num_classes, input_shape[0], (depth - 4) // 6, widen, Basic)
    # The paper widens the blocks, not the stem; one stem of 16 channels feeds the first block through its shortcut.
    first = network.blocks[0]
    assert isinstance(first, Basic)
    stem = PreResNet(num_classes, input_shape[0], 1, 1, Basic).stem
    network.stem = stem
    network.blocks[0] = Basic(16, 16 * widen, 1)
    return network
