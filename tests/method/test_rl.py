"""The pieces of the policy gradient, each against a loop or a closed form.

test_rl_control.py tests them together; whole steps beside the plain twin, in tests/bench, compare candidates and values
with those of each state alone.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from method_cases import SIZE, SMALL, random_nets
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method import rl
from rlv2v.method.collector import annealed
from rlv2v.method.rewards import REWARDS, RewardInputs
from rlv2v.method.rl import Policies, Transitions
from rlv2v.model import Discriminator
from rlv2v.model.build import Nets

CLOSE = {"rtol": 0, "atol": 1e-10}
pytestmark = pytest.mark.usefixtures("one_thread")


def nets_of(**changes: object) -> Nets:
    return random_nets(Config.of("paint", **SMALL, **changes))


def ragged(num: int, longest: int, padding: float = 50.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return states with padding far outside [-1,1], lengths 1..longest, and actions."""
    rng = torch.Generator().manual_seed(1)
    states = torch.rand(num, longest, 3, SIZE, SIZE, generator=rng, dtype=torch.float64) * 2 - 1
    lengths = torch.arange(num) % longest + 1
    for state, p in zip(states, lengths.tolist(), strict=True):
        state[p:] = padding
    return states, lengths, torch.rand(num, 3, SIZE, SIZE, generator=rng, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize("disc_norm", ["batch", "clip", "none"])
@pytest.mark.parametrize("norm", ["batch", "clip"])
@pytest.mark.parametrize("preset", ["default", "paper"])
def test_neither_padding_nor_other_states_change_candidates_or_values(preset: str, norm: str, disc_norm: str) -> None:
    config = Config.of(preset, **SMALL).replace(norm=norm, disc_norm=disc_norm)
    nets = random_nets(config)

    def outputs(padding: float, rows: slice = slice(None)) -> list[Tensor]:
        states, lengths, _ = (field[rows] for field in ragged(6, 3, padding))
        proposals = rl.candidates(Policies.of(nets, "x"), states, lengths)
        return [*proposals, *rl.q_values(nets.q_x, states, lengths, *proposals)]

    torch.testing.assert_close(outputs(0.0), outputs(50.0), **CLOSE)
    torch.testing.assert_close([field[2:4] for field in outputs(0.0)], outputs(0.0, slice(2, 4)), **CLOSE)


@pytest.mark.parametrize("disc_norm", ["batch", "clip", "none"])
def test_the_rewards_know_nothing_of_padding_and_see_the_level_of_a_colour(disc_norm: str) -> None:
    """A D that normalises over its mini-batch would score flat frames alike, were they judged by themselves."""
    config = Config.of("paper", **SMALL, disc_norm=disc_norm)
    nets = random_nets(config)
    real, _, _ = ragged(1, 4, 0.0)
    levels = torch.tensor([-0.8, 0.8], dtype=torch.float64)
    actions = levels[:, None, None, None].expand(2, 3, SIZE, SIZE)
    frames = real[0] if disc_norm == "batch" else real[0, :0]
    ends, logits = torch.zeros(2, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.float64)
    inputs = RewardInputs(nets.d_x, None, actions, actions, ends, actions, actions, logits, frames)
    for reward in REWARDS.values():
        low, high = reward.compute(inputs, config)
        assert (low - high).abs() > (1e-9 if disc_norm == "clip" else 1e-3)


# --- target and losses ---


def test_the_critic_loss_is_the_weighted_square_of_its_errors() -> None:
    nets = nets_of()
    states, lengths, actions = ragged(4, 3)
    zeros = torch.zeros(4, dtype=torch.float64)
    targets, weights = torch.tensor([1.0, -1.0, 0.5, 0.0]).double(), torch.tensor([1.0, 0.5, 0.25, 1.0]).double()
    batch = Transitions(states, lengths, actions, zeros, actions, zeros.bool(), weights)
    expected = targets - rl.q_value(nets.q_x, states, lengths, actions)
    loss, errors = rl.critic_loss(nets.q_x, batch, targets)
    torch.testing.assert_close(loss, (weights * expected**2).sum() / 4, **CLOSE)
    torch.testing.assert_close(errors, expected, **CLOSE)


def test_the_target_is_that_of_the_better_candidate_in_the_next_state() -> None:
    nets = nets_of()
    states, lengths, actions = ragged(24, 3)
    rewards, terminals = torch.linspace(-1, 1, 24).double(), lengths == 3
    batch = Transitions(states, lengths, actions, rewards, actions, terminals, torch.ones_like(rewards))
    policies = Policies.of(nets, "x")
    targets = rl.critic_targets(nets.q_y, policies, batch, 0.9)
    winners = set()
    for i, p in enumerate(lengths.tolist()):
        next_state = torch.cat((states[i, :p], actions[i : i + 1]))[None]
        proposals = rl.candidates(policies, next_state, torch.tensor([p + 1]))
        values = [nets.q_y(torch.cat((next_state, a[:, None]), 1))[0][0, -1, 0] for a in proposals]
        if p < 3:
            winners.add(bool(values[0] > values[1]))
        expected = rewards[i] if p == 3 else rewards[i] + 0.9 * max(values)
        torch.testing.assert_close(targets[i], expected, **CLOSE)
    assert winners == {True, False} and not targets.requires_grad


def test_probabilities_anneal_linearly() -> None:
    assert [annealed(0.2, 1.0, p) for p in (-1, 0, 0.5, 1, 3)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])


# --- what a critic learns ---


def toy_batch(rng: torch.Generator, num: int) -> tuple[Transitions, Tensor]:
    """Return transitions of clips that brighten evenly, with actions of every kind, and noise as another action."""
    level = torch.rand(num, 1, generator=rng) * 0.8 - 0.8
    levels = level + 0.4 * torch.arange(4) * torch.rand(num, 1, generator=rng)
    videos = levels[..., None, None, None].expand(-1, -1, 3, SIZE, SIZE)
    lengths = torch.randint(1, 4, (num,), generator=rng)
    true_frames = rl.last_of(videos, lengths + 1)
    noise = torch.rand(num, 3, SIZE, SIZE, generator=rng) * 2 - 1
    kinds = torch.stack((true_frames, noise, true_frames.flip(0), 0.5 * (true_frames + noise)))
    actions = kinds[torch.arange(num) % 4, torch.arange(num)]
    rewards = -(actions - true_frames).abs().mean((1, 2, 3))
    batch = Transitions(videos[:, :3], lengths, actions, rewards, true_frames, lengths == 3, torch.ones(num))
    return batch, noise


def test_a_critic_trained_for_a_short_while_ranks_the_true_frame_above_noise() -> None:
    shares = []
    for seed in range(3):
        torch.manual_seed(seed)
        q, rng = Discriminator((8, 8), patch=2, norm="none"), torch.Generator().manual_seed(seed)
        optimiser = torch.optim.Adam(q.parameters(), 1e-2)
        for _ in range(60):
            batch, _ = toy_batch(rng, 16)
            loss, _ = rl.critic_loss(q, batch, batch.rewards)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        batch, noise = toy_batch(rng, 128)
        with torch.no_grad():
            values = rl.q_values(q, batch.states, batch.lengths, batch.true_frames, noise)
        shares.append((values[0] > values[1]).float().mean().item())
    assert statistics.median(shares) > 0.95, shares
