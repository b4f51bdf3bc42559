"""What a step needs: the same bytes counted as kept in truth, the same numbers whatever is kept, and the advice."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlv2v.config import Config
from rlv2v.method import memory
from rlv2v.method.clips import Clips, Gains
from rlv2v.method.memory import GB, advise, count, estimate, largest, out_of_memory, phases
from rlv2v.method.objective import discriminator_losses, generator_losses
from rlv2v.method.rl import Policies, actor_loss
from rlv2v.model import Discriminator, Translator
from rlv2v.model import activation_memory as parts
from rlv2v.model import blocks as layers
from rlv2v.model.build import Nets, build_nets
from rlv2v.model.norm import local_stats
from rlv2v.runtime.memory import Ghosts, Ledger, Live

T, SIZE = 5, 16
MODES = ("store", "recompute", "frames")
TINY = Config.of("tiny", frames=T, graphs=False)
pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(kept: str, norm: str, **changes: object) -> Config:
    return TINY.replace(memory=kept, norm=norm, disc_norm=norm, **changes)  # type: ignore[arg-type]


def outcome(config: Config, dtype: torch.dtype, *, alone: bool = False) -> tuple[Tensor, dict[str, Tensor], Nets]:
    """What G and P descend with the actor's loss, what D descends; all gradients; the networks after it.

    The critic is frozen in the forward alone, as in training.
    """
    torch.manual_seed(0)
    nets = build_nets(config).to(dtype)
    x, y, z = (torch.rand(2, T, 3, SIZE, SIZE, dtype=dtype) * 2 - 1 for _ in range(3))
    clips, at = Clips(x, y, z, x[:, :1]), torch.tensor([1, 3])
    with torch.autocast("cpu", torch.bfloat16, enabled=config.runtime.precision == "bf16", cache_enabled=False):
        terms, out, back = generator_losses(nets, clips, config, Gains(1.0, 1.0), at, torch.eye(3, 4, dtype=dtype))
        fakes = out.fake.detach(), back.fake.detach()
        losses = [*terms.values(), *discriminator_losses(nets, clips, *fakes, config, at).values()]
        nets.q_x.requires_grad_(False)
        policies = Policies.of(nets, "x")
        if alone:
            with local_stats(*policies):
                losses.append(actor_loss(nets.q_x, policies, x, torch.tensor([2, 4])))
        else:
            losses.append(actor_loss(nets.q_x, policies, x, torch.tensor([2, 4])))
        nets.q_x.requires_grad_(True)
    torch.stack(losses).sum().backward()
    found = {name: p.grad for name, p in nets.named_parameters() if p.grad is not None}
    return torch.stack(losses).detach(), found, nets


@pytest.mark.parametrize(
    ("kept", "num_frames", "norm", "alone"),
    [
        ("recompute", 8, "clip", False),
        ("frames", 1, "batch", True),
        ("frames", 2, "clip", False),
        ("frames", 2, "batch", False),
        ("frames", 8, "batch", True),
    ],
)
def test_the_numbers_are_the_same_whatever_is_kept(
    kept: str, num_frames: int, norm: str, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART", num_frames)
    plain, plain_gradients, plain_nets = outcome(config_of("store", norm), torch.float64, alone=alone)
    losses, gradients, nets = outcome(config_of(kept, norm), torch.float64, alone=alone)
    torch.testing.assert_close(losses, plain, rtol=1e-12, atol=0)
    assert gradients.keys() == plain_gradients.keys()
    assert not any(name.startswith("q_") for name in gradients), "the frozen critic takes no gradient"
    scale = max(g.abs().max().item() for g in plain_gradients.values())
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-12, atol=1e-12 * scale)
    torch.testing.assert_close(dict(nets.named_buffers()), dict(plain_nets.named_buffers()), rtol=1e-12, atol=0)


def test_frames_keeps_the_precision_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run again in another precision, activations would not be those of the forward: torch checks their dtypes."""
    monkeypatch.setattr(parts, "PART", 2)
    plain, plain_gradients, _ = outcome(config_of("store", "clip", precision="bf16"), torch.float32)
    losses, gradients, _ = outcome(config_of("frames", "clip", precision="bf16"), torch.float32)
    assert torch.equal(losses, plain)
    exact = outcome(config_of("store", "clip"), torch.float32)[1]
    for name in ("g_y.encoder.0.residual.convlstm.w_x", "p_x.last.w_h", "d_y.blocks.1.residual.convlstm.w_x"):
        theirs, ours, true = plain_gradients[name], gradients[name], exact[name]
        assert (ours - theirs).norm() < 0.02 * theirs.norm(), name
        assert (ours - true).norm() > 1e-4 * true.norm(), "it is bfloat16 that ran"


@pytest.mark.parametrize("norm", ["clip", "batch"])
def test_parts_give_every_state_and_go_on_from_one(norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", 2)
    x = torch.rand(2, T, 3, SIZE, SIZE, dtype=torch.float64)
    nets = {}
    for kept in ("store", "frames"):
        torch.manual_seed(0)
        nets[kept] = Translator((4, 6), norm=norm, memory=kept).double()
    found = {}
    for kept, net in nets.items():
        _, _, half = net.run(x[:, :2])
        y, mask, states = net.run(x[:, 2:], half)
        _, _, every = net.run(x, all_states=True)
        forked, _, _ = net.run(x.flip(1), every, one_step_from_each=True)
        found[kept] = [y, mask, states, every, forked]
    torch.testing.assert_close(found["frames"], found["store"], rtol=1e-12, atol=1e-12)
    assert found["frames"][3][0][0].h.shape[:2] == (2, T)


def test_a_part_that_ran_apart_from_the_ranks_runs_again_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backward `apart` is over; a mean over ranks then would wait for ranks that take none."""
    asked = []
    monkeypatch.setattr(layers, "mean_over_ranks", lambda moments: asked.append(moments) or moments)
    net = Discriminator((4, 6), norm="batch", memory="frames")
    with local_stats(net):
        y, _ = net(torch.rand(2, T, 3, SIZE, SIZE))
    y.sum().backward()
    assert not asked
    net(torch.rand(2, T, 3, SIZE, SIZE))[0].sum().backward()
    assert len(asked) == 2, "once in the forward and once more in the backward"


def test_without_gradients_nothing_is_run_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(parts, "checkpoint", lambda *args, **kwargs: called.append(args))
    net = Discriminator((4, 6), memory="frames")
    with torch.no_grad():
        net(torch.rand(1, T, 3, SIZE, SIZE))
    assert not called
    with pytest.raises((TypeError, ValueError)):
        net(torch.rand(1, T, 3, SIZE, SIZE))
    assert called


def test_an_unknown_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Discriminator: memory must be one of .*'frames'.*, got 'disk'"):
        Discriminator((4,), memory="disk")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kept", MODES)
def test_what_is_counted_is_what_a_real_step_keeps(kept: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART", 2)
    config = config_of(kept, "clip", precision=precision, size=32, frames=4)
    for phase in phases(config):
        ours, real = count(config, phase), count(config, phase, live=Live)
        assert ours.activations == real.activations > 0, phase
        # The count sees what is alive inside an operator, which a real run hides.
        assert real.peak <= ours.peak <= 1.25 * real.peak, phase
    assert estimate(config).activations == count(config, "generators").activations


PEAK = """
import sys, torch
from rlv2v import _native
from rlv2v.config import Config
from rlv2v.runtime.memory import Live
from rlv2v.method.memory import count
torch.set_num_threads(1)
def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])
count(Config.of("tiny"), "generators", live=Live)
before = kib("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark from here
count(Config.of("default", memory=sys.argv[1], size=64), "generators", live=Live)
print(1024 * (kib("VmHWM") - before), _native.pool_bytes()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the high-water mark of Linux")
@pytest.mark.parametrize("kept", MODES)
def test_the_process_grows_by_what_is_counted(kept: str) -> None:
    """Pages of a real step in a process of its own, against the count: within 15 %, and 30 MB of libraries' own.

    And what the CPU's ConvLSTM has given back, and keeps for its next layer.
    """
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", PEAK, kept], capture_output=True, text=True, check=True, env=os.environ | settings
    )
    grown, idle = (int(number) for number in run.stdout.split())
    config = Config.of("default", memory=kept, size=64)
    ours = count(config, "generators").peak + sum(p.numel() * 4 for p in build_nets(config).parameters())
    said = f"{grown / 1e6:.0f} MB with {idle / 1e6:.0f} idle, counted {ours / 1e6:.0f} MB"
    assert 0.85 * ours - 30e6 <= grown <= 1.15 * ours + 30e6 + idle, said


def test_the_ledger_follows_what_is_alive() -> None:
    for mode in (Live, Ghosts):
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


def test_modes_need_less_in_their_order_and_more_needs_more() -> None:
    config = TINY.replace(frames=16, size=32)
    need = {kept: estimate(config.replace(memory=kept)).total for kept in MODES}  # type: ignore[arg-type]
    assert need["store"] > need["recompute"] > need["frames"]
    assert estimate(config, num_replicas=2).activations > 1.9 * estimate(config).activations
    assert estimate(config.replace(precision="bf16")).activations < 0.9 * estimate(config).activations
    recorded = estimate(config.replace(graphs=True))
    assert recorded.workspace - estimate(config).workspace > memory.RECORDING_BYTES
    assert recorded.activations == estimate(config).activations, "recordings share a pool"
    found = estimate(config)
    assert found.total == sum(found[:-1])
    assert found.optimiser == 2 * found.gradients


@pytest.mark.parametrize("over", ["frames", "batch", "size"])
def test_the_largest_fits_and_one_more_does_not(over: str) -> None:
    step = {"frames": 1, "batch": 1, "size": 8}[over]
    budget = estimate(TINY.replace(frames=12, size=24)).reserved
    number = largest(TINY, budget, over=over)  # type: ignore[arg-type]
    assert estimate(memory.scaled(TINY, over, number)).reserved <= budget  # type: ignore[arg-type]
    assert estimate(memory.scaled(TINY, over, number + step)).reserved > budget  # type: ignore[arg-type]
    assert largest(TINY, memory.CONTEXT_BYTES, over=over) == 0  # type: ignore[arg-type]


def test_advice_names_the_first_change_that_fits() -> None:
    config, cpu = TINY.replace(frames=16, size=32), torch.device("cpu")
    need = {kept: estimate(config.replace(memory=kept)).reserved for kept in MODES}  # type: ignore[arg-type]
    assert "; --memory recompute needs " in advise(config, cpu, need["recompute"])
    on_gpu = advise(config.replace(graphs=True), torch.device("cuda"), need["store"])
    assert "; --no-graphs needs " in on_gpu
    assert "--no-graphs" not in advise(config.replace(graphs=True), cpu, need["store"] - 1), "the CPU records nothing"
    on_gpu = advise(config.replace(graphs=True), torch.device("cuda"), need["recompute"])
    assert "; --no-graphs --memory recompute needs " in on_gpu
    assert "; --memory frames needs " in advise(config, cpu, need["recompute"] - 1)
    less = advise(config, cpu, need["frames"] - 1)
    assert "; --memory frames --batch-x 1 --batch-y 1 --batch-z 1 --batch-s 2 --transitions 1 needs " in less
    ones = dict.fromkeys(("batch_x", "batch_y", "batch_z", "batch_s", "transitions"), 1)
    least = estimate(config.replace(memory="frames", **ones)).reserved  # type: ignore[arg-type]
    fewer = re.search(r"; --memory frames .*--batch-s 1 .*--frames (\d+) needs ", advise(config, cpu, least - 1))
    assert fewer and 12 <= int(fewer[1]) < 16
    assert "smaller --widths" in advise(config, cpu, memory.CONTEXT_BYTES)
    assert "free what other programs hold of it, or add --memory recompute" in advise(config, cpu, 100 * GB)


def test_the_workstation_fits_its_card() -> None:
    config = Config.of("workstation").check()
    assert (config.data.size, config.data.frames, config.runtime.precision) == (128, 16, "bf16")
    assert all(width % 16 == 0 for width in (*config.model.widths, *config.model.disc_widths))
    assert estimate(config).reserved <= 7.5 * GB


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
            True,
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
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
