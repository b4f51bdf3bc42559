"""What a training step needs, counted without a GPU and without computing; and what to do when that is too much.

A step holds weights, their gradients and Adam's moments all the time, and in each phase what its backward waits for
(`activations`) and what is alive besides when most is (`workspace`: inputs, operators' own memory, gradients of
activations). `rlv2v.runtime.memory` runs the phases' own code on tensors without values.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rlv2v.config import Config
from rlv2v.method import rl as ddpg
from rlv2v.method.clips import Clips, Gains
from rlv2v.method.objective import discriminator_losses, generator_losses
from rlv2v.method.optim import autocast
from rlv2v.method.step import DISCRIMINATORS, GENERATORS, NUM_DIRECTIONS
from rlv2v.model.build import Nets, build_nets
from rlv2v.runtime import distributed as dist
from rlv2v.runtime.memory import CPU, Ghosts, Ledger, Live

GB = 10**9
CONTEXT_BYTES = GB
"""What else a card holds: the CUDA context and the kernels of torch and cuDNN, 0.8 GB on an H200, and a screen."""
FRAGMENTATION = 0.1
"""Of what is counted: cuDNN's workspace and what the allocator holds beyond what is asked of it, 0.07 on an H200."""
RECORDING_BYTES, RECORDING = GB // 5, 0.1
"""CUDA graphs: what they take beside the allocator, and of what is counted beside the pool that they work in."""
MOVES = {"generators": GENERATORS, "discriminators": DISCRIMINATORS, "critics": ("q_x", "q_y")}
Over = Literal["frames", "batch", "size"]


class Bytes(NamedTuple):
    """Of one rank, when most is alive."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    workspace: int
    total: int

    @property
    def reserved(self) -> int:
        """What a card must have: with `CONTEXT_BYTES`, and `FRAGMENTATION` of the rest."""
        return CONTEXT_BYTES + int(self.total * (1 + FRAGMENTATION))


class Count(NamedTuple):
    """Of one phase, without the weights: saved by its forward, and the most that was alive, its gradients included."""

    activations: int
    peak: int


@lru_cache(maxsize=512)
def estimate(config: Config, *, num_replicas: int = 1) -> Bytes:
    """What a step of `config` needs on a rank with `num_replicas` replicas and clips of all four sets.

    The most of its phases, which as CUDA graphs work in one pool too; with `graphs` the recordings besides, as
    workspace.
    """
    counts = {phase: count(config, phase, num_replicas) for phase in phases(config)}
    nets = build_on_meta(config)
    sizes = {name: nbytes(net.parameters()) for name, net in nets.named_children()}
    moved = {phase: sum(sizes[name] for name in MOVES[phase]) for phase in counts}
    generators = [net for name, net in nets.named_children() if name in ("g_x", "g_y")]
    tensors = [*nets.parameters(), *nets.buffers()]
    weights = 2 * nbytes(tensors) + sum(nbytes([*g.parameters(), *g.buffers()]) for g in generators)
    gradients, optimiser = sum(moved.values()), 2 * sum(moved.values())
    of_phase = {phase: gradients - moved[phase] + found.peak for phase, found in counts.items()}
    largest_phase = max(of_phase, key=lambda phase: of_phase[phase])
    peak, activations = of_phase[largest_phase], counts[largest_phase].activations
    workspace = max(0, peak - gradients - activations)
    if config.runtime.graphs:
        workspace += RECORDING_BYTES + int(RECORDING * (weights + optimiser + peak))
    parts = (weights, gradients, optimiser, activations, workspace)
    return Bytes(*parts, sum(parts))


def phases(config: Config) -> list[str]:
    """Of a step, those that have a backward."""
    return [phase for phase in MOVES if config.rl.enabled or phase != "critics"]


def count(config: Config, phase: str, num_replicas: int = 1, live: type[Live] = Ghosts) -> Count:
    """Forward and backward of a phase, followed; `live=Live` does it with real tensors on the CPU."""
    ledger = Ledger()
    with live(ledger):
        nets = build_nets(config)
        for tensor in (*nets.parameters(), *nets.buffers()):
            ledger.see(tensor)
        weights, own = ledger.bytes, set(ledger.sizes)
        ledger.peak = weights
        for name, net in nets.named_children():
            net.requires_grad_(name in MOVES[phase])
        run = RUN[phase](nets, config, num_replicas)
        with saved_tensors_hooks(ledger.save, lambda tensor: tensor), autocast(config, CPU):
            loss = run()
        activations = ledger.saved_bytes(own)
        loss.backward()
    return Count(activations, ledger.peak - weights)


def videos(num: int, frames: int, config: Config) -> Tensor:
    """Noise (num,frames,3,size,size), every frame a video of its own where the method wants it so."""
    shape = (num * frames, 1) if config.per_frame else (num, frames)
    return torch.rand(*shape, 3, config.data.size, config.data.size) * 2 - 1


def some_clips(config: Config, num_replicas: int) -> Clips:
    """A rank's batch."""
    x, y, z = (
        videos(num_replicas * n, config.data.frames, config)
        for n in (config.data.batch_x, config.data.batch_y, config.data.batch_z)
    )
    return Clips(x, y, z, videos(num_replicas * config.data.batch_s, 1, config))


def some_transitions(config: Config, num_replicas: int) -> ddpg.Transitions:
    """A rank's mini-batch M; its states are T-1 frames long."""
    num, length = num_replicas * config.rl.transitions, config.data.frames - 1
    states = torch.rand(num, length, 3, config.data.size, config.data.size)
    action, true = (torch.rand(num, 3, config.data.size, config.data.size) for _ in range(2))
    lengths = torch.full((num,), length)
    return ddpg.Transitions(states, lengths, action, torch.rand(num), true, torch.rand(num) < 0.5, torch.rand(num))


def judged(config: Config, clips: Clips) -> Tensor:
    """Which frames D judges singly."""
    return torch.arange(min(config.loss.disc_frames or clips.x.shape[1], clips.x.shape[1]))


def generators(nets: Nets, config: Config, num_replicas: int) -> Callable[[], Tensor]:
    clips = some_clips(config, num_replicas)
    batch = some_transitions(config, num_replicas) if config.rl.enabled else None
    at, directions = judged(config, clips), torch.rand(3, NUM_DIRECTIONS)

    def run() -> Tensor:
        terms, _, _ = generator_losses(nets, clips, config, Gains(1.0, 1.0), at, directions)
        if batch is not None:
            terms["actor"] = ddpg.actor_loss(nets.q_x, ddpg.Policies.of(nets, "x"), batch.states, batch.lengths)
        return torch.stack(list(terms.values())).sum()

    return run


def discriminators(nets: Nets, config: Config, num_replicas: int) -> Callable[[], Tensor]:
    clips = some_clips(config, num_replicas)
    at, fakes = judged(config, clips), (torch.zeros_like(clips.x), torch.zeros_like(clips.yz))

    def run() -> Tensor:
        return torch.stack(list(discriminator_losses(nets, clips, *fakes, config, at).values())).sum()

    return run


def critics(nets: Nets, config: Config, num_replicas: int) -> Callable[[], Tensor]:
    batch, policies = some_transitions(config, num_replicas), ddpg.Policies.of(nets, "x")

    def run() -> Tensor:
        targets = ddpg.critic_targets(nets.q_x, policies, batch, config.rl.gamma)
        return ddpg.critic_loss(nets.q_x, batch, targets)[0]

    return run


RUN = {"generators": generators, "discriminators": discriminators, "critics": critics}


def build_on_meta(config: Config) -> Nets:
    with torch.device("meta"):
        return build_nets(config)


def nbytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def altered(config: Config, **changes: Any) -> Config:
    """`replace`, for fields that are named at run time."""
    return config.replace(**changes)


def scaled(config: Config, over: Over, number: int) -> Config:
    """`config` with so many frames, pixels a side (both as given), or times its batch."""
    if over != "batch":
        return altered(config, **{over: number})
    names = ("batch_x", "batch_y", "batch_z", "batch_s", "transitions")
    return altered(config, **{name: number * getattr(config, name) for name in names})


def largest(
    config: Config, budget_bytes: int, *, over: Over = "frames", num_replicas: int = 1, confirm: bool = True
) -> int:
    """The largest T, batch factor or size with which a step, the reserve included, fits; 0: not even the smallest.

    Memory grows in proportion to each but the size, to whose square it does, and nearly so with `memory="frames"`: two
    estimates, of about half the config's number and of it, say where to look, and estimates on both sides confirm it.
    Without `confirm` it is left at that, which was 2 % off: long clips take long to count.
    """
    first, unit = {"frames": (2, 1), "batch": (1, 1), "size": (multiple(config), multiple(config))}[over]
    power = 2 if over == "size" else 1

    def need(number: int) -> int:
        return estimate(scaled(config, over, number), num_replicas=num_replicas).reserved

    if need(first) > budget_bytes:
        return 0
    given = 2 if over == "batch" else int(getattr(config, over))
    low = max(first, given // 2 // unit * unit)
    high = max(low + unit, given)
    slope = max(1, need(high) - need(low)) / (high**power - low**power)
    found = int(max(0.0, (budget_bytes - need(low)) / slope + low**power) ** (1 / power)) // unit * unit
    found = max(first, found)
    while confirm and found > first and need(found) > budget_bytes:
        found = max(first, found - max(unit, found // 50 // unit * unit))
    while confirm and need(found + unit) <= budget_bytes:
        found += unit
    return found


def multiple(config: Config) -> int:
    """Of which the size must be one."""
    return max(8, config.model.patch * 2 ** len(config.model.widths))


def advise(config: Config, device: torch.device, budget_bytes: int | None = None) -> str:
    """For a user whose run ran out of memory on `device`: what a step needs, and the first change that makes it fit.

    The changes, in this order, each with those before it: `--no-graphs`, `--memory recompute`, `--memory frames`, half
    the batch and so on, fewer frames, smaller frames.  budget_bytes: the device's memory when None.
    """
    budget = device_bytes(device) if budget_bytes is None else budget_bytes
    config = config.replace(graphs=config.runtime.graphs and device.type == "cuda")
    share = max(1, (config.runtime.replicas or 1) // dist.num_ranks())
    needed = estimate(config, num_replicas=share).reserved
    said = f"a step of this run needs about {gb(needed)}, {device} has {gb(budget)}"
    if needed <= budget:
        return f"{said}: free what other programs hold of it, or add {next(smaller(config, share, 0))[0]}"
    for flags, bytes_needed in smaller(config, share, budget):
        if bytes_needed <= budget:
            return f"{said}; {flags} needs {gb(bytes_needed)}"
    return f"{said}; no --memory, --batch-x, --frames or --size makes it fit: take smaller --widths and --disc-widths"


def smaller(config: Config, share: int, budget: int) -> Iterator[tuple[str, int]]:
    """Flags that need less and less, and what they need."""

    def needs(changed: Config) -> int:
        return estimate(changed, num_replicas=share).reserved

    flags = ""
    if config.runtime.graphs:
        config, flags = config.replace(graphs=False), "--no-graphs "
        yield flags.strip(), needs(config)
    for memory in ("recompute", "frames"):
        if config.runtime.memory in ("store", "recompute") and memory != config.runtime.memory:
            yield f"{flags}--memory {memory}", needs(altered(config, memory=memory))
    if config.runtime.memory != "frames":
        config, flags = config.replace(memory="frames"), f"{flags}--memory frames "
    names = ("batch_x", "batch_y", "batch_z", "batch_s", "transitions")
    while any(getattr(config, name) > 1 for name in names):
        config = altered(config, **{name: max(1, getattr(config, name) // 2) for name in names})
        batch = " ".join(f"--{name.replace('_', '-')} {getattr(config, name)}" for name in names)
        yield f"{flags}{batch}", needs(config)
    flags += " ".join(f"--{name.replace('_', '-')} 1" for name in names) + " "
    shrinks: tuple[Over, ...] = ("frames", "size")
    for over in shrinks:
        number = largest(config, budget, over=over, num_replicas=share, confirm=False)
        if 0 < number < getattr(config, over):
            config = altered(config, **{over: number})
            flags += f"--{over} {number} "
            yield flags.strip(), needs(config)


def device_bytes(device: torch.device) -> int:
    """Memory of a CUDA device, or of the machine."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def gb(size: int) -> str:
    return f"{size / GB:.1f} GB"


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        text in said for text in ("can't allocate memory", "not enough memory")
    )
