"""Equations 1-10: the one pass over all prefixes equals the letter of each equation, values and gradients in fp64."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from method_cases import CLIP_NORM, SIZE, SMALL, T, gradients, random_clips, random_draws, random_nets
from oracle import losses_ref
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method import losses
from rlv2v.method.clips import Clips
from rlv2v.method.objective import discriminator_losses, generator_losses
from rlv2v.method.rollout import discriminate, rollouts
from rlv2v.method.terms import TERMS
from rlv2v.model.build import Nets, build_nets

CLOSE = {"rtol": 1e-9, "atol": 1e-12}
NETS = ("g_x", "g_y", "p_x", "p_y", "d_x", "d_y")
GANS = ["log", "nonsaturating", "hinge"]
pytestmark = pytest.mark.usefixtures("one_thread")


def check(fast: Tensor, literal: Tensor, nets: Nets, moves: Iterable[str], names: Iterable[str] = NETS) -> None:
    """Assert the same value, the same gradient of every weight, and a gradient in just the networks `moves`."""
    torch.testing.assert_close(fast, literal, **CLOSE)
    ours, theirs = gradients(fast, nets, names), gradients(literal, nets, names)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert {name.split(".")[0] for name, grad in theirs.items() if grad.any()} == set(moves)


# --- eq. 10, as each side sees it ---


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def check_both_sides(config: Config, clips: Clips, indices: Tensor) -> None:
    """Assert that what G and P descend, and what D descends, is the literal reference, term by term."""
    nets = random_nets(config)
    terms, of_x, of_yz = generator_losses(nets, clips, config, 1.0, indices, random_draws())
    literal = losses_ref.generator_losses_ref(nets, clips, config, indices.tolist())
    torch.testing.assert_close(terms, literal, **CLOSE)
    check(total(terms), total(literal), nets, NETS)

    fakes = of_x.fake.detach(), of_yz.fake.detach()
    terms = discriminator_losses(nets, clips, *fakes, config, indices)
    literal = losses_ref.discriminator_losses_ref(nets, clips, config, indices.tolist())
    torch.testing.assert_close(terms, literal, **CLOSE)
    check(total(terms), total(literal), nets, {"d_x", "d_y"}, names=("d_x", "d_y"))


PAPER = [("paper", gan, sets, [*range(T)]) for gan in GANS for sets in ("xyzs", "xyz", "xys", "xy")]
FAST = {("log", "xyzs"), ("hinge", "xy"), ("nonsaturating", "xys")}
CASES = [pytest.param(*case, marks=() if case[1:3] in FAST else pytest.mark.thorough) for case in PAPER]
CASES += [("paint", "hinge", "xyzs", [0, 2])]  # patch and mask head, absolute distances; D sees two frames one by one


@pytest.mark.parametrize(("preset", "gan", "sets", "indices"), CASES)
def test_equation_10_of_both_sides(preset: str, gan: str, sets: str, indices: list[int]) -> None:
    config = Config.of(preset, **CLIP_NORM, gan=gan, l_tau=10.0, l_rc=10.0, **dict.fromkeys(TERMS, 0.0))
    check_both_sides(config, random_clips(sets, width=2 * SIZE), torch.tensor(indices))


def test_the_gain_scales_the_ramped_terms() -> None:
    config = Config.of("paint", **CLIP_NORM, l_tau=10.0, l_rc=10.0)
    nets, clips, indices = random_nets(config), random_clips(), torch.tensor([1])
    draws = random_draws()
    plain, *_ = generator_losses(nets, clips, config, 1.0, indices, draws)
    scaled, *_ = generator_losses(nets, clips, config, torch.tensor(0.25), indices, draws)
    ramped = {"contrast_x", "contrast_y", "mask_prior_x", "mask_prior_y"}
    assert {*ramped, "g_x", "v_y", "cycle_x", "identity_s", "patches_y", "tau_x", "rc_y"} <= plain.keys()
    for name, term in plain.items():
        torch.testing.assert_close(scaled[name], (0.25 if name in ramped else 1.0) * term, **CLOSE)


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
        terms, _, _ = generator_losses(nets, clips, config, 1.0, torch.tensor([1, 3]), random_draws())
        return {name: terms[name].item() for name in ("g_y", "v_y")}

    changed = clips._replace(y=0.2 * clips.y + 0.7)
    assert (adversarial(clips) != adversarial(changed)) == depends


# --- what a logit adds ---


def test_scores_stay_finite_where_the_letter_of_the_equations_does_not() -> None:
    a = torch.tensor([-800.0, 800.0], requires_grad=True)
    for kind in GANS:
        score = losses.discriminator_score(kind)
        (grad,) = torch.autograd.grad(score.real(a) + score.fake(a) + losses.generator_score(kind).fake(a), a)
        assert torch.isfinite(grad).all()
