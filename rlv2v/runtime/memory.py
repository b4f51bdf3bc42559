"""Memory counted by running code on fake tensors, which have shapes, dtypes and storages, but no values.

Fake tensors pass for CPU tensors: autograd, autocast and checkpointing treat them as real ones, and torch's meta
kernels stand for the arithmetic. torch's own FakeTensorMode counts the same bytes in four times the time. `Ledger`
follows which storages are alive, of fake tensors or of real ones, which is how the count is tested.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlv2v.kernels.ops import backward_by, forward_by
from rlv2v.kernels.triton.recurrence import TritonRecurrence

CPU, META = torch.device("cpu"), torch.device("meta")
CAPABILITY = (8, 6)  # an RTX 30 card: its tiles round the packed weights up
TRITON = TritonRecurrence(launch=lambda *_: None, capability=CAPABILITY)
CONVLSTM: dict[Any, Callable[..., Any]] = {
    torch.ops.rlv2v.convlstm.default: forward_by,
    torch.ops.rlv2v.convlstm_backward.default: backward_by,
}


class Ledger:
    """Count the bytes of the storages that are alive.

    A storage counts once, however many tensors view it.

    Attributes:
        bytes, peak: alive now, and the most that was alive at once.
        sizes: bytes of each storage that is alive.
        saved: which of them autograd has saved for a backward pass.
    """

    def __init__(self) -> None:
        self.bytes = self.peak = 0
        self.sizes: dict[int, int] = {}
        self.saved: set[int] = set()
        self._references: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: Tensor) -> int:
        """Count a tensor's storage unless it is counted already; return its key in `sizes`."""
        storage = (tensor.meta if isinstance(tensor, FakeTensor) else tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.sizes:

            def remove(_: Any) -> None:
                del self.sizes[key], self._references[key]
                self.saved.discard(key)
                self.bytes -= size

            self.sizes[key], self._references[key] = size, weakref.ref(storage, remove)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        return key

    def save(self, tensor: Tensor) -> Tensor:
        """Note that autograd saves a tensor; the `pack_hook` of `saved_tensors_hooks`."""
        self.saved.add(self.add(tensor))
        return tensor

    def saved_bytes(self, excluded: set[int]) -> int:
        """Return the bytes of the saved storages that are alive, without the keys `excluded`."""
        return sum(self.sizes[key] for key in self.saved - excluded)


class CountStorages(TorchDispatchMode):
    """Add to a ledger what operators return."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        map_tensors(self.ledger.add, result)
        return result


class FakeTensor(Tensor):
    """A tensor that passes for one on the CPU; `meta` has its shape, strides and storage, but no values."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> FakeTensor:
        fake = Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype, device=CPU
        )
        fake.meta = meta
        return fake

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{op} of a fake tensor outside of `CountFakes`")

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class CountFakes(CountStorages):
    """Run operators on fake tensors, and count; the ConvLSTM allocates what its Triton backend does on a GPU."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fakes: dict[int, FakeTensor] = {}

        def meta_of(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, FakeTensor):
                return tensor.to(META)
            fakes[id(tensor.meta)] = tensor
            return tensor.meta

        args, kwargs = map_tensors(meta_of, args), map_tensors(meta_of, kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = META
        with CountStorages(self.ledger):
            if op in CONVLSTM:
                *tensors, _, last = args
                result: Any = CONVLSTM[op](TRITON, *tensors, last)
            else:
                result = op(*args, **kwargs)
        # What an operator changes in place, it returns.
        return map_tensors(lambda meta: fakes[id(meta)] if id(meta) in fakes else FakeTensor(meta), result)


def map_tensors(fn: Callable[[Tensor], Any], value: Any) -> Any:
    """Return an operator's arguments or results with `fn` of every tensor; torch's `tree_map` is five times as slow."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, (tuple, list)):
        return type(value)([map_tensors(fn, item) for item in value])
    return {name: map_tensors(fn, item) for name, item in value.items()} if isinstance(value, dict) else value
