"""CUDA graphs of a step's phases: their kernels are launched once by the host, and after that replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlv2v.errors import UserError

Inputs = tuple[Tensor | None, ...]
Phase = Callable[..., Any]
Recording = tuple[Callable[[], object], Any]
NUM_PLAIN = 3  # calls of a phase before it is recorded: its kernels are chosen, its gradients and moments are there


class Recorder:
    """How phases become CUDA graphs: all in one stream and one pool of memory.

    One stream, that of the plain calls before too: autograd adds to a weight's gradient in the stream that the weight
    was first used in, and another one would be drawn into the recording. One pool: phases follow each other, so that
    each may work in the memory in which the others did.
    """

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def plain(self, phase: Phase, inputs: Inputs) -> Any:
        """`phase(*inputs)`."""
        here = torch.cuda.current_stream()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            outputs = phase(*inputs)
        here.wait_stream(self._stream)
        return outputs

    def record(self, phase: Phase, inputs: Inputs) -> Recording:
        """Record `phase(*inputs)` without running it; returns how to replay it, and its outputs' tensors."""
        graph = torch.cuda.CUDAGraph()
        # Threads of the loader go on allocating pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = phase(*inputs)
        return graph.replay, outputs


class Graphs:
    """Calls phases, which are functions of tensors, by name; after a few calls of each they are recorded and replayed.

    A phase may read and change, besides its inputs, tensors that live as long as it does (weights, moments), but no
    number of the host that differs from step to step. Its outputs, without gradient, are overwritten by the next call
    of any phase. None is recorded before all that were called have had their plain calls: these would need memory of
    their own beside that of the recordings.

    Args:
        recorder: what makes a recording; None: phases are called as they are.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._calls: dict[str, int] = {}
        self._recorded: dict[str, tuple[Inputs, Recording]] = {}

    def __call__(self, name: str, phase: Phase, *inputs: Tensor | None) -> Any:
        """Raises UserError when it cannot be recorded."""
        if self._recorder is None:
            return phase(*inputs)
        if name not in self._recorded:
            self._calls.setdefault(name, 0)
            if min(self._calls.values()) < NUM_PLAIN:
                self._calls[name] += 1
                return self._recorder.plain(phase, inputs)
            held = tuple(None if t is None else t.detach().clone() for t in inputs)
            try:
                self._recorded[name] = (held, self._recorder.record(phase, held))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UserError(
                    f"CUDA graphs: the phase {name!r} could not be recorded ({str(error).splitlines()[0]}); "
                    f"train with --no-graphs"
                ) from error
        held, (replay, outputs) = self._recorded[name]
        for mine, given in zip(held, inputs, strict=True):
            if mine is not None:
                assert given is not None
                mine.copy_(given)
        replay()
        return outputs
