"""Kernels that a ConvLSTM layer launches for one sequence, forward and backward.

On a GPU the profiler counts them. Elsewhere they are counted as a GPU would launch them: those of our Triton kernels by
the hook that launches them, under TRITON_INTERPRET=1; torch's one an operator that is neither a view nor an allocation,
one more for a convolution's bias, one a gradient of a convolution. An operator that takes several kernels counts once,
which is kind to eager. TRITON_INTERPRET is read when triton is imported: this file run as a script is such a process,
and prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from convlstm_layer import Form, Layer, Shape, noise, obstacle
from convlstm_peers import eager, mine
from convlstm_rows import Row
from torch._C._autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from rlv2v.kernels import convolution, dispatch, fused_triton, ops

SHAPE = Shape(1, 8, 16, 16, 4, 4)  # the number does not depend on the other sizes
LIMIT_LAUNCHES = 25
WITHOUT_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size"
}  # fmt: skip
SEQUENCE_OPS: dict[str, Callable[..., Any]] = {"convlstm": ops.forward, "convlstm_backward": ops.backward}


class Counting(TorchDispatchMode):
    """Counts operators that run a kernel, by name, also inside our operators; see the module."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.launching = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.namespace, func.overloadpacket.__name__
        kwargs = kwargs or {}
        with self:  # a mode is off inside its own handler
            if namespace == "rlv2v":
                return SEQUENCE_OPS[name](*args, **kwargs)
            made_of_others = func.decompose(*args, **kwargs)  # below autograd they come whole
            if made_of_others is not NotImplemented:
                return made_of_others
        if not self.launching:
            self.counts[name] += kernels_of(func, args)
        return func(*args, **kwargs)

    def launch(self, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        """In place of `fused_triton.launch`; what the interpreter does with torch to run the kernel is not counted."""
        self.counts["triton"] += 1
        self.launching = True
        try:
            fused_triton.launch(kernel, grid, arguments)
        finally:
            self.launching = False


def kernels_of(func: Any, args: tuple[Any, ...]) -> int:
    """How many kernels an operator of torch counts for."""
    name = func.overloadpacket.__name__
    if func.is_view or name in WITHOUT_KERNEL:
        return 0
    if name == "convolution":
        return 1 if args[2] is None else 2
    if name == "convolution_backward":
        return sum(args[-1])
    return 1


def counted(form: Form) -> Counter[str]:
    """Kernels by name of one forward and backward."""
    layer, counting, runners = Layer(form, noise(SHAPE)), Counting(), dispatch.RUNNERS
    hooked = {}
    if form.backend == "triton":
        hooked["triton"] = runners["triton"]._replace(recurrence=fused_triton.FusedTriton(launch=counting.launch))
    with patch.dict(runners, hooked), counting:
        layer.train()
    return +counting.counts


def profiled(form: Form) -> Counter[str]:
    """The same as a GPU's profiler sees them."""
    layer = Layer(form, noise(SHAPE), "cuda")
    layer.train()  # compiles, and lets cuDNN choose
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        layer.train()
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    return Counter(name for name in on_device if not name.startswith(("Memcpy", "Memset")))


def forms(device: str) -> tuple[list[Form], dict[str, str]]:
    """Eager and ours, those as our layers run them, and why one of ours cannot be counted."""
    backends = ("triton", "cuda") if device == "cuda" else ("triton",)
    every = [mine(backend, torch.float16, "frame-major") for backend in backends]
    missing = {form.backend: why for form in every if (why := obstacle(form, SHAPE, device)) is not None}
    kept = [form for form in every if form.backend not in missing]
    return [Form("eager", torch.float16, eager, joined=True), *kept], missing


def launch_rows(device: str) -> tuple[list[Row], dict[str, str]]:
    """Rows of eager and of ours, printed, and why one is missing."""
    if device == "cuda":
        every, missing = forms(device)
        found = {form.backend or form.name: dict(profiled(form)) for form in every}
    else:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve())],
            env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"counting launches under TRITON_INTERPRET=1 failed:\n{done.stderr}")
        found, missing = json.loads(done.stdout.splitlines()[-1])
    case, how, rows = f"launches T={SHAPE.steps}", "profiled" if device == "cuda" else "counted", []
    for name, counts in found.items():
        number = sum(counts.values())
        row: Row = {"case": case, "backend": name, "pass": "forward+backward", "dtype": "float16", "launches": number}
        rows.append(row | {"at_most": None if name == "eager" else LIMIT_LAUNCHES, "how": how, "kernels": counts})
        print(f"{case} | forward+backward | {name} | {number} kernels, {how}", flush=True)
    for name, why in missing.items():
        print(f"{case} | forward+backward | {name} | not counted: {why}", flush=True)
    return rows, {f"launches, {name}": why for name, why in missing.items()}


def main() -> None:
    """Count what can be, print `[{backend: {kernel: number}}, {backend: why not}]`."""
    convolution.through_float = lambda x: False  # a GPU convolves in 16 bits
    torch.set_num_threads(1)
    every, missing = forms("cpu")
    print(json.dumps([{form.backend or form.name: counted(form) for form in every}, missing]))


if __name__ == "__main__":
    main()
