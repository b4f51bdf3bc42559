"""The convolutions left to the vendor's library through torch: stride 1, same padding, and their gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import conv2d


def conv(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return w * x + bias in x's dtype: (N,C_in,H,W), (C_out,C_in,k,k), (C_out) -> (N,C_out,H,W)."""
    if needs_float32(x):
        return conv(x.float(), w.float(), None if bias is None else bias.float()).to(x.dtype)
    return conv2d(x, w, bias, padding=w.shape[-1] // 2)


def transposed(w: Tensor) -> Tensor:
    """Return the weight (C_in,C_out,k,k) whose `conv` is the input gradient of a `conv` with w (C_out,C_in,k,k)."""
    return w.flip(2, 3).transpose(0, 1).contiguous()


def convolver(w: Tensor, input_shape: torch.Size, times: int) -> Callable[[Tensor], Tensor]:
    """Return `conv` with one weight, for `times` calls on inputs of one shape.

    On the CPU the weight is brought into oneDNN's order once instead of in each call: 128 -> 512 channels at 8x8 take
    2.4 ms a call, not 2.8.
    """
    pack = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)
    run = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    if w.device.type != "cpu" or times < 3 or needs_float32(w) or w.dtype == torch.float64 or not pack or not run:
        return lambda x: conv(x, w)
    padding, one = [w.shape[-1] // 2] * 2, [1, 1]
    packed = pack(w.to_mkldnn(w.dtype), padding, one, one, 1, list(input_shape))
    return lambda x: run(x, packed, None, padding, one, one, 1, "none", [], "")


def conv_gradients(
    da: Tensor, x: Tensor, w: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of `conv` to x, w and bias from da (N,C_out,H,W); None where `need` is False."""
    if needs_float32(x):
        dx, dw, dbias = conv_gradients(da.float(), x.float(), w.float(), need)
        dx, dw, dbias = (None if gradient is None else gradient.to(x.dtype) for gradient in (dx, dw, dbias))
        return dx, dw, dbias
    need_x, need_w, need_bias = need
    # The library's own sum of the bias gradient takes twice as long as torch's, which adds in float32 too.
    dbias = da.sum((0, 2, 3)) if need_bias else None
    if not (need_x or need_w):
        return None, None, dbias
    dx, dw, _ = torch.ops.aten.convolution_backward(
        da, x, w, None, [1, 1], [w.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1, (need_x, need_w, False)
    )
    return dx, dw, dbias


def needs_float32(x: Tensor) -> bool:
    """Return whether the CPU lacks fast convolutions in x's 16-bit dtype: float16 took 289 ms, float32 takes 3."""
    if x.device.type != "cpu" or x.dtype.itemsize != 2:
        return False
    if x.dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not torch.ops.mkldnn._is_mkldnn_fp16_supported()
