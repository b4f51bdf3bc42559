"""CUDA graphs of a step's phases: their kernels are launched once by the host, and after that replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Tensor | None, ...]
Phase = Callable[..., Any]
Recording = tuple[Callable[[], object], Any]
NUM_PLAIN = 3  # calls of a phase before it is recorded: its kernels are chosen, its gradients and moments are there


def record_cuda(phase: Phase, inputs: Inputs) -> Recording:
    """Record `phase(*inputs)` without running it; returns how to replay it, and its outputs' tensors."""
    graph = torch.cuda.CUDAGraph()
    # Threads of the loader go on allocating pinned memory meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = phase(*inputs)
    return graph.replay, outputs


class Graphs:
    """Calls phases, which are functions of tensors, by name; after a few calls of each it is recorded and replayed.

    A phase may read and change, besides its inputs, tensors that live as long as it does (weights, moments), but no
    number of the host that differs from step to step. Outputs belong to the phase: the next call overwrites them.

    Args:
        record: what makes a recording; None: phases are called as they are.
    """

    def __init__(self, record: Callable[[Phase, Inputs], Recording] | None) -> None:
        self._record = record
        self._calls: dict[str, int] = {}
        self._recorded: dict[str, tuple[Inputs, Recording]] = {}

    def __call__(self, name: str, phase: Phase, *inputs: Tensor | None) -> Any:
        if self._record is None:
            return phase(*inputs)
        if name not in self._recorded:
            self._calls[name] = self._calls.get(name, 0) + 1
            if self._calls[name] <= NUM_PLAIN:
                return self._beside(phase, inputs)
            held = tuple(None if t is None else t.detach().clone() for t in inputs)
            self._recorded[name] = (held, self._record(phase, held))
        held, (replay, outputs) = self._recorded[name]
        for mine, given in zip(held, inputs, strict=True):
            if mine is not None:
                assert given is not None
                mine.copy_(given)
        replay()
        return outputs

    @staticmethod
    def _beside(phase: Phase, inputs: Inputs) -> Any:
        """A plain call; on a GPU in a stream of its own, as what is to be recorded later must be."""
        if not torch.cuda.is_available():
            return phase(*inputs)
        here, beside = torch.cuda.current_stream(), torch.cuda.Stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            outputs = phase(*inputs)
        here.wait_stream(beside)
        return outputs
