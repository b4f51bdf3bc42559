"""What one rank of several does in a step, in order: its arithmetic, the bytes it moves, and what it sends.

The step of `rlv2v.method.step` itself runs, as rank 0 of a world whose other ranks are not there
(`rlv2v.runtime.distributed.pretend`)
and on tensors that have a shape and a dtype but no contents (torch's FakeTensorMode): a large preset takes no memory
and some seconds. Every operator passes by a dispatch mode, those of the backward and of torch.distributed too.

FLOPs: two for each multiplication and addition of a convolution or matrix product, by torch's own formulas
(torch.utils.flop_counter), and by `convlstm_flops` for ours. Bytes: each operator reads its inputs once and writes its
outputs once; views are free. Of stored transitions, as most are; the forward passes that make new ones are left out,
and so is the measure of the domains' distance every tenth step: a step is rather longer than counted here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rlv2v.config import Config
from rlv2v.method.clips import Clips
from rlv2v.method.collector import ReplayRows
from rlv2v.method.rl import Transitions
from rlv2v.method.step import Algorithm
from rlv2v.model.build import Nets, build_nets
from rlv2v.runtime.distributed import StepControl, World, pretend
from rlv2v.runtime.nan_guard import NanGuard

SENDS = {"allreduce_": "all_reduce", "allgather_": "all_gather"}
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "detach", "scalar_tensor", "_unsafe_view")


@dataclass(frozen=True)
class Op:
    """One operator's work: FLOPs, bytes read and written, and whether tensor cores can do it (16-bit factors)."""

    flops: float
    bytes: float
    half: bool


@dataclass(frozen=True)
class Send:
    """One collective. bytes: of the tensor that a rank gives; `waits`: the step goes on only when it is done."""

    kind: str
    bytes: int
    waits: bool


@dataclass(frozen=True)
class Mark:
    """A part of the step is done; the parts are those of `rlv2v.runtime.timer`, and `numbers` and `control` at its end."""

    part: str


Event = Op | Send | Mark


def convlstm_flops(
    x: Sequence[int], w_x: Sequence[int], w_h: Sequence[int], with_state: bool, need: Sequence[bool] | None = None
) -> float:
    """FLOPs of a ConvLSTM layer's convolutions; with `need` (x, w_x, w_h, bias, h0, c0) those of its backward.

    A product with one kernel: 2 k^2 C_in 4C B H W a frame for x, 2 k^2 C 4C B H W a frame for h, of which the first
    has none without a state. Backward: dx, dw_x and dw_h as their forward products, and dh as that of h.
    Shapes: x (G,T,B,C_in,H,W), w_x (G,4C,C_in,k,k), w_h (G,4C,C,k,k).
    """
    groups, steps, batch, _, height, width = x
    each = 2.0 * groups * batch * height * width
    of_x = each * steps * _product(w_x[1:])
    of_h = each * (steps if with_state else steps - 1) * _product(w_h[1:])
    if need is None:
        return of_x + of_h
    first = each * _product(w_h[1:]) if with_state and not (need[4] or need[5]) else 0.0  # dh0 is not made
    return need[0] * of_x + need[1] * of_x + need[2] * of_h + of_h - first


def _product(sizes: Sequence[int]) -> float:
    product = 1.0
    for size in sizes:
        product *= size
    return product


class Tracer(TorchDispatchMode):
    """Writes down the operators that pass by, as events."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []

    def mark(self, part: str) -> None:
        self.events.append(Mark(part))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.events += sends(func, args)
        elif func.namespace in ("aten", "rlv2v") and not is_free(func):
            self.events.append(work(func, args, kwargs or {}, result))
        return result


def is_free(func: Any) -> bool:
    """Whether an operator only makes a view, or memory without contents."""
    returned = [value.alias_info for value in func._schema.returns]
    return func._opname in FREE or any(alias is not None and not alias.is_write for alias in returned)


def sends(func: Any, args: Any) -> list[Event]:
    """The collective of a c10d operator; a broadcast, which only arranges the buckets, is none."""
    if func._opname not in SENDS:
        return []
    given = args[0] if func._opname == "allreduce_" else args[1]
    names = [argument.name for argument in func._schema.arguments]
    at = names.index("async_op")
    waits = len(args) > at and not args[at]
    return [Send(SENDS[func._opname], sum(t.numel() * t.element_size() for t in given), waits)]


def work(func: Any, args: Any, kwargs: Any, result: Any) -> Op:
    """FLOPs and bytes of an operator of ours or torch's."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
    # an expanded tensor is read where it is stored
    moved = sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)
    flops = 0.0
    if func.namespace == "rlv2v":
        backward = func._opname == "convlstm_backward"
        x, w_x, w_h, _, h0, c0 = args[2:8] if backward else args[:6]
        need = args[-1] if backward else None
        flops = convlstm_flops(x.shape, w_x.shape, w_h.shape, h0 is not None or c0 is not None, need)
    elif func._overloadpacket in flop_registry:
        flops = float(flop_registry[func._overloadpacket](*args, **kwargs, out_val=result))
    factor = next((t.dtype for t in tensors if t.dtype.is_floating_point), torch.float32)
    return Op(flops, float(moved), factor.itemsize == 2)


def cycle(config: Config) -> int:
    """Steps after which a run's work is the same again: both domains have had their transitions."""
    return 2 * config.rl.every if config.rl.enabled else 1


def random_clips(config: Config, device: torch.device | str = "cpu") -> Clips:
    """A rank's batch of noise."""

    def noise(num: int, frames: int) -> Tensor:
        return torch.rand(num, frames, 3, config.data.size, config.data.size, device=device) * 2 - 1

    x, y, z = (
        noise(num, config.data.frames) for num in (config.data.batch_x, config.data.batch_y, config.data.batch_z)
    )
    return Clips(x, y, z, noise(config.data.batch_s, 1))


def random_transitions(config: Config) -> Transitions:
    """A rank's mini-batch M of noise, in the shapes of stored transitions."""
    num, size = config.rl.transitions, config.data.size
    frames = (torch.rand(num, 3, size, size) for _ in range(2))
    states, lengths = torch.rand(num, config.data.frames - 1, 3, size, size), torch.ones(num, dtype=torch.long)
    numbers, terminals = torch.rand(num), torch.zeros(num, dtype=torch.bool)
    return Transitions(states, lengths, next(frames), numbers, next(frames), terminals, torch.ones(num))


def trace(config: Config, num_ranks: int) -> list[list[Event]]:
    """The events of each step of one `cycle`, of one rank of `num_ranks`, its buckets arranged before.

    config: of one rank; its `replicas` do not count, each rank has one.
    """
    config = config.replace(replicas=num_ranks, replay_capacity=1, graphs=False, steps=1_000_000)
    with pretend(num_ranks) as world, FakeTensorMode(allow_non_fake_inputs=True):
        with mock.patch("rlv2v.method.step.build_nets", real_nets):
            learner = Algorithm(config, torch.device("cpu"), rank=0, num_ranks=num_ranks)
        clips, transitions = random_clips(config), random_transitions(config)
        for agent in learner.agents.values():
            agent.collect = lambda *_: (transitions, ReplayRows(()))  # type: ignore[method-assign]
        learner.start()
        for _ in range(cycle(config)):
            learner.advance(0.0, learner.step(clips)["distance"])
        return [trace_step(learner, clips, world) for _ in range(cycle(config))]


def trace_step(learner: Algorithm, clips: Clips, world: World) -> list[Event]:
    """The events of one step of a run: Algorithm 1's, what it tells the other ranks, what they agree on."""
    with Tracer() as tracer:
        told = learner.step(clips, tracer.mark)
        told |= learner.advance(0.0, told.pop("distance"))
        NanGuard(world.device).record(learner.schedule.step, told)
        tracer.mark("numbers")
        World(world.device, world._control).all_agree(StepControl(False, 0.0, False))
        tracer.mark("control")
    return tracer.events


def real_nets(config: Config, *, discriminators: bool = True) -> Nets:
    """`build_nets`, with contents: a module that was made without them cannot be moved to a device."""
    with unset_fake_temporarily():
        return build_nets(config, discriminators=discriminators)


@dataclass(frozen=True)
class Sent:
    """A collective with the part of the step it belongs to: what is marked next after it."""

    part: str
    send: Send

    @property
    def what(self) -> str:
        """gradients, statistics (of batch normalisation), colours (of `domain_gap`), numbers or control."""
        if self.part in ("numbers", "control"):
            return self.part
        if self.send.kind == "all_gather":
            return "colours"
        return "statistics" if self.send.waits else f"gradients of {self.part}"


def sent(events: Sequence[Event]) -> list[Sent]:
    """The collectives of a step, in order."""
    part, found = "", list[Sent]()
    for event in reversed(events):
        if isinstance(event, Mark):
            part = event.part
        elif isinstance(event, Send):
            found.append(Sent(part, event))
    return found[::-1]


def sent_bytes(steps: Sequence[Sequence[Event]]) -> dict[str, float]:
    """Bytes that a rank gives to collectives a step, by what they are: the mean over the steps."""
    totals: dict[str, float] = {}
    for events in steps:
        for each in sent(events):
            totals[each.what] = totals.get(each.what, 0.0) + each.send.bytes / len(steps)
    return totals
