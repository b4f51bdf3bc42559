"""What a ConvLSTM layer keeps, and on a GPU launches: counted, not timed.

Bytes that autograd holds from forward to backward, for each element and step (one of B*T*C*H*W). A storage counts once;
the caller's own x and weights count apart. `with_result` adds the hidden states where they are not among what is saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from convlstm_layer import Form, Layer, Shape, name_of, runnable, solved
from convlstm_peers import BF16, F32, eager, mine
from harness import Bench, Row
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.autograd.graph import saved_tensors_hooks

LAUNCH_SHAPE = Shape(1, 8, 16, 16, 4, 4)
"""The number of launches depends on T alone."""


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
    """Return the rows of saved bytes, of eager and of ours."""
    backend = "cpu" if device == "cpu" else "triton"
    forms = [Form("eager", dtype, eager, joined=True) for dtype in (F32, BF16)]
    for dtype in (F32, BF16, torch.float16):
        forms += [mine(backend, dtype, "frame-major"), mine(backend, dtype, "frame-major recompute")]
    rows = list[Row]()
    for form in runnable(bench, f"saved {shape}", forms, shape, device):
        layer = Layer(form, solved(shape, device), device)
        each = {name: round(size / shape.elements, 2) for name, size in saved_bytes(layer.run, layer.leaves).items()}
        row: Row = {"case": f"saved {shape}", "backend": form.backend or form.name, "ours": bool(form.backend)}
        row |= {"pass": "recompute" if "recompute" in form.name else "store", "dtype": name_of(form.dtype)}
        row |= {"bytes_per_element_step": each["saved"], "bytes_with_result": each["with_result"]}
        rows.append(row | {"bytes_of_inputs": each["inputs"]})
    return rows


def launch_rows(bench: Bench) -> list[Row]:
    """Return the GPU kernels of one sequence, forward and backward, of eager and of ours, as the profiler sees them."""
    dtype, rows, case = torch.float16, list[Row](), f"launches T={LAUNCH_SHAPE.steps}"
    forms = [Form("eager", dtype, eager, joined=True)]
    forms += [mine(backend, dtype, "frame-major") for backend in ("triton", "cuda")]
    for form in runnable(bench, case, forms, LAUNCH_SHAPE, "cuda"):
        layer = Layer(form, solved(LAUNCH_SHAPE, "cuda"), "cuda")
        layer.train()  # compiles, and lets cuDNN choose
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            layer.train()
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() if event.device_type == DeviceType.CUDA]
        kernels = Counter(name for name in names if not name.startswith(("Memcpy", "Memset")))
        row: Row = {"case": case, "backend": form.backend or form.name, "pass": "forward+backward", "dtype": "float16"}
        rows.append(row | {"ours": bool(form.backend), "launches": kernels.total(), "kernels": dict(kernels)})
    return rows
