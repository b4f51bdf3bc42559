"""Equations 1-10: the all-prefix pass against the letter of each, prefix by prefix, values and gradients in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method import losses, losses_ref
from rlv2v.method.clips import Clips, Gains
from rlv2v.method.objective import discriminator_losses, generator_losses, single_frames
from rlv2v.method.rollout import discriminate, rollouts
from rlv2v.model.build import Nets, build_nets

T, SIZE = 4, 8
CLOSE = {"rtol": 1e-9, "atol": 1e-12}
SETS = {"x": (2, T), "y": (1, T), "z": (3, T), "s": (2, 1)}
NETS = ("g_x", "g_y", "p_x", "p_y", "d_x", "d_y")
PAPER = {"widths": (4, 6), "disc_widths": (4, 6), "size": SIZE, "frames": T, "norm": "clip", "disc_norm": "clip"}
GANS = ["log", "nonsaturating", "hinge"]
EVERY_FRAME = torch.arange(T)
NO_DIRECTIONS = torch.empty(3, 0)


def clips_of(sets: str = "xyzs", height: int = SIZE, width: int = SIZE) -> Clips:
    rng = torch.Generator().manual_seed(3)
    made = {
        name: torch.rand(*shape, 3, height, width, generator=rng, dtype=torch.float64) * 2 - 1
        for name, shape in SETS.items()
    }
    return Clips(**{name: made[name] if name in sets else None for name in SETS})


def nets_of(config: Config) -> Nets:
    torch.manual_seed(0)
    nets = build_nets(config).double()
    with torch.no_grad():
        for p in nets.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for d in (nets.d_x, nets.d_y):
            d.out.weight.mul_(4)  # far enough from 0 for every branch of the hinge
    return nets


def gradients(loss: Tensor, nets: Nets, names: Iterable[str] = NETS) -> dict[str, Tensor]:
    weights = {f"{name}.{key}": p for name in names for key, p in getattr(nets, name).named_parameters()}
    found = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return dict(zip(weights, found, strict=True))


def check(fast: Tensor, literal: Tensor, nets: Nets, moves: Iterable[str], names: Iterable[str] = NETS) -> None:
    """Same value, same gradient of every weight, and the gradient is there in just the networks named."""
    torch.testing.assert_close(fast, literal, **CLOSE)
    got, want = gradients(fast, nets, names), gradients(literal, nets, names)
    torch.testing.assert_close(got, want, **CLOSE)
    moved = {name.split(".")[0] for name, grad in want.items() if grad.any()}
    assert moved == set(moves)


def at_each(net, video: Tensor) -> list[Tensor]:
    """net(v[1:t])_t for t = 1..T, each by a run of its own."""
    return [net(video[:, : t + 1])[0][:, -1] for t in range(video.shape[1])]


def log_d(logits: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(logits)).mean()


def log_not_d(logits: Tensor) -> Tensor:
    return torch.log(1 - torch.sigmoid(logits)).mean()


# --- each equation, written out in its test ---


@pytest.fixture(scope="module", params=["paper", "default"])
def setting(request: pytest.FixtureRequest) -> tuple[Nets, Clips]:
    """The paper's networks, and the default's with patch and mask head; frames need not be square."""
    config = Config.of(request.param, **PAPER)
    return nets_of(config), clips_of(height=SIZE, width=2 * SIZE)


def passes(nets: Nets, clips: Clips) -> tuple[losses.Rollout, losses.Rollout]:
    return rollouts(nets, clips.x, clips.yz)


def test_equation_1(setting: tuple[Nets, Clips]) -> None:
    nets, clips = setting
    assert clips.z is not None
    out, _ = passes(nets, clips)
    y, z = discriminate(nets.d_y, clips.y, clips.z)
    frames = [single_frames(v, EVERY_FRAME) for v in (clips.y, clips.z, out.fake)]
    frames_y, frames_z, stills, fakes = discriminate(nets.d_y, frames[0], frames[1], clips.s, frames[2])
    fast = losses.l_g_y(
        losses.discriminator_score("log"),
        frames_y=frames_y, frames_z=frames_z, stills=stills, prefixes_y=y, prefixes_z=z, fakes=fakes,
    )  # fmt: skip
    literal = log_d(nets.d_y(clips.s)[0])
    for t in range(T):
        literal = (
            literal
            + (
                log_d(nets.d_y(clips.y[:, t : t + 1])[0][..., 0])
                + log_d(nets.d_y(clips.y[:, : t + 1])[0][:, -1, 0])
                + log_d(nets.d_y(clips.z[:, t : t + 1])[0])
                + log_d(nets.d_y(clips.z[:, : t + 1])[0][:, -1])
                + log_not_d(nets.d_y(nets.g_y(clips.x[:, : t + 1])[0][:, -1:])[0])
            )
            / T
        )
    check(fast, literal, nets, {"g_y", "d_y"})


def test_equation_2(setting: tuple[Nets, Clips]) -> None:
    nets, clips = setting
    _, back = passes(nets, clips)
    fast = losses.l_g_x(
        losses.discriminator_score("log"),
        frames=discriminate(nets.d_x, single_frames(clips.x, EVERY_FRAME))[0],
        prefixes=discriminate(nets.d_x, clips.x)[0],
        fakes_y=discriminate(nets.d_x, single_frames(back.fake, EVERY_FRAME))[0],
    )
    literal = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        literal = (
            literal
            + (
                log_d(nets.d_x(clips.x[:, t : t + 1])[0])
                + log_d(nets.d_x(clips.x[:, : t + 1])[0][:, -1])
                + log_not_d(nets.d_x(nets.g_x(clips.yz[:, : t + 1])[0][:, -1:])[0])
            )
            / T
        )
    check(fast, literal, nets, {"g_x", "d_x"})


@pytest.mark.parametrize(("distance", "norm"), [("l2", torch.square), ("l1", torch.abs)])
def test_equations_3_and_4(setting: tuple[Nets, Clips], distance: str, norm: Callable[[Tensor], Tensor]) -> None:
    nets, clips = setting
    for r, p, moves in zip(passes(nets, clips), (nets.p_x, nets.p_y), ({"p_x"}, {"p_y"}), strict=True):
        literal = sum(norm(r.video[:, t] - p(r.video[:, :t])[0][:, -1]).mean() for t in range(1, T)) / (T - 1)
        check(losses.l_tau(r.video, r.predicted, distance), literal, nets, moves)


@pytest.mark.parametrize(("distance", "norm"), [("l2", torch.square), ("l1", torch.abs)])
def test_equations_5_and_6(setting: tuple[Nets, Clips], distance: str, norm: Callable[[Tensor], Tensor]) -> None:
    nets, clips = setting
    ways = ((nets.g_y, nets.p_y, nets.g_x), (nets.g_x, nets.p_x, nets.g_y))
    for r, (g_there, p_there, g_back), moves in zip(
        passes(nets, clips), ways, ({"g_y", "p_y", "g_x"}, {"g_x", "p_x", "g_y"}), strict=True
    ):
        literal = torch.zeros((), dtype=torch.float64)
        for t in range(1, T):
            there = g_there(r.video[:, :t])[0]
            longer = torch.cat((there, p_there(there)[0][:, -1:]), 1)
            literal = literal + norm(r.video[:, t] - g_back(longer)[0][:, t]).mean() / (T - 1)
        check(losses.l_rc(r.video, r.recycled, distance), literal, nets, moves)


def test_equations_7_8_and_9(setting: tuple[Nets, Clips]) -> None:
    nets, clips = setting
    assert clips.z is not None
    out, back = passes(nets, clips)
    score = losses.discriminator_score("log")
    y, z, fake_y = (v[:, -1] for v in discriminate(nets.d_y, clips.y, clips.z, out.fake))
    x, fake_x = (v[:, -1] for v in discriminate(nets.d_x, clips.x, back.fake))
    fast = losses.l_v_x(score, video=x, fake_y=fake_x) + losses.l_v_y(score, video_y=y, video_z=z, fake=fake_y)
    real_z, fake = nets.d_y(clips.z)[0][:, -1], nets.d_y(nets.g_y(clips.x)[0])[0][:, -1]
    literal_y = log_d(nets.d_y(clips.y)[0][:, -1, 0]) + (log_d(real_z[:, 0]) + log_d(real_z[:, 1])) / 2
    literal_y = literal_y + (log_not_d(fake[:, 0]) + log_not_d(fake[:, 1])) / 2
    literal_x = log_d(nets.d_x(clips.x)[0][:, -1]) + log_not_d(nets.d_x(nets.g_x(clips.yz)[0])[0][:, -1])
    check(fast, literal_x + literal_y, nets, {"g_x", "g_y", "d_x", "d_y"})


def test_fakes_of_y_and_z_may_come_apart() -> None:
    """As eq. 2 and 8 write them: a mean over each set."""
    a, b, c = torch.randn(3, 4, 5, 1, dtype=torch.float64)
    score = losses.discriminator_score("log")
    want = log_d(a) + log_not_d(b) + log_not_d(c)
    torch.testing.assert_close(losses.l_g_x(score, prefixes=a, fakes_y=b, fakes_z=c), want)
    torch.testing.assert_close(losses.l_v_x(score, video=a, fake_y=b, fake_z=c), want)


# --- eq. 10, as each side sees it ---


def weighted(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


@pytest.mark.parametrize("gan", GANS)
@pytest.mark.parametrize("sets", ["xyzs", "xyz", "xys", "xy"])
def test_equation_10_of_both_sides(gan: str, sets: str) -> None:
    config = Config.of("paper", **PAPER, gan=gan)
    nets, clips, at = nets_of(config), clips_of(sets), EVERY_FRAME
    terms, out, back = generator_losses(nets, clips, config, Gains(1.0, 1.0), at, NO_DIRECTIONS)
    want = losses_ref.generator_losses_ref(nets, clips, config, at.tolist())
    assert terms.keys() == want.keys()
    for name, term in terms.items():
        torch.testing.assert_close(term, want[name], **CLOSE)
    check(weighted(terms), weighted(want), nets, NETS)

    judged = discriminator_losses(nets, clips, out.fake.detach(), back.fake.detach(), config, at)
    want = losses_ref.discriminator_losses_ref(nets, clips, config, at.tolist())
    assert judged.keys() == want.keys()
    for name, term in judged.items():
        torch.testing.assert_close(term, want[name], **CLOSE)
    check(weighted(judged), weighted(want), nets, {"d_x", "d_y"}, names=("d_x", "d_y"))


def test_equation_10_is_one_min_max() -> None:
    """With the paper's log, both sides move along the gradient of the same L: G and P down, D up."""
    config = Config.of("paper", **PAPER)
    nets, clips, at = nets_of(config), clips_of(), EVERY_FRAME
    x, y, z, s, yz = clips.x, clips.y, clips.z, clips.s, clips.yz
    score = losses_ref.DISCRIMINATOR_SCORES["log"]
    value = (
        config.loss.l_adv * losses_ref.l_g_x_ref(score, nets.g_x, nets.d_x, x, yz, at.tolist())
        + config.loss.l_adv * losses_ref.l_g_y_ref(score, nets.g_y, nets.d_y, x, y, z, s, at.tolist())
        + config.loss.l_tau * (losses_ref.l_tau_ref("l2", nets.p_x, x) + losses_ref.l_tau_ref("l2", nets.p_y, yz))
        + config.loss.l_rc * losses_ref.l_rc_ref("l2", nets.g_y, nets.p_y, nets.g_x, x)
        + config.loss.l_rc * losses_ref.l_rc_ref("l2", nets.g_x, nets.p_x, nets.g_y, yz)
        + config.loss.l_v * losses_ref.l_v_x_ref(score, nets.g_x, nets.d_x, x, yz)
        + config.loss.l_v * losses_ref.l_v_y_ref(score, nets.g_y, nets.d_y, x, y, z)
    )
    want = gradients(value, nets)
    terms, out, back = generator_losses(nets, clips, config, Gains(1.0, 1.0), at, NO_DIRECTIONS)
    judged = discriminator_losses(nets, clips, out.fake.detach(), back.fake.detach(), config, at)
    got = gradients(weighted(terms), nets, NETS[:4])
    got |= {name: -grad for name, grad in gradients(weighted(judged), nets, NETS[4:]).items()}
    torch.testing.assert_close(got, want, **CLOSE)


def test_only_the_frames_named_are_judged_singly() -> None:
    config = Config.of("default", **PAPER, cycle=0, identity=0, contrast=0, mask_prior=0, colours=0)
    nets, clips, at = nets_of(config), clips_of(), torch.tensor([0, 2])
    terms, out, back = generator_losses(nets, clips, config, Gains(1.0, 1.0), at, NO_DIRECTIONS)
    want = losses_ref.generator_losses_ref(nets, clips, config, at.tolist())
    check(weighted(terms), weighted(want), nets, NETS)
    judged = discriminator_losses(nets, clips, out.fake.detach(), back.fake.detach(), config, at)
    want = losses_ref.discriminator_losses_ref(nets, clips, config, at.tolist())
    torch.testing.assert_close(judged, want, **CLOSE)


def test_gains_scale_the_adversarial_and_the_content_terms() -> None:
    config = Config.of("default", **PAPER)
    nets, clips, at = nets_of(config), clips_of(), torch.tensor([1])
    directions = torch.eye(3, dtype=torch.float64)
    one, *_ = generator_losses(nets, clips, config, Gains(1.0, 1.0), at, directions)
    two, *_ = generator_losses(nets, clips, config, Gains(0.5, 0.25), at, directions)
    factors = {"g": 0.5, "v": 0.5, "contrast": 0.25, "mask": 0.25}
    assert {"g_x", "v_y", "contrast_x", "mask_y", "cycle_x", "identity_s", "colours_y", "tau_x", "rc_y"} <= one.keys()
    for name, term in one.items():
        torch.testing.assert_close(two[name], factors.get(name.split("_")[0], 1.0) * term, **CLOSE)


def test_a_weight_of_zero_leaves_its_terms_out() -> None:
    config = Config.of("paper", **PAPER, l_v=0.0, l_tau=0.0, l_rc=0.0)
    nets, clips = nets_of(config), clips_of()
    terms, out, back = generator_losses(nets, clips, config, Gains(1.0, 1.0), EVERY_FRAME, NO_DIRECTIONS)
    assert terms.keys() == {"g_x", "g_y"} and out.predicted is None and out.cycle is None
    assert discriminator_losses(nets, clips, out.fake, back.fake, config, EVERY_FRAME).keys() == {"d_g_x", "d_g_y"}


def test_a_run_over_parts_of_the_networks_is_the_same_run() -> None:
    config = Config.of("paper", **PAPER)
    nets, clips = nets_of(config), clips_of()
    full = rollouts(nets, clips.x, clips.yz)
    for keywords, absent in (
        ({"same": False}, {"same"}),
        ({"predict": False}, {"predicted", "recycled"}),
        ({"back": False, "predict": False}, {"cycle", "predicted", "recycled"}),
    ):
        for r, whole in zip(rollouts(nets, clips.x, clips.yz, **keywords), full, strict=True):
            for name, value in r._asdict().items():
                assert (value is None) == (name in absent | {"mask"})
                if value is not None:
                    torch.testing.assert_close(value, getattr(whole, name), **CLOSE)


# --- the paper's normalisation over the mini-batch ---


def test_with_batch_statistics_each_prefix_is_run_with_the_clips_it_shares_a_batch_with() -> None:
    config = Config.of("paper", **PAPER | {"norm": "batch", "disc_norm": "batch"})
    nets, clips = nets_of(config), clips_of()
    x, yz, n, m = clips.x, clips.yz, len(clips.x), len(clips.yz)
    out, back = rollouts(nets, x, yz, same=False)
    fakes_y, fakes_x, predicted, recycled_x, recycled_yz = [], [], [], [], []
    for t in range(1, T + 1):
        fake_y, fake_x = nets.g_y(x[:, :t])[0], nets.g_x(yz[:, :t])[0]
        p_x = nets.p_x(torch.cat((x[:, :t], fake_x)))[0][:, -1:]
        p_y = nets.p_y(torch.cat((yz[:, :t], fake_y)))[0][:, -1:]
        fakes_y.append(fake_y[:, -1])
        fakes_x.append(fake_x[:, -1])
        predicted.append(p_x[:n, 0])
        recycled_x.append(nets.g_x(torch.cat((fake_y, p_y[m:]), 1))[0][:, -1])
        recycled_yz.append(nets.g_y(torch.cat((fake_x, p_x[n:]), 1))[0][:, -1])
    for got, want in (
        (out.fake, fakes_y), (back.fake, fakes_x), (out.predicted, predicted),
        (out.recycled, recycled_x[:-1]), (back.recycled, recycled_yz[:-1]),
    ):  # fmt: skip
        assert got is not None
        torch.testing.assert_close(got, torch.stack(want, 1), **CLOSE)
    groups = discriminate(nets.d_y, clips.y, None, out.fake)
    assert groups[1] is None
    literal = torch.stack(at_each(nets.d_y, torch.cat((clips.y, out.fake))), 1)
    torch.testing.assert_close(torch.cat((groups[0], groups[2])), literal, **CLOSE)


# --- what a judgement adds ---


@pytest.mark.parametrize("kind", GANS)
def test_scores_of_a_logit(kind: str) -> None:
    for logit in (-3.0, -1.0, -0.5, 0.0, 0.4, 1.0, 2.5):
        a = torch.tensor([logit], dtype=torch.float64)
        p = 1 / (1 + math.exp(-logit))
        d, g = losses.discriminator_score(kind), losses.generator_score(kind)
        if kind == "hinge":
            want = (-max(0.0, 1 - logit), -max(0.0, 1 + logit), -logit)
        else:
            want = (math.log(p), math.log(1 - p), math.log(1 - p) if kind == "log" else -math.log(p))
        assert (d.real(a).item(), d.fake(a).item(), g.fake(a).item()) == pytest.approx(want, abs=1e-12)
        assert g.real(a).item() == 0


def test_scores_stay_finite_where_the_letter_of_the_equations_does_not() -> None:
    a = torch.tensor([-800.0, 800.0], requires_grad=True)
    for kind in GANS:
        score = losses.discriminator_score(kind)
        (grad,) = torch.autograd.grad(score.real(a) + score.fake(a) + losses.generator_score(kind).fake(a), a)
        assert torch.isfinite(grad).all()


def test_sets_that_are_missing_drop_out() -> None:
    score = losses.discriminator_score("log")
    a = torch.randn(2, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(losses.l_g_y(score, prefixes_y=a), log_d(a[..., 0]))
    torch.testing.assert_close(losses.l_v_y(score, video_z=a), log_d(a))
    assert losses.l_g_y(score) == 0 and losses.l_v_x(score) == 0
    assert discriminate(build_nets(Config.of("paper", **PAPER)).d_y, None, None) == [None, None]
    config = Config.of("default", **PAPER)
    nets, clips = nets_of(config), clips_of("xys")
    directions = torch.eye(3, dtype=torch.float64)
    with_s, *_ = generator_losses(nets, clips, config, Gains(1, 1), EVERY_FRAME, directions)
    without, *_ = generator_losses(nets, replace(clips, s=None), config, Gains(1, 1), EVERY_FRAME, directions)
    assert with_s.keys() - without.keys() == {"identity_s"}
