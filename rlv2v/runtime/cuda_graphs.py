"""CUDA graphs of a step's phases: the host launches their kernels once, and after that replays them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from rlv2v.errors import UserError

Phase = Callable[..., Any]
Inputs = tuple[Any, ...]  # tensors in nested tuples and dictionaries, and objects that stay the same
Recording = tuple[Callable[[], object], Any]
NUM_PLAIN = 3  # calls of a phase before it is recorded: its kernels are chosen, its gradients and moments are there


class Recorder:
    """Makes CUDA graphs of phases, all in one stream and one pool of memory.

    Plain calls use that stream too: autograd adds to a weight's gradient in the stream in which the weight was first
    used, and another stream would be drawn into the recording. One pool is enough, because phases follow each other:
    each may work in the memory in which the others did.
    """

    def __init__(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def plain(self, phase: Phase, inputs: Inputs) -> Any:
        """Return `phase(*inputs)`."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = phase(*inputs)
        current.wait_stream(self._stream)
        return outputs

    def record(self, phase: Phase, inputs: Inputs) -> Recording:
        """Record `phase(*inputs)` without running it; return a function that replays it, and its outputs."""
        graph = torch.cuda.CUDAGraph()
        # Meanwhile the loader's threads go on allocating pinned memory.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = phase(*inputs)
        return graph.replay, outputs


class Graphs:
    """Calls phases by name; after a few calls of each, they are recorded and replayed.

    A phase may read and change tensors of its inputs, and tensors that live as long as it does (weights, moments). It
    may not use a number of the host that differs from step to step. No phase is recorded before all have had their
    plain calls: those would need memory of their own besides that of the recordings.

    Args:
        recorder: makes the recordings; None: phases are called as they are.
    """

    def __init__(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        self._calls: dict[str, int] = {}
        self._recorded: dict[str, tuple[Inputs, Recording]] = {}

    @property
    def recorded(self) -> frozenset[str]:
        """The names of the phases that are recorded."""
        return frozenset(self._recorded)

    def __call__(self, name: str, phase: Phase, *inputs: Any) -> Any:
        """Return `phase(*inputs)`, detached from autograd; its tensors belong to the caller.

        Inputs and outputs are tensors, in tuples, named tuples and dictionaries; an input that is no tensor has to be
        the same in every call.

        Raises:
            UserError: the phase cannot be recorded.
        """

        def detached_phase(*inputs: Any) -> Any:
            # With its autograd graph, a recording would keep the weights' gradient accumulators alive.
            return tree_map_only(Tensor, Tensor.detach, phase(*inputs))

        if self._recorder is None:
            return detached_phase(*inputs)
        if name not in self._recorded:
            self._calls.setdefault(name, 0)
            if min(self._calls.values()) < NUM_PLAIN:
                self._calls[name] += 1
                return self._recorder.plain(detached_phase, inputs)
            static_inputs = tree_map_only(Tensor, lambda t: t.detach().clone(), inputs)
            try:
                self._recorded[name] = (static_inputs, self._recorder.record(detached_phase, static_inputs))
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise UserError(
                    f"CUDA graphs: the phase {name!r} could not be recorded ({str(error).splitlines()[0]}); "
                    f"train with --no-graphs"
                ) from error
        static_inputs, (replay, outputs) = self._recorded[name]
        for static, new in zip(tree_leaves(static_inputs), tree_leaves(inputs), strict=True):
            if isinstance(static, Tensor):
                static.copy_(new)
        replay()
        # The next replay of any phase writes to the recording's memory again.
        return tree_map_only(Tensor, Tensor.clone, outputs)
