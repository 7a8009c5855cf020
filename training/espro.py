"""Simplexes of low loss around trained networks, and the ensembles inside them (Benton et al. 2021).

ESPRO: at each mode (a trained network) a simplex grows, one vertex at a time; with --connect (SPRO) the new vertices
are shared, so that a simplicial complex joins the modes. A new vertex is trained so that networks drawn uniformly from
the complex are good and the complex is large: its loss is the mean loss of the drawn networks minus 6 λ / ((k + 1)(k + 2))
times the logarithm of the volume, where λ is --volume-weight and k + 1 the number of vertices of a simplex. The paper's
weight is the same for all vertices, and much smaller; docs/methods/espro.md lists what else departs from it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch

from models_store.manifest import Origin
from models_store.store import Store, Version
from training import command, pipeline
from training.config import Config as BaseConfig
from training.errors import ConfigError
from training.geometry import coefficients, volume
from training.geometry.coefficients import Coefficients, Coordinates
from training.geometry.vertices import State, combine
from training.members.publication import Points
from training.optimisation.loop import Leg
from training.optimisation.schedules import rate_of, snapshot_rate
from training.optimisation.seeds import Stream, derive
from training.optimisation.steps import Between, Span
from training.pipeline import Plan
from training.runs import Run, checkpoint


@dataclass(frozen=True, kw_only=True)
class Config(BaseConfig):
    """Options of ESPRO and SPRO."""

    method: ClassVar[str] = "espro"
    RATES: ClassVar[tuple[str, ...]] = ("lr", "vertex_lr")
    AVERAGES: ClassVar[bool] = False

    base: tuple[str, ...] = ()
    """The networks to grow simplexes around: published ensembles (NAME for all members, NAME/INDEX for one) or
    checkpoint files. Without --base, each of --runs trains one network first."""
    vertices: int | None = None
    """Number of new vertices around each network (default: 3). Not with --connect, which lists the vertices of the
    simplexes."""
    connect: tuple[str, ...] = ()
    """Simplexes that connect the networks, each as a list of vertex numbers, for example 0,2,3 1,2,3. The networks have
    the first numbers, from 0; higher numbers are new vertices (in the example, 2 and 3 if there are two networks)."""
    vertex_epochs: int = 10
    """Epochs of training for each new vertex. Each epoch costs as much as --points-per-step plain epochs."""
    vertex_lr: float = 0.05
    """Initial learning rate of a new vertex; it falls along a cosine."""
    points_per_step: int = 1
    """Number of networks drawn from the simplexes whose losses are averaged in one step, each on the whole batch. At
    equal cost, more steps were better than more networks per step."""
    volume_weight: float = 0.1
    """Weight λ of the log-volume term in the loss of a new vertex, in nats for each factor e of volume. Simplexes of
    k + 1 vertices use 6 λ / ((k + 1)(k + 2)), so that all vertices trade loss for distance equally. Quadrupling λ doubles
    the distance; the network at a vertex is about 1.5 λ nats worse than the base. A vertex that does not raise the loss
    moves away until the L2 penalty balances the term."""
    perturbation: float = 0.01
    """Initial distance of a new vertex from the mean of the other vertices, as a share of each tensor's norm."""
    samples: int = 25
    """Number of members for each simplex; their predictions are averaged. From connected simplexes, all members are
    drawn together, in proportion to volume."""
    bank: int = 256
    """Number of networks in the bank, drawn from all simplexes, from which the service's modes random and keyed draw.
    0: no bank."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base and self.runs > 1:
            raise ConfigError(
                "--runs trains that many modes here; with --base the modes are given. Leave out one of the two."
            )
        if self.connect and self.vertices is not None:
            raise ConfigError(
                "--vertices grows a separate simplex at each mode; --connect lists the vertices itself. Leave out one of the two."
            )
        if self.grown < 1 or self.vertex_epochs < 1 or self.vertex_lr <= 0 or self.points_per_step < 1:
            raise ConfigError("--vertices, --vertex-epochs, --vertex-lr and --points-per-step must be positive.")
        if self.volume_weight < 0 or not 0 < self.perturbation < 1:
            raise ConfigError(
                "--volume-weight must not be negative, and --perturbation must lie between 0 and 1: at 0 a simplex is flat."
            )
        if self.samples < 1 or self.bank < 0:
            raise ConfigError("--samples must be at least 1; --bank must not be negative.")
        _ = self.connections

    def given(self) -> tuple[str, ...]:
        """See Config.

        Raises:
            StoreError: a published ensemble does not have the given version.
        """
        store = Store()
        return tuple(one for reference in self.base for one in checkpoint.members(reference, store))

    def beginning_from(self, given: Sequence[str]) -> Self:
        """See Config."""
        return dataclasses.replace(self, base=tuple(given))

    @property
    def grown(self) -> int:
        """Number of new vertices at each mode, without --connect."""
        return 3 if self.vertices is None else self.vertices

    @property
    def connections(self) -> list[list[int]]:
        """--connect as lists of vertex numbers.

        Raises:
            ConfigError: an entry is not a list of at least two different vertices.
        """
        try:
            found = [[int(vertex) for vertex in simplex.split(",")] for simplex in self.connect]
        except ValueError:
            raise ConfigError(
                f"--connect must be lists of vertices, for example 0,2,3 1,2,3; got {' '.join(self.connect)}."
            ) from None
        for simplex in found:
            if min(simplex) < 0:
                raise ConfigError(f"--connect {','.join(map(str, simplex))}: vertices are counted from 0.")
            if len(simplex) < 2 or len(set(simplex)) != len(simplex):
                raise ConfigError(
                    f"--connect {','.join(map(str, simplex))}: a simplex has at least two different vertices."
                )
        return found


def complexes(config: Config, modes: int) -> list[list[list[int]]]:
    """The simplexes of each complex; vertices 0 … modes − 1 are the modes, the others are to be trained.

    Raises:
        ConfigError: --connect leaves out a mode or a number, has a simplex of modes only or one that is part of
        another, or
            is not connected.
    """
    if not config.connect:
        first = [modes + mode * config.grown for mode in range(modes)]
        return [[[mode, *range(start, start + config.grown)]] for mode, start in enumerate(first)]
    found = config.connections
    used = {vertex for simplex in found for vertex in simplex}
    if (missing := next(number for number in itertools.count() if number not in used)) < max(modes, *used):
        raise ConfigError(
            f"--connect does not use vertex {missing}; the {modes} modes are 0 … {modes - 1}, new vertices are counted from {modes}."
        )
    if fixed := [simplex for simplex in found if max(simplex) < modes]:
        raise ConfigError(f"--connect {','.join(map(str, fixed[0]))} has modes only; there is nothing in it to train.")
    for number, simplex in enumerate(found):
        if any(set(simplex) <= set(other) for other in found[:number] + found[number + 1 :]):
            raise ConfigError(f"--connect {','.join(map(str, simplex))} is part of another simplex; leave it out.")
    reached = {0}
    while near := {v for simplex in found if reached & set(simplex) for v in simplex} - reached:
        reached |= near
    if apart := sorted(used - reached):
        raise ConfigError(f"--connect is not connected: no simplexes join vertex {apart[0]} to mode 0.")
    return [found]


def star(simplexes: Sequence[Sequence[int]], vertex: int, others: Collection[int]) -> list[list[int]]:
    """The simplexes that contain a new vertex, reduced to vertices that exist already, without faces of one another.

    The rest of the complex does not depend on the vertex, so passes for networks drawn there would be wasted.
    """
    grown = {tuple(sorted(v for v in own if v == vertex or v in others)) for own in simplexes if vertex in own}
    return [list(own) for own in sorted(grown) if not any(set(own) < set(other) for other in grown)]


def in_turn(simplexes: Sequence[Sequence[int]], modes: int) -> list[int]:
    """The vertices to train, in order: by number, but not before a simplex joins a vertex to an existing one."""
    there = {vertex for simplex in simplexes for vertex in simplex if vertex < modes}
    left = sorted({vertex for simplex in simplexes for vertex in simplex} - there)
    order: list[int] = []
    while left:
        vertex = next(v for v in left if any(v in own and there & set(own) for own in simplexes))
        left.remove(vertex)
        there.add(vertex)
        order.append(vertex)
    return order


def plan(config: Config, run: Run, steps: int) -> Plan:
    """A leg for each mode, unless they are given, and one for each new vertex, complex by complex.

    Raises:
        ConfigError: see complexes; or --base names a mode of a complex twice.
    """
    given = len(config.base)
    if config.connect and (twice := [one for one in config.base if config.base.count(one) > 1]):
        raise ConfigError(f"--base names {twice[0]} twice; a complex joins different networks.")
    modes = given or config.runs
    legs = [] if given else [_mode(config, run, steps, number) for number in range(modes)]
    files = {i: run.start_file(f"given-{i}") if given else run.vertex_file(i, 0) for i in range(modes)}
    joined = complexes(config, modes)
    for number, simplexes in enumerate(joined):
        order = in_turn(simplexes, modes)
        for count, vertex in enumerate(order, 1):
            label = f"vertex {count}/{len(order)}" + (f" of simplex {number + 1}" if len(joined) > 1 else "")
            legs.append(_vertex(config, steps, files, star(simplexes, vertex, files), vertex, label))
            files[vertex] = run.vertex_file(len(legs) - 1, 0)
    vertices = [(files[vertex], Origin()) for vertex in sorted(files)]
    unused = given and (config.epochs, config.lr) != (Config.epochs, Config.lr)
    note = "note: --epochs and --lr apply to modes that are trained here, and are ignored with --base; see --vertex-epochs and --vertex-lr"
    return Plan(legs, vertices, _points(config, joined, len(vertices)), note=note if unused else None)


def _mode(config: Config, run: Run, steps: int, number: int) -> Leg:
    total = config.epochs * steps
    return Leg(
        label=f"mode {number + 1}",
        iterations=total,
        rate=lambda i: rate_of(config, i, total),
        start=run.start_file(f"fresh-{number}"),
        collect=(total,),
    )


def _vertex(
    config: Config, steps: int, files: Mapping[int, Path], around: list[list[int]], vertex: int, label: str
) -> Leg:
    total = config.vertex_epochs * steps
    return Leg(
        label=label,
        iterations=total,
        rate=lambda i: snapshot_rate(i, [total], config.vertex_lr),
        rate_option="--vertex-lr",
        collect=(total,),
        steps=Between(within(config, files, around, vertex)),
        passes=config.points_per_step,
    )


def within(config: Config, files: Mapping[int, Path], around: Sequence[Sequence[int]], vertex: int) -> Span:
    """The span that trains one new vertex, in the simplexes `around` it; `files` holds the other vertices."""
    fixed = sorted({v for simplex in around for v in simplex} - {vertex})
    order = {v: i for i, v in enumerate([*fixed, vertex])}
    simplexes = [[order[v] for v in simplex] for simplex in around]
    # The loss resists the growth of a vertex in proportion to the second moment of its coefficient, 2 / ((k + 1)(k +
    # 2)).
    # With one λ for all, each vertex would be worse than the one before it (the third by 6 points of error, the first
    # by 0.7).
    k = max(len(simplex) for simplex in simplexes) - 1
    weight = config.volume_weight * 6 / ((k + 1) * (k + 2))

    def begin(others: Sequence[State], parameters: Collection[str]) -> list[State]:
        generator = torch.Generator().manual_seed(derive(config.seed, Stream.SIMPLEXES, 0, vertex))
        mean = combine(others, np.full(len(others), 1 / len(others)))
        return [perturbed(mean, parameters, config.perturbation, generator)]

    def draw(generator: np.random.Generator, positions: Coordinates | None) -> Coefficients:
        assert positions is not None
        shares = volume.shares(positions, simplexes)
        return coefficients.uniform_over(generator, config.points_per_step, simplexes, shares, len(order))

    def push(positions: Coordinates) -> Coefficients:
        return -weight * volume.gradient(positions, simplexes, order[vertex])[None]

    centre = np.zeros(len(order))
    centre[simplexes[0]] = 1 / len(simplexes[0])
    return Span((*(files[v] for v in fixed), None), begin, draw, centre, push)


def perturbed(state: State, parameters: Collection[str], length: float, generator: torch.Generator) -> State:
    """The weights plus a random step, in each parameter of `length` times its norm."""
    found = dict(state)
    for name in parameters:
        noise = torch.randn(state[name].shape, generator=generator).to(state[name])
        found[name] = state[name] + noise * (length * state[name].norm() / noise.norm())
    return found


def _points(config: Config, joined: list[list[list[int]]], total: int) -> Points:
    def draw(stream: int, counts: Sequence[int], positions: Coordinates) -> Coefficients:
        generator = np.random.default_rng(derive(config.seed, Stream.SIMPLEXES, 1, stream))
        rows = [
            coefficients.uniform_over(generator, count, simplexes, volume.shares(positions, simplexes), total)
            for count, simplexes in zip(counts, joined, strict=True)
        ]
        return np.concatenate(rows)

    of_bank = [len(part) for part in np.array_split(np.arange(config.bank), len(joined))]
    return Points(
        shape="complex" if config.connect else "simplex",
        components=[simplex for simplexes in joined for simplex in simplexes],
        members=lambda positions: draw(0, [config.samples * len(simplexes) for simplexes in joined], positions),
        bank=lambda positions: draw(1, of_bank, positions),
        summary=lambda positions: describe(positions, [simplex for simplexes in joined for simplex in simplexes]),
    )


def describe(positions: Coordinates, simplexes: Sequence[Sequence[int]]) -> str:
    """Volume and edge lengths of each simplex, as text for the log."""
    lines: list[str] = []
    for number, own in enumerate(map(list, simplexes), 1):
        edges = coefficients.distances(positions[own])[np.triu_indices(len(own), 1)]
        log_volume = volume.log_volume(positions[own])
        lines.append(
            f"simplex {number}, vertices {', '.join(map(str, own))}: log-volume {log_volume:.3f}, edges {edges.min():.3g} … {edges.max():.3g}"
            + (
                ""
                if np.isfinite(log_volume)
                else f"; flat: up to rounding, a vertex is a combination of the others (height under {volume.lowest(positions[own]):.1g}). "
                "Raise --volume-weight or --perturbation, or grow fewer vertices."
            )
        )
    return "\n".join(lines)


def run(config: Config) -> Version:
    """Train, resuming an interrupted run if there is one, and publish."""
    return pipeline.run(config, plan)


if __name__ == "__main__":
    command.main(Config, run, __doc__)
