"""Equations 1-10: the one pass over all prefixes equals the letter of each equation, values and gradients in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import pytest
import torch
from method_cases import CLIP_NORM, SIZE, SMALL, T, gradients, random_clips, random_nets
from oracle import losses_ref
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method import losses
from rlv2v.method.clips import Clips, Gains
from rlv2v.method.objective import discriminator_losses, generator_losses, single_frames
from rlv2v.method.rollout import Rollout, discriminate, rollouts
from rlv2v.model.build import Nets, build_nets

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
NETS = ("g_x", "g_y", "p_x", "p_y", "d_x", "d_y")
GANS = ["log", "nonsaturating", "hinge"]
EVERY_FRAME = torch.arange(T)
NO_DIRECTIONS = torch.empty(3, 0)
ONE = Gains(1.0, 1.0)
pytestmark = pytest.mark.usefixtures("one_thread")


def check(fast: Tensor, literal: Tensor, nets: Nets, moves: Iterable[str], names: Iterable[str] = NETS) -> None:
    """Assert the same value, the same gradient of every weight, and a gradient in just the networks `moves`."""
    torch.testing.assert_close(fast, literal, **CLOSE)
    ours, theirs = gradients(fast, nets, names), gradients(literal, nets, names)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert {name.split(".")[0] for name, grad in theirs.items() if grad.any()} == set(moves)


def log_d(logits: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(logits)).mean()


def log_not_d(logits: Tensor) -> Tensor:
    return torch.log(1 - torch.sigmoid(logits)).mean()


# --- each equation, written out in its test ---


@pytest.fixture(scope="module", params=["paper", pytest.param("default", marks=pytest.mark.thorough)])
def setting(request: pytest.FixtureRequest) -> tuple[Nets, Clips]:
    """The paper's networks, and the default's with patch and mask head; frames need not be square."""
    return random_nets(Config.of(request.param, **CLIP_NORM)), random_clips(height=SIZE, width=2 * SIZE)


def run(setting: tuple[Nets, Clips]) -> tuple[Nets, Clips, Rollout, Rollout]:
    nets, clips = setting
    return nets, clips, *rollouts(nets, clips.x, clips.yz)


def test_equation_1(setting: tuple[Nets, Clips]) -> None:
    nets, clips, of_x, _ = run(setting)
    y, z = discriminate(nets.d_y, clips.y, clips.z)
    frames = [single_frames(v, EVERY_FRAME) for v in (clips.y, clips.z, of_x.fake)]
    frames_y, frames_z, stills, fakes = discriminate(nets.d_y, frames[0], frames[1], clips.s, frames[2])
    fast = losses.l_g_y(
        losses.discriminator_score("log"),
        frames_y=frames_y, frames_z=frames_z, stills=stills, prefixes_y=y, prefixes_z=z, fakes=fakes,
    )  # fmt: skip
    literal = log_d(nets.d_y(clips.s)[0])
    for t in range(T):
        at_t = (
            log_d(nets.d_y(clips.y[:, t : t + 1])[0][..., 0])
            + log_d(nets.d_y(clips.y[:, : t + 1])[0][:, -1, 0])
            + log_d(nets.d_y(clips.z[:, t : t + 1])[0])
            + log_d(nets.d_y(clips.z[:, : t + 1])[0][:, -1])
            + log_not_d(nets.d_y(nets.g_y(clips.x[:, : t + 1])[0][:, -1:])[0])
        )
        literal = literal + at_t / T
    check(fast, literal, nets, {"g_y", "d_y"})


def test_equation_2(setting: tuple[Nets, Clips]) -> None:
    nets, clips, _, of_yz = run(setting)
    fast = losses.l_g_x(
        losses.discriminator_score("log"),
        frames=discriminate(nets.d_x, single_frames(clips.x, EVERY_FRAME))[0],
        prefixes=discriminate(nets.d_x, clips.x)[0],
        fakes_y=discriminate(nets.d_x, single_frames(of_yz.fake, EVERY_FRAME))[0],
    )
    literal = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        at_t = (
            log_d(nets.d_x(clips.x[:, t : t + 1])[0])
            + log_d(nets.d_x(clips.x[:, : t + 1])[0][:, -1])
            + log_not_d(nets.d_x(nets.g_x(clips.yz[:, : t + 1])[0][:, -1:])[0])
        )
        literal = literal + at_t / T
    check(fast, literal, nets, {"g_x", "d_x"})


@pytest.mark.parametrize(("distance", "norm"), [("l2", torch.square), ("l1", torch.abs)])
def test_equations_3_and_4(setting: tuple[Nets, Clips], distance: str, norm: Callable[[Tensor], Tensor]) -> None:
    nets, _, *both = run(setting)
    for rollout, p, moves in zip(both, (nets.p_x, nets.p_y), ({"p_x"}, {"p_y"}), strict=True):
        video = rollout.video
        literal = sum(norm(video[:, t] - p(video[:, :t])[0][:, -1]).mean() for t in range(1, T)) / (T - 1)
        check(losses.l_tau(video, rollout.predicted, distance), literal, nets, moves)


@pytest.mark.parametrize(("distance", "norm"), [("l2", torch.square), ("l1", torch.abs)])
def test_equations_5_and_6(setting: tuple[Nets, Clips], distance: str, norm: Callable[[Tensor], Tensor]) -> None:
    nets, _, *both = run(setting)
    for rollout, names in zip(both, (("g_y", "p_y", "g_x"), ("g_x", "p_x", "g_y")), strict=True):
        g_out, p_out, g_back = (getattr(nets, name) for name in names)
        literal = torch.zeros((), dtype=torch.float64)
        for t in range(1, T):
            fake = g_out(rollout.video[:, :t])[0]
            longer = torch.cat((fake, p_out(fake)[0][:, -1:]), 1)
            literal = literal + norm(rollout.video[:, t] - g_back(longer)[0][:, t]).mean() / (T - 1)
        check(losses.l_rc(rollout.video, rollout.recycled, distance), literal, nets, names)


def test_equations_7_8_and_9(setting: tuple[Nets, Clips]) -> None:
    nets, clips, of_x, of_yz = run(setting)
    score = losses.discriminator_score("log")
    y, z, fake_y = (v[:, -1] for v in discriminate(nets.d_y, clips.y, clips.z, of_x.fake))
    x, fake_x = (v[:, -1] for v in discriminate(nets.d_x, clips.x, of_yz.fake))
    fast = losses.l_v_x(score, video=x, fake_y=fake_x) + losses.l_v_y(score, video_y=y, video_z=z, fake=fake_y)
    real_z, fake = nets.d_y(clips.z)[0][:, -1], nets.d_y(nets.g_y(clips.x)[0])[0][:, -1]
    literal_y = log_d(nets.d_y(clips.y)[0][:, -1, 0]) + (log_d(real_z[:, 0]) + log_d(real_z[:, 1])) / 2
    literal_y = literal_y + (log_not_d(fake[:, 0]) + log_not_d(fake[:, 1])) / 2
    literal_x = log_d(nets.d_x(clips.x)[0][:, -1]) + log_not_d(nets.d_x(nets.g_x(clips.yz)[0])[0][:, -1])
    check(fast, literal_x + literal_y, nets, {"g_x", "g_y", "d_x", "d_y"})


# --- eq. 10, as each side sees it ---


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def check_both_sides(config: Config, clips: Clips, indices: Tensor) -> None:
    """Assert that what G and P descend, and what D descends, is the literal reference, term by term."""
    nets = random_nets(config)
    terms, of_x, of_yz = generator_losses(nets, clips, config, ONE, indices, NO_DIRECTIONS)
    literal = losses_ref.generator_losses_ref(nets, clips, config, indices.tolist())
    torch.testing.assert_close(terms, literal, **CLOSE)
    check(total(terms), total(literal), nets, NETS)

    fakes = of_x.fake.detach(), of_yz.fake.detach()
    terms = discriminator_losses(nets, clips, *fakes, config, indices)
    literal = losses_ref.discriminator_losses_ref(nets, clips, config, indices.tolist())
    torch.testing.assert_close(terms, literal, **CLOSE)
    check(total(terms), total(literal), nets, {"d_x", "d_y"}, names=("d_x", "d_y"))


FAST = {("log", "xyzs"), ("hinge", "xy"), ("nonsaturating", "xys")}


@pytest.mark.parametrize(
    ("gan", "sets"),
    [
        pytest.param(gan, sets, marks=() if (gan, sets) in FAST else pytest.mark.thorough)
        for gan in GANS
        for sets in ("xyzs", "xyz", "xys", "xy")
    ],
)
def test_equation_10_of_both_sides(gan: str, sets: str) -> None:
    check_both_sides(Config.of("paper", **CLIP_NORM, gan=gan), random_clips(sets), EVERY_FRAME)


def test_d_sees_only_the_frames_of_the_indices_one_by_one() -> None:
    off = {"cycle": 0, "identity": 0, "contrast": 0, "mask_prior": 0, "colours": 0}
    check_both_sides(Config.of("default", **CLIP_NORM, **off), random_clips(), torch.tensor([0, 2]))


def test_equation_10_is_one_min_max() -> None:
    """With the paper's log, both sides move along the gradient of the same L: G and P down, D up."""
    config = Config.of("paper", **CLIP_NORM)
    nets, clips, every = random_nets(config), random_clips(), EVERY_FRAME.tolist()
    literal = losses_ref.generator_losses_ref(nets, clips, config, every)
    # The generators' reference leaves out real samples, which only D moves on.
    literal |= losses_ref.adversarial_ref(nets, clips, losses_ref.DISCRIMINATOR_SCORES["log"], config, every)
    terms, of_x, of_yz = generator_losses(nets, clips, config, ONE, EVERY_FRAME, NO_DIRECTIONS)
    terms_d = discriminator_losses(nets, clips, of_x.fake.detach(), of_yz.fake.detach(), config, EVERY_FRAME)
    ours = gradients(total(terms), nets, NETS[:4])
    ours |= {name: -grad for name, grad in gradients(total(terms_d), nets, NETS[4:]).items()}
    torch.testing.assert_close(ours, gradients(total(literal), nets, NETS), **CLOSE)


def test_gains_scale_the_adversarial_and_the_ramped_terms() -> None:
    config = Config.of("default", **CLIP_NORM)
    nets, clips, indices = random_nets(config), random_clips(), torch.tensor([1])
    directions = torch.eye(3, dtype=torch.float64)
    plain, *_ = generator_losses(nets, clips, config, ONE, indices, directions)
    scaled, *_ = generator_losses(nets, clips, config, Gains(0.5, 0.25), indices, directions)
    ramped = dict.fromkeys(("contrast_x", "contrast_y", "mask_prior_x", "mask_prior_y"), 0.25)
    factors = dict.fromkeys(("g_x", "g_y", "v_x", "v_y"), 0.5) | ramped
    assert {*factors, "cycle_x", "identity_s", "colours_y", "tau_x", "rc_y"} <= plain.keys()
    for name, term in plain.items():
        torch.testing.assert_close(scaled[name], factors.get(name, 1.0) * term, **CLOSE)


def test_a_weight_of_zero_leaves_its_equations_out() -> None:
    config = Config.of("paper", **CLIP_NORM, l_v=0.0, l_tau=0.0, l_rc=0.0)
    nets, clips = random_nets(config), random_clips()
    terms, of_x, of_yz = generator_losses(nets, clips, config, ONE, EVERY_FRAME, NO_DIRECTIONS)
    assert terms.keys() == {"g_x", "g_y"} and of_x.predicted is None and of_x.cycle is None
    terms_d = discriminator_losses(nets, clips, of_x.fake, of_yz.fake, config, EVERY_FRAME)
    assert terms_d.keys() == {"d_g_x", "d_g_y"}


@pytest.mark.parametrize(
    ("keywords", "absent"),
    [
        ({"same": False}, {"same"}),
        ({"predict": False}, {"predicted", "recycled"}),
        ({"back": False, "predict": False}, {"cycle", "predicted", "recycled"}),
    ],
)
def test_a_rollout_without_some_parts_has_the_same_other_parts(keywords: dict[str, bool], absent: set[str]) -> None:
    nets, clips = random_nets(Config.of("paper", **CLIP_NORM)), random_clips()
    complete = rollouts(nets, clips.x, clips.yz)
    for rollout, reference in zip(rollouts(nets, clips.x, clips.yz, **keywords), complete, strict=True):
        for name, value in rollout._asdict().items():
            assert (value is None) == (name in absent | {"mask"})
            if value is not None:
                torch.testing.assert_close(value, getattr(reference, name), **CLOSE)


# --- the paper's normalisation over the mini-batch ---


def test_with_batch_statistics_each_prefix_is_run_with_the_clips_it_shares_a_batch_with() -> None:
    config = Config.of("paper", **SMALL, norm="batch", disc_norm="batch")
    nets, clips = random_nets(config), random_clips()
    x, yz, n, m = clips.x, clips.yz, len(clips.x), len(clips.yz)
    of_x, of_yz = rollouts(nets, x, yz, same=False)
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
    for ours, literal in (
        (of_x.fake, fakes_y), (of_yz.fake, fakes_x), (of_x.predicted, predicted),
        (of_x.recycled, recycled_x[:-1]), (of_yz.recycled, recycled_yz[:-1]),
    ):  # fmt: skip
        torch.testing.assert_close(ours, torch.stack(literal, 1), **CLOSE)
    y, nothing, fake = discriminate(nets.d_y, clips.y, None, of_x.fake)
    assert nothing is None
    together = torch.cat((clips.y, of_x.fake))
    literal = torch.stack([nets.d_y(together[:, : t + 1])[0][:, -1] for t in range(T)], 1)
    torch.testing.assert_close(torch.cat((y, fake)), literal, **CLOSE)


@pytest.mark.parametrize(("norm", "depends"), [("batch", True), ("clip", False), ("none", False)])
def test_scores_of_fakes_depend_on_real_clips_where_d_normalises_over_the_batch(norm: str, depends: bool) -> None:
    config = Config.of("tiny", disc_norm=norm)
    nets, clips = build_nets(config), random_clips("xyz", 16, 16, torch.float32)

    def adversarial(clips: Clips) -> dict[str, float]:
        terms, _, _ = generator_losses(nets, clips, config, ONE, torch.tensor([1, 3]), torch.eye(3))
        return {name: terms[name].item() for name in ("g_y", "v_y")}

    changed = clips._replace(y=0.2 * clips.y + 0.7)
    assert (adversarial(clips) != adversarial(changed)) == depends


# --- what a logit adds ---


@pytest.mark.parametrize("kind", GANS)
def test_scores_of_a_logit(kind: str) -> None:
    for logit in (-3.0, -1.0, -0.5, 0.0, 0.4, 1.0, 2.5):
        a = torch.tensor([logit], dtype=torch.float64)
        p = 1 / (1 + math.exp(-logit))
        d, g = losses.discriminator_score(kind), losses.generator_score(kind)
        if kind == "hinge":
            expected = (-max(0.0, 1 - logit), -max(0.0, 1 + logit), -logit)
        else:
            expected = (math.log(p), math.log(1 - p), math.log(1 - p) if kind == "log" else -math.log(p))
        assert (d.real(a).item(), d.fake(a).item(), g.fake(a).item()) == pytest.approx(expected, abs=1e-12)
        assert g.real(a).item() == 0


def test_scores_stay_finite_where_the_letter_of_the_equations_does_not() -> None:
    a = torch.tensor([-800.0, 800.0], requires_grad=True)
    for kind in GANS:
        score = losses.discriminator_score(kind)
        (grad,) = torch.autograd.grad(score.real(a) + score.fake(a) + losses.generator_score(kind).fake(a), a)
        assert torch.isfinite(grad).all()


def test_missing_sets_drop_out() -> None:
    score = losses.discriminator_score("log")
    a = torch.randn(2, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(losses.l_g_y(score, prefixes_y=a), log_d(a[..., 0]))
    torch.testing.assert_close(losses.l_v_y(score, video_z=a), log_d(a))
    assert losses.l_g_y(score) == 0 and losses.l_v_x(score) == 0
