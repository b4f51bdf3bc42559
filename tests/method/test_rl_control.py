"""Critic and actor learn a control problem whose optimal Q and policy are known.

Linear-quadratic, horizon 2: videos of 3 frames, each of one grey m. r(s, a) = -(a^2 + RHO (a - m_p)^2), m_p the last
grey of s: get to grey 0, but move slowly. By dynamic programming, from the end:
    p = 2:  Q* = r,                                     a* = K2 m,  K2 = RHO / (1 + RHO),  V* = -K2 m^2
    p = 1:  Q* = r + gamma V*(s') = r - gamma K2 a^2,   a* = K1 m,  K1 = RHO / (1 + RHO + gamma K2)
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rlv2v.method import rl
from rlv2v.method.rl import Policies, Transitions, actor_loss, critic_loss, critic_targets

SIZE = 4
RHO, GAMMA, LENGTH = 1.5, 0.9, 3
K2 = RHO / (1 + RHO)
K1 = RHO / (1 + RHO + GAMMA * K2)
pytestmark = pytest.mark.usefixtures("one_thread")


def grey(levels: Tensor) -> Tensor:
    """Return frames of one grey each: (n,) -> (n,3,H,W), (n,L) -> (n,L,3,H,W)."""
    return levels[..., None, None, None].expand(*levels.shape, 3, SIZE, SIZE)


def lq_reward(m: Tensor, a: Tensor) -> Tensor:
    return -(a**2 + RHO * (a - m) ** 2)


def q_star(m: Tensor, a: Tensor, lengths: Tensor) -> Tensor:
    return lq_reward(m, a) - torch.where(lengths == 1, GAMMA * K2 * a**2, torch.zeros_like(a))


def lq_batch(rng: torch.Generator, num: int) -> tuple[Transitions, Tensor, Tensor]:
    """Return random states and actions, and the greys m of the last frame and a of the action."""
    levels = torch.rand(num, LENGTH - 1, generator=rng) * 2 - 1
    lengths = torch.randint(1, LENGTH, (num,), generator=rng)
    m, a = rl.last_of(levels, lengths), torch.rand(num, generator=rng) * 2 - 1
    rewards = lq_reward(m, a)
    ends, weights = lengths == LENGTH - 1, torch.ones_like(rewards)
    return Transitions(grey(levels), lengths, grey(a), rewards, grey(a), ends, weights), m, a


class Gain(nn.Module):
    """A policy or generator called like a `Translator`: it multiplies frame t by a gain k_t; its state is t."""

    def __init__(self, gains: list[float]) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.tensor([*gains, 1.0, 1.0]))

    def forward(self, x: Tensor, state: Tensor | None = None, *, all_states: bool = False) -> tuple[Tensor, Tensor]:
        start = torch.zeros(len(x), dtype=torch.long) if state is None else state
        index = start[:, None] + torch.arange(x.shape[1])
        return self.gains[index][..., None, None, None] * x, index + 1 if all_states else index[:, -1] + 1


class Quadratic(nn.Module):
    """A critic called like a `Discriminator`: for each length, a quadratic form of the last two greys and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.forms = nn.Parameter(torch.zeros(LENGTH + 1, 6))

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, *, all_states: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the values, and as state the number of frames and the grey of the last."""
        a = x.mean((2, 3, 4))
        start, last_grey = (
            (torch.zeros(len(x), dtype=torch.long), torch.zeros_like(a[:, 0])) if state is None else state
        )
        m = torch.cat((last_grey[:, None], a[:, :-1]), 1)
        features = torch.stack((a * a, a * m, m * m, a, m, torch.ones_like(a)), -1)
        index = start[:, None] + torch.arange(x.shape[1])
        values = (features * self.forms[index]).sum(-1, keepdim=True)
        return values, (index + 1, a) if all_states else (index[:, -1] + 1, a[:, -1])


def lq_policies(k1: float, k2: float) -> Policies:
    """Return policies with the gains k1, k2 in P_A and P_B; the generators, which are fixed, double and halve."""
    double, half = (Gain([g] * LENGTH).requires_grad_(False) for g in (2.0, 0.5))
    return Policies(Gain([k1, k2]), double, Gain([k1, k2]), half)


def lq_return(policies: Policies) -> float:
    """Return the mean return of P_A over a grid of first greys."""
    m = torch.linspace(-1, 1, 21)
    total, levels = torch.zeros(21), m[:, None]
    for p in range(1, LENGTH):
        a = policies.p_a(grey(levels))[0][:, -1].mean((1, 2, 3))
        total = total + GAMMA ** (p - 1) * lq_reward(levels[:, -1], a)
        levels = torch.cat((levels, a[:, None]), 1)
    return total.mean().item()


def q_error(q: nn.Module) -> Tensor:
    batch, m, a = lq_batch(torch.Generator().manual_seed(9), 256)
    with torch.no_grad():
        return rl.q_value(q, batch.states, batch.lengths, batch.actions) - q_star(m, a, batch.lengths)


def test_the_known_solution_is_the_solution() -> None:
    """No pair of gains on a grid around (K1, K2) does better."""
    best = lq_return(lq_policies(K1, K2))
    assert best == pytest.approx(-(RHO * (1 - K1)) * (torch.linspace(-1, 1, 21) ** 2).mean().item(), rel=1e-5)
    for d1 in (-0.1, 0, 0.1):
        for d2 in (-0.1, 0, 0.1):
            assert lq_return(lq_policies(K1 + d1, K2 + d2)) <= best + 1e-7


def test_the_policy_descends_to_the_optimum() -> None:
    """Critic and actor move in turn, from a policy that does nothing; both candidates end at the optimal gains.

    The critic ends within 0.05 of Q*, which runs over [-7, 0] and whose bootstrapped part alone over [-0.54, 0].
    """
    policies, q = lq_policies(0.0, 0.0), Quadratic()
    targets, q_target = copy.deepcopy(policies), copy.deepcopy(q)
    actors = [policies.p_a, policies.p_b]
    critic = torch.optim.Adam(q.parameters(), 0.1)
    actor = torch.optim.Adam([p for net in actors for p in net.parameters()], 0.02)
    rng, first = torch.Generator().manual_seed(0), lq_return(policies)
    steps = 500
    for step in range(steps):
        for optimiser in (critic, actor):
            group = optimiser.param_groups[0]
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * min(1.0, 2 * (1 - step / steps))
        batch, _, _ = lq_batch(rng, 64)
        loss, _ = critic_loss(q, batch, critic_targets(q_target, targets, batch, GAMMA))
        critic.zero_grad()
        loss.backward()
        critic.step()
        actor.zero_grad()
        actor_loss(q, policies, batch.states, batch.lengths).backward()
        actor.step()
        for target, source in ((q_target, q), *zip(targets, policies, strict=True)):
            rl.polyak(target, source, 0.1)
    for net in actors:
        assert net.gains[:2].tolist() == pytest.approx([K1, K2], abs=0.02)
    assert q_error(q).abs().max() < 0.05
    best = lq_return(lq_policies(K1, K2))
    assert first < 1.9 * best and lq_return(policies) == pytest.approx(best, abs=2e-3)
