"""The networks are causal, the same in chunks as in one run, and built and initialised as section 3.4 says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from oracle import plain_nets
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from rlv2v.config import Config
from rlv2v.model import ConvLSTM, Discriminator, GridTranslator, SequenceNorm, Translator, limit_history
from rlv2v.model.build import build_nets
from rlv2v.model.norm import Moments, stats_over

B, T, H, W = 2, 5, 8, 16
HEADS = [("convlstm", 1), ("letter", 1), ("mask", 1), ("mask", 2)]
MODES = [("clip", True), ("batch", True), ("batch", False)]


@pytest.fixture(autouse=True)
def fp64() -> None:
    torch.manual_seed(0)


def video(*shape: int) -> Tensor:
    return torch.rand(*(shape or (B, T)), 3, H, W, dtype=torch.float64) * 2 - 1


def translator(head: str = "mask", patch: int = 2, norm: str = "clip", training: bool = True) -> Translator:
    net = Translator((4, 6), head=head, patch=patch, norm=norm, head_width=5).double()
    return lively(net).train(training)


def discriminator(norm: str = "clip", training: bool = True, **kwargs: int) -> Discriminator:
    return lively(Discriminator((4, 6), norm=norm, **kwargs).double()).train(training)


def grid_translator(norm: str = "clip", training: bool = True) -> GridTranslator:
    return lively(GridTranslator((4, 6), patch=2, norm=norm, hidden=3, bins=4).double()).train(training)


def lively(net: nn.Module) -> nn.Module:
    """Move every weight away from values that would hide a fault (zero biases, unit gains, no running statistics)."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    return net


FAST = [
    (translator, ("convlstm", 1, "clip", True)),
    *((translator, ("mask", 2, "batch", mode)) for mode in (True, False)),
]
FAST += [(discriminator, (norm, True)) for norm in ("none", "batch", "clip")] + [(grid_translator, ("clip", True))]
ALL = [(translator, (*head, *mode)) for head in HEADS for mode in MODES]
ALL += [(discriminator, mode) for mode in (("none", True), *MODES)] + [(grid_translator, mode) for mode in MODES]
EVERY_NET = [net if net in FAST else pytest.param(*net, marks=pytest.mark.thorough) for net in ALL]


def name_of(part) -> str:
    return "-".join(map(str, part)) if isinstance(part, tuple) else part.__name__


@pytest.mark.parametrize("preset", ["default", "paint", "paper", "paper-letter"])
def test_every_network_is_its_plain_twin(preset: str) -> None:
    """Blocks, heads, mask and normalisation of section 3.4, in the twin's plain PyTorch, with the same weights."""
    config = Config.of(preset, widths=(4, 6), disc_widths=(4, 6, 5, 4, 3), norm="clip", disc_norm="clip")
    nets, plain, x = lively(build_nets(config).double()), plain_nets.Nets(config).double(), video()
    with torch.no_grad():
        nets.p_x.mask_gain.fill_(0.25)
        nets.q_x.out.bias -= 10
    plain.load_state_dict(plain_nets.plain_weights(nets.state_dict()))
    for name, net in nets.named_children():
        if isinstance(net, Translator):
            assert net.multiple == 4 * net.patch
            ours, theirs = net.forward_with_mask(x)[:2], getattr(plain, name).run(x)
        else:
            ours, theirs = net(x)[0], getattr(plain, name)(x)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert (nets.q_x(x)[0] == 0).all() == config.model.q_positive


@pytest.mark.parametrize("level", [-1.0, 1.0])
def test_the_head_of_the_paper_can_show_black_and_white_in_its_first_frame(level: float) -> None:
    for head, reach in (("convlstm", 0.99), ("letter", 0.7616)):
        net = Translator((4, 6), head=head).double()
        with torch.no_grad():
            net.last.bias.copy_(100.0 * torch.tensor([1.0, 0.0, 1.0, level]).repeat_interleave(3))  # i, f, o, g
        first = net(video())[0][:, 0] * level
        assert (first.max() < 0.7617) if head == "letter" else (first.min() > reach)


@pytest.mark.parametrize(("build", "args"), EVERY_NET, ids=name_of)
def test_no_frame_looks_ahead(build, args) -> None:
    net, x = build(*args), video()
    y = net(x)[0]
    for t in range(T):
        changed = x.clone()
        changed[0, t] = -changed[0, t]
        difference = net(changed)[0] - y
        torch.testing.assert_close(difference[:, :t], torch.zeros_like(y[:, :t]), rtol=0, atol=1e-12)
        assert difference[0, t].abs().max() > 1e-6, "frame t itself must change"
        if t + 1 < T:
            assert difference[0, t + 1].abs().max() > 1e-9, "and what follows remembers it"


@pytest.mark.parametrize("norm", ["clip", "batch", "none"])
def test_a_discriminator_sees_what_a_single_frame_shows(norm: str) -> None:
    y = discriminator(norm)(video(4, 1))[0]
    assert y.std() > 1e-3


@pytest.mark.parametrize(("build", "args"), EVERY_NET, ids=name_of)
def test_a_clip_depends_on_the_others_only_by_the_batch_norm(build, args) -> None:
    net, x = build(*args), video()
    alone = net(x[:1])[0]
    together = net(x)[0][:1]
    batch_statistics = args[-2:] == ("batch", True)
    assert ((alone - together).abs().max() > 1e-6) == batch_statistics


@pytest.mark.parametrize(("build", "args"), EVERY_NET, ids=name_of)
@pytest.mark.parametrize("cuts", [(2, 3), pytest.param((1,) * T, marks=pytest.mark.thorough)], ids=str)
def test_chunks_with_state_are_one_run(build, args, cuts) -> None:
    net, x = build(*args), video()
    expected, last_state = net(x)
    state, outputs = None, []
    for chunk in x.split(cuts, 1):
        y, state = net(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(leaves(state), leaves(last_state), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("build", "args"),
    [
        (translator, ("convlstm", 1)),
        (translator, ("mask", 2)),
        (grid_translator, ()),
        (discriminator, ()),
        (discriminator, ("none",)),
    ],
)
def test_one_clip_is_the_same_in_training_and_in_use(build, args) -> None:
    """With statistics of the clip or none; `batch` uses running statistics, a known fault of the method."""
    net, x = build(*args), video(1, T)
    torch.testing.assert_close(net.eval()(x)[0], net.train()(x)[0], rtol=0, atol=0)


def leaves(state) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if leaf is not None]


@pytest.mark.parametrize(("build", "args"), EVERY_NET, ids=name_of)
def test_a_step_from_each_state_is_a_run_over_the_prefix_and_one_other_frame(build, args) -> None:
    net, x, other = build(*args), video(), video()
    y, states = net(x, all_states=True)
    torch.testing.assert_close(y, net(x)[0], rtol=0, atol=0)
    steps, nothing = net(other, states, one_step_from_each=True)
    assert nothing is None or not leaves(nothing)
    for t in range(1, T + 1):
        literal = net(torch.cat((x[:, :t], other[:, t - 1 : t]), 1))[0]
        torch.testing.assert_close(y[:, :t], literal[:, :t], rtol=0, atol=1e-10)
        torch.testing.assert_close(steps[:, t - 1], literal[:, t], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "training"), [("clip", True), ("clip", False), ("batch", True), ("batch", False)])
def test_sequence_norm_takes_its_statistics_over_the_frames_so_far(kind: str, training: bool) -> None:
    norm = lively(SequenceNorm(3, kind).double()).train(training)
    x = video() * torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)[:, None, None] + 0.5
    y, _ = norm(x)
    for b in range(B):
        for t in range(T):
            seen = x[:, : t + 1] if kind == "batch" and training else x[b : b + 1, : t + 1]
            for c in range(3):
                mean, var = seen[:, :, c].mean(), seen[:, :, c].var(unbiased=False)
                want = (x[b, t, c] - mean) / torch.sqrt(var + norm.eps) * norm.weight[c] + norm.bias[c]
                torch.testing.assert_close(y[b, t, c], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [translator, discriminator])
def test_over_each_clip_a_batch_norm_knows_no_other_clip(make: Callable[..., nn.Module]) -> None:
    """A clip alone in training, any clip with `stats_over`, and any clip in eval mode: the same."""
    net, x = make(norm="batch"), video()
    alone = torch.cat([net(clip[None])[0] for clip in x])
    assert (net(x)[0] - alone).abs().max() > 1e-3
    with stats_over("clip", net):
        torch.testing.assert_close(net(x)[0], alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(net.eval()(x)[0], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["clip", "batch"])
def test_gradients_of_the_norm(kind: str) -> None:
    """Finite differences, through the statistics of earlier frames too."""
    norm = lively(SequenceNorm(2, kind)).double()
    x = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def in_chunks(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weights = {"weight": weight, "bias": bias}
        first, state = torch.func.functional_call(norm, weights, (x[:, :2],))
        return torch.cat((first, torch.func.functional_call(norm, weights, (x[:, 2:], state))[0]), 1)

    assert torch.autograd.gradcheck(in_chunks, (x, *norm.parameters()))


@pytest.mark.parametrize("kind", ["clip", "batch"])
def test_the_norm_of_a_channel_whose_mean_is_large_against_its_spread(kind: str) -> None:
    norm = lively(SequenceNorm(3, kind))
    x = (5.0 + 0.05 * torch.randn(2, 3, 3, 8, 8)).requires_grad_()
    dy = torch.randn_like(x)
    grads = torch.autograd.grad((norm(x)[0] * dy).sum(), (x, *norm.parameters()))
    norm64, x64 = copy.deepcopy(norm).double(), x.detach().double().requires_grad_()
    grads64 = torch.autograd.grad((norm64(x64)[0] * dy).sum(), (x64, *norm64.parameters()))
    for ours, theirs in zip(grads, grads64, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_flat_clip_stays_finite_forward_and_backward() -> None:
    for net in (translator().float(), discriminator().float()):
        x = torch.full((1, T, 3, H, W), 0.7, requires_grad=True)
        y = net(x)[0]
        y.sum().backward()
        assert torch.isfinite(y).all() and x.grad is not None and torch.isfinite(x.grad).all()


def test_sides_that_are_no_multiple_of_the_patch_are_refused() -> None:
    x = torch.rand(1, 2, 3, 9, 8, dtype=torch.float64)
    for net in (translator(patch=2), discriminator(patch=2)):
        with pytest.raises(ValueError, match=r"H and W multiples of 2 \(patch\), got \(1, 2, 3, 9, 8\)"):
            net(x)
        with pytest.raises(ValueError, match=r"must be \(B,T,3,H,W\)"):
            net(x[0])


@pytest.mark.parametrize("sides", [(7, 5), (1, 1), (1, 6)], ids=str)
def test_without_a_patch_any_side_works(sides: tuple[int, int]) -> None:
    x = torch.rand(1, 2, 3, *sides, dtype=torch.float64)
    assert translator(patch=1)(x)[0].shape == x.shape
    assert discriminator(heads=2)(x)[0].shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Translator((4,), head="linear"),
            r"Translator: head must be one of \['convlstm', 'letter', 'mask'\], got 'linear'",
        ),
        (lambda: Translator((4,), head="convlstm", patch=2), "Translator: patch must be 1 with head='convlstm', got 2"),
        (
            lambda: Discriminator((4, 4), norm="layer"),
            "SequenceNorm: kind must be 'clip', 'batch' or 'none', got 'layer'",
        ),
    ],
)
def test_unknown_settings_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_weights_are_xavier_uniform() -> None:
    c_in, c_out, k = 6, 16, 3
    layer = ConvLSTM(c_in, c_out, k)
    for weight, fan_in in ((layer.w_x, c_in), (layer.w_h, c_out)):
        bound = math.sqrt(6 / (k * k * (fan_in + c_out)))
        for gate in weight.detach().chunk(4):
            assert gate.abs().max() <= bound
            assert gate.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not layer.bias.any()
    net = Discriminator((8, 16), heads=2)
    for linear in (net.hidden, net.out):
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert bound * 0.8 < linear.weight.abs().max() <= bound and not linear.bias.any()
    head = Translator((4,), head="mask").to_rgbm
    assert head is not None and head.weight.abs().max() <= math.sqrt(6 / (16 + 4)) and not head.bias.any()


def test_cells_remember_over_all_times_up_to_the_horizon() -> None:
    horizon, c_out = 9, 400
    i, f, o, g = ConvLSTM(1, c_out, 1, horizon=horizon).bias.detach().chunk(4)
    spans = 1 / (1 - torch.sigmoid(f))  # a cell forgets in 1 / (1 - forget gate) = 1 + u frames
    assert spans.min() >= 2 - 1e-4 and spans.max() <= horizon + 1e-4
    torch.testing.assert_close(torch.quantile(spans, 0.5).item(), (2 + horizon) / 2, rtol=0.1, atol=0)
    assert torch.equal(i, -f) and not o.any() and not g.any()


def test_a_limited_history_changes_nothing_within_a_clip() -> None:
    net, x = translator(), video(1, T)
    state, outputs = None, []
    for frame in x.split(1, 1):
        y, state = net(frame, limit_history(state, T))
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), net(x)[0], rtol=0, atol=1e-10)


def test_a_limited_history_forgets_the_start_of_a_long_stream() -> None:
    norm = SequenceNorm(3).double()
    start, rest = video(1, 40), video(1, 80) * 0.1 + 0.8

    def end(first: Tensor, limited: bool) -> Tensor:
        state = None
        for frame in torch.cat((first, rest), 1).split(1, 1):
            y, state = norm(frame, limit_history(state, T) if limited else state)
        assert isinstance(state, Moments) and (state.frames.item() <= T) == limited
        return y

    for limited, bounds in ((True, (0, 1e-2)), (False, (0.1, 9))):
        difference = (end(start, limited) - end(start * 0.1 - 0.8, limited)).abs().max()
        assert bounds[0] <= difference <= bounds[1]
