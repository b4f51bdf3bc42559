"""The metrics that need a trained network, which the user names by the path of a TorchScript file.

| metric | network | as in |
|---|---|---|
| fid | images uint8 (N,3,H,W) -> features (N,d) | the Inception of StyleGAN's `inception-2015-12-05.pt` |
| fvd | videos float (N,3,16,H,W) in [-1,1] -> features (N,d) | the I3D of StyleGAN-V's `i3d_torchscript.pt` |
| lpips | two images float (N,3,H,W) in [-1,1] -> distances (N) | `lpips.LPIPS`, scripted |

A TorchScript file is a program: load only files that you trust.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlv2v.errors import UserError, first_line
from rlv2v.metrics.base import FVD_FRAMES, Frame, metric

Name = Literal["fid", "fvd", "lpips"]


def load_networks(paths: Mapping[Name, Path]) -> dict[str, Any]:
    """Return the networks by the metric's name.

    Raises:
        UserError: no such file, or one that is not TorchScript.
    """
    networks: dict[str, Any] = {}
    for name, path in paths.items():
        if not path.is_file():
            raise UserError(f"--{name} {path}: expected a TorchScript file with the network's weights, found none")
        try:
            networks[name] = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"--{name} {path}: expected a TorchScript file, got {first_line(error)}") from None
    return networks


def run(frame: Frame, name: Name, *inputs: Tensor) -> np.ndarray:
    """Return what a network makes of its inputs. Raises UserError where it does not take them."""
    try:
        with torch.inference_mode():
            output: Tensor = frame.networks[name](*inputs)
        return output.flatten(1).double().numpy() if name != "lpips" else output.flatten().double().numpy()
    except (RuntimeError, AttributeError) as error:
        message = f"--{name}: the network does not take {[tuple(i.shape) for i in inputs]}: {first_line(error)}"
        raise UserError(message) from None


def signed(*images: np.ndarray) -> Tensor:
    """Return images (H,W,3) as float32 (N,3,H,W) in [-1,1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def frechet(own: np.ndarray, other: np.ndarray) -> float | None:
    """Return |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of features (N,d), (M,d); None for fewer than two."""
    if min(len(own), len(other)) < 2:
        return None
    (m_a, s_a), (m_b, s_b) = ((points.mean(axis=0), np.cov(points, rowvar=False)) for points in (own, other))
    s_a, s_b = np.atleast_2d(s_a), np.atleast_2d(s_b)
    cross = np.sqrt(np.linalg.eigvals(s_a @ s_b).real.clip(min=0)).sum()
    return float(((m_a - m_b) ** 2).sum() + np.trace(s_a) + np.trace(s_b) - 2 * cross)


@metric(
    "lower",
    "Frechet distance of the network's features of all frames to the target set's; needs hundreds of frames",
    formula="|m_o - m_z|^2 + tr(S_o + S_z - 2 (S_o S_z)^(1/2))",
    source="Heusel et al. 2017, arXiv:1706.08500",
    needs=["target", "fid"],
    digits=2,
    reduce=frechet,
    pooled=True,
)
def fid(frame: Frame) -> np.ndarray:
    """Return the features of the frame, (d,)."""
    return run(frame, "fid", torch.from_numpy(frame.image).permute(2, 0, 1)[None])[0]


@metric(
    "lower",
    "Frechet distance of the network's features of all runs of 16 frames to the target set's; needs hundreds of them",
    formula="|m_o - m_z|^2 + tr(S_o + S_z - 2 (S_o S_z)^(1/2))",
    source="Unterthiner et al. 2018, arXiv:1812.01717",
    needs=["target", "fvd"],
    digits=1,
    reduce=frechet,
    pooled=True,
)
def fvd(frame: Frame) -> np.ndarray | None:
    """Return the features of the last 16 frames, (d,); None but for every sixteenth frame."""
    if (frame.index + 1) % FVD_FRAMES:
        return None
    return run(frame, "fvd", signed(*frame.recent).transpose(0, 1)[None])[0]


@metric(
    "lower",
    "distance to the hidden truth in the network's features; copying the source does well where only colours differ",
    formula="d(o, y), mean over frames; d: the network",
    source="Zhang et al. 2018, arXiv:1801.03924",
    needs=["truth", "lpips"],
)
def lpips(frame: Frame) -> float:
    """Return the distance of o and y."""
    assert frame.scene.truth is not None
    return float(run(frame, "lpips", signed(frame.image), signed(frame.scene.truth))[0])
