"""Bytes that a ConvLSTM layer holds from its forward to its backward, for each element and step, one of B*T*C*H*W.

A storage counts once, however many tensors of the graph look into it; the caller's own x and weights count apart.
`with_result` adds the hidden states where they are not among what is saved, as ours are: the caller holds them anyway.
By hand, C_in = C: eager in float32 saves cat of x and h 8, gates 16, c 4, tanh c 4, so 32, with its result 36. Ours in
16 bits: gates 8, c 4, h 2, so 14; recomputed 6. Ours get x as our layers hand it on; in another layout it is copied
first, 2 more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from convlstm_layer import Form, Layer, Shape, noise, obstacle
from convlstm_peers import BF16, F32, eager, mine
from convlstm_rows import Row, name_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

AT_MOST = {"store": 14.0, "recompute": 6.0}
"""Of ours in 16 bits."""


def held_bytes(run: Callable[[], Tensor], given: Iterable[Tensor]) -> dict[str, int]:
    """Bytes that autograd saves in `run`: `saved`, those of the tensors `given` apart as `given`; and `with_result`."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held: no other one gets its address meanwhile
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    sizes = {address: storage.nbytes() for address, storage in storages.items()}
    own = {tensor.untyped_storage().data_ptr() for tensor in given}
    saved = sum(size for address, size in sizes.items() if address not in own)
    of_result = result.untyped_storage()
    more = 0 if of_result.data_ptr() in sizes else of_result.nbytes()
    return {"saved": saved, "given": sum(sizes.values()) - saved, "with_result": saved + more}


def saved_rows(shape: Shape, device: str = "cpu") -> tuple[list[Row], dict[str, str]]:
    """Rows of ours and of eager, printed, and why one is missing."""
    backend = "cpu" if device == "cpu" else "triton"
    forms = [Form("eager", dtype, eager, joined=True) for dtype in (F32, BF16)]
    for dtype in (F32, BF16, torch.float16):
        forms += [mine(backend, dtype, "frame-major"), mine(backend, dtype, "frame-major recompute")]
    data, rows, missing = noise(shape), list[Row](), dict[str, str]()
    for form in forms:
        why = obstacle(form, shape, device)
        if why is not None:
            missing[f"saved, {form.label}"] = why
            print(f"saved {shape} | {form.label} | not counted: {why}", flush=True)
            continue
        layer = Layer(form, data, device)
        held = held_bytes(layer.run, layer.leaves)
        each = {name: round(size / shape.elements, 2) for name, size in held.items()}
        mode = "recompute" if "recompute" in form.name else "store"
        name, limit = form.backend or form.name, AT_MOST[mode] if form.backend and form.dtype.itemsize == 2 else None
        row: Row = {"case": f"saved {shape}", "backend": name, "pass": mode, "dtype": name_of(form.dtype)}
        row |= {"bytes_per_element_step": each["saved"], "at_most": limit}
        rows.append(row | {"bytes_with_result": each["with_result"], "bytes_of_given": each["given"]})
        figures = f"{each['saved']:.2f} B an element and step, {each['with_result']:.2f} with the result"
        print(f"{row['case']} | {mode:9} | {name} {row['dtype']} | {figures}", flush=True)
    return rows, missing
