"""The policy gradient, piece by piece: each against a loop or a closed form. See test_ddpg_control.py for the whole."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.method import rl as ddpg
from rlv2v.method.collector import Agent, ReplayRows, build_agents
from rlv2v.method.rl import Policies, Transitions, append, candidates, critic_loss, critic_targets
from rlv2v.model.build import Nets, build_nets
from rlv2v.replay import PrioritizedReplay

T, SIZE = 5, 8
CLOSE = {"rtol": 0, "atol": 1e-10}
SMALL = {"widths": (4, 4), "disc_widths": (4, 6), "size": SIZE, "frames": T, "transitions": 8, "replay_capacity": 64}


def nets_of(config: Config, seed: int = 0) -> Nets:
    torch.manual_seed(seed)
    nets = build_nets(config)
    with torch.no_grad():
        for p in nets.parameters():
            p.add_(0.2 * torch.randn(p.shape))  # of any layout the same numbers
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
    actions, true_frames = torch.full((2, 3, 4, 4), 0.5), torch.full((2, 3, 4, 4), 0.25)
    true_frames[1] = 1.0
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


def test_several_actions_in_one_state_are_worth_what_each_is_alone() -> None:
    nets = nets_of(Config.of("default", **SMALL)).double()
    states, lengths, actions = ragged(5, 3)
    others = actions.flip(0).requires_grad_()
    got = ddpg.q_values(nets.q_x, states, lengths, actions, others)
    want = [ddpg.q_value(nets.q_x, states, lengths, a) for a in (actions, others)]
    torch.testing.assert_close(got, tuple(want), **CLOSE)
    ours, theirs = (torch.autograd.grad(v[1].sum(), others)[0] for v in (got, want))
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_terminal_does_not_bootstrap_whatever_the_critic_says_there() -> None:
    rewards, terminals = torch.tensor([1.0, 2.0]), torch.tensor([False, True])
    got = ddpg.td_target(rewards, torch.tensor([10.0, math.inf]), terminals, 0.9)
    assert got.tolist() == pytest.approx([10.0, 2.0])


def test_the_critic_loss_is_the_weighted_square_of_its_errors() -> None:
    nets = nets_of(Config.of("default", **SMALL)).double()
    states, lengths, actions = ragged(4, 3)
    zeros = torch.zeros(4, dtype=torch.float64)
    targets, weights = torch.tensor([1.0, -1.0, 0.5, 0.0]).double(), torch.tensor([1.0, 0.5, 0.25, 1.0]).double()
    batch = Transitions(states, lengths, actions, zeros, actions, zeros.bool(), weights)
    errors = targets - ddpg.q_value(nets.q_x, states, lengths, actions)
    loss, reported = critic_loss(nets.q_x, batch, targets)
    torch.testing.assert_close(loss, (weights * errors**2).sum() / 4, **CLOSE)
    torch.testing.assert_close(reported, errors, **CLOSE)


def test_the_target_is_that_of_the_better_proposal_in_the_next_state() -> None:
    nets = nets_of(Config.of("default", **SMALL)).double()
    states, lengths, actions = ragged(24, 3)
    rewards, terminals = torch.linspace(-1, 1, 24).double(), lengths == 3
    weights = torch.ones_like(rewards)
    batch, policies = (
        Transitions(states, lengths, actions, rewards, actions, terminals, weights),
        Policies.of(nets, "x"),
    )
    got = critic_targets(nets.q_y, policies, batch, 0.9)
    winners = set()
    for i, p in enumerate(lengths.tolist()):
        following = torch.cat((states[i, :p], actions[i : i + 1]))[None]
        proposals = candidates(policies, following, torch.tensor([p + 1]))
        values = [nets.q_y(torch.cat((following, a[:, None]), 1))[0][0, -1, 0] for a in proposals]
        if p < 3:
            winners.add(bool(values[0] > values[1]))
        want = rewards[i] if p == 3 else rewards[i] + 0.9 * max(values)
        torch.testing.assert_close(got[i], want, **CLOSE)
    assert winners == {True, False} and not got.requires_grad


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


# --- the agent ---


def agent_of(domain: str = "x", preset: str = "default", num_replicas: int = 1, **changes: object) -> Agent:
    config = Config.of(preset, **SMALL | changes)
    nets = nets_of(config)
    how = {"alpha": config.rl.replay_alpha, "beta": config.rl.replay_beta}
    replays = [
        PrioritizedReplay(config.rl.replay_capacity, (SIZE, SIZE, 3), T - 1, seed=seed, **how)
        for seed in range(num_replicas)
    ]
    return Agent(domain, nets, copy.deepcopy(nets), replays, config)


def ids_of(recall: ReplayRows) -> list[int]:
    """Of all stored transitions in M."""
    return [i for _, ids in recall.drawn for i in ids.tolist()]


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
        batch, recall = agent.gather([clip(round_)], [rng], 0.0)
        num_new = 8 - len(ids_of(recall))
        assert (num_new == 8) if round_ == 0 else (0 < num_new < 8)
        assert all(len(field) == 8 for field in batch) and torch.isfinite(batch.rewards).all()
        total += num_new
        known |= {shown(batch, i) for i in range(num_new)}
        assert {shown(batch, i) for i in range(num_new, 8)} <= known, "stored ones are what was put in"
        assert batch.weights.tolist() == pytest.approx([1.0] * 8), "uniform replay"
    agent.flush()
    assert len(agent.replays[0]) == total
    loss, _ = agent.critic_loss(batch)
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in agent.q.parameters()) or agent.config.model.q_positive


def test_new_transitions_are_prefixes_of_their_clip() -> None:
    agent, video = agent_of(eta1=(0.0, 0.0)), clip()
    batch, recall = agent.gather([video], [np.random.default_rng(1)], 0.0)
    assert not ids_of(recall) and set(batch.lengths.tolist()) <= set(range(1, T))
    for i, p in enumerate(batch.lengths.tolist()):
        assert torch.equal(batch.states[i, :p], video[:p]) and torch.equal(batch.true_frames[i], video[p])
        assert batch.terminals[i] == (p == T - 1)


def test_eta2_says_how_often_the_critic_chooses() -> None:
    video, rng = clip(), np.random.default_rng(2)
    agent = agent_of()
    frames = {f.numpy().tobytes() for f in video}
    for eta2, share in ((1.0, 0.0), (0.0, 1.0), (0.75, 0.25)):
        actions = agent.play(video, rng.integers(1, T, 400), rng, eta2).actions
        random = np.mean([a.detach().numpy().tobytes() in frames for a in actions])
        assert random == pytest.approx(share, abs=0.08 if 0 < share < 1 else 0)
    with torch.no_grad():
        batch = agent.play(video, rng.integers(1, T, 30), rng, 1.0)
        proposals = candidates(agent.policies, batch.states, batch.lengths)
        best = torch.maximum(*(ddpg.q_value(agent.q, batch.states, batch.lengths, a) for a in proposals))
        chosen = ddpg.q_value(agent.q, batch.states, batch.lengths, batch.actions)
    torch.testing.assert_close(chosen, best, rtol=1e-5, atol=1e-6)


def test_the_literal_reward_judges_the_proposals_and_the_whole_video() -> None:
    agent, video = agent_of(reward="paper"), clip()
    config = agent.config
    with torch.no_grad():
        rng = np.random.default_rng(3)
        batch = agent.play(video, rng.integers(1, T, 12), rng, 0.5)
        assert batch.terminals.any() and not batch.terminals.all()
        a1, a2 = candidates(agent.policies, batch.states, batch.lengths)
        for i, p in enumerate(batch.lengths.tolist()):
            l_g = torch.log(1 - torch.sigmoid(agent.d(a2[i][None, None])[0])).mean()
            whole = torch.cat((video[:p], batch.actions[i : i + 1]))[None]
            l_v = torch.log(1 - torch.sigmoid(agent.d(whole)[0][0, -1])).mean()
            l_tau, l_rc = ((video[p] - a[i]).square().mean() for a in (a1, a2))
            want = (
                -config.loss.l_v * l_v if p == T - 1 else -(l_g + config.loss.l_tau * l_tau + config.loss.l_rc * l_rc)
            )
            torch.testing.assert_close(batch.rewards[i], want, rtol=1e-4, atol=1e-5)


def test_prioritised_replay_learns_from_the_errors_of_each_replica() -> None:
    agent = agent_of(replay_alpha=0.6, eta1=(0.5, 0.5), num_replicas=2)
    rngs = [np.random.default_rng(seed) for seed in range(2)]
    agent.gather([clip(), clip(1)], rngs, 0.0)
    batch, recall = agent.gather([clip(2), clip(3)], rngs, 0.0)
    assert len(batch.lengths) == 16 and len(recall.drawn) == 2
    agent.flush()
    before = [replay.state_dict() for replay in agent.replays]
    _, errors = agent.critic_loss(batch)
    agent.prioritise(recall, errors)
    agent.flush()
    for replay, (where, ids), was in zip(agent.replays, recall.drawn, before, strict=True):
        now = replay.state_dict()
        for i, error in zip(ids.tolist(), errors[where].abs().tolist(), strict=True):
            assert batch.lengths[where].tolist() == [int(now["positions"][j]) - 1 for j in ids.tolist()]
            if ids.tolist().count(i) == 1:
                assert now["priorities"][i].item() == pytest.approx(error + 1e-6, rel=1e-5)
        others = [j for j in range(len(replay)) if j not in ids.tolist()]
        assert torch.equal(now["priorities"][others], was["priorities"][others])


def test_when_the_buffers_take_in_what_is_new_changes_nothing() -> None:
    """A checkpoint between two mini-batches settles the first one early."""
    batches = []
    for early in (False, True):
        agent, rng = agent_of(replay_alpha=0.6, eta1=(0.5, 0.5)), np.random.default_rng(5)
        for round_ in range(5):
            batch, recall = agent.gather([clip(round_)], [rng], 0.0)
            agent.prioritise(recall, agent.critic_loss(batch)[1])
            if early:
                agent.flush()
        batches.append(batch)
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


def test_padding_that_all_states_share_is_not_run_and_changes_nothing() -> None:
    for seed in range(6):
        batches, losses = [], []
        for crops in (True, False):
            agent, rng = agent_of(eta1=(0.5, 0.5), transitions=2), np.random.default_rng(seed)
            agent.crops = crops
            for round_ in range(3):
                batch, _ = agent.gather([clip(round_)], [rng], 0.0)
            batches.append(batch)
            losses.append(torch.stack((agent.critic_loss(batch)[0], agent.actor_loss(batch))))
        short, whole = batches
        assert short.states.shape[1] == short.lengths.max() <= whole.states.shape[1] == T - 1
        torch.testing.assert_close(*losses)


def test_two_replicas_in_one_rank_are_two_ranks_of_one() -> None:
    both = agent_of(eta1=(0.5, 0.5), num_replicas=2)
    each = [agent_of(eta1=(0.5, 0.5), num_replicas=2) for _ in range(2)]
    both.crops = False
    for number, agent in enumerate(each):
        agent.replays, agent.crops = agent.replays[number : number + 1], False
    together, alone = ([np.random.default_rng(seed) for seed in range(2)] for _ in range(2))
    for round_ in range(3):
        videos = [clip(2 * round_), clip(2 * round_ + 1)]
        batch, _ = both.gather(videos, together, 0.0)
        halves = [each[r].gather(videos[r : r + 1], alone[r : r + 1], 0.0)[0] for r in range(2)]
        for whole, *parts in zip(batch, *halves, strict=True):
            torch.testing.assert_close(whole, torch.cat(parts))


def test_the_actor_moves_every_policy_and_not_the_critic() -> None:
    agent = agent_of()
    batch, _ = agent.gather([clip()], [np.random.default_rng(0)], 0.0)
    agent.actor_loss(batch).backward()
    for net in agent.policies:
        assert any(p.grad is not None and p.grad.any() for p in net.parameters())
    assert all(p.grad is None and p.requires_grad for p in agent.q.parameters())


def test_every_replica_and_domain_draws_from_a_seed_of_its_own() -> None:
    config = Config.of("default", **SMALL)
    nets = nets_of(config)

    def seeds(replicas: list[int]) -> list[int]:
        agents = build_agents(nets, copy.deepcopy(nets), config, replicas).values()
        return [replay.state_dict()["seed"] for agent in agents for replay in agent.replays]

    assert len(set(seeds([0, 1, 2]))) == 6
    assert seeds([1]) == seeds([0, 1, 2])[1::3], "whichever rank has it"
