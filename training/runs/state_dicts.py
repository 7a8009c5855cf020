"""Finds a network's weights in what people save: wrappers, prefixes, averages, and what else is in the same file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.errors import CheckpointError

Weights = dict[str, torch.Tensor]
# Keys that hold averaged weights: other weights than those of the training, and often better ones.
AVERAGED = ("ema", "model_ema", "ema_state_dict", "state_dict_ema", "swa_state_dict", "averaged", "average", "teacher")
# Names that tools leave among the weights.
LEFT_BEHIND = ("total_ops", "total_params", "_extra_state", "n_averaged", "num_updates", "decay")
COMPILED = "_orig_mod."  # torch.compile adds it, also in the middle of names
# Places and prefixes that hold what an optimizer keeps for each weight.
OF_OPTIMIZERS = (
    "optimizer",
    "optimizers",
    "optimizer_states",
    "optimizer_state_dict",
    "momentum",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
)
DEPTH = 4  # of wrappers around wrappers


@dataclass(frozen=True)
class Found:
    """Weights for a network, by its own names."""

    weights: Weights
    notes: tuple[str, ...]  # what was done, for the log


@dataclass(frozen=True)
class _Held:
    """A state dict in a checkpoint."""

    place: str  # the keys that lead to it, joined by dots
    weights: Weights


def find(network: nn.Module, content: Any, what: str, part: str | None = None, *, reset_head: bool = False) -> Found:
    """Find the weights of a network in a checkpoint.

    Args:
        network: the network; it is not changed.
        content: what the file holds.
        what: the file, for messages.
        part: which of several state dicts to take, by its key or a prefix of its names; None: the one that is trained.
        reset_head: whether the last layer may have another number of classes; it then keeps the network's own weights.

    Raises:
        CheckpointError: the checkpoint has no weights, those of another network, or several sets that fit.
    """
    held = list(_state_dicts(content))
    if not held:
        raise CheckpointError(f"{what} holds no state_dict: save one with torch.save(network.state_dict(), ...).")
    fits = [fit for one in held for fit in _fits(network, one, reset_head)]
    if part is not None:
        fits = [fit for fit in fits if part in (fit.place, fit.place.rpartition(".")[2], fit.prefix.rstrip("."))]
        if not fits:
            raise CheckpointError(f"{what} holds no weights of this network under {part!r}. {_listed(held)}")
    if not fits:
        raise CheckpointError(_why_not(network, _closest(network, held), what))
    raw = [fit for fit in fits if not fit.is_averaged] or fits
    if len(raw) > 1 and part is None and not all(_same(raw[0].weights, other.weights) for other in raw[1:]):
        names = ", ".join(f"{what}#{fit.name}" for fit in raw)
        raise CheckpointError(f"{what} holds several sets of weights of this network; say which one: {names}.")
    chosen = raw[0]
    return Found(chosen.weights, tuple(_notes(chosen, [fit for fit in fits if fit is not chosen], what)))


@dataclass(frozen=True)
class _Fit:
    """A way to read weights of the network."""

    place: str
    prefix: str  # stripped from the names
    weights: Weights
    ignored: tuple[str, ...]  # names beside the network's
    reset: tuple[str, ...]  # names of a head of another size

    @property
    def name(self) -> str:
        return self.prefix.rstrip(".") or self.place.rpartition(".")[2] or "state_dict"

    @property
    def is_averaged(self) -> bool:
        return any(word in AVERAGED for word in (*self.place.split("."), *self.prefix.split(".")))


def _state_dicts(content: Any, place: str = "", depth: int = DEPTH) -> Iterator[_Held]:
    """Every dictionary that holds tensors by name, outermost first."""
    if not isinstance(content, Mapping) or depth == 0:
        return
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if tensors:
        yield _Held(place, {str(key): value for key, value in tensors.items()})
    for key, value in content.items():
        if isinstance(key, str) and key not in OF_OPTIMIZERS:
            yield from _state_dicts(value, f"{place}.{key}".lstrip("."), depth - 1)


def _fits(network: nn.Module, held: _Held, reset_head: bool) -> Iterator[_Fit]:
    own = network.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    if not needed:
        return
    named = {
        name.replace(COMPILED, ""): tensor
        for name, tensor in held.weights.items()
        if name.rpartition(".")[2] not in LEFT_BEHIND
    }
    parts = {_part(name) for name in own}
    # A wrapper of the network, such as one for grey images, may have put a prefix before all names.
    wrapper = f"{next(iter(parts))}." if len(parts) == 1 and all("." in name for name in own) else ""
    inner = [name.removeprefix(wrapper) for name in needed]
    prefixes = [*_prefixes(needed, named), *_prefixes(inner, named)]
    ways = [(prefix, added) for prefix in dict.fromkeys(prefixes) for added in dict.fromkeys(("", wrapper))]
    for prefix, added in ways:
        of_prefix = {added + name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)}
        of_prefix = _with_tied(own, of_prefix)
        wrong = [name for name in needed if name not in of_prefix or not _alike(of_prefix[name], own[name])]
        head = [name for name in wrong if reset_head and name in _head(network, own)]
        if len(head) < len(wrong):
            continue
        beside = [name for name in named if not name.startswith(prefix)]
        unknown = [name for name in of_prefix if name not in own]
        # Unknown names within the network's own parts are those of a larger network.
        if any(
            _part(name.removeprefix(wrapper)) in {_part(one.removeprefix(wrapper)) for one in own} for name in unknown
        ):
            continue
        kept = {name: tensor for name, tensor in of_prefix.items() if name in own and name not in head}
        yield _Fit(held.place, prefix, kept, tuple(beside + unknown), tuple(head))


def _prefixes(needed: list[str], named: Weights) -> Iterator[str]:
    """Prefixes with which some name of the file would be the network's first or last one."""
    yield ""
    for own in (needed[0], needed[len(needed) // 2]):
        for name in named:
            if name.endswith("." + own) and name[: -len(own)].split(".")[0] not in OF_OPTIMIZERS:
                yield name[: -len(own)]


def _part(name: str) -> str:
    """The first part of a name; all numbers are one, because they count the layers of one part."""
    first = name.partition(".")[0]
    return "0" if first.isdecimal() else first


def _alike(given: torch.Tensor, own: torch.Tensor) -> bool:
    return given.shape == own.shape and given.is_floating_point() == own.is_floating_point()


def _with_tied(own: Mapping[str, torch.Tensor], given: Weights) -> Weights:
    """Tensors that the network shares are stored once by some tools; here under each of their names."""
    by_memory: dict[int, list[str]] = {}
    for name, tensor in own.items():
        if tensor.numel():
            by_memory.setdefault(tensor.data_ptr(), []).append(name)
    found = dict(given)
    for names in by_memory.values():
        if (stored := next((name for name in names if name in given), None)) is not None:
            found |= {name: given[stored] for name in names if name not in given}
    return found


def _head(network: nn.Module, own: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the last layer with weights."""
    last = [name for name, _ in network.named_parameters()][-1].rpartition(".")[0]
    return {name for name in own if name.rpartition(".")[0] == last}


def _same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _notes(chosen: _Fit, others: list[_Fit], what: str) -> Iterator[str]:
    if chosen.prefix:
        yield f"{what}: the prefix {chosen.prefix!r} of its names was left out"
    if chosen.ignored:
        yield f"{what}: {_some(chosen.ignored)} {'is' if len(chosen.ignored) == 1 else 'are'} not of this network, and was left out"
    if chosen.reset:
        yield f"{what}: the last layer ({_some(chosen.reset)}) has another size, and begins with new weights (--reset-head)"
    for other in others:
        if other.is_averaged != chosen.is_averaged:
            taken, left = (
                ("averaged", "those of the training") if chosen.is_averaged else ("not averaged", "averaged ones")
            )
            yield f"{what}: weights under {chosen.name!r} were taken, which are {taken}; {left} are {what}#{other.name}"
            return


def _closest(network: nn.Module, held: list[_Held]) -> Weights:
    """The state dict with the most names of the network, for a message; prefixes that all names share are left out."""
    own = network.state_dict()

    def plain(weights: Weights) -> Weights:
        named = {name.replace(COMPILED, ""): tensor for name, tensor in weights.items()}
        while len(parts := {name.partition(".")[0] for name in named}) == 1 and all("." in name for name in named):
            if parts & {name.partition(".")[0] for name in own}:
                break
            named = {name.partition(".")[2]: tensor for name, tensor in named.items()}
        return named

    return max((plain(one.weights) for one in held), key=lambda one: len(one.keys() & own.keys()))


def _why_not(network: nn.Module, state: Weights, what: str) -> str:
    own = network.state_dict()
    # Counters are not weights, and older checkpoints lack them.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    foreign = [name for name in state if name not in own]
    wrong = [name for name in own if name in state and state[name].shape != own[name].shape]
    shapes = [f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}" for name in wrong]
    shapes += [
        f"{name} of {state[name].dtype} instead of {own[name].dtype}"
        for name in own
        if name in state and state[name].shape == own[name].shape and not _alike(state[name], own[name])
    ]
    told = [
        f"{how} {_some(names)}"
        for how, names in (("lacks", missing), ("has besides", foreign), ("has", shapes))
        if names
    ]
    head = (
        " Only its last layer has another size: --reset-head takes the others."
        if wrong and not missing and not foreign and set(wrong) <= _head(network, own)
        else " Give the --network (and --network-options) it was trained with."
    )
    return f"{what} belongs to another network: it {', '.join(told)}.{head}"


def _listed(held: list[_Held]) -> str:
    places = [one.place for one in held if one.place]
    return f"It holds {', '.join(places)}." if places else "It holds one state_dict."


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
