"""What more GPUs bring: a small model of a step of N ranks, of inputs that are all named here or measured.

    operator      t = max(max(FLOPs / peak, bytes / bandwidth) / share of the peaks, floor)
    all-reduce    t = 2 (N-1) latency + 2 (N-1)/N bytes / bandwidth                       (ring; of the slowest link)
    all-gather    t = (N-1) latency + (N-1) bytes / bandwidth                             (bytes: of one rank)
    step          the events of `scaling_trace` in order: operators one after the other; a collective starts when it
                  was asked for and those before it are done; a phase waits for its gradients before its optimiser
    efficiency    t(1 rank) / t(N ranks), each rank with the batch of the one

So a bucket hides behind the backward that is left when it goes out, the last one cannot hide, and what waits, waits.
Left out: ranks that wait for the slowest one, what NCCL's kernels take from the others, launches, the host, new
transitions. The first two make scaling worse than said here, the others make steps longer and scaling better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scaling_trace import Event, Mark, Op, Send


@dataclass(frozen=True)
class Card:
    """A GPU's peaks by its data sheet: dense FLOP/s in 16 bits with float32 sums, FLOP/s in float32, bytes/s."""

    name: str
    half: float
    single: float
    bandwidth: float

    def seconds(self, op: Op, case: Case) -> float:
        """Of an operator."""
        arithmetic = op.flops / (self.half if op.half else self.single)
        moving = op.bytes / self.bandwidth if case.moves else 0.0
        return max(max(arithmetic, moving) / case.share, case.floor)


@dataclass(frozen=True)
class Case:
    """What is assumed of a card's way with operators.

    moves: bytes count; share: of its peaks that it reaches; floor: least seconds of an operator.
    """

    name: str
    moves: bool
    share: float
    floor: float


@dataclass(frozen=True)
class Link:
    """What joins ranks in a ring: seconds a hop, and bytes/s in one direction (nccl-tests' bus bandwidth)."""

    name: str
    latency: float
    bandwidth: float

    def all_reduce(self, num_bytes: float, num_ranks: int) -> float:
        """Seconds of one all-reduce."""
        hops = 2 * (num_ranks - 1)
        return hops * self.latency + hops / num_ranks * num_bytes / self.bandwidth

    def all_gather(self, num_bytes: float, num_ranks: int) -> float:
        """Seconds until each rank has the `num_bytes` of every other one."""
        return (num_ranks - 1) * (self.latency + num_bytes / self.bandwidth)

    def collective(self, send: Send, num_ranks: int) -> float:
        """Seconds of either."""
        return (self.all_reduce if send.kind == "all_reduce" else self.all_gather)(send.bytes, num_ranks)


CARDS = (
    # NVIDIA Ampere GA102 architecture whitepaper (table of GeForce cards), H100 and H200 data sheets (SXM, dense)
    Card("RTX 3070", half=40.6e12, single=20.3e12, bandwidth=448e9),
    Card("H100 SXM", half=989e12, single=67e12, bandwidth=3.35e12),
    Card("H200 SXM", half=989e12, single=67e12, bandwidth=4.8e12),
)
CASES = (  # from the shortest step, which scales worst; the last one's figures are assumed
    Case("arithmetic alone", moves=False, share=1.0, floor=0.0),
    Case("at its peaks", moves=True, share=1.0, floor=0.0),
    Case("at 30 %, 3 us an operator", moves=True, share=0.3, floor=3e-6),
)
LINKS = {  # assumed, on the careful side; none of them has been measured
    "PCIe 4.0 x16": Link("PCIe 4.0 x16, through host memory", latency=10e-6, bandwidth=5.5e9),
    "PCIe 4.0 x8": Link("PCIe 4.0 x8, through host memory", latency=10e-6, bandwidth=2.75e9),
    "NVLink": Link("NVLink 4", latency=5e-6, bandwidth=300e9),
    "10 GbE": Link("10 Gbit/s Ethernet, TCP", latency=50e-6, bandwidth=1.1e9),
    "25 GbE": Link("25 Gbit/s Ethernet, TCP", latency=50e-6, bandwidth=2.7e9),
    "100 GbE": Link("100 Gbit/s Ethernet, RDMA", latency=15e-6, bandwidth=11e9),
}


def between_nodes(inside: Link, outside: Link) -> Link:
    """One flat ring over all GPUs of several nodes: each hop as slow as the slowest."""
    latency, bandwidth = max(inside.latency, outside.latency), min(inside.bandwidth, outside.bandwidth)
    return Link(f"{outside.name} between nodes, {inside.name} within", latency, bandwidth)


@dataclass(frozen=True)
class Step:
    """Seconds of a step: its operators, and what of its collectives hides behind none of them."""

    compute: float
    exposed: float
    sent: float
    """Of all collectives, hidden or not."""

    @property
    def efficiency(self) -> float:
        """Of N ranks, with as much work each as one alone."""
        return self.compute / (self.compute + self.exposed)


Timeline = list[float | Send | Mark]


def no_send(_: Send) -> float:
    """Of one rank alone."""
    return 0.0


def timeline(events: Sequence[Event], seconds: Callable[[Op], float]) -> Timeline:
    """The events with the operators between two others as their seconds together."""
    line: Timeline = [0.0]
    for event in events:
        if isinstance(event, Op):
            last = line[-1]
            if isinstance(last, float):
                line[-1] = last + seconds(event)
            else:
                line.append(seconds(event))
        else:
            line.append(event)
    return line


def play(line: Timeline, of_send: Callable[[Send], float], scale: float = 1.0) -> Step:
    """A step by its timeline, operators taking `scale` times as long.

    What the ranks agree on for the step after goes through a group of its own on the hosts and holds nobody up.
    """
    now = free = compute = total = 0.0  # free: when the link is
    marks = [event.part for event in line if isinstance(event, Mark)]
    for event in line:
        if isinstance(event, Mark):
            marks.pop(0)
            if event.part in ("all_reduce", "numbers"):
                now = max(now, free)
        elif isinstance(event, Send):
            if marks[0] == "control":
                continue
            took = of_send(event)
            free = max(free, now) + took
            total += took
            now = free if event.waits else now
        else:
            now += scale * event
            compute += scale * event
    return Step(compute, now - compute, total)


def mean_step(steps: Sequence[Step]) -> Step:
    """Of a cycle's steps."""
    num = len(steps)
    return Step(*(sum(getattr(step, name) for step in steps) / num for name in ("compute", "exposed", "sent")))


def predict(lines: Sequence[Timeline], of_send: Callable[[Send], float], scale: float = 1.0) -> Step:
    """A cycle's mean step."""
    return mean_step([play(line, of_send, scale) for line in lines])


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float, list[float]]:
    """(latency, bandwidth, relative errors) of t = latency + bytes / bandwidth by least squares of relative errors.

    Raises:
        ValueError: fewer than two sizes, or larger ones that take no longer.
    """
    # minimise sum (a/t + b s/t - 1)^2: the normal equations of two unknowns
    rows = [(1 / t, s / t) for s, t in zip(sizes, seconds, strict=True)]
    aa, ab, bb = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = (sum(r[i] for r in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if len(set(sizes)) < 2 or determinant <= 0:
        raise ValueError(f"fit: expected at least two sizes, got {list(sizes)}")
    latency, inverse = (a1 * bb - b1 * ab) / determinant, (b1 * aa - a1 * ab) / determinant
    if inverse <= 0:
        raise ValueError(f"fit: expected times that grow with the bytes, got {list(seconds)} for {list(sizes)}")
    errors = [(latency + inverse * s) / t - 1 for s, t in zip(sizes, seconds, strict=True)]
    return latency, 1 / inverse, errors
