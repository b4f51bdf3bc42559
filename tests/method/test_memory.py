"""Tests of the memory of a step: the count against real tensors, results that do not depend on it, and the advice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch

from rlv2v.config import Config
from rlv2v.method import memory as method_memory
from rlv2v.method.memory import GB, Bytes, advise, count, estimate, largest, scaled, with_graphs_that_fit
from rlv2v.model.activation_memory import MEMORY
from rlv2v.model.build import build_nets
from rlv2v.runtime.device import out_of_memory
from rlv2v.runtime.memory import CountFakes, CountStorages, Ledger

TINY = Config.of("tiny", graphs=False)
PHASES = ["generators", "discriminators", "critics"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("memory", "precision", "phases"),
    [
        ("frames", "bf16", ["discriminators", "critics"]),
        *(pytest.param(m, p, PHASES, marks=pytest.mark.thorough) for m in MEMORY for p in ("fp32", "bf16")),
    ],
)
def test_the_count_is_what_a_real_step_holds(memory: str, precision: str, phases: list[str]) -> None:
    config = TINY.replace(memory=memory, precision=precision, frames=10)
    for phase in phases:
        counted, real = count(config, phase), count(config, phase, mode=CountStorages)
        assert counted.activations == real.activations > 0, phase
        # The count sees what is alive inside a ConvLSTM, which a real run on the CPU hides.
        assert real.peak <= counted.peak <= 1.25 * real.peak, phase


PEAK = """
import sys, torch
from rlv2v import _native
from rlv2v.config import Config
from rlv2v.runtime.memory import CountStorages
from rlv2v.method.memory import count
torch.set_num_threads(1)
def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
count(Config.of("tiny"), "generators", mode=CountStorages)
start = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark from here
count(Config.of("default", memory=sys.argv[1], size=64), "generators", mode=CountStorages)
print(1024 * (kib("VmHWM") - start), _native.pool_bytes()[1])
"""


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark of Linux")
@pytest.mark.parametrize("memory", MEMORY)
def test_the_process_grows_by_what_is_counted(memory: str) -> None:
    """Pages of a real step in a process of its own, against the count: within 15 %, and 30 MB of libraries' own.

    And what the CPU's ConvLSTM has given back, and keeps for its next layer.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, memory], capture_output=True, text=True, check=True, env=os.environ | settings
    )
    grown, idle = (int(number) for number in run.stdout.split())
    config = Config.of("default", memory=memory, size=64)
    counted = count(config, "generators").peak + sum(p.numel() * 4 for p in build_nets(config).parameters())
    message = f"{grown / 1e6:.0f} MB with {idle / 1e6:.0f} idle, counted {counted / 1e6:.0f} MB"
    assert 0.85 * counted - 30e6 <= grown <= 1.15 * counted + 30e6 + idle, message


@pytest.mark.parametrize("mode", [CountStorages, CountFakes])
def test_the_ledger_follows_what_is_alive(mode: type[CountStorages]) -> None:
    ledger = Ledger()
    with mode(ledger):
        a = torch.zeros(100)
        b = a[10:20]
        a.add_(1)
        assert ledger.bytes == 400, "a view and a change in place take nothing"
        c = a * 2
        assert ledger.bytes == 800
        del a
        assert ledger.bytes == 800, "the view keeps all of it"
        del b, c
    assert (ledger.bytes, ledger.peak) == (0, 800)


def test_an_estimate_is_made_of_the_largest_phase_and_grows_with_graphs_and_replicas() -> None:
    config = TINY.replace(rl=False, head="mask", patches=0.0)
    plain, recorded = estimate(config), estimate(config.replace(graphs=True))
    counts = [count(config, phase) for phase in PHASES[:2]]
    assert plain.activations == max(counts, key=lambda counted: counted.peak).activations
    assert recorded.workspace - plain.workspace > 200e6
    assert recorded.activations == plain.activations, "recordings share a pool"
    assert plain.total == sum(plain[:-1])
    assert plain.optimiser == 2 * plain.gradients
    assert estimate(config, num_replicas=2).activations > 1.9 * plain.activations


@pytest.fixture
def simple_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs that are easy to add: 100 MB a frame and clip of x, less by `memory`, and 1 GB for graphs."""

    def estimate(config: Config, *, num_replicas: int = 1) -> Bytes:
        share = {"store": 10, "recompute": 6, "frames": 3}[config.runtime.memory]
        total = 10**7 * share * config.data.frames * config.data.batch_x * num_replicas + GB * config.runtime.graphs
        return Bytes(0, 0, 0, total, 0, total)

    monkeypatch.setattr(method_memory, "estimate", estimate)


@pytest.mark.parametrize(
    ("budget", "graphs", "advice"),
    [
        (5.5, True, "cuda has 5.5 GB; --no-graphs needs 4.5 GB"),
        (4.4, True, "; --no-graphs --memory recompute needs 3.1 GB"),
        (4.4, False, "; --memory recompute needs 3.1 GB"),
        (3.0, False, "; --memory frames needs 2.1 GB"),
        (2.0, False, "; --memory frames --batch-x 1 --batch-y 1 --batch-z 1 --batch-s 2 --transitions 1 needs 1.5 GB"),
        (1.0, False, "no --memory or batch makes it fit: take smaller --frames, --size, --widths or --disc-widths"),
        (9.0, False, "needs about 4.5 GB, cuda has 9.0 GB: free what other programs hold of it, or add --memory recom"),
    ],
)
def test_advice_names_the_first_change_that_fits(
    simple_estimate: None, budget: float, graphs: bool, advice: str
) -> None:
    config = TINY.replace(frames=16, graphs=graphs)
    assert advice in advise(config, torch.device("cuda"), int(budget * GB))
    assert "--no-graphs" not in advise(config, torch.device("cpu"), int(budget * GB)), "the CPU records nothing"


def test_graphs_are_recorded_where_they_fit(simple_estimate: None) -> None:
    config, cuda = TINY.replace(frames=16, graphs=True, replicas=1), torch.device("cuda")
    assert with_graphs_that_fit(config, cuda, int(5.7 * GB)) == config
    assert with_graphs_that_fit(config, cuda, int(5.5 * GB)) == config.replace(graphs=False)
    assert with_graphs_that_fit(config, torch.device("cpu"), 0) == config


def test_advice_counts_a_rank_s_replicas_and_keeps_the_way_that_memory_is_kept(simple_estimate: None) -> None:
    config = TINY.replace(frames=16, memory="frames", replicas=2)
    assert advise(config, torch.device("cpu"), 3 * GB).endswith("needs about 3.1 GB, cpu has 3.0 GB; "
        "--batch-x 1 --batch-y 1 --batch-z 1 --batch-s 2 --transitions 1 needs 2.1 GB")  # fmt: skip


def test_the_largest_fits_and_one_more_does_not(simple_estimate: None) -> None:
    assert largest(TINY, int(3.2 * GB)) == 10
    assert largest(TINY.replace(frames=4), int(3.2 * GB), over="batch") == 2
    assert largest(TINY, GB) == largest(TINY, GB, over="batch") == 0


@pytest.mark.thorough
@pytest.mark.parametrize("over", ["frames", "batch"])
def test_the_largest_is_within_one_or_two_percent(over: Literal["frames", "batch"]) -> None:
    config = TINY.replace(frames=16, size=24)
    number = {"frames": 60, "batch": 20}[over]
    found = largest(config, estimate(scaled(config, over, number)).reserved, over=over)
    assert abs(found - number) <= max(1, 0.02 * number)  # it rounds down


@pytest.mark.thorough
def test_less_is_kept_in_the_order_of_the_modes_and_in_bfloat16() -> None:
    config = TINY.replace(frames=16, size=32)
    store, recompute, frames = (count(config.replace(memory=memory), "generators").peak for memory in MEMORY)
    assert store > recompute > frames
    assert count(config.replace(precision="bf16"), "generators").peak < 0.9 * store


def test_the_clips_of_the_pool_are_counted() -> None:
    """A translation of them is kept for the backward pass, and they are more bytes than their pixels."""
    few, many = (count(Config.of("tiny", batch_pool=num), "generators").activations for num in (0, 8))
    pixels = 3 * 8 * 4 * (3 * 4 * 16 * 16)  # of X, Y and Z: float32, 4 frames of 16x16
    assert many - few > 4 * pixels


@pytest.mark.parametrize(
    ("method", "phase"), [("rlv2v", "discriminators"), ("rlv2v", "critics"), ("cyclegan", "discriminators")]
)
def test_a_rectangle_needs_more_than_its_short_side_and_less_than_its_long_one(method: str, phase: str) -> None:
    small = {"graphs": False, "widths": (2, 4), "disc_widths": (2, 3), "patch": 1 if method != "rlv2v" else 2}
    configs = [Config.of("tiny", method, size=size, **small).check() for size in (16, "16x24", "24x16", 24)]
    square, wide, high, large = (count(config, phase).activations for config in configs)
    assert square < wide < large and abs(wide - high) < 0.01 * wide
    assert abs((wide - square) / (large - square) - (16 * 24 - 16**2) / (24**2 - 16**2)) < 0.05


@pytest.mark.thorough
@pytest.mark.parametrize(("preset", "card"), [("workstation", 8), ("gpu24", 24), ("gpu80", 80)])
def test_a_preset_fits_its_card_with_graphs(preset: str, card: int) -> None:
    config = Config.of(preset).check()
    assert (config.data.size.plain, config.runtime.precision, config.runtime.graphs) == (256, "bf16", True)
    assert all(width % 16 == 0 for width in (*config.model.widths, *config.model.disc_widths))
    assert 0.55 * card * GB <= estimate(config).reserved <= 0.95 * card * GB


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA runtime API error cudaErrorMemoryAllocation (2): out of memory"), True),  # DALI
        (RuntimeError("encountered: std::bad_alloc"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("not enough memory"), False),
    ],
)
def test_errors_for_want_of_memory(error: Exception, is_it: bool) -> None:
    assert out_of_memory(error) == is_it


def test_the_allocator_of_the_cpu_is_understood() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(error.value)
