"""Time a training step of a preset by itself, and count what it launches.

    python bench/step.py [--case default:32 default:64:4] [--device cuda] [--json F]

A case is preset:size[:factor]: the preset's step at size x size, with `factor` times its batch (default 1), in the
preset's precision, on a GPU with CUDA graphs. A time is that of one step, the device waited for. `clips_per_s` is how
many clips of X, Y and Z go through a second, those that statistics alone look at included. `launches` are the kernels
that a GPU ran, by torch's profiler; on a CPU `kernels`, those that a GPU would be asked for: one for each operator of
PyTorch that computes (one for each gradient of a convolution), and of an operator of ours those of its Triton form,
which is traced. bench/train_step.py compares the step with its plain twin.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import Bench, Contender, DeviceArgs, Row, compare
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlv2v.cli import run_command
from rlv2v.config import BATCH, Config, check_name
from rlv2v.errors import UserError
from rlv2v.kernels import bilateral, norm_ops
from rlv2v.kernels import ops as convlstm
from rlv2v.kernels.triton import norms, slices
from rlv2v.kernels.triton.recurrence import TritonRecurrence
from rlv2v.method.memory import some_clips
from rlv2v.method.step import Algorithm
from rlv2v.model.frames import attributes_set
from rlv2v.presets import PRESETS
from rlv2v.runtime.cuda_graphs import NUM_PLAIN

EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""Operators that compute nothing, beside those whose results are views."""
CASE = re.compile(r"([\w-]+):(\d+)(?::(\d+))?")


@dataclass(frozen=True)
class Args(DeviceArgs):
    """Time training steps; --quick: the first case at 16x16."""

    case: tuple[str, ...] = ("default:32", "default:64", "paint:32")
    """preset:size[:factor] of the batch."""


class CountKernels(TorchDispatchMode):
    """Count the kernels that a GPU would be asked for."""

    num = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op.name().split("::")[1].split(".")[0]
        result = op(*args, **(kwargs or {}))
        if name in TRITON_FORMS:
            self.num += kernels_of_ours(name, args)
        elif name == "convolution_backward":
            self.num += sum(gradient is not None for gradient in result)
        elif name not in EMPTY:
            self.num += name.endswith("_") or not storages(result) <= storages((args, kwargs))
        return result


def storages(values: Any) -> set[int]:
    """Return the addresses of the memory of all tensors in nested values."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


TRITON_FORMS: dict[str, Callable[..., object]] = {
    "convlstm": lambda launch, *args: convlstm.forward_by(TritonRecurrence(launch), *args[:-2], args[-1]),
    "convlstm_backward": lambda launch, *args: convlstm.backward_by(TritonRecurrence(launch), *args[:-2], args[-1]),
    "sequence_norm": lambda _, *args: norm_ops.forward(*args[:-1], "triton"),
    "sequence_norm_backward": lambda _, *args: norm_ops.backward(*args[:-2], "triton", args[-1]),
    "slice_apply": lambda _, *args: bilateral.forward(args[0], args[1], args[2], "triton"),
    "slice_apply_backward": lambda _, *args: bilateral.backward(args[0], args[1], args[2], args[3], "triton", args[-1]),
}
"""Operators of ours as a GPU runs them, given what runs a kernel."""


def kernels_of_ours(name: str, args: Sequence[Any]) -> int:
    """Return how many kernels an operator of ours is in Triton; its kernels do not run."""
    launched = 0

    def launch(kernel: Any, grid: Any, arguments: Any) -> None:
        nonlocal launched
        launched += 1

    forms = [
        (module, direction, partial(getattr(module, direction), run=launch))
        for module in (norms, slices)
        for direction in ("forward", "backward")
    ]
    with attributes_set(forms), CountKernels() as around:
        TRITON_FORMS[name](launch, *args)
    return launched + around.num


def config_of(case: str, device: str) -> tuple[Config, int]:
    """Return the settings of a case and its factor. Raises UserError for one that is none."""
    found = CASE.fullmatch(case)
    if not found or int(found[3] or 1) < 1:
        raise UserError(f"--case: expected preset:size[:factor], as default:64:4, got {case!r}")
    check_name("case", found[1], PRESETS)
    factor, config = int(found[3] or 1), Config.of(found[1], size=int(found[2]), replicas=1, steps=10**6, budget=None)
    larger = {name: factor * config.get(name) for name in (*BATCH, "batch_pool")}
    return config.replace(**larger, graphs=device == "cuda").check(), factor


def count(algorithm: Algorithm, step: Any, steps: int) -> dict[str, float]:
    """Return what `steps` steps launch, a step."""
    if algorithm.device.type == "cuda":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for _ in range(steps):
                step()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if "CUDA" in str(e.device_type) and "Mem" not in e.name]
        return {"launches": len(kernels) / steps, "gpu_us": sum(e.time_range.elapsed_us() for e in kernels) / steps}
    with CountKernels() as counted:
        for _ in range(steps):
            step()
    return {"kernels": counted.num / steps}


def case_rows(case: str, args: Args) -> list[Row]:
    """Time one case."""
    config, factor = config_of(case, args.device)
    device = torch.device(args.device)
    algorithm = Algorithm(config, device)
    algorithm.start()
    of_round = 2 * config.rl.every if config.rl.enabled else 1  # steps in which each domain has a mini-batch
    with device:
        clips = some_clips(config, 1)

    def step() -> None:
        algorithm.step(clips)
        algorithm.advance(0.0)

    def one_round() -> None:
        for _ in range(of_round):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range((NUM_PLAIN + 1) if config.runtime.graphs else 1):  # until all is recorded
        one_round()
    fields: dict[str, Any] = {
        "clips": sum(len(v) for v in (clips.x, clips.yz, clips.pool_x, clips.pool_yz) if v is not None)
    }
    fields |= count(algorithm, step, of_round)
    dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[config.runtime.precision]
    name = f"{config.preset} {config.data.size} T={config.data.frames} x{factor}"
    contender = Contender("rlv2v", one_round, dtype, ours=True, fields=fields)
    (row,) = compare(name, "train step", [contender], args.num_rounds)
    for key in ("median_us", "p20_us", "p80_us"):
        row[key] = round(row[key] / of_round, 2)
    row["clips_per_s"] = round(1e6 * row["clips"] / row["median_us"], 1)
    if device.type == "cuda":
        row["reserved_mb"] = torch.cuda.max_memory_reserved() // 10**6
    return [row]


def main(args: Args) -> None:
    """Time all cases, and print the JSON line."""
    cases = [f"{args.case[0].split(':')[0]}:16"] if args.quick else list(args.case)
    for case in cases:
        config_of(case, args.device)
    with Bench("step", args) as bench:
        for case in cases:
            bench.add(case_rows(case, args))


if __name__ == "__main__":
    run_command(main, Args)
