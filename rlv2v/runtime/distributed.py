"""Several processes as one run: the ranks of torchrun, what they average, and what they agree on.

This is the one place that uses torch.distributed. A process alone averages, gathers and agrees with itself: every
function is then the identity, and the rest of the package has no path of its own for several ranks.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlv2v.errors import UserError, first_line
from rlv2v.runtime.device import grow_segments, pick_device

NUM_BUCKETS = 4  # a phase; fewer where they would be small
MIN_BUCKET_BYTES = 256 * 1024
MEETING = timedelta(minutes=10)  # for all ranks to be there
POLL = 0.05  # seconds
PATIENCE = timedelta(hours=6)  # of ranks that wait while the first one reads a dataset
T = TypeVar("T")


class StepControl(NamedTuple):
    """What all ranks do next, alike."""

    stop: bool
    """Some rank was asked to end."""
    seconds: float
    """Seconds of the run by rank 0's clock."""
    save: bool
    """Rank 0 wants a checkpoint."""


class World:
    """This process among the ranks of a run.

    Args:
        device: where this rank computes.
        control: the group that small decisions go through, on the CPU; None alone.
        restarts: how often torchrun has brought this job back, alike on all ranks.
    """

    def __init__(self, device: torch.device, control: Any = None, restarts: int = 0) -> None:
        self.device, self._control, self.restarts = device, control, restarts
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if control else (0, 1)
        self._pending: tuple[Any, Tensor] | None = None

    @property
    def first(self) -> bool:
        """Whether this rank is the one that writes files and messages."""
        return self.rank == 0

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 alone, and return its result on all ranks."""
        value = [make() if self.first else None]
        if self._control:
            with peer_errors():
                dist.broadcast_object_list(value, group=self._control, device=torch.device("cpu"))
        return value[0]  # type: ignore[return-value]

    def gather_objects(self, value: T) -> list[T]:
        """Return every rank's `value` on all ranks, in their order."""
        values = [value] * self.size
        if self._control:
            with peer_errors():
                dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast_parameters(self, *modules: nn.Module) -> None:
        """Give all ranks the parameters and buffers of rank 0."""
        if not self._control:
            return
        with peer_errors(), torch.no_grad():
            for module in modules:
                for tensor in (*module.parameters(), *module.buffers()):
                    copy = tensor.detach().contiguous()  # channels-last weights are not contiguous
                    dist.broadcast(copy, 0)
                    tensor.copy_(copy)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self._control:
            with peer_errors():
                dist.barrier(group=self._control)

    def all_agree(self, control: StepControl) -> StepControl:
        """Hand in what this rank wants, and return what the ranks agreed on at the call before; alone: this call's.

        The answer is a step old so that no rank waits for it: it travels while the next step is computed.
        """
        if not self._control:
            return control
        agreed = self.flush()
        by_rank0 = (control.seconds, float(control.save)) if self.first else (0.0, 0.0)
        sums = torch.tensor([float(control.stop), *by_rank0], dtype=torch.float64)
        with peer_errors():
            self._pending = (dist.all_reduce(sums, group=self._control, async_op=True), sums)
        return agreed

    def flush(self) -> StepControl:
        """Wait for the answer to the last call of `all_agree`, and return it."""
        if self._pending is None:
            return StepControl(False, 0.0, False)
        (work, sums), self._pending = self._pending, None
        with peer_errors():
            work.wait()
        return StepControl(bool(sums[0]), float(sums[1]), bool(sums[2]))

    def close(self) -> None:
        """Leave the other ranks; every rank calls it, and only when all goes well."""
        if self._control:
            self.flush()
            self.abort()

    def abort(self) -> None:
        """Leave the other ranks after an error: gloo aborts if its threads live until the interpreter's end."""
        if self._control:
            self._pending = self._control = None
            dist.destroy_process_group()


def connect(device: str) -> World:
    """Join torchrun's ranks, over NCCL on GPUs and gloo on CPUs; without torchrun this is a world of one.

    Args:
        device: as `rlv2v.runtime.device.pick_device` takes it; "auto" and "cuda" mean the GPU of the local rank.

    Raises:
        UserError: no such device, or the ranks cannot reach each other.
    """
    alone, gpu = "RANK" not in os.environ or "WORLD_SIZE" not in os.environ, torch.cuda.is_available()
    if gpu:
        grow_segments()
    if not alone and gpu and device in ("auto", "cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    picked = pick_device(device)
    if picked.type == "cuda":  # streams, events and recordings are those of the current device
        torch.cuda.set_device(picked)
    if alone:
        return World(picked, restarts=restarts())
    try:
        store, rank, size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
        # torchrun may keep one store over its restarts, with the addresses of ranks that are dead by now
        name, count = meet(store, rank, size)
        store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if picked.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
        return World(picked, dist.new_group(backend="gloo", timeout=PATIENCE), count)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"torchrun: rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not reach the others: "
            f"{first_line(error)}"
        ) from None


def meet(store: Any, rank: int, size: int) -> tuple[str, int]:
    """Return a name that the living processes of all ranks have alike, and nobody before them had; and their restarts.

    No number of torchrun's is alike on all nodes: where one node restarts its ranks, another sees new members, which
    it does not count. So each rank leaves a word of its own in the store; rank 0 answers with those that it found,
    until every rank has found its own in the answer. The restarts are the most that a rank knows of, or one where the
    store has seen ranks before these.

    Raises:
        RuntimeError: they have not met in `MEETING`.
    """
    word, end = f"{secrets.token_hex(8)}:{restarts()}", time.monotonic() + MEETING.total_seconds()
    store.set(f"word-{rank}", word)
    while time.monotonic() < end:
        if rank == 0:
            words = [word] + [store.get(f"word-{r}").decode() for r in range(1, size)]
            store.set("answer", " ".join(words))
            if size == 1 or store.check([f"heard-{r}-{words[r]}-{word}" for r in range(1, size)]):
                count = max(int(store.add("meetings", 1) > 1), *(int(own.partition(":")[2]) for own in words))
                store.set(f"agreed-{word}", str(count))
                return word, count
        else:
            words = store.get("answer").decode().split()
            if len(words) == size and words[rank] == word:
                store.set(f"heard-{rank}-{word}-{words[0]}", "")
                if store.check([agreed := f"agreed-{words[0]}"]):
                    return words[0], int(store.get(agreed))
        time.sleep(POLL)
    raise RuntimeError(f"not all of {size} ranks were there within {MEETING.total_seconds():g} s")


def restarts() -> int:
    """Return how often torchrun's agent on this node has brought the job back."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def num_ranks() -> int:
    """Return the number of ranks that the functions below run over."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextmanager
def peer_errors() -> Iterator[None]:
    """Turn a collective's error into a UserError: a rank that is gone is no bug of this one."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            f"lost another rank ({first_line(error)}); torchrun --max-restarts brings a run back by itself, "
            "--resume by hand"
        ) from None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.contiguous().clone()
        with peer_errors():
            dist.all_reduce(y)
        return y / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _Mean.apply(grads[0])


def mean(x: Tensor) -> Tensor:
    """Return the mean of x over the ranks; its gradient is the mean of the ranks' gradients."""
    return x if num_ranks() == 1 else _Mean.apply(x)


def gather(x: Tensor) -> Tensor:
    """Concatenate (B,...) of every rank to (ranks*B,...), for a term that all ranks then compute alike.

    Backward returns this rank's share of the gradient, times the number of ranks: the mean over ranks of the weights'
    gradients is then the term's own.
    """
    if num_ranks() == 1:
        return x
    shares = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
    with peer_errors():
        dist.all_gather(shares, x.detach().contiguous())
    if x.requires_grad:
        shares[dist.get_rank()] = own = x.view_as(x)
        own.register_hook(lambda grad: grad * num_ranks())
    return torch.cat(shares)


class Reducer:
    """Average one phase's gradients over the ranks, in few large buckets, begun while the backward pass still runs.

        with reducer:
            loss.backward()
        reducer.finish()

    Buckets follow the order in which the first backward pass made the gradients, so that each is complete early; they
    are sent in that order on every rank. A weight without a gradient stays without one.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weights = list(weights)
        self._active, self._order = False, list[int]()
        self._buckets: list[list[int]] = []
        self._bucket_of: dict[int, int] = {}
        self._missing: list[int] = []
        self._sent: list[tuple[Any, Tensor, list[Tensor]]] = []
        self._hooks = [
            weight.register_post_accumulate_grad_hook(self._hook(index))
            for index, weight in enumerate(self._weights)
            if num_ranks() > 1
        ]

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        def ready(_: Tensor) -> None:
            if not self._active:
                return
            if not self._buckets:
                self._order.append(index)
                return
            self._missing[self._bucket_of[index]] -= 1
            while len(self._sent) < len(self._buckets) and not self._missing[len(self._sent)]:
                self._send_next()

        return ready

    def __enter__(self) -> Reducer:
        self._active = True
        self._order.clear()
        self._missing = [len(bucket) for bucket in self._buckets]
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False

    def finish(self) -> None:
        """Wait until every gradient is the mean over the ranks."""
        if not self._hooks:
            return
        if not self._buckets:
            self._arrange()
        while len(self._sent) < len(self._buckets):
            self._send_next()
        for work, flat, grads in self._sent:
            if work is not None:
                with peer_errors():
                    work.wait()
                flat /= num_ranks()
                pieces = flat.split([grad.numel() for grad in grads])
                torch._foreach_copy_(grads, [p.view(grad.shape) for p, grad in zip(pieces, grads, strict=True)])
        self._sent = []

    def _send_next(self) -> None:
        """Begin the all-reduce of the first bucket that has not been sent."""
        bucket = self._buckets[len(self._sent)]
        grads = [grad for index in bucket if (grad := self._weights[index].grad) is not None]
        flat = torch.cat([grad.reshape(-1) for grad in grads]) if grads else torch.empty(0)
        with peer_errors():
            self._sent.append((dist.all_reduce(flat, async_op=True) if grads else None, flat, grads))

    def _arrange(self) -> None:
        """Fill the buckets in rank 0's order of the pass that has just run; the weights it left out come last."""
        order = [[*self._order, *(i for i in range(len(self._weights)) if i not in set(self._order))]]
        with peer_errors():
            dist.broadcast_object_list(order)
        sizes = [weight.numel() * weight.element_size() for weight in self._weights]
        limit = max(MIN_BUCKET_BYTES, -(-sum(sizes) // NUM_BUCKETS))
        bucket, filled = list[int](), 0
        for index in order[0]:
            bucket.append(index)
            filled += sizes[index]
            if filled >= limit:
                self._buckets.append(bucket)
                bucket, filled = [], 0
        self._buckets += [bucket] if bucket else []
        self._bucket_of = {index: number for number, bucket in enumerate(self._buckets) for index in bucket}

    def close(self) -> None:
        """Remove the hooks from the weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
