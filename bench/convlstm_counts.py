"""What a ConvLSTM layer keeps and launches: counted, not timed.

Bytes that autograd holds from forward to backward, for each element and step (one of B*T*C*H*W). A storage counts once;
the caller's own x and weights count apart. `with_result` adds the hidden states where they are not among what is saved.

Kernels of one sequence, forward and backward. On a GPU the profiler counts them. Elsewhere they are counted as a GPU
would launch them: those of our Triton kernels by the hook that launches them, under TRITON_INTERPRET=1; an operator of
torch as one, if it is neither a view nor an allocation, one more for a convolution's bias, one a gradient of a
convolution. TRITON_INTERPRET is read when triton is imported, so this file runs as a script of its own and prints JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from convlstm_layer import Form, Layer, Shape, name_of, noise, obstacle
from convlstm_peers import BF16, F32, eager, mine
from harness import Bench, Row
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from rlv2v.kernels import convolution, dispatch, ops
from rlv2v.kernels.triton.recurrence import TritonRecurrence, launch

LAUNCH_SHAPE = Shape(1, 8, 16, 16, 4, 4)
"""The number of launches depends on T alone."""
WITHOUT_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "is_same_size"
}  # fmt: skip
SEQUENCE_OPS: dict[str, Callable[..., Any]] = {"convlstm": ops.forward, "convlstm_backward": ops.backward}


def saved_bytes(run: Callable[[], Tensor], inputs: Iterable[Tensor]) -> dict[str, int]:
    """Return the bytes that autograd saves in `run`: `saved`, those of `inputs` apart, and `with_result`."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other one gets its address meanwhile
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    sizes = {address: storage.nbytes() for address, storage in storages.items()}
    own = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved = sum(size for address, size in sizes.items() if address not in own)
    storage = result.untyped_storage()
    more = 0 if storage.data_ptr() in sizes else storage.nbytes()
    return {"saved": saved, "inputs": sum(sizes.values()) - saved, "with_result": saved + more}


def saved_rows(bench: Bench, shape: Shape, device: str = "cpu") -> list[Row]:
    """Return and print the rows of saved bytes, of eager and of ours."""
    backend = "cpu" if device == "cpu" else "triton"
    forms = [Form("eager", dtype, eager, joined=True) for dtype in (F32, BF16)]
    for dtype in (F32, BF16, torch.float16):
        forms += [mine(backend, dtype, "frame-major"), mine(backend, dtype, "frame-major recompute")]
    rows = list[Row]()
    for form in forms:
        reason = obstacle(form, shape, device)
        if reason is not None:
            bench.skip(f"saved, {form.name} {name_of(form.dtype)}", reason)
            continue
        layer = Layer(form, noise(shape), device)
        each = {name: round(size / shape.elements, 2) for name, size in saved_bytes(layer.run, layer.leaves).items()}
        row: Row = {"case": f"saved {shape}", "backend": form.backend or form.name, "ours": bool(form.backend)}
        row |= {"pass": "recompute" if "recompute" in form.name else "store", "dtype": name_of(form.dtype)}
        row |= {"bytes_per_element_step": each["saved"], "bytes_with_result": each["with_result"]}
        rows.append(row | {"bytes_of_inputs": each["inputs"]})
        figures = f"{each['saved']:.2f} B an element and step, {each['with_result']:.2f} with the result"
        print(f"{row['case']} | {row['pass']} | {row['backend']} {row['dtype']} | {figures}", flush=True)
    return rows


class Counting(TorchDispatchMode):
    """Count the operators that run a kernel, by name, inside our operators too."""

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
            decomposed = func.decompose(*args, **kwargs)  # below autograd composite operators come whole
            if decomposed is not NotImplemented:
                return decomposed
        if not self.launching:
            self.counts[name] += kernels_of(func, args)
        return func(*args, **kwargs)

    def launch(self, kernel: Any, grid: Any, arguments: dict[str, Any]) -> None:
        """Launch in place of `launch`; what the interpreter does with torch meanwhile does not count."""
        self.counts["triton"] += 1
        self.launching = True
        try:
            launch(kernel, grid, arguments)
        finally:
            self.launching = False


def kernels_of(func: Any, args: tuple[Any, ...]) -> int:
    """Return how many kernels an operator of torch counts for."""
    name = func.overloadpacket.__name__
    if func.is_view or name in WITHOUT_KERNEL:
        return 0
    if name == "convolution":
        return 1 if args[2] is None else 2
    return sum(args[-1]) if name == "convolution_backward" else 1


def counted(form: Form) -> Counter[str]:
    """Return the kernels of one forward and backward by name, counted without a GPU."""
    layer, counting, runners = Layer(form, noise(LAUNCH_SHAPE)), Counting(), dispatch.TABLE
    hooked = {}
    if form.backend == "triton":
        hooked["triton"] = runners["triton"]._replace(recurrence=TritonRecurrence(launch=counting.launch))
    with patch.dict(runners, hooked), counting:
        layer.train()
    return +counting.counts


def profiled(form: Form) -> Counter[str]:
    """Return the kernels of one forward and backward by name, as a GPU's profiler sees them."""
    layer = Layer(form, noise(LAUNCH_SHAPE), "cuda")
    layer.train()  # compiles, and lets cuDNN choose
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        layer.train()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
    return Counter(name for name in names if not name.startswith(("Memcpy", "Memset")))


def count(device: str) -> tuple[dict[str, Counter[str]], dict[str, str]]:
    """Return the kernels of eager and of ours, and why a backend cannot be counted."""
    forms, missing = [Form("eager", torch.float16, eager, joined=True)], {}
    for backend in ("triton", "cuda") if device == "cuda" else ("triton",):
        form = mine(backend, torch.float16, "frame-major")
        reason = obstacle(form, LAUNCH_SHAPE, device)
        if reason is None:
            forms.append(form)
        else:
            missing[backend] = reason
    kernels = profiled if device == "cuda" else counted
    return {form.backend or form.name: kernels(form) for form in forms}, missing


def launch_rows(bench: Bench, device: str) -> list[Row]:
    """Return and print the rows of launches, of eager and of ours."""
    if device == "cuda":
        counts, missing = count(device)
    else:
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, str(Path(__file__).resolve())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"counting launches under TRITON_INTERPRET=1 failed:\n{done.stderr}")
        counts, missing = json.loads(done.stdout.splitlines()[-1])
    for name, reason in missing.items():
        bench.skip(f"launches, {name}", reason)
    case, rows = f"launches T={LAUNCH_SHAPE.steps}", list[Row]()
    for name, kernels in counts.items():
        row: Row = {
            "case": case,
            "backend": name,
            "pass": "forward+backward",
            "dtype": "float16",
            "ours": name != "eager",
        }
        rows.append(row | {"launches": sum(kernels.values()), "kernels": dict(kernels)})
        print(f"{case} | forward+backward | {name} | {rows[-1]['launches']} kernels", flush=True)
    return rows


if __name__ == "__main__":
    convolution.needs_float32 = lambda x: False  # a GPU convolves in 16 bits
    torch.set_num_threads(1)
    print(json.dumps(count("cpu")))
