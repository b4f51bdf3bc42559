"""The memory that a training step needs, counted without a GPU, and what to change when that is too much.

A rank always holds the weights, their gradients and Adam's two moments. Each phase adds the activations that its
backward pass needs, and at its peak a workspace: inputs, the operators' own memory, gradients of activations.
`rlv2v.runtime.memory` counts them while the phases' own code runs on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rlv2v.config import BATCH, Config
from rlv2v.errors import get_logger
from rlv2v.method import rl as ddpg
from rlv2v.method.baselines import METHODS
from rlv2v.method.clips import Clips, pool_size
from rlv2v.method.objective import discriminator_losses, generator_losses
from rlv2v.method.optim import autocast
from rlv2v.method.patches import draw
from rlv2v.method.step import DISCRIMINATORS, GENERATORS
from rlv2v.method.trainer import Footprint, Phase
from rlv2v.model.activation_memory import MEMORY
from rlv2v.model.build import Nets, build_nets
from rlv2v.runtime import distributed as dist
from rlv2v.runtime.constants import made_anew
from rlv2v.runtime.device import device_bytes
from rlv2v.runtime.memory import CountFakes, CountStorages, Ledger

log = get_logger(__name__)

GB = 10**9
CONTEXT_BYTES = GB
"""What a card holds besides: the CUDA context and the kernels of torch and cuDNN, 0.8 GB on an H200, and a screen."""
FRAGMENTATION = 0.1
"""Share of the count that cuDNN's workspace and the allocator's segments take on top: 0.07 on an H200."""
RECORDING_BYTES, RECORDING = GB // 5, 0.1
"""What CUDA graphs take: bytes beside the allocator, and a share of the count beside the pool that they work in."""
TRAINED = {"generators": GENERATORS, "discriminators": DISCRIMINATORS, "critics": ("q_x", "q_y")}
Over = Literal["frames", "batch"]


class Bytes(NamedTuple):
    """The bytes that one rank holds at its peak, by their purpose."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    workspace: int
    total: int

    @property
    def reserved(self) -> int:
        """The bytes that a card must have: `CONTEXT_BYTES`, and `FRAGMENTATION` on top of the rest."""
        return CONTEXT_BYTES + int(self.total * (1 + FRAGMENTATION))


class Count(NamedTuple):
    """The bytes of one phase besides the weights: saved by its forward, and at its peak, gradients included."""

    activations: int
    peak: int


@lru_cache(maxsize=512)
def estimate(config: Config, *, num_replicas: int = 1) -> Bytes:
    """Return what a step of `config` needs on a rank with `num_replicas` replicas and clips of all four sets.

    That is the largest of its phases, which share one pool as CUDA graphs too; with `graphs` the workspace has the
    recordings as well.
    """
    held = METHODS[config.method].footprint(config)
    counts = {phase: count(config, phase, num_replicas) for phase in held.phases}
    with torch.device("meta"):
        nets = held.nets()
    sizes = {name: nbytes(net.parameters()) for name, net in nets.named_children()}
    trained = {phase: sum(sizes[name] for name in held.phases[phase].trained) for phase in counts}
    copies = [tensor for name in held.copies for tensor in getattr(nets, name).state_dict().values()]
    weights = nbytes([*nets.parameters(), *nets.buffers(), *copies])
    if not counts:  # nothing is descended
        return Bytes(weights, 0, 0, 0, 0, weights)
    gradients, optimiser = sum(trained.values()), 2 * sum(trained.values())
    peaks = {phase: gradients - trained[phase] + counted.peak for phase, counted in counts.items()}
    largest_phase = max(peaks, key=lambda phase: peaks[phase])
    peak, activations = peaks[largest_phase], counts[largest_phase].activations
    workspace = max(0, peak - gradients - activations)
    if config.runtime.graphs:
        workspace += RECORDING_BYTES + int(RECORDING * (weights + optimiser + peak))
    by_purpose = (weights, gradients, optimiser, activations, workspace)
    return Bytes(*by_purpose, sum(by_purpose))


def footprint(config: Config) -> Footprint:
    """Return what a run of RL-V2V-GAN holds: besides its networks, their targets and the average of its generators."""
    phases = {name: Phase(TRAINED[name], run) for name, run in RUN.items() if config.rl.enabled or name != "critics"}
    everything = tuple(name for names in TRAINED.values() for name in names)
    return Footprint(lambda: build_nets(config), phases, (*everything, "g_x", "g_y"))


def count(config: Config, phase: str, num_replicas: int = 1, mode: type[CountStorages] = CountFakes) -> Count:
    """Count forward and backward of a phase on fake tensors; `mode=CountStorages` computes it on real ones."""
    held, ledger = METHODS[config.method].footprint(config), Ledger()
    trained, prepare = held.phases[phase]
    with made_anew(), mode(ledger):
        nets = held.nets()
        for tensor in (*nets.parameters(), *nets.buffers()):
            ledger.add(tensor)
        weights, own = ledger.bytes, set(ledger.sizes)
        ledger.peak = weights
        for name, net in nets.named_children():
            net.requires_grad_(name in trained)
        run = prepare(nets, config, num_replicas)
        with saved_tensors_hooks(ledger.save, lambda tensor: tensor), autocast(config, torch.device("cpu")):
            loss = run()
        activations = ledger.saved_bytes(own)
        loss.backward()
    return Count(activations, ledger.peak - weights)


def random_videos(num: int, frames: int, config: Config) -> Tensor:
    """Return noise (num,frames,3,H,W)."""
    return torch.rand(num, frames, 3, config.data.size.height, config.data.size.width) * 2 - 1


def some_clips(config: Config, num_replicas: int) -> Clips:
    """Return a rank's batch of noise."""
    data = config.data
    x, y, z = (random_videos(num_replicas * n, data.frames, config) for n in (data.batch_x, data.batch_y, data.batch_z))
    clips = Clips(x, y, z, random_videos(num_replicas * data.batch_s, 1, config))
    if not (pool := num_replicas * pool_size(config)):
        return clips
    pool_x, pool_yz = (random_videos(num, data.frames, config) for num in (pool, 2 * pool))
    return clips._replace(pool_x=pool_x, pool_yz=pool_yz)


def some_transitions(config: Config, num_replicas: int) -> ddpg.Transitions:
    """Return a rank's mini-batch M of noise; its states are T-1 frames long."""
    num, length = num_replicas * config.rl.transitions, config.data.frames - 1
    height, width = config.data.size.height, config.data.size.width
    states = torch.rand(num, length, 3, height, width)
    action, true = (torch.rand(num, 3, height, width) for _ in range(2))
    lengths = torch.full((num,), length)
    return ddpg.Transitions(states, lengths, action, torch.rand(num), true, torch.rand(num) < 0.5, torch.rand(num))


def single_frames(config: Config, clips: Clips) -> Tensor:
    """Return the indices of as many frames as D scores singly."""
    return torch.arange(min(config.loss.disc_frames or clips.x.shape[1], clips.x.shape[1]))


def generators(nets: Nets, config: Config, num_replicas: int) -> Callable[[], Tensor]:
    """Return what computes the loss of the generators' phase, on inputs that are made now."""
    clips = some_clips(config, num_replicas)
    batch = some_transitions(config, num_replicas) if config.rl.enabled else None
    frames, replicas = single_frames(config, clips), range(num_replicas)
    draws = draw(np.random.default_rng(0), num_replicas, replicas, torch.device("cpu"))

    def run() -> Tensor:
        terms, _, _ = generator_losses(nets, clips, config, 1.0, frames, draws)
        if batch is not None:
            terms["actor"] = ddpg.actor_loss(nets.q_x, ddpg.Policies.of(nets, "x"), batch.states, batch.lengths)
        return torch.stack(list(terms.values())).sum()

    return run


def discriminators(nets: Nets, config: Config, num_replicas: int) -> Callable[[], Tensor]:
    """Return what computes the loss of the discriminators' phase."""
    clips = some_clips(config, num_replicas)
    frames, fakes = single_frames(config, clips), (torch.zeros_like(clips.x), torch.zeros_like(clips.yz))

    def run() -> Tensor:
        return torch.stack(list(discriminator_losses(nets, clips, *fakes, config, frames).values())).sum()

    return run


def critics(nets: Nets, config: Config, num_replicas: int) -> Callable[[], Tensor]:
    """Return what computes the loss of the critics' phase."""
    batch, policies = some_transitions(config, num_replicas), ddpg.Policies.of(nets, "x")

    def run() -> Tensor:
        targets = ddpg.critic_targets(nets.q_x, policies, batch, config.rl.gamma)
        return ddpg.critic_loss(nets.q_x, batch, targets)[0]

    return run


RUN = {"generators": generators, "discriminators": discriminators, "critics": critics}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors' values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def scaled(config: Config, over: Over, number: int) -> Config:
    """Return `config` with `number` frames, or with its batch times `number`."""
    if over == "frames":
        return config.replace(frames=number)
    return config.replace(**{flag: number * config.get(flag) for flag in BATCH})


def largest(config: Config, budget_bytes: int, *, over: Over = "frames", num_replicas: int = 1) -> int:
    """Return about the largest T or batch factor with which a step, the reserve included, fits; 0: not even the least.

    Memory grows nearly in proportion to both, so that two estimates, of half the config's number and of it, give it to
    2 %.
    """
    first = {"frames": 2, "batch": 1}[over]
    high = max(first + 1, config.data.frames if over == "frames" else 2)
    low = max(first, high // 2)

    def need(number: int) -> int:
        return estimate(scaled(config, over, number), num_replicas=num_replicas).reserved

    if need(first) > budget_bytes:
        return 0
    slope = max(1.0, (need(high) - need(low)) / (high - low))
    return max(first, int(low + (budget_bytes - need(low)) / slope))


def advise(config: Config, device: torch.device, budget_bytes: int | None = None) -> str:
    """Return what a step needs and the first change of `smaller` that makes it fit, for a run that is out of memory.

    Args:
        config: the run's.
        device: where it ran out of memory.
        budget_bytes: what there is; by default the device's memory.
    """
    budget = device_bytes(device) if budget_bytes is None else budget_bytes
    config = config.replace(graphs=config.runtime.graphs and device.type == "cuda")
    share = max(1, config.runtime.replicas // dist.num_ranks())

    def need(config: Config) -> int:
        return estimate(config, num_replicas=share).reserved

    needed = need(config)
    summary = f"a step of this run needs about {gb(needed)}, {device} has {gb(budget)}"
    for flags, change in smaller(config):
        if needed <= budget:
            return f"{summary}: free what other programs hold of it, or add {flags}"
        if (bytes_needed := need(change)) <= budget:
            return f"{summary}; {flags} needs {gb(bytes_needed)}"
    return f"{summary}; no --memory or batch makes it fit: take smaller --frames, --size, --widths or --disc-widths"


def with_graphs_that_fit(config: Config, device: torch.device, budget_bytes: int | None = None) -> Config:
    """Return the config without `graphs` where a step with its recordings needs more than the device has.

    Args:
        config: the run's, with `replicas` settled.
        device: where it runs.
        budget_bytes: what there is; by default the device's memory.
    """
    if device.type != "cuda" or not config.runtime.graphs:
        return config
    budget = device_bytes(device) if budget_bytes is None else budget_bytes
    share = max(1, config.runtime.replicas // dist.num_ranks())
    needed = estimate(config, num_replicas=share).reserved
    if needed <= budget:
        return config
    log.info("a step with CUDA graphs needs about %s, %s has %s: without graphs", gb(needed), device, gb(budget))
    return config.replace(graphs=False)


def smaller(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield changes that need less and less memory, as flags and as the config with them.

    They are `--no-graphs`, `--memory recompute`, `--memory frames`, and half the batch until it is one; each keeps
    those before it.
    """
    flags = ""
    if config.runtime.graphs:
        config, flags = config.replace(graphs=False), "--no-graphs "
        yield flags.strip(), config
    graphs_flag = flags
    for memory in MEMORY[MEMORY.index(config.runtime.memory) + 1 :]:
        config, flags = config.replace(memory=memory), f"{graphs_flag}--memory {memory} "
        yield flags.strip(), config
    while any(config.get(flag) > 1 for flag in BATCH):
        config = config.replace(**{flag: max(1, config.get(flag) // 2) for flag in BATCH})
        yield flags + " ".join(f"--{flag.replace('_', '-')} {config.get(flag)}" for flag in BATCH), config


def gb(size: int) -> str:
    """Return bytes as text, in GB of 10^9."""
    return f"{size / GB:.1f} GB"
