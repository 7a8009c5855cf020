"""The defence benchmark at small scale: every attack on every arm, also through the running service."""

import itertools
import json
import zlib

import numpy as np
import pytest

pytest.importorskip("art", reason="the dev extra is not installed")

import torch
from torch import nn

from benchmarks.defense import blackbox, judging, report, whitebox
from benchmarks.defense.arms import Oracle


class Linear(nn.Module):
    """Two classes, separated by the sum of all pixels or of one half of them."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.as_tensor(weights, dtype=torch.float32)

    def forward(self, images):
        lead = (images.flatten(1) - 0.5) @ self.weights
        return torch.stack([lead, -lead], 1)


class Several(nn.Module):
    """A linear network with many classes."""

    def __init__(self, weights):
        super().__init__()
        self.weights = torch.as_tensor(weights, dtype=torch.float32)

    def forward(self, images):
        return (images.flatten(1) - 0.5) @ self.weights.T


def images(value, count=3):
    return np.full((count, 1, 2, 2), value, np.float32), np.zeros(count, np.int64)


@pytest.mark.parametrize("attack", [whitebox.pgd, whitebox.arc])
def test_a_linear_border_is_crossed_exactly_where_it_lies(attack):
    arguments = {"nearest": 1} if attack is whitebox.arc else {}
    clean, labels = images(0.6)
    network = Linear([1.0, 1.0, 1.0, 1.0])
    assert whitebox.error(network, attack([network], clean, labels, 0.11, **arguments), labels) == 1
    assert whitebox.error(network, attack([network], clean, labels, 0.09, **arguments), labels) == 0
    moved = attack([network], clean, labels, 0.09, **arguments)
    assert np.abs(moved - clean).max() <= 0.09 + 1e-6


def test_arc_fools_a_second_network_without_letting_the_first_one_go():
    clean, labels = images(0.6)
    networks = [Linear([1.0, 1.0, 0.0, 0.0]), Linear([0.0, 0.0, 1.0, 1.0])]
    moved = whitebox.arc(networks, clean, labels, 0.11, nearest=1)
    assert [whitebox.error(network, moved, labels) for network in networks] == [1, 1]


@pytest.mark.parametrize(("count", "epsilon"), [(2, 0.06), (16, 0.08)])
def test_arc_fools_networks_that_are_alike_as_often_as_pgd_on_their_mean(count, epsilon):
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(10, 64))
    networks = [Several(shared + 0.3 * rng.normal(size=(10, 64))) for _ in range(count)]
    clean = rng.random((40, 1, 8, 8)).astype(np.float32)
    labels = ((clean.reshape(40, -1) - 0.5) @ shared.T).argmax(1)

    def fooled(moved):
        assert np.abs(moved - clean).max() <= epsilon + 1e-6
        return np.mean([whitebox.error(network, moved, labels) for network in networks])

    pgd, arc = (fooled(attack(networks, clean, labels, epsilon)) for attack in (whitebox.pgd, whitebox.arc))
    assert pgd > 0.9
    assert arc > pgd - 0.03


def test_the_mean_of_networks_is_that_of_their_probabilities():
    network = whitebox.Mean([Linear([1.0, 2.0, 3.0, 4.0]), Linear([0.0, -1.0, 0.0, 9.0])], temperature=2.0)
    shown = torch.rand(5, 1, 2, 2)
    expected = sum(torch.softmax(member(shown) / 2, 1) for member in network.members) / 2
    assert torch.allclose(network(shown).exp(), expected, atol=1e-6)


def linear_door(kind, count=64, spread=0.3):
    """An oracle over linear networks that differ by `spread`, with images and labels.

    By `kind`, the first network answers, or a random one, or one chosen by a hash of the pixels and the current key.
    """
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(10, 64))
    each = shared + spread * rng.normal(size=(count, 10, 64))
    turned = itertools.count()
    key = [next(turned)]

    def ask(shown):
        quantised = np.rint(shown * 255).astype(np.uint8)
        drawn = {
            "fixed": lambda: np.zeros(len(shown), int),
            "random": lambda: rng.integers(count, size=len(shown)),
            "keyed": lambda: np.array([zlib.crc32(image.tobytes() + bytes(key)) % count for image in quantised]),
        }[kind]()
        logits = np.einsum("bcp,bp->bc", each[drawn], shown.reshape(len(shown), -1) - 0.5)
        return np.exp(logits - logits.max(1, keepdims=True)) / np.exp(logits - logits.max(1, keepdims=True)).sum(
            1, keepdims=True
        )

    def turn():
        key[0] = next(turned)

    clean = rng.random((12, 1, 8, 8)).astype(np.float32)
    labels = ((clean.reshape(12, -1) - 0.5) @ shared.T).argmax(1)
    return Oracle(ask, turn=turn if kind == "keyed" else None, repeats=kind != "random"), clean, labels


def error_of(told):
    return np.mean(told["now"] or np.array(told["wrong"]) / told["asked"])


@pytest.mark.parametrize(
    ("kind", "m", "jitter"),
    [("fixed", 1, False), ("random", 5, False), ("keyed", 1, False), ("keyed", 5, True)],
)
@pytest.mark.parametrize("attack", ["square", "hopskipjump"])
def test_query_attacks_reach_far_into_every_kind_of_service_within_their_budget(attack, kind, m, jitter):
    oracle, clean, labels = linear_door(kind)
    epsilon, budget = 0.16, 1000
    if attack == "square":
        found = blackbox.square(oracle, clean, labels, epsilon, budget, m, jitter=jitter)
    else:
        found = blackbox.hop_skip_jump(oracle, clean, labels, budget, m, jitter=jitter)
        found = judging.within(blackbox.outward(found, clean, epsilon), clean, epsilon)
    assert oracle.answers <= budget * len(clean)
    assert np.abs(found - clean).max() <= epsilon + 1e-6
    reached = error_of(judging.judged(oracle, found, labels, 100))
    signs = np.random.default_rng(1).choice([-1.0, 1.0], clean.shape)
    noise = judging.judged(
        oracle, judging.within((clean + epsilon * signs).astype(np.float32), clean, epsilon), labels, 100
    )
    assert reached > error_of(noise) + 0.1


def test_an_image_that_was_wrong_to_begin_with_is_left_where_it_is():
    clean = np.full((1, 1, 2, 2), 0.5, np.float32)
    assert np.array_equal(blackbox.outward(clean + 1e-5, clean, 0.1), clean + 1e-5)
    assert np.allclose(blackbox.outward(clean + 0.05, clean, 0.1), clean + 0.1)


def test_a_success_that_ends_with_the_key_is_told_apart_from_one_that_lasts():
    turned = []
    oracle = Oracle(
        lambda shown: np.eye(10)[[1 if turned else 0] * len(shown)], turn=lambda: turned.append(1), repeats=True
    )
    found = judging.judged(oracle, np.zeros((4, 1, 2, 2), np.float32), np.ones(4, int), 10)
    assert found == {"now": [1] * 4, "wrong": [0] * 4, "asked": 10}


def cell(seed, m, wrong, **others):
    usual = {"attack": "square", "asked": 10, "now": None, "answers": 7.0}
    return {"seed": seed, "m": m, "wrong": wrong, **usual, **others}


def test_the_number_of_averaged_answers_is_not_chosen_on_the_images_that_are_reported():
    cells = [cell(0, 1, [10, 10]), cell(0, 5, [0, 0]), cell(1, 1, [2, 2]), cell(1, 5, [4, 4])]
    found = report.pooled(report.adapted(cells))
    assert found["error"] == pytest.approx(np.mean([0, 0, 0.2, 0.2]))
    assert found["m"] == "1/5"


def test_differences_hold_the_attack_that_is_adapted_to_a_key():
    place = {"epsilon": 0.1, "budget": 100}
    cells = [
        cell(seed, 1, [wrong, wrong], **place, arm=arm, attack=attack)
        for seed in (0, 1)
        for arm in ("fixed", "keyed")
        for attack in ("none", "square", "hopskipjump", "surrogate", "eot", "arc")
        for wrong in [1]
    ]
    cells += [
        cell(seed, 5, [9, 9], **place, arm="keyed", attack=attack)
        for seed in (0, 1)
        for attack in ("square, jittered", "hopskipjump, jittered")
    ]
    told = report.Report(cells, {"fixed": 0.1, "keyed": 0.1}, 0.1, 0.1, 100).differences("fixed")
    keyed = [value.strip() for value in told.splitlines()[3].strip("|").split("|")]
    assert keyed == ["keyed", *(f"{more} ({more} … {more})" for more in ("+0", "+80", "+80", "+0", "+0", "+0"))]


def test_intervals_are_over_the_images_of_all_seeds():
    rng = np.random.default_rng(0)
    wrong = rng.integers(0, 11, size=(2, 100))
    found = report.pooled([cell(seed, 1, wrong[seed].tolist()) for seed in (1, 0)])
    spread = 1.96 * (wrong / 10).std(ddof=1) / np.sqrt(200)
    assert (found["low"], found["high"]) == pytest.approx(
        (wrong.mean() / 10 - spread, wrong.mean() / 10 + spread), abs=0.01
    )
    assert found["majority"] == (wrong > 5).mean()
    assert found["of"] == 200


def test_a_smoke_run_attacks_every_arm_and_the_running_service_answers_alike(command, tmp_path):
    done = command("benchmarks.defense", "--smoke", timeout=600)
    assert done.returncode == 0, done.stderr
    _, *lines = (tmp_path / "evaluation" / "defense.jsonl").read_text().splitlines()
    cells = [json.loads(line) for line in lines]
    (http,) = (cell["found"] for cell in cells if cell["at"].get("what") == "http")
    assert http["answers"] > 0
    assert max(http["keyed_away"], http["random_away"]) < 1e-5
    asked = [cell["at"] for cell in cells if isinstance(cell["at"], dict) and "attack" in cell["at"]]
    assert {"square", "hopskipjump", "surrogate", "eot", "arc", "autoattack"} <= {at["attack"] for at in asked}
    spent = [
        cell["found"]["answers"] / cell["at"]["budget"]
        for cell in cells
        if cell["at"] in asked and cell["at"]["budget"]
    ]
    assert 0 < max(spent) <= 1
    assert (tmp_path / "evaluation" / "defense.png").stat().st_size > 10_000
