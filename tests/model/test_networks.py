"""The networks: causal in time, the same in chunks as in one run, and built and initialised as section 3.4 says."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from rlv2v.model import RPB, URB, ConvLSTM, Discriminator, Residual, SequenceNorm, Translator, limit_history
from rlv2v.model.frames import map_state
from rlv2v.model.norm import Moments

B, T, H, W = 2, 5, 8, 16
HEADS = [("convlstm", 1), ("mask", 1), ("mask", 2)]
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


def lively(net: nn.Module) -> nn.Module:
    """Every weight away from the value where it would hide a fault (zero biases, unit gains, no running statistics)."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for name, buffer in net.named_buffers():
            if "running" in name:
                buffer.add_(0.1 * torch.rand_like(buffer))
    return net


def every_net() -> list:
    nets = [
        pytest.param(translator, (head, patch, *mode), id=f"{head}-{patch}-{mode[0]}-{'train' if mode[1] else 'eval'}")
        for head, patch in HEADS
        for mode in MODES
    ]
    judges = [("none", True), *MODES]
    return nets + [
        pytest.param(discriminator, mode, id=f"judge-{mode[0]}-{'train' if mode[1] else 'eval'}") for mode in judges
    ]


@pytest.mark.parametrize(("build", "args"), every_net())
def test_no_frame_looks_ahead(build, args) -> None:
    net, x = build(*args), video()
    before = net(x)[0]
    for t in range(T):
        other = x.clone()
        other[0, t] = -other[0, t]
        after = net(other)[0]
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert (after[0, t] - before[0, t]).abs().max() > 1e-6, "frame t itself must change"
        if t + 1 < T:
            assert (after[0, t + 1] - before[0, t + 1]).abs().max() > 1e-9, "and what follows remembers it"


@pytest.mark.parametrize("norm", ["clip", "batch", "none"])
def test_a_judge_sees_what_a_single_frame_shows(norm: str) -> None:
    y = discriminator(norm)(video(4, 1))[0]
    assert y.std() > 1e-3


@pytest.mark.parametrize(("build", "args"), every_net())
def test_a_clip_depends_on_the_others_only_by_the_batch_norm(build, args) -> None:
    net, x = build(*args), video()
    alone = net(x[:1])[0]
    together = net(x)[0][:1]
    batch_statistics = args[-2:] == ("batch", True)
    assert ((alone - together).abs().max() > 1e-6) == batch_statistics


@pytest.mark.parametrize(("build", "args"), every_net())
@pytest.mark.parametrize("cuts", [(1,) * T, (2, 3), (4, 1)], ids=str)
def test_chunks_with_state_are_the_whole_run(build, args, cuts) -> None:
    net, x = build(*args), video()
    whole, state_whole = net(x)
    state, parts = None, []
    for chunk in x.split(cuts, 1):
        y, state = net(chunk, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    torch.testing.assert_close(leaves(state), leaves(state_whole), rtol=0, atol=1e-10)


def leaves(state) -> list[Tensor]:
    found: list[Tensor] = []
    map_state(lambda s: found.append(s) or s, state)
    return found


@pytest.mark.parametrize(("head", "patch"), HEADS)
@pytest.mark.parametrize(("norm", "training"), MODES)
def test_forks_are_the_runs_over_each_prefix_and_its_other_frame(head, patch, norm, training) -> None:
    net, x, other = translator(head, patch, norm, training), video(), video()
    y, states = net(x, all_states=True)
    torch.testing.assert_close(y, net(x)[0], rtol=0, atol=0)
    forked, nothing = net(other, states, one_step_from_each=True)
    assert nothing is None or not leaves(nothing)
    for t in range(1, T + 1):
        literal = net(torch.cat((x[:, :t], other[:, t - 1 : t]), 1))[0]
        torch.testing.assert_close(y[:, :t], literal[:, :t], rtol=0, atol=1e-10)
        torch.testing.assert_close(forked[:, t - 1], literal[:, t], rtol=0, atol=1e-10)


def test_the_state_after_a_run_is_the_last_of_every_state() -> None:
    net, x = translator(), video()
    _, states = net(x, all_states=True)
    torch.testing.assert_close(leaves(map_state(lambda s: s[:, -1], states)), leaves(net(x)[1]), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "training"), [("clip", True), ("clip", False), ("batch", True)])
def test_sequence_norm_takes_its_statistics_over_the_frames_so_far(kind: str, training: bool) -> None:
    norm = lively(SequenceNorm(3, kind).double()).train(training)
    x = video() * torch.tensor([1.0, 3.0, 0.2], dtype=torch.float64)[:, None, None] + 0.5
    y, _ = norm(x)
    for b in range(B):
        for t in range(T):
            seen = x[:, : t + 1] if kind == "batch" else x[b : b + 1, : t + 1]
            for c in range(3):
                mean, var = seen[:, :, c].mean(), seen[:, :, c].var(unbiased=False)
                want = (x[b, t, c] - mean) / torch.sqrt(var + norm.eps) * norm.weight[c] + norm.bias[c]
                torch.testing.assert_close(y[b, t, c], want, rtol=0, atol=1e-12)


def test_batch_norm_in_eval_mode_uses_the_average_of_whole_batches() -> None:
    norm = SequenceNorm(3, "batch", momentum=0.25).double()
    mean, square = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for _ in range(3):
        x = video() + 0.3
        norm(x)
        mean = 0.75 * mean + 0.25 * x.mean((0, 1, 3, 4))
        square = 0.75 * square + 0.25 * x.square().mean((0, 1, 3, 4))
    x = video()
    y, state = norm.eval()(x)
    want = (x - mean[:, None, None]) / torch.sqrt(square - mean.square() + norm.eps)[:, None, None]
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
    assert state is None
    norm(video())
    torch.testing.assert_close(norm.running_mean, mean, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["clip", "batch"])
def test_gradients_of_the_norm(kind: str) -> None:
    """By finite differences; through the statistics of earlier frames too."""
    norm = lively(SequenceNorm(2, kind)).double()
    x = torch.randn(2, 3, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def in_chunks(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weights = {"weight": weight, "bias": bias}
        first, state = torch.func.functional_call(norm, weights, (x[:, :2],))
        return torch.cat((first, torch.func.functional_call(norm, weights, (x[:, 2:], state))[0]), 1)

    assert torch.autograd.gradcheck(in_chunks, (x, *norm.parameters()))


@pytest.mark.parametrize("kind", ["clip", "batch"])
def test_norm_of_a_channel_whose_mean_is_large_beside_its_spread(kind: str) -> None:
    norm = lively(SequenceNorm(3, kind))
    x = (5.0 + 0.05 * torch.randn(2, 3, 3, 8, 8)).requires_grad_()
    pull = torch.randn_like(x)
    found = torch.autograd.grad((norm(x)[0] * pull).sum(), (x, *norm.parameters()))
    exact = copy.deepcopy(norm).double()
    x64 = x.detach().double().requires_grad_()
    wanted = torch.autograd.grad((exact(x64)[0] * pull).sum(), (x64, *exact.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_a_flat_clip_stays_finite_forward_and_backward() -> None:
    for net in (translator().float(), discriminator().float()):
        x = torch.full((1, T, 3, H, W), 0.7, requires_grad=True)
        y = net(x)[0]
        y.sum().backward()
        assert torch.isfinite(y).all() and x.grad is not None and torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("head", "patch"), HEADS)
@pytest.mark.parametrize("frames", [1, 3])
def test_a_translator_gives_frames_of_the_size_it_got(head: str, patch: int, frames: int) -> None:
    net = translator(head, patch)
    assert net.multiple == patch * 4
    for height, width in ((net.multiple, net.multiple), (2 * net.multiple, 3 * net.multiple)):
        y, mask, _ = net.forward_with_mask(torch.rand(2, frames, 3, height, width, dtype=torch.float64) * 2 - 1)
        assert y.shape == (2, frames, 3, height, width) and y.abs().max() < 1
        assert (mask is None) == (head == "convlstm")
        if mask is not None:
            assert mask.shape == (2, frames, 1, height, width) and mask.min() > 0 and mask.max() < 1


def test_the_mask_head_copies_its_input_where_the_mask_says() -> None:
    net, x = translator(), video()
    assert net.to_rgbm is not None
    with torch.no_grad():
        net.to_rgbm.weight[3] = 0
        net.to_rgbm.bias[3] = 40.0
    torch.testing.assert_close(net(x)[0], x, rtol=0, atol=1e-12)
    net.mask_gain.fill_(0.25)
    quarter, mask, _ = net.forward_with_mask(x)
    net.mask_gain.fill_(0.0)
    none = net(x)[0]
    assert mask is not None
    torch.testing.assert_close(mask, torch.full_like(mask, 0.25), rtol=0, atol=1e-12)
    torch.testing.assert_close(quarter, 0.25 * x + 0.75 * none, rtol=0, atol=1e-12)
    assert (none - x).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(B, T), (B, 1)])
@pytest.mark.parametrize("heads", [1, 2])
def test_a_judge_gives_a_number_a_head_for_frame_and_video_of_any_size(shape: tuple[int, int], heads: int) -> None:
    net = discriminator(heads=heads, patch=2)
    for height, width in ((8, 8), (8, 16), (4, 6)):
        y, _ = net(torch.rand(*shape, 3, height, width, dtype=torch.float64))
        assert y.shape == (*shape, heads)


def test_only_a_paper_critic_is_clipped_at_zero() -> None:
    linear = discriminator()
    with torch.no_grad():
        linear.out.bias -= 10
    x = video()
    y = linear(x)[0]
    assert (y < 0).all()
    linear.positive = True
    assert (linear(x)[0] == 0).all()


def test_sides_that_are_no_multiple_of_the_patch_are_named() -> None:
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
    assert discriminator()(x)[0].shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Translator((4,), head="linear"), "Translator: head must be 'convlstm' or 'mask', got 'linear'"),
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


def test_the_blocks_are_those_of_section_3_4() -> None:
    x = torch.randn(1, 2, 3, H, W, dtype=torch.float64)
    r = lively(Residual(3, 5).double())
    assert r.skip is not None
    y, _ = r(x)
    h, _ = r.convlstm(x)
    want = torch.nn.functional.leaky_relu(h + torch.einsum("btchw,oc->btohw", x, r.skip[..., 0, 0]), 0.2)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)

    down = RPB(3, 5, "none").double()
    y, skip, _ = down(x)
    torch.testing.assert_close(skip, down.residual(x)[0], rtol=0, atol=0)
    squares = skip.unflatten(-1, (W // 2, 2)).unflatten(-3, (H // 2, 2)).mean((-3, -1))
    torch.testing.assert_close(y, squares, rtol=0, atol=1e-12)

    up = URB(5, 5, 4, "none").double()
    z, _ = up(y, skip)
    large = y.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(z, up.residual(torch.cat((large, skip), 2))[0], rtol=0, atol=1e-12)


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


def test_limited_memory_changes_nothing_within_a_clip() -> None:
    net, x = translator(), video(1, T)
    state, parts = None, []
    for frame in x.split(1, 1):
        y, state = net(frame, limit_history(state, T))
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), net(x)[0], rtol=0, atol=1e-10)


def test_limited_memory_forgets_the_start_of_a_long_stream() -> None:
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


def test_a_streamed_state_does_not_grow() -> None:
    net = translator("mask", 2)
    state, sizes = None, []
    for frame in video(1, 30).split(1, 1):
        y, state = net(frame, limit_history(state, T))
        sizes.append(sum(s.numel() for s in leaves(state)))
        assert torch.isfinite(y).all()
    assert len(set(sizes)) == 1
