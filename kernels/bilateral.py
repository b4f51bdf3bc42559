"""A bilateral grid of colour transforms: sliced by place and guide, and applied to each pixel.

    A(x, y) = the trilinear interpolation of grid at (guide(x, y), y, x), 3 x 4;    out = A (r, g, b, 1)
A small network may so decide at low resolution what happens to the pixels of a large frame, whose edges stay where they
are. Source: Gharbi et al. 2017, arXiv:1707.02880 (HDRNet), sections 3.3 and 3.4; the grid is that of Chen et al. 2007.

`slice_apply` is one torch.library operator with gradients; `slice_apply_frame` takes a frame of bytes to another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from rlv2v import _native
from rlv2v.kernels.autograd import register_autograd
from rlv2v.kernels.layout import address
from rlv2v.kernels.triton import slices

COEFFICIENTS = 12
MAX_BINS: int = _native.max_bins
MAX_AROUND: int = _native.max_around
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("reference", "cpu", "triton")

LIBRARY = torch.library.Library("rlv2v", "FRAGMENT")
LIBRARY.define("slice_apply(Tensor grid, Tensor guide, Tensor frames, str backend) -> Tensor")
LIBRARY.define(
    "slice_apply_backward(Tensor grid, Tensor guide, Tensor frames, Tensor d_out, str backend, bool[] need)"
    " -> (Tensor, Tensor, Tensor)"
)


def slice_apply(grid: Tensor, guide: Tensor, frames: Tensor, *, backend: str = "auto") -> Tensor:
    """Slice a bilateral grid of colour transforms by a guide, and apply it to frames.

        u = clamp((x + 1/2) w / W - 1/2, 0, w-1);  v the same of y, h, H;  s = clamp(guide bins - 1/2, 0, bins-1)
        out_c = sum_k A_ck frames_k + A_c3,  A_ck = grid[4 c + k] interpolated trilinearly at (s, v, u)
    Source: Gharbi et al. 2017, arXiv:1707.02880, sections 3.3 and 3.4. Places are those of `grid_sample` without
    align_corners and with padding by the border. The guide has no gradient beyond the middle of the first or last bin.

    Takes float64, float32, bfloat16 or float16, all arguments of one dtype; sums are float32 for 16 bits. No tensor of
    coefficients is made but by the reference.

    Args:
        grid: (B,12,bins,h,w), 1 to 8 bins: of output channel c and input k at 4 c + k; k = 3 is the constant.
        guide: (B,H,W), of any size; 0 to 1 are the ends of the first and the last bin.
        frames: (B,3,H,W).
        backend: "auto", or "reference" (PyTorch), "cpu" (C++: AVX-512, AVX2 or portable), "triton" (a GPU).

    Returns:
        The transformed frames (B,3,H,W).

    Raises:
        ValueError: a shape, dtype or device that does not fit, or a backend that is unknown or cannot run this.
    """
    check_arguments(grid, guide, frames)
    backend = choose_backend(backend, frames)
    if backend == "reference":
        return slice_apply_ref(grid, guide, frames)
    result: Tensor = torch.ops.rlv2v.slice_apply(grid, guide, frames, backend)
    return result


def slice_apply_frame(frame: Tensor, grid: Tensor, curve: Tensor, around: Tensor | None = None) -> Tensor:
    """Apply a grid to a frame of bytes on the CPU, with a guide that is made of the frame's colours, and of planes.

        p = frame / 127.5 - 1;  q = around, interpolated bilinearly at the pixel, by the places of `slice_apply`
        guide = c_0 . (p, q, 1) + sum_{j > 0} f_j max(0, c_j . (p, q, 1));  row j of curve is (c_j, f_j)
        result = round(127.5 (clamp(out, -1, 1) + 1)),  out as `slice_apply` gives
    So the guide is a two-layer network of each pixel. Nothing of the frame's size is made but the result.

    Args:
        frame: uint8 (H,W,3).
        grid: float32 (12,bins,h,w), 1 to 8 bins.
        curve: float32 (1+J,5+K); f_0 is not used.
        around: float32 (K,h',w'), up to 4 planes; None for K = 0.

    Returns:
        uint8 (H,W,3).

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    expected: dict[str, tuple[Tensor, torch.dtype, int, str]] = {
        "frame": (frame, torch.uint8, 3, "(H,W,3)"),
        "grid": (grid, torch.float32, 4, "(12,bins,h,w)"),
        "curve": (curve, torch.float32, 2, "(1+J,5+K)"),
    }
    if around is not None:
        expected["around"] = (around, torch.float32, 3, "(K,h',w')")
    for name, (tensor, dtype, rank, shape) in expected.items():
        if tensor.dtype != dtype or tensor.dim() != rank or tensor.device.type != "cpu" or not tensor.numel():
            raise ValueError(f"slice_apply_frame: {name} must be {dtype} {shape} on the CPU, got {describe(tensor)}")
    num_around = 0 if around is None else len(around)
    fits = frame.shape[2] == 3 and grid.shape[0] == COEFFICIENTS and grid.shape[1] <= MAX_BINS
    if not fits or num_around > MAX_AROUND or curve.shape[1] != 5 + num_around:
        got = ", ".join(f"{name} {tuple(tensor.shape)}" for name, (tensor, *_) in expected.items())
        raise ValueError(
            f"slice_apply_frame: expected (H,W,3), (12,1 to {MAX_BINS},h,w), (1+J,5+K) and K up to {MAX_AROUND} planes "
            f"around, got {got}"
        )
    frame, grid, curve = frame.contiguous(), grid.detach().contiguous(), curve.detach().contiguous()
    around = None if around is None else around.detach().contiguous()
    out = torch.empty_like(frame)
    sizes, around_sizes = (1, *grid.shape[1:], *frame.shape[:2]), (0, 0, 0) if around is None else tuple(around.shape)
    inputs = (address(grid), address(curve), len(curve), address(around), around_sizes, address(frame))
    _native.slice_frame(sizes, *inputs, address(out), torch.get_num_threads())
    return out


def slice_apply_ref(grid: Tensor, guide: Tensor, frames: Tensor) -> Tensor:
    """Return `slice_apply` by PyTorch's trilinear `grid_sample`: the definition that the others are held to."""
    *_, height, width = frames.shape
    y, x = ((2 * torch.arange(size, dtype=guide.dtype, device=guide.device) + 1) / size - 1 for size in (height, width))
    places = torch.stack(torch.broadcast_tensors(x[None, None], y[None, :, None], 2 * guide - 1), -1)
    sampled = grid_sample(grid, places[:, None], mode="bilinear", padding_mode="border", align_corners=False)
    a = sampled[:, :, 0].unflatten(1, (3, 4))
    return torch.einsum("bckhw,bkhw->bchw", a[:, :, :3], frames) + a[:, :, 3]


def describe(tensor: Tensor) -> str:
    """Return dtype, shape and device of a tensor."""
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"


def check_arguments(grid: Tensor, guide: Tensor, frames: Tensor) -> None:
    """Raise ValueError for the first argument that does not fit the frames."""
    if frames.dtype not in DTYPES or frames.dim() != 4 or frames.shape[1] != 3 or min(frames.shape[2:]) < 1:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise ValueError(f"slice_apply: frames must be (B,3,H,W) of one of {names}, got {describe(frames)}")
    batch, _, height, width = frames.shape
    fits = grid.dim() == 5 and grid.shape[:2] == (batch, COEFFICIENTS) and min(grid.shape[2:]) >= 1
    if not fits or grid.shape[2] > MAX_BINS:
        raise ValueError(
            f"slice_apply: grid must be ({batch},{COEFFICIENTS},bins,h,w) with 1 to {MAX_BINS} bins, "
            f"got {tuple(grid.shape)}"
        )
    if guide.shape != (batch, height, width):
        raise ValueError(f"slice_apply: guide must be {(batch, height, width)}, got {tuple(guide.shape)}")
    for name, tensor in (("grid", grid), ("guide", guide)):
        if tensor.dtype != frames.dtype or tensor.device != frames.device:
            raise ValueError(
                f"slice_apply: {name} must be {frames.dtype} on {frames.device} like frames, got {describe(tensor)}"
            )


def unsupported_reason(backend: str, frames: Tensor) -> str | None:
    """Return why a backend cannot run on such frames, or None if it can."""
    if backend == "reference":
        return None
    if frames.dtype == torch.float64:
        return "it computes in float32 at most, frames are torch.float64"
    if backend == "cpu":
        return None if frames.device.type == "cpu" else f"it runs on the CPU, frames are on {frames.device}"
    return slices.unavailable_reason(frames.device)


def choose_backend(backend: str, frames: Tensor) -> str:
    """Return the backend to run: the one named, or for "auto" the fastest that can; ValueError if it cannot."""
    if backend == "auto":
        fast = "triton" if frames.device.type == "cuda" else "cpu"
        return fast if unsupported_reason(fast, frames) is None else "reference"
    if backend not in BACKENDS:
        raise ValueError(f"slice_apply: backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}")
    if reason := unsupported_reason(backend, frames):
        raise ValueError(f"slice_apply: backend {backend!r} cannot run this: {reason}")
    return backend


def sizes_of(grid: Tensor, frames: Tensor) -> tuple[int, ...]:
    """Return batch, bins, grid height and width, height and width."""
    return len(frames), *grid.shape[2:], *frames.shape[2:]


def forward(grid: Tensor, guide: Tensor, frames: Tensor, backend: str) -> Tensor:
    """Run `rlv2v::slice_apply`."""
    if backend == "triton":
        return slices.forward(grid.contiguous(), guide.contiguous(), frames.contiguous())
    wide = [tensor.float().contiguous() for tensor in (grid, guide, frames)]
    out = torch.empty_like(wide[2])
    _native.slice_forward(sizes_of(grid, frames), *map(address, (*wide, out)), torch.get_num_threads())
    return out.to(frames.dtype)


def backward(
    grid: Tensor, guide: Tensor, frames: Tensor, d_out: Tensor, backend: str, need: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run `rlv2v::slice_apply_backward`; a gradient that is not needed is empty."""
    if backend == "triton":
        gradients = slices.backward(
            grid.contiguous(), guide.contiguous(), frames.contiguous(), d_out.contiguous(), need
        )
    else:
        wide = [tensor.float().contiguous() for tensor in (grid, guide, frames, d_out)]
        d_wide = [torch.empty_like(tensor) if needed else None for tensor, needed in zip(wide, need, strict=False)]
        addresses = [address(tensor) for tensor in (*wide, *d_wide)]
        _native.slice_backward(sizes_of(grid, frames), *addresses, torch.get_num_threads())
        gradients = [None if gradient is None else gradient.to(frames.dtype) for gradient in d_wide]
    d_grid, d_guide, d_frames = (frames.new_empty(0) if gradient is None else gradient for gradient in gradients)
    return d_grid, d_guide, d_frames


def forward_fake(grid: Tensor, guide: Tensor, frames: Tensor, backend: str) -> Tensor:
    return frames.new_empty(frames.shape)


def backward_fake(
    grid: Tensor, guide: Tensor, frames: Tensor, d_out: Tensor, backend: str, need: list[bool]
) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape if needed else 0) for t, needed in zip((grid, guide, frames), need, strict=True))


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def differentiate(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    need = list(ctx.needs_input_grad[:3])
    gradients = torch.ops.rlv2v.slice_apply_backward(*ctx.saved_tensors, d_out, ctx.backend, need)
    return *(g if needed else None for g, needed in zip(gradients, need, strict=True)), None


def save_backend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.backend = inputs[-2]


def no_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise ValueError(f"slice_apply: backend must be 'reference' for a second derivative, got {ctx.backend!r}")


LIBRARY.impl("slice_apply", forward, "CompositeExplicitAutograd")
LIBRARY.impl("slice_apply_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("rlv2v::slice_apply", forward_fake, lib=LIBRARY)
torch.library.register_fake("rlv2v::slice_apply_backward", backward_fake, lib=LIBRARY)
register_autograd(LIBRARY, "slice_apply", differentiate, setup_context)
register_autograd(LIBRARY, "slice_apply_backward", no_second_derivative, save_backend)
