"""What a network keeps of a training run for its backward: `memory` of `Translator` and `Discriminator`.

    store      everything
    recompute  everything but the gates of the ConvLSTMs, which are computed again
    frames     the state after every few frames, from which they are run again when their gradient is wanted: Chen et
               al. 2016, arXiv:1604.06174, along time
Outputs, gradients and running averages are the same, to rounding. Without gradients there is no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlv2v.model.blocks import RPB, URB
from rlv2v.model.conv_lstm import ConvLSTM
from rlv2v.model.frames import State, frame_major, map_state
from rlv2v.model.norm import SequenceNorm

MEMORY = ("store", "recompute", "frames")
PART = 8  # frames that are run again at once; docs/memory.md has the figures
Setting = tuple[Any, str, Any]  # object, attribute, value


def set_memory(net: nn.Module, memory: str) -> None:
    """Choose what a network keeps, among `MEMORY`."""
    if memory not in MEMORY:
        raise ValueError(f"{type(net).__name__}: memory must be one of {list(MEMORY)}, got {memory!r}")
    net.memory = memory  # type: ignore[assignment]
    for layer in net.modules():
        if isinstance(layer, ConvLSTM):
            layer.recompute = memory == "recompute"


def run_keeping(
    net: nn.Module,
    run: Callable[..., tuple[Any, ...]],
    x: Tensor,
    state: State,
    *,
    all_states: bool = False,
    one_step_from_each: bool = False,
) -> tuple[Any, ...]:
    """`run(x, state, all_states=all_states, one_step_from_each=one_step_from_each)`, which is all of `net`, in
    parts where its memory says so."""
    if net.memory == "frames" and torch.is_grad_enabled():
        return in_parts(
            net, run, x, state, num_frames=PART, all_states=all_states, one_step_from_each=one_step_from_each
        )
    return run(x, state, all_states=all_states, one_step_from_each=one_step_from_each)


def in_parts(
    net: nn.Module,
    run: Callable[..., tuple[Any, ...]],
    x: Tensor,
    state: State,
    *,
    num_frames: int,
    all_states: bool = False,
    one_step_from_each: bool = False,
) -> tuple[Any, ...]:
    """`run(x, state, all_states=all_states, one_step_from_each=one_step_from_each)`, which is `net`'s, under `checkpoint`, `num_frames` frames at a time.

    x (B,T,3,H,W); `run` gives videos (B,T,...) or None, and last a state. Values, gradients and running averages are
    the same, to rounding.
    """
    settings, nothing = conditions(net), x.new_empty(0)

    def part(frames: Tensor, form: State, *tensors: Tensor) -> tuple[Any, ...]:
        given = iter(tensors)
        with under(settings):
            *videos, after = run(
                frames,
                map_state(lambda _: next(given), form),
                all_states=all_states,
                one_step_from_each=one_step_from_each,
            )
        # Copied: a view would keep the states after all frames of the part.
        last = map_state(lambda s: (s[:, -1] if all_states else s).clone(), after)
        return *videos, after if all_states else None, last

    parts = []
    for first in range(0, x.shape[1], num_frames):
        here = slice(first, first + num_frames)
        before = map_state(lambda s, here=here: s[:, here], state) if one_step_from_each else state
        tensors: list[Tensor] = []
        map_state(tensors.append, before)  # one by one, which `checkpoint` saves as autograd saves tensors
        form = map_state(lambda _: nothing, before)
        *found, last = checkpoint(part, x[:, here], form, *tensors, use_reentrant=False, preserve_rng_state=False)
        parts.append(found)
        state = state if one_step_from_each else last
    *videos, states = (joined(list(pieces)) for pieces in zip(*parts, strict=True))
    if one_step_from_each:
        return *videos, None
    blocks = [m for m in net.modules() if isinstance(m, (RPB, URB))]
    for block, (_, moments) in zip(blocks, state, strict=False):
        block.norm.learn(moments)
    return *videos, states if all_states else state


def joined(pieces: list[State]) -> State:
    """Parts (B,T_n,...), or states of them, along T: in memory T,B as the networks have them."""
    first = pieces[0]
    if first is None or len(pieces) == 1:
        return first
    if not isinstance(first, Tensor):
        inner = (joined(list(of_all)) for of_all in zip(*pieces, strict=True))
        return type(first)(*inner) if hasattr(first, "_fields") else tuple(inner)
    whole = torch.cat([frame_major(piece) for piece in pieces])
    return whole.unflatten(0, (-1, first.shape[0])).transpose(0, 1)


def conditions(net: nn.Module) -> list[Setting]:
    """What a run of `net` depends on besides inputs and weights, as it is now.

    A part is run again during the backward: by then a critic that was frozen may be trained, and `apart` is over. And
    its running averages may not move each time: that is done once, after the last part.
    """
    norms = [m for m in net.modules() if isinstance(m, SequenceNorm) and m.kind == "batch"]
    settings: list[Setting] = [(weight, "requires_grad", weight.requires_grad) for weight in net.parameters()]
    return settings + [s for norm in norms for s in ((norm, "apart", norm.apart), (norm, "learning", False))]


@contextmanager
def under(settings: list[Setting]) -> Iterator[None]:
    """Within it the attributes have these values."""
    before = [(of, name, getattr(of, name)) for of, name, _ in settings]
    try:
        for of, name, value in settings:
            setattr(of, name, value)
        yield
    finally:
        for of, name, value in before:
            setattr(of, name, value)
