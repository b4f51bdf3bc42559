"""The persistent CUDA backend: its reasons and its plan anywhere, its numbers where there is a GPU.

The kernels themselves run on the CPU in csrc/tests/test_persistent.cpp, emulated.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from rlv2v import _native
from rlv2v.kernels import cuda
from rlv2v.kernels.layout import empty_frames
from rlv2v.kernels.reference import LIMITS

SM86 = SimpleNamespace(multi_processor_count=46, shared_memory_per_multiprocessor=100 * 1024)
SM90 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 * 1024)
CUDA = torch.device("cuda")
REASON = cuda.available(CUDA)
PERSISTENT = cuda.CudaRecurrence()


def test_says_why_it_cannot_run() -> None:
    reason = cuda.available(torch.device("cpu"))
    assert reason is not None
    assert ("built without CUDA" in reason) != _native.has_cuda


@pytest.mark.parametrize(
    ("channels", "kernel", "properties"),
    [(64, 3, SM86), (160, 3, SM86), (48, 5, SM86), (736, 1, SM86), (128, 3, SM90), (384, 3, SM90), (128, 5, SM90)],
)
def test_fits(channels: int, kernel: int, properties: SimpleNamespace) -> None:
    assert cuda.fits(channels, kernel, torch.float16, properties) is None
    assert cuda.fits(channels, kernel, torch.bfloat16, properties) is None


@pytest.mark.parametrize(
    ("channels", "kernel", "dtype", "properties", "groups", "reason"),
    [
        (64, 3, torch.float32, SM86, 1, "float16 or bfloat16, got torch.float32"),
        (168, 3, torch.float16, SM86, 1, "C=168, k=3 needs .* bytes of shared memory a block, the device has 101376"),
        (64, 7, torch.float16, SM90, 1, "k must be 1, 3 or 5, got 7"),
        (64, 3, torch.float16, SM86, 12, "one CTA for each slice of each group must be resident, .* 46 SMs"),
    ],
)
def test_says_why_a_state_does_not_fit(
    channels: int, kernel: int, dtype: torch.dtype, properties: SimpleNamespace, groups: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        raise ValueError(cuda.fits(channels, kernel, dtype, properties, groups))


def test_the_plan_of_a_known_shape() -> None:
    """C=64, k=3: 9 taps, 4 segments of 16, 64 columns, 2 bytes; 11 CTAs share the 64 tiles of each of 4 slices."""
    shape = _native.ConvLstmShape(1, 8, 4, 64, 32, 32, 3)
    for backward in (False, True):
        plan = _native.persistent_plan(shape, backward, 46, 99 * 1024)
        assert isinstance(plan, dict)
        assert plan["weight_bytes"] == 9 * 64 * 64 * 2
        assert plan["shared_bytes"] == plan["weight_bytes"] + 2 * 10 * 10 * 64 * 2
        assert (plan["tile"], plan["tiles"], plan["slices"], plan["ctas"], plan["blocks"]) == ((1, 8, 8), 64, 4, 11, 44)


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 5, 6), (64, 1, 1), (2, 33, 65)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_what_fits_at_all_fits_at_any_frame_size(kernel: int, size: tuple[int, int, int]) -> None:
    batch, height, width = size
    for channels in (1, 17, 48):
        assert cuda.fits(channels, kernel, torch.float16, SM86) is None
        for backward in (False, True):
            shape = _native.ConvLstmShape(1, 2, batch, channels, height, width, kernel)
            assert isinstance(_native.persistent_plan(shape, backward, 46, 99 * 1024), dict)


def test_refuses_arguments_that_do_not_fit_each_other() -> None:
    a, w_h = (
        empty_frames(torch.empty(0).half(), 1, 2, 3, 20, 4, 4),
        torch.zeros(1, 20, 5, 3, 3).half(),
    )
    state = empty_frames(torch.empty(0).half(), 1, 3, 5, 4, 4)
    with pytest.raises(ValueError, match=r"w_h must be \(G,4C,C,k,k\) and contiguous, got \(1, 20, 3, 3\)"):
        PERSISTENT.recur(a, w_h[:, :, 0], None, None, True)
    with pytest.raises(ValueError, match=r"w_h must be float16 or bfloat16, got torch.float32"):
        PERSISTENT.recur(a, w_h.float(), None, None, True)
    with pytest.raises(ValueError, match=r"c0 must be torch.float32 .*, got torch.float16"):
        PERSISTENT.recur(a, w_h, state, state, True)
    with pytest.raises(ValueError, match=r"h0 must be dense with C after H, W, got strides"):
        PERSISTENT.recur(a, w_h, state.contiguous(), None, True)
    with pytest.raises(ValueError, match=r"gates' tensor must be .*, got \(1, 2, 3, 5, 4, 4\)"):
        PERSISTENT.recur(a[:, :, :, :5], w_h, None, None, True)


def test_the_binding_refuses_before_it_touches_memory() -> None:
    shape = _native.ConvLstmShape(1, 1, 1, 4, 4, 4, 3)
    with pytest.raises(ValueError, match="dtype must be float16 or bfloat16, got float32"):
        _native.persistent_forward(shape, "float32", 0, 0, 16, 16, 0, 0, 16, 16, 0, 16)
    with pytest.raises(ValueError, match="w_h must be at an address that 16 divides, got 8"):
        _native.persistent_forward(shape, "float16", 0, 0, 16, 8, 0, 0, 16, 16, 0, 16)
    with pytest.raises(ValueError, match="cs must be at an address that 16 divides, got 0"):
        _native.persistent_forward(shape, "float16", 0, 0, 16, 16, 0, 0, 16, 0, 0, 16)
    if not _native.has_cuda:
        with pytest.raises(ValueError, match="built without CUDA"):
            _native.persistent_forward(shape, "float16", 0, 0, 16, 16, 0, 0, 16, 16, 0, 16)


def unrolled(a: Tensor, w_h: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """hs, cs of the recurrence in the dtype of the arguments, step by step; differentiable."""
    hs, cs = [], []
    for t in range(a.shape[1]):
        step = [a[n, t] + conv2d(h[n], w_h[n], padding=w_h.shape[-1] // 2) for n in range(a.shape[0])]
        i, f, o, g = torch.stack(step).chunk(4, dim=2)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        hs.append(h)
        cs.append(c)
    return torch.stack(hs, 1), torch.stack(cs, 1)


@pytest.mark.skipif(REASON is not None, reason=f"persistent kernels: {REASON}")
@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize(
    ("groups", "steps", "batch", "channels", "height", "width", "kernel"),
    [
        (1, 3, 1, 1, 1, 1, 3),
        (2, 4, 3, 5, 7, 6, 3),
        (1, 2, 2, 24, 9, 5, 5),
        (1, 8, 4, 64, 32, 32, 3),
        (3, 4, 2, 32, 17, 33, 1),
    ],
)
def test_matches_the_loop_in_fp64(
    groups: int,
    steps: int,
    batch: int,
    channels: int,
    height: int,
    width: int,
    kernel: int,
    activated: bool,
    dtype: torch.dtype,
) -> None:
    rng = torch.Generator(CUDA).manual_seed(0)

    def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=rng, device=CUDA).to(to)
        out = empty_frames(values, *shape)
        return out.copy_(values)

    frames = (height, width)
    a = normal(groups, steps, batch, 4 * channels, *frames)
    h0 = normal(groups, batch, channels, *frames)
    c0 = normal(groups, batch, channels, *frames, to=torch.float32)
    w_h = torch.randn(groups, 4 * channels, channels, kernel, kernel, generator=rng, device=CUDA)
    w_h = (w_h / (channels * kernel * kernel) ** 0.5).to(dtype)
    dhs = normal(groups, steps, batch, channels, *frames)
    dcs = normal(groups, steps, batch, channels, *frames, to=torch.float32)
    exact = [tensor.double().requires_grad_() for tensor in (a, w_h, h0, c0)]
    hs_ref, cs_ref = unrolled(*exact)
    da_ref, _, dh0_ref, dc0_ref = torch.autograd.grad((hs_ref, cs_ref), exact, (dhs.double(), dcs.double()))

    hs, cs, gates = PERSISTENT.recur(a.clone(), w_h, h0, c0, True)
    assert gates is not None
    if not activated:  # from the h that was computed, as a driver that keeps no gates does
        before = torch.cat((h0[:, None], hs[:, :-1]), 1)
        steps_of = [
            torch.stack([a[n, t] + conv2d(before[n, t], w_h[n], padding=kernel // 2) for t in range(steps)])
            for n in range(groups)
        ]
        gates = empty_frames(a, *a.shape).copy_(torch.stack(steps_of))
    da, dh0, dc0 = PERSISTENT.backward(dhs, dcs, gates, activated, cs, c0, w_h, True)
    assert dh0 is not None and dc0 is not None
    forward_limit, gradient_limit = LIMITS[dtype]
    assert (hs - hs_ref).abs().max() <= forward_limit
    for got, expected in ((cs, cs_ref), (da, da_ref), (dh0, dh0_ref), (dc0, dc0_ref)):
        assert (got - expected).abs().max() <= gradient_limit * expected.abs().max()
