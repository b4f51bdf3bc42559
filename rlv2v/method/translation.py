"""Frames in, translated frames out: a generator runs over a stream of frames and carries its state along."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import chain
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.data.scaling import fit_size, resize, shrink
from rlv2v.errors import UserError
from rlv2v.kernels.bilateral import slice_apply_frame
from rlv2v.model import Generator, GridTranslator
from rlv2v.model.frames import State

NOT_FINITE = "translate: the model's output is not finite; its weights are damaged or its training diverged"


@torch.inference_mode()
def translate_chunk(g: Generator, config: Config, frames: np.ndarray, state: State = None) -> tuple[np.ndarray, State]:
    """Translate the next T frames of a video, uint8 (T,H,W,3) of any size; `state` None: the video starts here.

    Return frames of the same shape, and the state after them. Beyond the first `config.data.frames` frames the
    generator may forget (`Generator.limit_state`), frame by frame, so the result is the same however a video is cut
    into chunks.

    Raises:
        UserError: the output is NaN or infinite.
    """
    height, width = frames.shape[1:3]
    device = next(chain(g.parameters(), g.buffers())).device
    x = to_model(torch.from_numpy(np.ascontiguousarray(frames)).to(device))  # (T,3,H,W)
    x = pad(x, (0, -width % g.multiple, 0, -height % g.multiple), mode="replicate")
    num_first = config.data.frames if state is None else 1
    translated = []
    for chunk in (x[:num_first], *x[num_first:, None]):
        video, state = g(chunk[None], state)
        state = g.limit_state(state, config.data.frames)
        translated.append(video[0])
    y = torch.cat(translated)
    if not torch.isfinite(y).all():
        raise UserError(NOT_FINITE)
    return to_uint8(y[..., :height, :width]).cpu().numpy(), state


def translate_clip(g: Generator, config: Config, frames: np.ndarray) -> np.ndarray:
    """Translate a complete clip, uint8 (T,H,W,3) -> the same shape; see `translate_chunk`."""
    return translate_chunk(g, config, frames)[0]


class Stream:
    """Translate a video frame by frame, with the recurrent state carried along and one frame in memory.

    size: the short side in pixels that the model sees; None: that of its training crops, or the video's own where the
    generator takes any size; 0: the video's own.  aspect: how many times as wide as high the frames' pixels are; the
    model sees square ones, as in training.
    """

    def __init__(self, g: Generator, config: Config, size: int | None = None, aspect: Fraction = Fraction(1)) -> None:
        default = 0 if g.any_size else config.data.size.short_side
        self.g, self.config, self.size = g, config, default if size is None else size
        self.aspect = aspect
        self.state: State = None

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Return the translation of the next frame, uint8 (H,W,3) as the frame."""
        height, width = frame.shape[:2]
        if isinstance(self.g, GridTranslator):
            return self.transform(self.g, frame)
        wide = round(width * self.aspect)  # in square pixels
        clip = resize(frame, *fit_size(wide, height, self.size or min(height, wide)))[None]
        translated, self.state = translate_chunk(self.g, self.config, clip, self.state)
        output: np.ndarray = translated[0]
        if output.shape != frame.shape:
            method = cv2.INTER_AREA if len(output) > height else cv2.INTER_CUBIC
            output = cv2.resize(output, (width, height), interpolation=method)
        return output

    def snapshot(self) -> list[Any]:
        """Return a copy of what the next frames' translation depends on, on the CPU; `restore` takes it."""
        return [leaf.cpu().clone() if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(self.state)]

    def restore(self, snapshot: Sequence[Any], first: np.ndarray) -> None:
        """Go on from a snapshot of another stream of this video, whose first frame tells the form of the state.

        Raises:
            ValueError: the state of this model has another form.
        """
        self(first)
        leaves, form = tree_flatten(self.state)
        if [shape_of(leaf) for leaf in leaves] != [shape_of(leaf) for leaf in snapshot]:
            raise ValueError("Stream.restore: a snapshot of another model or another size of frame")
        devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
        moved = [leaf if device is None else leaf.to(device) for leaf, device in zip(snapshot, devices, strict=True)]
        self.state = tree_unflatten(moved, form)

    @torch.inference_mode()
    def transform(self, g: GridTranslator, frame: np.ndarray) -> np.ndarray:
        """Translate a frame at its own size, by the grid that the generator reads off the frame made small.

        The small frame's sides are the nearest multiples of `g.multiple`, so that the grid ends where the frame does.
        """
        height, width = frame.shape[:2]
        wide = round(width * self.aspect)  # in square pixels
        scale = (self.size or min(height, wide)) / min(height, wide)
        rows, columns = (max(1, round(side * scale / g.multiple)) * g.multiple for side in (height, wide))
        frame = np.require(frame, np.uint8, ("C", "W"))  # what torch takes without a copy
        small = torch.from_numpy(shrink(frame, columns, rows))
        device = g.guide.weight.device
        grids, self.state = g.decide(to_model(small.to(device))[None, None], self.state)
        self.state = g.limit_state(self.state, self.config.data.frames)
        grid = grids.grid
        if not torch.isfinite(grid).all():
            raise UserError(NOT_FINITE)
        whole = torch.from_numpy(frame)
        if device.type == "cpu":
            return slice_apply_frame(whole, grid[0, 0], g.guide.curve, grids.around[0, 0]).numpy()
        return to_uint8(g.transform(grids, to_model(whole.to(device))[None, None]))[0, 0].cpu().numpy()


def shape_of(leaf: Any) -> Any:
    """Return the shape and dtype of a tensor, and the type of what is none."""
    return (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else type(leaf)
