"""Test which transitions are drawn, and with what weight: against numpy, and by chi-square tests that can fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from rlv2v.replay import PrioritizedReplay

Array = npt.NDArray[np.float64]
DRAWS = 4_000_000


def replay_of(priorities: Array, **options: float) -> PrioritizedReplay:
    """Return a buffer of one-byte frames whose item i has id i and priority priorities[i]."""
    replay = PrioritizedReplay(len(priorities), (1,), 1, **options)  # type: ignore[arg-type]
    byte = np.zeros((len(priorities), 1), np.uint8)
    replay.add(state=byte[:, None], action=byte, reward=np.zeros(len(priorities)), true_frame=byte, position=0)
    replay.update_priorities(np.arange(len(priorities)), priorities)
    return replay


def p_value(replay: PrioritizedReplay, expected: Array, draws: int = DRAWS) -> float:
    """Return the p-value of a chi-square test of `draws` independent draws against the expected probabilities."""
    counts = np.bincount(replay.sample(draws).ids, minlength=len(expected))
    return float(stats.chisquare(counts, expected * draws).pvalue)


def draws_ref(seed: int, count: int) -> Array:
    """Return draws 0 .. count - 1 of SplitMix64 as csrc/replay/draws.h defines it."""
    golden = np.uint64(0x9E3779B97F4A7C15)

    def mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    key = mix(np.array([seed], np.uint64) + golden)
    return (mix(key + np.arange(1, count + 1, dtype=np.uint64) * golden) >> np.uint64(11)) * 2.0**-53


@pytest.mark.parametrize("size", [1, 7, 16, 17, 127, 128, 129, 1000, 1025])
@pytest.mark.parametrize("stratified", [False, True])
def test_draws_are_those_of_a_running_sum(size: int, stratified: bool) -> None:
    # Whole priorities make every sum exact, so that the tree and numpy must agree on each draw.
    priorities = np.random.default_rng(size).integers(0, 5, size).astype(np.float64)
    priorities[size // 2] = 3
    replay = replay_of(priorities, alpha=1.0, stratified=stratified, seed=5)
    u = draws_ref(5, 3 * 1000).reshape(3, 1000)
    points = (np.arange(1000) + u) / 1000 if stratified else u
    expected = np.searchsorted(np.cumsum(priorities), points * priorities.sum(), side="right")
    for row in expected:
        np.testing.assert_array_equal(replay.sample(1000).ids, row)


def test_weights_are_those_of_the_formula() -> None:
    priorities = np.random.default_rng(0).random(100) ** 3
    priorities[3] = 0.0
    for alpha, beta in ((0.6, 0.4), (1.0, 1.0), (0.3, 0.0), (0.0, 1.0)):
        replay = replay_of(priorities, alpha=alpha, beta=beta)
        p = np.ones(100) if alpha == 0 else priorities**alpha
        p /= p.sum()
        weights = (100 * p[p > 0]) ** -beta
        batch = replay.sample(2000)
        expected = (100 * p[batch.ids.numpy()]) ** -beta / weights.max()
        np.testing.assert_allclose(batch.weights.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_the_distribution_is_right_and_a_biased_one_is_seen(alpha: float) -> None:
    priorities = np.array([1.0, 2.0, 3.0, 4.0, 0.5, 2.5, 1.5, 3.5])
    expected = priorities**alpha / (priorities**alpha).sum()
    options: dict[str, Any] = {"alpha": alpha, "stratified": False, "seed": 1}
    assert p_value(replay_of(priorities, **options), expected) > 1e-3
    # A bias of 1% on item 3 has a noncentrality of 70 or more here, so it passes with a probability below 1e-6.
    priorities[3] *= 1.01 ** (1 / alpha)
    assert p_value(replay_of(priorities, **options), expected) < 1e-3


def test_alpha_0_is_uniform_whatever_the_priorities() -> None:
    replay = replay_of(np.array([0.0, 1e-30, 1.0, 7.0, 1e30, 3.0, 0.0]), alpha=0.6, stratified=False)
    replay.alpha = 0.0
    assert (replay.sample(100).weights == 1).all()
    assert p_value(replay, np.full(7, 1 / 7)) > 1e-3
    replay.alpha = 0.6
    assert p_value(replay, np.full(7, 1 / 7), 1000) < 1e-3


def test_the_tree_equals_its_rebuild_after_many_updates() -> None:
    rng = np.random.default_rng(0)
    replay = replay_of(rng.random(5000), alpha=0.6)
    for _ in range(500):
        replay.update_priorities(rng.integers(0, 5000, 2000), rng.random(2000) ** 20)
    assert replay.is_consistent()
    rebuilt = replay_of(np.ones(5000))
    rebuilt.load_state_dict(replay.state_dict())
    assert torch.equal(replay.sample(5000).ids, rebuilt.sample(5000).ids)
