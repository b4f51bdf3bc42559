"""A generator as graphs that play a video frame by frame without rlv2v: ONNX, and `torch.export`.

    start: small[, frame] -> translated, state          the first frame of a video, with the generator's burn-in
    step:  small[, frame], state -> translated, state   every later frame
`small` is the frame as the networks see it. `frame`, for a `GridTranslator` alone, is the frame at its own size, which
is then the size of `translated`. A graph holds what `rlv2v.method.translation.Stream` does, forgetting included, in
standard operators only.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils._pytree import tree_flatten, tree_flatten_with_path, tree_unflatten

from rlv2v.errors import UserError
from rlv2v.files import atomic_file
from rlv2v.model.conv_lstm import ConvLSTM
from rlv2v.model.frames import State, attributes_set
from rlv2v.model.generator import Generator
from rlv2v.model.grid import AROUND, GridTranslator
from rlv2v.model.networks import Translator
from rlv2v.model.norm import SequenceNorm

NAMES = ("start", "step")
SUFFIXES = (".onnx", ".pt2")
OPSET = 20
MIN_SMALL, MAX_SMALL = 2, 1024  # sides of `small`, in multiples; torch.export makes a side of 1 a constant
MAX_SIDE = 16384  # of `frame`, pixels


class StartGraph(nn.Module):
    """Translate the first frame of a video: small (1,3,h,w)[, frame (1,3,H,W)] -> translated, and the state's tensors.

    Frames are in [-1,1], h and w multiples of `multiple_of(g)`, at least two. horizon: as in `Generator.limit_state`.
    """

    def __init__(self, g: Generator, horizon: int) -> None:
        super().__init__()
        self.g, self.horizon = g, horizon

    def forward(self, *frames: Tensor) -> tuple[Tensor, ...]:
        translated, state = self.run(frames, None)
        return translated, *tree_flatten(state)[0]

    def run(self, frames: tuple[Tensor, ...], state: State) -> tuple[Tensor, State]:
        """Translate a frame from a state, as `Stream` does."""
        small = frames[0][:, None]
        if isinstance(self.g, GridTranslator):
            grids, state = self.g.decide(small, state)
            guide = self.g.guide(frames[1], grids.around[:, 0])
            translated = slice_by_bins(grids.grid[:, 0], guide, frames[1])
        else:
            video, state = self.g(small, state)
            translated = video[:, 0]
        return translated.clamp(-1, 1), self.g.limit_state(state, self.horizon)


class StepGraph(StartGraph):
    """Translate a later frame: the inputs of `StartGraph` and the state's tensors -> translated, and the new state.

    state: one of the generator's, for its structure.
    """

    def __init__(self, g: Generator, horizon: int, state: State) -> None:
        super().__init__(g, horizon)
        self.structure = tree_flatten(state)[1]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        num_frames = len(inputs) - self.structure.num_leaves
        state = tree_unflatten(inputs[num_frames:], self.structure)
        translated, state = self.run(inputs[:num_frames], state)
        return translated, *tree_flatten(state)[0]


def slice_by_bins(grid: Tensor, guide: Tensor, frames: Tensor) -> Tensor:
    """Return `rlv2v.kernels.bilateral.slice_apply` of the same arguments in operators that every runtime has fast.

        out = sum over bins b of hat(s - b) A_b (r, g, b, 1),  hat(u) = max(0, 1 - |u|)
    A_b is a bin's slice of the grid, scaled up bilinearly, and s the guide in bins, clamped.
    """
    bins = grid.shape[2]
    place = (guide * bins - 0.5).clamp(0, bins - 1)
    colours = torch.cat((frames, torch.ones_like(frames[:, :1])), 1)
    out = torch.zeros_like(frames)
    for number, plane in enumerate(grid.unbind(2)):
        transform = interpolate(plane, size=frames.shape[-2:], mode="bilinear", align_corners=False).unflatten(
            1, (3, 4)
        )
        hat = (1 - (place - number).abs()).clamp(min=0)
        out = out + hat[:, None] * (transform * colours[:, None]).sum(2)
    return out


def state_names(state: State) -> list[str]:
    """Return a name for each tensor of a state: `state_`, the number of its layer, and what it is, as `state_0_h`."""
    names = []
    for path, _ in tree_flatten_with_path(state)[0]:
        keys: list[Any] = list(path)  # the layer's number, perhaps that of its part, and the field of a named tuple
        names.append(f"state_{keys[0].idx}_{keys[-1].name}")
    assert len(set(names)) == len(names), names
    return names


def write_graphs(g: Generator, horizon: int, size: int, out: Path, about: Mapping[str, str] = {}) -> list[Path]:
    """Write `start` and `step` of a generator into a folder, as ONNX and as `torch.export`; return the files.

    Sides of frames are dynamic, the batch is 1. The files carry metadata: `size`, the short side of the crops that
    the generator was trained on, `multiple`, and what `about` adds.

    Raises:
        UserError: a package is missing, the generator is of another kind or was trained at less than two multiples, or
            the folder holds such files already.
        OSError: the folder cannot be written.
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export: {' and '.join(missing)} not installed; pip install 'rlv2v[export]'")
    if not isinstance(g, (GridTranslator, Translator)):
        raise UserError(f"export: expected a generator of --method rlv2v, got {type(g).__name__}, which cannot be one")
    multiple = multiple_of(g)
    if size < MIN_SMALL * multiple:
        raise UserError(f"export: expected a run of --size {MIN_SMALL * multiple} or more, got {size}")
    about = {"size": str(size), "multiple": str(multiple), **about}
    paths = [out / f"{name}{suffix}" for name in NAMES for suffix in SUFFIXES]
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: is there already; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(False), torch.no_grad(), quiet(), standard_operators(g):
        for name, program, inputs, outputs in trace(g, horizon):
            with atomic_file(out / f"{name}.pt2") as path:
                torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
            onnx = torch.onnx.export(
                program, input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False
            )
            assert onnx is not None
            onnx.model.metadata_props.update(about)
            with atomic_file(out / f"{name}.onnx") as path:
                onnx.save(path)
    return paths


def multiple_of(g: Generator) -> int:
    """Return what the sides of `small` are multiples of; cells of the luma around are then whole."""
    return max(g.multiple, *AROUND) if isinstance(g, GridTranslator) else g.multiple


def trace(g: Generator, horizon: int) -> Iterator[tuple[str, Any, list[str], list[str]]]:
    """Yield both graphs: name, exported program, and the names of its inputs and outputs."""
    side = torch.export.Dim
    rows, columns = side("rows", min=MIN_SMALL, max=MAX_SMALL), side("columns", min=MIN_SMALL, max=MAX_SMALL)
    tall, wide, multiple = 4, 6, multiple_of(g)  # of the example, in multiples
    frames = [torch.zeros(1, 3, tall * multiple, wide * multiple)]
    sides: list[Any] = [{2: multiple * rows, 3: multiple * columns}]
    if isinstance(g, GridTranslator):
        frames.append(torch.zeros(1, 3, 70, 110))
        sides.append({2: side("height", max=MAX_SIDE), 3: side("width", max=MAX_SIDE)})
    inputs = ["small", "frame"][: len(frames)]
    start = StartGraph(g, horizon).eval()
    _, state = start.run(tuple(frames), None)
    names, tensors = state_names(state), tree_flatten(state)[0]
    outputs = ["translated", *(f"next_{name}" for name in names)]

    def sides_of(tensor: Tensor) -> Any:
        scale = tensor.shape[2] // tall if tensor.dim() == 4 else 0
        return {2: scale * rows if scale > 1 else rows, 3: scale * columns if scale > 1 else columns} if scale else None

    yield "start", torch.export.export(start, tuple(frames), dynamic_shapes=(tuple(sides),)), inputs, outputs
    sides += [sides_of(tensor) for tensor in tensors]
    step = StepGraph(g, horizon, state).eval()
    program = torch.export.export(step, (*frames, *tensors), dynamic_shapes=(tuple(sides),))
    yield "step", program, inputs + names, outputs


def standard_operators(g: Generator) -> Any:
    """Return a context in which ConvLSTMs and normalisations run by their definition, which is plain torch."""
    layers = (layer for layer in g.modules() if isinstance(layer, (ConvLSTM, SequenceNorm)))
    return attributes_set((layer, "backend", "reference") for layer in layers)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what the exporter says about itself and about packages that it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)
