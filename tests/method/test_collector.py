"""The mini-batch M: new and stored transitions, the critic's choice, and what reaches the replay buffers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from method_cases import SIZE, random_nets
from torch import Tensor

from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.method import rl
from rlv2v.method.collector import Agent, InPlay, ReplayRows, build_agents
from rlv2v.method.rl import Transitions
from rlv2v.replay import PrioritizedReplay

T = 5
SMALL = {"widths": (4, 4), "disc_widths": (4, 6), "size": SIZE, "frames": T, "transitions": 8, "replay_capacity": 64}
pytestmark = pytest.mark.usefixtures("one_thread")


def agent_of(
    domain: str = "x", preset: str = "default", num_replicas: int = 1, crops: bool = True, **changes: object
) -> Agent:
    config = Config.of(preset, **SMALL | changes)
    nets = random_nets(config, dtype=torch.float32)
    replays = [
        PrioritizedReplay(
            config.rl.replay_capacity,
            (SIZE, SIZE, 3),
            T - 1,
            seed=seed,
            alpha=config.rl.replay_alpha,
            beta=config.rl.replay_beta,
        )
        for seed in range(num_replicas)
    ]
    return Agent(domain, nets, copy.deepcopy(nets), replays, config, crops=crops)


def critic_loss(agent: Agent, batch: Transitions) -> Tensor:
    targets = rl.critic_targets(agent.q_target, agent.policies_target, batch, agent.config.rl.gamma)
    return rl.critic_loss(agent.q, batch, targets)[0]


def actor_loss(agent: Agent, batch: Transitions) -> Tensor:
    return rl.actor_loss(agent.q, agent.policies, batch.states, batch.lengths)


def num_stored(rows: ReplayRows) -> int:
    return sum(len(ids) for _, ids in rows.drawn)


def play(seed: int = 0) -> InPlay:
    video = clip(seed)
    return InPlay(video, video)


def clip(seed: int = 0) -> Tensor:
    frames = np.random.default_rng(seed).integers(0, 256, (T, SIZE, SIZE, 3), dtype=np.uint8)
    return to_model(torch.from_numpy(frames))


def row(batch: Transitions, i: int) -> tuple:
    """Return one transition without its padding, with frames in uint8, as the buffer keeps it."""
    p = int(batch.lengths[i])
    frames = [to_uint8(f).numpy().tobytes() for f in (batch.states[i, :p], batch.actions[i], batch.true_frames[i])]
    return (p, *frames, round(batch.rewards[i].item(), 5), bool(batch.terminals[i]))


@pytest.mark.parametrize(
    ("domain", "preset", "reward"), [("x", "default", "transition"), ("y", "default", "paper"), ("y", "paper", "paper")]
)
def test_m_mixes_new_and_stored_transitions_and_the_buffer_returns_what_it_took(
    domain: str, preset: str, reward: str
) -> None:
    agent, rng = agent_of(domain, preset, reward=reward, eta1=(0.5, 0.5)), np.random.default_rng(0)
    known: set[tuple] = set()
    total = 0
    for number in range(4):
        batch, rows = agent.collect([play(number)], [rng], 0.0)
        num_new = 8 - num_stored(rows)
        assert (num_new == 8) if number == 0 else (0 < num_new < 8)
        assert all(len(field) == 8 for field in batch) and torch.isfinite(batch.rewards).all()
        total += num_new
        known |= {row(batch, i) for i in range(num_new)}
        assert {row(batch, i) for i in range(num_new, 8)} <= known, "stored ones are what was put in"
        assert batch.weights.tolist() == pytest.approx([1.0] * 8), "uniform replay"
    agent.flush()
    assert len(agent.replays[0]) == total


def test_new_transitions_are_prefixes_of_their_clip_of_lengths_uniform_over_one_to_t_minus_one() -> None:
    agent, video = agent_of(eta1=(0.0, 0.0), transitions=400, replay_capacity=400), clip()
    batch, rows = agent.collect([InPlay(video, video)], [np.random.default_rng(1)], 0.0)
    counts = torch.bincount(batch.lengths, minlength=T)
    assert not num_stored(rows) and counts[0] == 0 and counts[1:].min() > 70 and len(counts) == T
    for i, p in enumerate(batch.lengths.tolist()):
        assert torch.equal(batch.states[i, :p], video[:p]) and torch.equal(batch.true_frames[i], video[p])
        assert batch.terminals[i] == (p == T - 1)


def test_eta1_and_eta2_follow_the_progress_of_the_run() -> None:
    agent, rng = agent_of(eta1=(0.0, 1.0), eta2=(0.0, 1.0)), np.random.default_rng(1)
    frames = {frame.numpy().tobytes() for frame in clip()}
    first, rows = agent.collect([play()], [rng], 0.0)
    assert num_stored(rows) == 0 and all(a.numpy().tobytes() in frames for a in first.actions)
    _, rows = agent.collect([play()], [rng], 1.0)
    assert num_stored(rows) == 8


def test_eta2_says_how_often_the_critic_chooses() -> None:
    video, rng = clip(), np.random.default_rng(2)
    agent = agent_of()
    frames = {f.numpy().tobytes() for f in video}
    with torch.no_grad():
        for eta2, share in ((1.0, 0.0), (0.0, 1.0), (0.75, 0.25)):
            actions = agent.act(InPlay(video, video), rng.integers(1, T, 200), rng, eta2).actions
            random = np.mean([a.numpy().tobytes() in frames for a in actions])
            assert random == pytest.approx(share, abs=0.1 if 0 < share < 1 else 0)
        batch = agent.act(InPlay(video, video), rng.integers(1, T, 30), rng, 1.0)
        proposals = rl.candidates(agent.policies, batch.states, batch.lengths)
        values = [rl.q_value(agent.q, batch.states, batch.lengths, a) for a in proposals]
        chosen = rl.q_value(agent.q, batch.states, batch.lengths, batch.actions)
    torch.testing.assert_close(chosen, torch.maximum(*values), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("domain", ["x", "y"])
@pytest.mark.parametrize("reward", ["transition", "paper"])
def test_rewards_are_those_of_each_transition_alone(reward: str, domain: str) -> None:
    agent, video = agent_of(domain, reward=reward, reward_distance=3.0), clip()
    weights = agent.config.loss
    with torch.no_grad():
        rng = np.random.default_rng(3)
        batch = agent.act(InPlay(video, video), rng.integers(1, T, 12), rng, 0.5)
        assert batch.terminals.any() and not batch.terminals.all()
        a1, a2 = rl.candidates(agent.policies, batch.states, batch.lengths)
        for i, p in enumerate(batch.lengths.tolist()):
            action = batch.actions[i]
            scores = [torch.sigmoid(agent.d(frame[None, None])[0]) for frame in (action, a2[i])]
            complete = torch.sigmoid(agent.d(torch.cat((video[:p], action[None]))[None])[0][0, -1])
            if reward == "transition":
                expected = torch.log(scores[0]).mean() - 3 * (action - video[p]).abs().mean()
                expected = expected + (p == T - 1) * weights.l_v * torch.log(complete).mean()
            elif p == T - 1:
                expected = -weights.l_v * torch.log(1 - complete).mean()
            else:
                l_g = torch.log(1 - scores[1]).mean()
                l_tau, l_rc = ((video[p] - a[i]).square().mean() for a in (a1, a2))
                expected = -(l_g + weights.l_tau * l_tau + weights.l_rc * l_rc)
            torch.testing.assert_close(batch.rewards[i], expected, rtol=1e-4, atol=1e-5)


def test_prioritised_replay_takes_the_errors_of_each_replica() -> None:
    agent = agent_of(replay_alpha=0.6, eta1=(0.5, 0.5), num_replicas=2)
    rngs = [np.random.default_rng(seed) for seed in range(2)]
    agent.collect([play(), play(1)], rngs, 0.0)
    batch, rows = agent.collect([play(2), play(3)], rngs, 0.0)
    assert len(batch.lengths) == 16 and len(rows.drawn) == 2
    agent.flush()
    old_states = [replay.state_dict() for replay in agent.replays]
    errors = torch.linspace(-2.0, 2.0, 16)
    agent.prioritise(rows, errors)
    agent.flush()
    for replay, (in_batch, ids), old in zip(agent.replays, rows.drawn, old_states, strict=True):
        new, numbers = replay.state_dict(), ids.tolist()
        assert batch.lengths[in_batch].tolist() == [int(new["positions"][i]) - 1 for i in numbers]
        for i, error in zip(numbers, errors[in_batch].abs().tolist(), strict=True):
            if numbers.count(i) == 1:
                assert new["priorities"][i].item() == pytest.approx(error + 1e-6, rel=1e-5)
        others = [i for i in range(len(replay)) if i not in numbers]
        assert torch.equal(new["priorities"][others], old["priorities"][others])


def test_an_early_flush_changes_no_draw() -> None:
    """A checkpoint between two mini-batches flushes the first one early."""
    batches = []
    for early in (False, True):
        agent, rng = agent_of(replay_alpha=0.6, eta1=(0.5, 0.5)), np.random.default_rng(5)
        for number in range(4):
            batch, rows = agent.collect([play(number)], [rng], 0.0)
            agent.prioritise(rows, torch.linspace(-1.0, 1.0, 8))
            if early:
                agent.flush()
        batches.append(batch)
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_padding_that_all_states_share_is_cut_off_and_changes_nothing(seed: int) -> None:
    batches, losses = [], []
    for crops in (True, False):
        agent, rng = agent_of(eta1=(0.5, 0.5), transitions=2, crops=crops), np.random.default_rng(seed)
        for number in range(3):
            batch, _ = agent.collect([play(number)], [rng], 0.0)
        batches.append(batch)
        losses.append(torch.stack((critic_loss(agent, batch), actor_loss(agent, batch))))
    cropped, padded = batches
    assert cropped.states.shape[1] == cropped.lengths.max() <= padded.states.shape[1] == T - 1
    torch.testing.assert_close(*losses)


def test_two_replicas_in_one_rank_are_two_ranks_of_one() -> None:
    both = agent_of(eta1=(0.5, 0.5), num_replicas=2, crops=False)
    each = [agent_of(eta1=(0.5, 0.5), num_replicas=2, crops=False) for _ in range(2)]
    for number, agent in enumerate(each):
        agent.replays = agent.replays[number : number + 1]
    together, alone = ([np.random.default_rng(seed) for seed in range(2)] for _ in range(2))
    for number in range(3):
        videos = [play(2 * number), play(2 * number + 1)]
        batch, _ = both.collect(videos, together, 0.0)
        halves = [each[r].collect(videos[r : r + 1], alone[r : r + 1], 0.0)[0] for r in range(2)]
        for field, *parts in zip(batch, *halves, strict=True):
            torch.testing.assert_close(field, torch.cat(parts))


def test_the_actor_moves_every_policy_and_not_the_critic() -> None:
    agent = agent_of()
    batch, _ = agent.collect([play()], [np.random.default_rng(0)], 0.0)
    with rl.frozen(agent.q):
        loss = actor_loss(agent, batch)
    loss.backward()
    for net in agent.policies:
        assert any(p.grad is not None and p.grad.any() for p in net.parameters())
    assert all(p.grad is None and p.requires_grad for p in agent.q.parameters())


def test_every_replica_and_domain_draws_from_a_seed_of_its_own() -> None:
    config = Config.of("default", **SMALL)
    nets = random_nets(config, dtype=torch.float32)

    def seeds(replicas: list[int]) -> list[int]:
        agents = build_agents(nets, copy.deepcopy(nets), config, replicas).values()
        return [replay.state_dict()["seed"] for agent in agents for replay in agent.replays]

    assert len(set(seeds([0, 1, 2]))) == 6
    assert seeds([1]) == seeds([0, 1, 2])[1::3], "the same on any rank"
