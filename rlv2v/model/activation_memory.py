"""What a network stores during a training run for its backward pass: `memory` of `Translator` and `Discriminator`.

    store      everything
    recompute  everything but the gates of the ConvLSTMs, which are computed again
    frames     the state after every few frames; the backward pass runs the frames between again (Chen et al. 2016,
               arXiv:1604.06174, applied along time)
Outputs and gradients are the same, to rounding. Without gradients there is no difference.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint

from rlv2v.model.conv_lstm import ConvLSTM
from rlv2v.model.frames import RunMode, State, attributes_set, frame_major, map_state
from rlv2v.model.norm import SequenceNorm

MEMORY = ("store", "recompute", "frames")
CHUNK = 8  # frames that are run again at once; docs/memory.md has the figures
Forward = TypeVar("Forward", bound=Callable[..., tuple[Any, ...]])


def set_memory(net: nn.Module, memory: str) -> None:
    """Choose what a network stores, among `MEMORY`."""
    if memory not in MEMORY:
        raise ValueError(f"{type(net).__name__}: memory must be one of {list(MEMORY)}, got {memory!r}")
    net.memory = memory  # type: ignore[assignment]
    for layer in net.modules():
        if isinstance(layer, ConvLSTM):
            layer.recompute = memory == "recompute"


def in_chunks(forward: Forward) -> Forward:
    """Decorate a network's forward, so that it runs in chunks of `CHUNK` frames where `memory` is "frames".

    `forward(net, x, state, **mode)` takes x (B,T,3,H,W) and returns videos (B,T,...) or None, and last a state.
    """

    @wraps(forward)
    def wrapped(net: nn.Module, x: Tensor, state: State = None, **mode: Unpack[RunMode]) -> tuple[Any, ...]:
        if net.memory == "frames" and torch.is_grad_enabled():
            return run_in_chunks(forward, net, x, state, mode)
        return forward(net, x, state, **mode)

    return cast(Forward, wrapped)


def run_in_chunks(
    forward: Callable[..., tuple[Any, ...]], net: nn.Module, x: Tensor, state: State, mode: RunMode
) -> tuple[Any, ...]:
    """Return `forward(net, x, state, **mode)`, run under `checkpoint` in chunks of `CHUNK` frames."""
    all_states, one_step_from_each = mode.get("all_states"), mode.get("one_step_from_each")
    attributes = forward_attributes(net)

    def run_chunk(frames: Tensor, spec: Any, *tensors: Any) -> tuple[Any, ...]:
        with attributes_set(attributes):
            *videos, states = forward(net, frames, tree_unflatten(tensors, spec), **mode)
        # Cloned: a view would hold on to the states after all frames of the chunk.
        last = map_state(lambda s: (s[:, -1] if all_states else s).clone(), states)
        return *videos, states if all_states else None, last

    outputs = []
    for start in range(0, x.shape[1], CHUNK):
        chunk = slice(start, start + CHUNK)
        first = map_state(lambda s, chunk=chunk: s[:, chunk], state) if one_step_from_each else state
        # `checkpoint` saves tensors that are arguments of their own, as autograd saves tensors.
        tensors, spec = tree_flatten(first)
        *output, last = checkpoint(
            run_chunk, x[:, chunk], spec, *tensors, use_reentrant=False, preserve_rng_state=False
        )
        outputs.append(output)
        state = state if one_step_from_each else last
    *videos, states = tree_map(cat_time, *outputs)
    if one_step_from_each:
        return *videos, None
    return *videos, states if all_states else state


def cat_time(*chunks: Tensor | None) -> Tensor | None:
    """Concatenate (B,T_n,...) along T; in memory T comes before B, as the networks have it."""
    present = [chunk for chunk in chunks if chunk is not None]
    if len(present) < 2:
        return chunks[0]
    frames = torch.cat([frame_major(chunk) for chunk in present])
    return frames.unflatten(0, (-1, len(present[0]))).transpose(0, 1)


def forward_attributes(net: nn.Module) -> list[tuple[Any, str, Any]]:
    """Return the attributes that a run of `net` depends on, with the values for a run of a chunk.

    The backward pass runs a chunk again. By then a frozen critic may be trainable and `stats_over` may be over.
    """
    attributes: list[tuple[Any, str, Any]] = [
        (weight, "requires_grad", weight.requires_grad) for weight in net.parameters()
    ]
    norms = (norm for norm in net.modules() if isinstance(norm, SequenceNorm))
    return attributes + [(norm, "scope", norm.scope) for norm in norms]
