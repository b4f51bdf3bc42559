"""The convolutions that stay with the vendor's library through torch: stride 1, same padding, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from rlv2v.kernels.layout import dense, empty_frames


@dataclass(frozen=True)
class Inputs:
    """The pre-activations that come from x, w_x * x + bias, for a recurrence to take whole or a few steps at a time.

    Shapes: x (G,T,B,C_in,H,W) dense, w_x (G,4C,C_in,k,k), bias (G,4C).
    """

    x: Tensor
    w_x: Tensor
    bias: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int, int, int]:
        """Of `whole`: (G,T,B,4C,H,W)."""
        groups, steps, batch, _, height, width = self.x.shape
        return groups, steps, batch, self.bias.shape[1], height, width

    def whole(self, with_bias: bool = True) -> Tensor:
        """Of all frames, (G,T,B,4C,H,W), dense, the caller's to overwrite."""
        a = joined([self.chunk(g, 0, self.x.shape[1], with_bias) for g in range(self.x.shape[0])])
        assert a is not None
        return a

    def chunk(self, group: int, first: int, last: int, with_bias: bool = True) -> Tensor:
        """Of the steps [first, last) of a group, (last-first,B,4C,H,W), dense, the caller's to overwrite."""
        x = self.x[group, first:last]
        bias = self.bias[group] if with_bias else None
        return dense(conv(x.flatten(0, 1), self.w_x[group], bias)).unflatten(0, x.shape[:2])


def conv(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """w * x + bias: (N,C_in,H,W), (C_out,C_in,k,k), (C_out) -> (N,C_out,H,W) of x's dtype."""
    if through_float(x):
        return conv(x.float(), w.float(), None if bias is None else bias.float()).to(x.dtype)
    return conv2d(x, w, bias, padding=w.shape[-1] // 2)


def transposed(w: Tensor) -> Tensor:
    """The weight (C_in,C_out,k,k) with which `conv` is the gradient of `conv` with w (C_out,C_in,k,k) to its input."""
    return w.flip(2, 3).transpose(0, 1).contiguous()


def convolver(w: Tensor, input_shape: torch.Size, times: int) -> Callable[[Tensor], Tensor]:
    """`conv` with one weight, for `times` calls on inputs of a shape.

    On the CPU the weight is then brought into oneDNN's order once, not in each call. 128 -> 512 channels at 8x8: 2.8
    ms a call, 2.4 so.
    """
    pack = getattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", None)
    run = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
    if w.device.type != "cpu" or times < 3 or through_float(w) or w.dtype == torch.float64 or not pack or not run:
        return lambda x: conv(x, w)
    padding, one = [w.shape[-1] // 2] * 2, [1, 1]
    packed = pack(w.to_mkldnn(w.dtype), padding, one, one, 1, list(input_shape))
    return lambda x: run(x, packed, None, padding, one, one, 1, "none", [], "")


def conv_gradients(
    da: Tensor, x: Tensor, w: Tensor, need: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `conv` to x, w and bias from da (N,C_out,H,W), those that `need` asks for."""
    if through_float(x):
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


def through_float(x: Tensor) -> bool:
    """Whether the CPU lacks fast convolutions of x's 16-bit dtype: fp16 ones took 289 ms where fp32 ones take 3."""
    if x.device.type != "cpu" or x.dtype.itemsize != 2:
        return False
    if x.dtype == torch.bfloat16:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return not torch.ops.mkldnn._is_mkldnn_fp16_supported()


def joined(groups: list[Tensor | None] | tuple[Tensor | None, ...]) -> Tensor | None:
    """The tensors of G groups as one with an axis before: of a single group without a copy; None if the first is."""
    first = groups[0]
    if first is None:
        return None
    if len(groups) == 1:
        return first.unsqueeze(0)
    shape = (len(groups), *first.shape)
    into = empty_frames(first, *shape) if first.dim() > 2 else first.new_empty(shape)
    for slot, group in zip(into, groups, strict=True):
        slot.copy_(group)
    return into
