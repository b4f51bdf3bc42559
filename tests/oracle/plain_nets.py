"""The networks of RL-V2V-GAN in plain eager PyTorch, operations of torch only, for the twin in `plain_step`.

The same functions of the same weights as `rlv2v.model`, which `load` copies over, written as they are usually found: a
ConvLSTM is one convolution of [x, h] a frame in a Python loop, frames are (B,T,C,H,W) contiguous, and there is no state
to pass on: a network maps a whole video. The normalisation is causal, as the method's is (reading 11).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rlv2v.config import Config

SLOPE = 0.2
NETS = ("g_x", "g_y", "p_x", "p_y", "d_x", "d_y", "q_x", "q_y")


def per_frame(op: Callable[..., Tensor], x: Tensor, *args: object) -> Tensor:
    """Apply an operation on (N,C,H,W) to every frame of (B,T,C,H,W)."""
    return op(x.flatten(0, 1), *args).unflatten(0, x.shape[:2])


def cut(y: Tensor, quiet: int) -> Tensor:
    """Return y (B,T,...) such that no gradient goes through the first `quiet` frames."""
    return torch.cat((y[:, :quiet].detach(), y[:, quiet:]), 1) if quiet else y


class ConvLSTM(nn.Module):
    """Compute i, f, o, g = conv([x_t, h_{t-1}]);  c_t = f c_{t-1} + i g;  h_t = o tanh(c_t)."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.c_out = c_out
        self.conv = nn.Conv2d(c_in + c_out, 4 * c_out, 3, padding=1)

    def forward(self, x: Tensor, quiet: int = 0) -> Tensor:
        batch, steps, _, height, width = x.shape
        h = c = x.new_zeros(batch, self.c_out, height, width)
        outputs = []
        for t in range(steps):
            if t == quiet:
                h, c = h.detach(), c.detach()
            i, f, o, g = self.conv(torch.cat((x[:, t], h), 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, 1)


class SequenceNorm(nn.Module):
    """Compute (x - mean) / sqrt(var + eps) * weight + bias, over all pixels of each clip's frames so far."""

    def __init__(self, channels: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[None, :, None]
        mean = x.mean((3, 4)).cumsum(1) / count
        variance = (x.square().mean((3, 4)).cumsum(1) / count - mean.square()).clamp(min=0)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return x * scale[..., None, None] + (self.bias - mean * scale)[..., None, None]


class Residual(nn.Module):
    """Compute R: LeakyReLU(ConvLSTM(x) + skip(x))."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.convlstm = ConvLSTM(c_in, c_out)
        self.skip = nn.Conv2d(c_in, c_out, 1, bias=False) if c_in != c_out else None

    def forward(self, x: Tensor, quiet: int = 0) -> Tensor:
        skipped = x if self.skip is None else per_frame(self.skip, x)
        return cut(F.leaky_relu(self.convlstm(x, quiet) + skipped, SLOPE), quiet)


class RPB(nn.Module):
    """Apply R, average pooling, normalisation; return R's output too, for the skip."""

    def __init__(self, c_in: int, c_out: int, norm: str) -> None:
        super().__init__()
        self.residual = Residual(c_in, c_out)
        self.norm = SequenceNorm(c_out) if norm == "clip" else nn.Identity()

    def forward(self, x: Tensor, quiet: int = 0) -> tuple[Tensor, Tensor]:
        y = self.residual(x, quiet)
        return cut(self.norm(per_frame(F.avg_pool2d, y, [min(2, n) for n in y.shape[-2:]])), quiet), y


class URB(nn.Module):
    """Apply upsampling, R over [upsampled, skip], normalisation."""

    def __init__(self, c_in: int, c_skip: int, c_out: int, norm: str) -> None:
        super().__init__()
        self.residual = Residual(c_in + c_skip, c_out)
        self.norm = SequenceNorm(c_out) if norm == "clip" else nn.Identity()

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.norm(self.residual(torch.cat((per_frame(F.interpolate, x, skip.shape[-2:]), skip), 2)))


class Translator(nn.Module):
    """Translate a video, as G or P: (B,T,3,H,W) -> the same, and the copy mask (B,T,1,H,W) of a mask head."""

    mask_gain: Tensor

    def __init__(self, widths: Sequence[int], *, patch: int, head: str, norm: str) -> None:
        super().__init__()
        self.patch, self.head = patch, head
        ins = [3 * patch**2, *widths[:-1]]
        self.encoder = nn.ModuleList(RPB(a, b, norm) for a, b in zip(ins, widths, strict=True))
        outs = [*reversed(widths[:-1]), widths[0]]
        entering = zip([widths[-1], *outs[:-1]], reversed(widths), outs, strict=True)
        self.decoder = nn.ModuleList(URB(*entry, norm) for entry in entering)
        self.register_buffer("mask_gain", torch.ones(()))
        self.last = ConvLSTM(widths[0], 4 * patch**2 if head == "mask" else 3)
        self.fuse = nn.Conv2d(7, 16, 3, padding=1) if head == "mask" else None
        self.to_rgbm = nn.Conv2d(16, 4, 1) if head == "mask" else None

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, skips = per_frame(F.pixel_unshuffle, x, self.patch), []
        for block in self.encoder:
            y, skip = block(y)
            skips.append(skip)
        for block in self.decoder:
            y = block(y, skips.pop())
        y = self.last(y)
        if self.fuse is None or self.to_rgbm is None:
            return (y if self.head == "letter" else torch.tanh(4 * y)), None
        y = torch.cat((per_frame(F.pixel_shuffle, y, self.patch), x), 2)
        rgb, mask = per_frame(self.to_rgbm, F.leaky_relu(per_frame(self.fuse, y), SLOPE)).split((3, 1), 2)
        mask = self.mask_gain * torch.sigmoid(mask)
        return mask * x + (1 - mask) * torch.tanh(rgb), mask


class GridTranslator(nn.Module):
    """Translate a video by a bilateral grid: encoder, ConvLSTM, y = A x + b, A and b by place and guide."""

    def __init__(self, widths: Sequence[int], *, patch: int, bins: int, norm: str, chrono: bool) -> None:
        super().__init__()
        self.patch, self.bins, self.chrono = patch, bins, chrono
        ins = [3 * patch**2, *widths[:-1]]
        self.encoder = nn.ModuleList(RPB(a, b, norm) for a, b in zip(ins, widths, strict=True))
        self.last = ConvLSTM(widths[-1] + 2, 16)
        self.to_whole, self.to_local = nn.Linear(16, 12 * bins), nn.Conv2d(16, 12 * bins, 1)
        self.guide = nn.ParameterDict({"weight": torch.zeros(8, 5), "bias": torch.zeros(8), "factor": torch.zeros(8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)[0]

    def run(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the translation, and the two parts of the grid, the whole one and the local one."""
        quiet = 0 if self.chrono else 6  # frames of burn-in
        seen = torch.cat((x[:, :1].expand(-1, quiet, -1, -1, -1), x), 1)
        y = per_frame(F.pixel_unshuffle, seen, self.patch)
        for block in self.encoder:
            y, _ = block(y, quiet)
        rows, columns = ((2 * torch.arange(n, device=x.device) + 1) / n - 1 for n in y.shape[-2:])
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij")).to(y.dtype).expand(*y.shape[:2], -1, -1, -1)
        y = self.last(torch.cat((y, places), 2), quiet)[:, quiet:]
        whole = self.to_whole(y.mean((3, 4))).unflatten(2, (12, self.bins))[..., None, None]
        local = 0.3 * per_frame(self.to_local, y).unflatten(2, (12, self.bins))
        identity = torch.eye(3, 4, dtype=x.dtype, device=x.device).reshape(12, 1, 1, 1)
        frames, grid = x.flatten(0, 1), (identity + whole + local).flatten(0, 1)
        luma = torch.tensor((0.299, 0.587, 0.114)).to(x)  # float32 numbers, as the weights are
        grey = (luma[:, None, None] * frames).sum(1, keepdim=True)
        cells = [F.adaptive_avg_pool2d(grey, (-(-x.shape[3] // size), -(-x.shape[4] // size))) for size in (4, 16)]
        for size in (cells[0].shape[-2:], x.shape[-2:]):  # means over 16 pixels by way of the places of those over 4
            cells = [F.interpolate(c, tuple(size), mode="bilinear", align_corners=False) for c in cells]
        seen = torch.cat((frames, *cells), 1)
        hidden = torch.einsum("nchw,jc->njhw", seen, self.guide["weight"]) + self.guide["bias"][:, None, None]
        guide = grey[:, 0] / 2 + 0.5
        guide = guide + (self.guide["factor"][:, None, None] * hidden.relu()).sum(1)
        height, width = x.shape[-2:]
        sides = ((2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in (height, width))
        v, u = torch.meshgrid(*sides, indexing="ij")
        at = torch.stack((u.to(x).expand_as(guide), v.to(x).expand_as(guide), 2 * guide - 1), -1)
        a = F.grid_sample(grid, at[:, None], padding_mode="border", align_corners=False)[:, :, 0]
        a = a.unflatten(1, (3, 4))
        y = (a[:, :, :3] * frames[:, None]).sum(2) + a[:, :, 3]
        return y.unflatten(0, x.shape[:2]), (whole, local)


class Discriminator(nn.Module):
    """Score every prefix of a video, as D or Q: (B,T,3,H,W) -> (B,T,heads), entry t of the prefix x[1:t]."""

    def __init__(self, widths: Sequence[int], *, heads: int, patch: int, norm: str, positive: bool = False) -> None:
        super().__init__()
        self.patch, self.positive = patch, positive
        ins, norms = [3 * patch**2, *widths[:-1]], [norm] * (len(widths) - 1) + ["none"]
        self.blocks = nn.ModuleList(RPB(*block) for block in zip(ins, widths, norms, strict=True))
        self.hidden, self.out = nn.Linear(widths[-1], widths[-1]), nn.Linear(widths[-1], heads)

    def forward(self, x: Tensor) -> Tensor:
        y = per_frame(F.pixel_unshuffle, x, self.patch)
        for block in self.blocks:
            y, _ = block(y)
        y = self.out(F.leaky_relu(self.hidden(y.mean((3, 4))), SLOPE))
        return y.relu() if self.positive else y


class Nets(nn.Module):
    """Hold the eight networks, by the paper's names."""

    g_x: Translator | GridTranslator
    g_y: Translator | GridTranslator
    p_x: Translator
    p_y: Translator
    d_x: Discriminator
    d_y: Discriminator
    q_x: Discriminator
    q_y: Discriminator

    def __init__(self, config: Config) -> None:
        super().__init__()
        assert "batch" not in (config.model.norm, config.model.disc_norm), (
            "its statistics depend on what is run together"
        )
        model = config.model
        shared: dict[str, Any] = {"patch": model.patch, "norm": model.norm}
        for name in NETS[:4]:
            if name.startswith("g") and model.head == "grid":
                setattr(self, name, GridTranslator(model.widths, bins=model.bins, chrono=model.chrono, **shared))
            else:
                head = "mask" if model.head == "grid" else model.head
                setattr(self, name, Translator(model.widths, head=head, **shared))
        for name in NETS[4:]:
            heads, positive = 2 if name == "d_y" else 1, config.model.q_positive and name.startswith("q")
            shared = {"patch": model.patch, "norm": model.disc_norm}
            setattr(self, name, Discriminator(config.model.disc_widths, heads=heads, positive=positive, **shared))


def plain_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of rlv2v's `Nets` under the names, and in the shapes, that they have in this one."""
    plain = {}
    for name, value in state.items():
        if name.endswith(".w_x"):
            stem = name.removesuffix("w_x")
            plain[f"{stem}conv.weight"] = torch.cat((value, state[f"{stem}w_h"]), 1).contiguous()
            plain[f"{stem}conv.bias"] = state[f"{stem}bias"]
        elif name.endswith("residual.skip"):
            plain[f"{name}.weight"] = value
        elif not name.endswith((".w_h", "guide.luma")) and f"{name.removesuffix('bias')}w_x" not in state:
            plain[name] = value
    return plain
