"""The policy gradient: each piece against a loop, and a control problem whose optimal Q and policy are known."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlv2v import ddpg
from rlv2v.checkpoint import build_nets
from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.ddpg import Agent, Policies, Recall, Transitions, actor_loss, append, candidates, critic_loss, critic_targets
from rlv2v.losses import Nets
from rlv2v.model import Judge
from rlv2v.replay import PrioritizedReplay

T, SIZE = 5, 8
CLOSE = {"rtol": 0, "atol": 1e-10}
SMALL = {"widths": (4, 4), "judge_widths": (4, 6), "size": SIZE, "frames": T, "transitions": 8, "replay_capacity": 64}


def nets_of(config: Config, seed: int = 0) -> Nets:
    torch.manual_seed(seed)
    nets = build_nets(config)
    with torch.no_grad():
        for p in nets.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return nets


def ragged(num: int, longest: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """States whose padding is NaN-like large, lengths 1..longest, actions."""
    rng = torch.Generator().manual_seed(1)
    states = torch.rand(num, longest, 3, SIZE, SIZE, generator=rng, dtype=dtype) * 2 - 1
    lengths = torch.arange(num) % longest + 1
    for state, p in zip(states, lengths.tolist(), strict=True):
        state[p:] = 50.0
    return states, lengths, torch.rand(num, 3, SIZE, SIZE, generator=rng, dtype=dtype) * 2 - 1


# --- ragged prefixes ---


def test_last_and_append_are_those_of_each_sequence() -> None:
    states, lengths, actions = ragged(6, 3)
    longer = append(states, lengths, actions)
    assert longer.shape == (6, 4, 3, SIZE, SIZE)
    for i, p in enumerate(lengths.tolist()):
        assert torch.equal(ddpg.last_of(states, lengths)[i], states[i, p - 1])
        assert torch.equal(longer[i, : p + 1], torch.cat((states[i, :p], actions[i : i + 1])))
    assert torch.equal(ddpg.last_of(longer, lengths + 1), actions)


@pytest.mark.parametrize("domain", ["x", "y"])
def test_candidates_and_values_are_those_of_each_state_alone(domain: str) -> None:
    nets = nets_of(Config.of("default", **SMALL)).double()
    states, lengths, actions = ragged(6, 3)
    a1, a2 = candidates(Policies.of(nets, domain), states, lengths)
    values = ddpg.q_value(nets.q_x, states, lengths, actions)
    names = {"x": ("p_x", "g_y", "p_y", "g_x"), "y": ("p_y", "g_x", "p_x", "g_y")}[domain]
    p_here, g_there, p_there, g_back = (getattr(nets, name) for name in names)
    for i, p in enumerate(lengths.tolist()):
        state = states[i : i + 1, :p]
        torch.testing.assert_close(a1[i], p_here(state)[0][0, -1], **CLOSE)
        abroad = g_there(state)[0]
        on = torch.cat((abroad, p_there(abroad)[0][:, -1:]), 1)
        torch.testing.assert_close(a2[i], g_back(on)[0][0, -1], **CLOSE)
        whole = torch.cat((state, actions[i : i + 1, None]), 1)
        torch.testing.assert_close(values[i], nets.q_x(whole)[0][0, -1, 0], **CLOSE)


def test_the_better_proposal_is_chosen() -> None:
    first, second = torch.zeros(3, 3, 2, 2), torch.ones(3, 3, 2, 2)
    chosen = ddpg.choose(first, second, torch.tensor([1.0, -1.0, 2.0]), torch.tensor([0.0, 0.0, 2.0]))
    assert chosen.mean((1, 2, 3)).tolist() == [0, 1, 0]


# --- reward, target, losses ---


def log_sigmoid(a: float) -> float:
    return -math.log1p(math.exp(-a))


def test_the_reward_of_a_transition() -> None:
    frame_logits, video_logits = torch.tensor([[0.5, -1.0], [2.0, 0.0]]), torch.tensor([[1.0, 3.0], [-2.0, 0.5]])
    actions, true_frames = grey(torch.tensor([0.5, 0.5])), grey(torch.tensor([0.25, 1.0]))
    got = ddpg.reward_per_transition(
        actions, true_frames, frame_logits, video_logits, torch.tensor([False, True]), distance_weight=3.0, l_v=2.0
    )
    before = (log_sigmoid(0.5) + log_sigmoid(-1.0)) / 2 - 3.0 * 0.25
    end = (log_sigmoid(2.0) + log_sigmoid(0.0)) / 2 - 3.0 * 0.5 + 2.0 * (log_sigmoid(-2.0) + log_sigmoid(0.5)) / 2
    assert got.tolist() == pytest.approx([before, end], abs=1e-6)


def test_the_reward_of_the_paper() -> None:
    l_g, l_tau, l_rc, l_v = (torch.tensor([v, v]) for v in (-0.5, 0.1, 0.2, -0.7))
    got = ddpg.reward_paper(
        l_g, l_tau, l_rc, l_v, torch.tensor([False, True]), weight_tau=10.0, weight_rc=5.0, weight_v=2.0
    )
    assert got.tolist() == pytest.approx([-(-0.5 + 10 * 0.1 + 5 * 0.2), 2 * 0.7], abs=1e-6)


def test_a_terminal_does_not_bootstrap_whatever_the_critic_says_there() -> None:
    rewards, terminals = torch.tensor([1.0, 2.0]), torch.tensor([False, True])
    got = ddpg.td_target(rewards, torch.tensor([10.0, math.inf]), terminals, 0.9)
    assert got.tolist() == pytest.approx([10.0, 2.0])


def test_the_critic_loss_is_the_weighted_square_of_its_errors() -> None:
    nets = nets_of(Config.of("default", **SMALL)).double()
    states, lengths, actions = ragged(4, 3)
    zeros = torch.zeros(4, dtype=torch.float64)
    batch = Transitions(states, lengths, actions, zeros, actions, zeros.bool())
    targets, weights = torch.tensor([1.0, -1.0, 0.5, 0.0]).double(), torch.tensor([1.0, 0.5, 0.25, 1.0]).double()
    errors = targets - ddpg.q_value(nets.q_x, states, lengths, actions)
    loss, reported = critic_loss(nets.q_x, batch, targets, weights)
    torch.testing.assert_close(loss, (weights * errors**2).sum() / 4, **CLOSE)
    torch.testing.assert_close(reported, errors, **CLOSE)
    torch.testing.assert_close(critic_loss(nets.q_x, batch, targets)[0], (errors**2).mean(), **CLOSE)


def test_target_networks_follow_and_buffers_are_copied() -> None:
    source, target = (nets_of(Config.of("paper", **SMALL), seed) for seed in (0, 1))
    with torch.no_grad():
        source.g_x(torch.rand(1, 2, 3, SIZE, SIZE))
    before = copy.deepcopy(target)
    ddpg.polyak(target, source, 0.25)
    rows = zip(target.parameters(), before.parameters(), source.parameters(), strict=True)
    for now, was, towards in rows:
        torch.testing.assert_close(now, 0.75 * was + 0.25 * towards)
    assert all(torch.equal(a, b) for a, b in zip(target.buffers(), source.buffers(), strict=True))
    ddpg.polyak(target, source, 1.0)
    torch.testing.assert_close(dict(target.named_parameters()), dict(source.named_parameters()))


def test_probabilities_anneal_linearly() -> None:
    assert [ddpg.annealed(0.2, 1.0, p) for p in (-1, 0, 0.5, 1, 3)] == pytest.approx([0.2, 0.2, 0.6, 1.0, 1.0])
    rng = np.random.default_rng(0)
    assert ddpg.explore(rng, 4000, 0.8).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert ddpg.explore(rng, 50, 1.0).all() and not ddpg.explore(rng, 50, 0.0).any()


# --- a control problem with a known solution ---
#
# Linear-quadratic, horizon 2: videos of 3 frames, each of one grey m. r(s, a) = -(a^2 + RHO (a - m_p)^2), m_p the last
# grey of s: get to grey 0, but move slowly. By dynamic programming, from the end:
#     p = 2:  Q* = r,                                     a* = K2 m,  K2 = RHO / (1 + RHO),  V* = -K2 m^2
#     p = 1:  Q* = r + gamma V*(s') = r - gamma K2 a^2,   a* = K1 m,  K1 = RHO / (1 + RHO + gamma K2)

RHO, GAMMA, LENGTH = 1.5, 0.9, 3
K2 = RHO / (1 + RHO)
K1 = RHO / (1 + RHO + GAMMA * K2)


def grey(levels: Tensor) -> Tensor:
    """(n,) or (n,L) -> frames of one grey."""
    return levels[..., None, None, None].expand(*levels.shape, 3, SIZE, SIZE)


def lq_reward(m: Tensor, a: Tensor) -> Tensor:
    return -(a**2 + RHO * (a - m) ** 2)


def q_star(m: Tensor, a: Tensor, lengths: Tensor) -> Tensor:
    return lq_reward(m, a) - torch.where(lengths == 1, GAMMA * K2 * a**2, torch.zeros_like(a))


def lq_batch(rng: torch.Generator, num: int) -> tuple[Transitions, Tensor, Tensor]:
    """Random states and actions, with the greys m of the last frame and a of the action."""
    levels = torch.rand(num, LENGTH - 1, generator=rng) * 2 - 1
    lengths = torch.randint(1, LENGTH, (num,), generator=rng)
    m, a = ddpg.last_of(levels, lengths), torch.rand(num, generator=rng) * 2 - 1
    return Transitions(grey(levels), lengths, grey(a), lq_reward(m, a), grey(a), lengths == LENGTH - 1), m, a


class Gain(nn.Module):
    """A policy or generator in the calling form of `Translator`: frame t times its own gain k_t; the state counts."""

    def __init__(self, gains: list[float]) -> None:
        super().__init__()
        self.gains = nn.Parameter(torch.tensor([*gains, 1.0, 1.0]))

    def forward(self, x: Tensor, state: Tensor | None = None, *, every: bool = False) -> tuple[Tensor, Tensor]:
        start = torch.zeros(len(x), dtype=torch.long) if state is None else state
        index = start[:, None] + torch.arange(x.shape[1])
        return self.gains[index][..., None, None, None] * x, index + 1 if every else index[:, -1] + 1


class Quadratic(nn.Module):
    """A critic in the calling form of `Judge`, for each length a quadratic form of the last two greys and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.forms = nn.Parameter(torch.zeros(LENGTH + 1, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        a = x.mean((2, 3, 4))
        m = torch.cat((torch.zeros_like(a[:, :1]), a[:, :-1]), 1)
        features = torch.stack((a * a, a * m, m * m, a, m, torch.ones_like(a)), -1)
        return (features * self.forms[: x.shape[1]]).sum(-1, keepdim=True), None


def lq_policies(k1: float, k2: float) -> Policies:
    """P_A has the gains k1, k2; abroad, P_B has them too, and the generators (fixed) double and halve."""
    double, half = (Gain([g] * LENGTH).requires_grad_(False) for g in (2.0, 0.5))
    return Policies(Gain([k1, k2]), double, Gain([k1, k2]), half)


def lq_return(policies: Policies) -> float:
    """Mean return of P_A from a grid of first greys."""
    m = torch.linspace(-1, 1, 21)
    total, levels = torch.zeros(21), m[:, None]
    for p in range(1, LENGTH):
        a = policies.p_a(grey(levels))[0][:, -1].mean((1, 2, 3))
        total = total + GAMMA ** (p - 1) * lq_reward(levels[:, -1], a)
        levels = torch.cat((levels, a[:, None]), 1)
    return total.mean().item()


def fit_critic(q: nn.Module, policies: Policies, steps: int, lr: float, tau: float) -> None:
    target, rng = copy.deepcopy(q), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(q.parameters(), lr)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / steps))
        batch, _, _ = lq_batch(rng, 64)
        loss, _ = critic_loss(q, batch, critic_targets(target, policies, batch, GAMMA))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        ddpg.polyak(target, q, tau)


def q_error(q: nn.Module) -> Tensor:
    batch, m, a = lq_batch(torch.Generator().manual_seed(9), 256)
    with torch.no_grad():
        return ddpg.q_value(q, batch.states, batch.lengths, batch.actions) - q_star(m, a, batch.lengths)


def test_the_known_solution_is_the_solution() -> None:
    """No pair of gains on a grid around (K1, K2) does better."""
    best = lq_return(lq_policies(K1, K2))
    assert best == pytest.approx(-(RHO * (1 - K1)) * (torch.linspace(-1, 1, 21) ** 2).mean().item(), rel=1e-5)
    for d1 in (-0.1, 0, 0.1):
        for d2 in (-0.1, 0, 0.1):
            assert lq_return(lq_policies(K1 + d1, K2 + d2)) <= best + 1e-7


def test_the_critic_converges_to_the_optimal_q() -> None:
    """To 1e-2 everywhere, where Q* runs over [-7, 0] and the bootstrapped part alone over [-0.54, 0]."""
    q = Quadratic()
    fit_critic(q, lq_policies(K1, K2), steps=600, lr=0.1, tau=0.1)
    assert q_error(q).abs().max() < 1e-2


def test_a_judge_as_critic_learns_the_optimal_q_too() -> None:
    """The network itself, to a tenth of Q*'s spread."""
    torch.manual_seed(0)
    q = Judge((8, 16), patch=2, norm="none")
    _, m, a = lq_batch(torch.Generator().manual_seed(9), 256)
    spread = q_star(m, a, torch.ones(256, dtype=torch.long)).std()
    before = q_error(q).square().mean().sqrt()
    fit_critic(q, lq_policies(K1, K2), steps=400, lr=1e-2, tau=0.1)
    error = q_error(q).square().mean().sqrt()
    assert before > 0.8 * spread and error < 0.1 * spread


def test_the_policy_descends_to_the_optimum() -> None:
    """Critic and actor in turn, from a policy that does nothing; both proposals end at the optimal gains."""
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
        for mine, theirs in ((q_target, q), *zip(targets, policies, strict=True)):
            ddpg.polyak(mine, theirs, 0.1)
    for net in actors:
        assert net.gains[:2].tolist() == pytest.approx([K1, K2], abs=0.02)
    assert q_error(q).abs().max() < 0.05
    best = lq_return(lq_policies(K1, K2))
    assert first < 1.9 * best and lq_return(policies) == pytest.approx(best, abs=2e-3)


def test_a_network_as_policy_improves_its_return() -> None:
    """A ConvLSTM predictor led by the exact critic: its actions go where Q* is highest."""
    config = Config.of("paper", **SMALL)
    nets = nets_of(config)
    policies = Policies(nets.p_x.eval(), *lq_policies(0.5, 0.5)[1:])
    q = Quadratic()
    with torch.no_grad():  # Q* as a quadratic form of (a a, a m, m m); the length of [s, a] is p + 1
        for p, extra in ((1, GAMMA * K2), (2, 0.0)):
            q.forms[p, :3] = torch.tensor([-1 - RHO - extra, 2 * RHO, -RHO])
    assert q_error(q).abs().max() < 1e-5
    first, best = lq_return(policies), lq_return(lq_policies(K1, K2))
    optimiser, rng = torch.optim.Adam(nets.p_x.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for _ in range(150):
        batch, _, _ = lq_batch(rng, 16)
        optimiser.zero_grad()
        actor_loss(q, policies, batch.states, batch.lengths).backward()
        optimiser.step()
    assert best - lq_return(policies) < 0.2 * (best - first)


# --- the agent ---


def agent_of(domain: str = "x", preset: str = "default", **changes: object) -> Agent:
    config = Config.of(preset, **SMALL | changes)
    nets = nets_of(config)
    replay = PrioritizedReplay(
        config.replay_capacity, (SIZE, SIZE, 3), T - 1, alpha=config.replay_alpha, beta=config.replay_beta, seed=0
    )
    return Agent(domain, nets, copy.deepcopy(nets), replay, config)


def clip(seed: int = 0) -> Tensor:
    frames = np.random.default_rng(seed).integers(0, 256, (T, SIZE, SIZE, 3), dtype=np.uint8)
    return to_model(torch.from_numpy(frames))


def shown(batch: Transitions, i: int) -> tuple:
    """One transition without its padding, as the buffer keeps it: frames in uint8."""
    p = int(batch.lengths[i])
    frames = [to_uint8(f).numpy().tobytes() for f in (batch.states[i, :p], batch.actions[i], batch.true_frames[i])]
    return (p, *frames, round(batch.rewards[i].item(), 5), bool(batch.terminals[i]))


@pytest.mark.parametrize("domain", ["x", "y"])
@pytest.mark.parametrize(("preset", "reward"), [("default", "transition"), ("default", "paper"), ("paper", "paper")])
def test_m_mixes_new_and_stored_transitions_and_the_buffer_gives_back_what_it_got(
    domain: str, preset: str, reward: str
) -> None:
    agent, rng = agent_of(domain, preset, reward=reward, eta1=(0.5, 0.5)), np.random.default_rng(0)
    known: set[tuple] = set()
    total = 0
    for round_ in range(4):
        batch, recall = agent.gather(clip(round_), rng, 0.0)
        num_new = 8 - len(recall.ids)
        assert (num_new == 8) if round_ == 0 else (0 < num_new < 8)
        assert all(len(field) == 8 for field in batch) and torch.isfinite(batch.rewards).all()
        total += num_new
        known |= {shown(batch, i) for i in range(num_new)}
        assert {shown(batch, i) for i in range(num_new, 8)} <= known, "stored ones are what was put in"
        assert recall.weights.tolist() == pytest.approx([1.0] * 8), "uniform replay"
    assert len(agent.replay) == total
    loss = agent.critic_loss(batch, recall)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in agent.q.parameters()) or agent.config.q_positive


def test_new_transitions_are_prefixes_of_their_clip() -> None:
    agent, video = agent_of(eta1=(0.0, 0.0)), clip()
    batch, recall = agent.gather(video, np.random.default_rng(1), 0.0)
    assert len(recall.ids) == 0 and set(batch.lengths.tolist()) <= set(range(1, T))
    for i, p in enumerate(batch.lengths.tolist()):
        assert torch.equal(batch.states[i, :p], video[:p]) and torch.equal(batch.true_frames[i], video[p])
        assert batch.terminals[i] == (p == T - 1)


def test_eta2_says_how_often_the_critic_chooses() -> None:
    video, rng = clip(), np.random.default_rng(2)
    agent = agent_of()
    frames = {f.numpy().tobytes() for f in video}
    for eta2, share in ((1.0, 0.0), (0.0, 1.0), (0.75, 0.25)):
        actions = agent.play(video, 400, rng, eta2).actions
        random = np.mean([a.detach().numpy().tobytes() in frames for a in actions])
        assert random == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)
    with torch.no_grad():
        batch = agent.play(video, 30, rng, 1.0)
        proposals = candidates(agent.policies, batch.states, batch.lengths)
        best = torch.maximum(*(ddpg.q_value(agent.q, batch.states, batch.lengths, a) for a in proposals))
        chosen = ddpg.q_value(agent.q, batch.states, batch.lengths, batch.actions)
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=1e-6)


def test_the_literal_reward_judges_the_proposals_and_the_whole_video() -> None:
    agent, video = agent_of(reward="paper"), clip()
    config = agent.config
    with torch.no_grad():
        batch = agent.play(video, 12, np.random.default_rng(3), 0.5)
        assert batch.terminals.any() and not batch.terminals.all()
        a1, a2 = candidates(agent.policies, batch.states, batch.lengths)
        for i, p in enumerate(batch.lengths.tolist()):
            l_g = torch.log(1 - torch.sigmoid(agent.d(a2[i][None, None])[0])).mean()
            whole = torch.cat((video[:p], batch.actions[i : i + 1]))[None]
            l_v = torch.log(1 - torch.sigmoid(agent.d(whole)[0][0, -1])).mean()
            l_tau, l_rc = ((video[p] - a[i]).square().mean() for a in (a1, a2))
            want = -config.l_v * l_v if p == T - 1 else -(l_g + config.l_tau * l_tau + config.l_rc * l_rc)
            torch.testing.assert_close(batch.rewards[i], want, rtol=1e-4, atol=1e-5)


def test_prioritised_replay_learns_from_the_errors() -> None:
    agent, rng = agent_of(replay_alpha=0.6, eta1=(0.5, 0.5)), np.random.default_rng(0)
    agent.gather(clip(), rng, 0.0)
    batch, recall = agent.gather(clip(1), rng, 0.0)
    before = agent.replay.state_dict()["priorities"].clone()
    agent.critic_loss(batch, recall)
    changed = (agent.replay.state_dict()["priorities"] != before).nonzero().flatten().tolist()
    assert changed and set(changed) <= set(recall.ids.tolist())


def test_the_actor_moves_every_policy_and_not_the_critic() -> None:
    agent = agent_of()
    batch, _ = agent.gather(clip(), np.random.default_rng(0), 0.0)
    agent.actor_loss(batch).backward()
    for net in agent.policies:
        assert any(p.grad is not None and p.grad.any() for p in net.parameters())
    assert all(p.grad is None and p.requires_grad for p in agent.q.parameters())


def test_an_empty_recall_weighs_everything_alike() -> None:
    recall = Recall.none(3, torch.device("cpu"))
    assert recall.ids.numel() == 0 and recall.weights.tolist() == [1, 1, 1]
