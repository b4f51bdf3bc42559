"""The CUDA backend: its reasons and its plan anywhere, its numbers on a GPU.

The kernels themselves run on the CPU in csrc/tests/test_persistent.cpp, emulated.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from recurrence_cases import check_recurrence

from rlv2v import _native
from rlv2v.kernels import cuda
from rlv2v.kernels.layout import empty_frames

SM86 = SimpleNamespace(multi_processor_count=46, shared_memory_per_multiprocessor=100 * 1024)
SM90 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 * 1024)
MOST_CHANNELS = {1: (736, 1776), 3: (160, 384), 5: (48, 128)}  # of one group on SM86 and SM90, by k
CUDA = torch.device("cuda")
REASON = cuda.unavailable_reason(CUDA)
CUDA_RECURRENCE = cuda.CudaRecurrence()


def test_says_why_it_cannot_run() -> None:
    reason = cuda.unavailable_reason(torch.device("cpu"))
    assert reason is not None
    assert ("built without CUDA" in reason) != _native.has_cuda


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("kernel", MOST_CHANNELS)
def test_as_many_channels_fit_as_the_module_says(kernel: int, dtype: torch.dtype) -> None:
    for channels, properties in zip(MOST_CHANNELS[kernel], (SM86, SM90), strict=True):
        assert cuda.unfit_reason(channels, kernel, dtype, properties) is None
        assert cuda.unfit_reason(channels + 1, kernel, dtype, properties) is not None


@pytest.mark.parametrize(
    ("channels", "kernel", "dtype", "properties", "groups", "reason"),
    [
        (64, 3, torch.float32, SM86, 1, "float16 or bfloat16, got torch.float32"),
        (168, 3, torch.float16, SM86, 1, "C=168, k=3 needs .* bytes of shared memory a block, the device has 101376"),
        (64, 7, torch.float16, SM90, 1, "k must be 1, 3 or 5, got 7"),
        (64, 3, torch.float16, SM86, 12, "one CTA for each slice of each group must be resident, .* 46 SMs"),
        (257, 1, torch.float16, SM86, 4, "one CTA for each slice of each group"),  # of the forward; the backward fits
    ],
)
def test_says_why_a_state_does_not_fit(
    channels: int, kernel: int, dtype: torch.dtype, properties: SimpleNamespace, groups: int, reason: str
) -> None:
    got = cuda.unfit_reason(channels, kernel, dtype, properties, groups)
    assert got is not None and re.search(reason, got)


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
    for channels in (1, 17, MOST_CHANNELS[kernel][0]):
        assert cuda.unfit_reason(channels, kernel, torch.float16, SM86) is None
        for backward in (False, True):
            shape = _native.ConvLstmShape(1, 2, batch, channels, height, width, kernel)
            assert isinstance(_native.persistent_plan(shape, backward, 46, 99 * 1024), dict)


def test_refuses_arguments_that_do_not_fit_each_other() -> None:
    a, w_h = empty_frames(torch.empty(0).half(), 1, 2, 3, 20, 4, 4), torch.zeros(1, 20, 5, 3, 3).half()
    h0 = empty_frames(torch.empty(0).half(), 1, 3, 5, 4, 4)
    for message, tensors in (
        ("w_h must be (G,4C,C,k,k) and contiguous, got (1, 20, 3, 3)", (a, w_h[:, :, 0], None, None)),
        ("w_h must be float16 or bfloat16, got torch.float32", (a, w_h.float(), None, None)),
        ("c0 must be torch.float32 (1, 3, 5, 4, 4) on cpu, got torch.float16", (a, w_h, h0, h0)),
        ("h0 must be dense with C after H, W, got strides", (a, w_h, h0.contiguous(), None)),
        ("gates' tensor must be (1, 'T', 'B', 20, 'H', 'W'), got (1, 2, 3, 5, 4, 4)", (a[:, :, :, :5], w_h, h0, None)),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            CUDA_RECURRENCE.recur(*tensors, True)


def test_the_binding_refuses_before_it_touches_memory() -> None:
    shape = _native.ConvLstmShape(1, 1, 1, 4, 4, 4, 3)
    for message, dtype, w_h, cs in (
        ("dtype must be float16 or bfloat16, got float32", "float32", 16, 16),
        ("w_h must be at an address that 16 divides, got 8", "float16", 8, 16),
        ("cs must be at an address that 16 divides, got 0", "float16", 16, 0),
        *([] if _native.has_cuda else [("built without CUDA", "float16", 16, 16)]),
    ):
        with pytest.raises(ValueError, match=message):
            _native.persistent_forward(shape, dtype, 0, 0, 16, w_h, 0, 0, 16, cs, 0, 16)


@pytest.mark.skipif(REASON is not None, reason=f"cuda backend: {REASON}")
@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("activated", [True, False])
@pytest.mark.parametrize(
    "shape",  # G, T, B, C, H, W, k
    [
        (1, 3, 1, 1, 1, 1, 3),
        (2, 4, 3, 5, 7, 6, 3),
        (1, 2, 2, 24, 9, 5, 5),
        (1, 8, 4, 64, 32, 32, 3),
        (3, 4, 2, 32, 17, 33, 1),
    ],
)
def test_values_and_gradients_are_those_of_the_textbook(
    shape: tuple[int, ...], activated: bool, dtype: torch.dtype
) -> None:
    check_recurrence(CUDA_RECURRENCE, shape, dtype, CUDA, state="state", with_dcs=True, activated=activated)
