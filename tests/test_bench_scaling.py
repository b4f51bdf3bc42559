"""bench/scaling.py: what a step sends and computes is counted exactly, and the model does what it says."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from ranks import ROOT, run_ranks
from torch.utils.flop_counter import FlopCounterMode

from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.kernels import driver
from rlv2v.kernels.dispatch import Problem, recurrence

pytestmark = pytest.mark.usefixtures("bench_folder", "one_thread")
SMALL: dict[str, Any] = {"size": 8, "frames": 3, "widths": (4,), "disc_widths": (4,), "replay_capacity": 8}


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_a_step_sends_is_what_two_real_ranks_send(preset: str, tmp_path: Path) -> None:
    scaling = module("scaling_trace")
    more = {"head": "mask", "patch": 2, "rl_every": 2} if preset == "default" else {}
    config = Config.of(preset, **(SMALL | more), replicas=2, steps=1000).check()
    (tmp_path / "config.json").write_text(config.to_json())
    worker = [ROOT / "tests" / "scaling_worker.py", tmp_path / "config.json", tmp_path / "sent.json"]
    run_ranks(2, worker, {"PYTHONPATH": str(ROOT)})
    real = json.loads((tmp_path / "sent.json").read_text())
    steps = scaling.trace(config, 2)
    counted = [[[each.send.kind, each.send.bytes] for each in scaling.sent(events)] for events in steps]
    assert counted == real

    # and the bytes by name are those of the networks
    nets = module("rlv2v.checkpoint.export").build_nets(config)
    totals = scaling.sent_bytes(steps)
    for part, names in (("generators", ("g_x", "g_y", "p_x", "p_y")), ("discriminators", ("d_x", "d_y"))):
        weights = [p for name in names for p in getattr(nets, name).parameters()]
        assert totals[f"gradients of {part}"] == 4 * sum(p.numel() for p in weights)
    critics = sum(4 * p.numel() for name in ("q_x", "q_y") for p in getattr(nets, name).parameters()) / 2
    assert totals["gradients of critics"] == critics / config.rl.every
    assert totals["control"] == 24
    assert ("statistics" in totals) == (preset == "paper")


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("need", [(True,) * 6, (False, True, True, True, False, False)])
def test_flops_of_the_layer_are_those_of_its_convolutions(with_state: bool, need: tuple[bool, ...]) -> None:
    x, w_x, w_h = torch.randn(1, 4, 2, 3, 6, 5), torch.randn(1, 20, 3, 3, 3), torch.randn(1, 20, 5, 3, 3)
    state = [torch.randn(1, 2, 5, 6, 5) if with_state else None for _ in range(2)]
    need = (*need[:4], *(n and with_state for n in need[4:]))
    run, flops = recurrence("plain", Problem.of(x, w_h)), module("scaling_trace").convlstm_flops
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        hs, cs, gates = driver.forward(run, x, w_x, w_h, torch.zeros(1, 20), *state, True)
    with torch.no_grad(), FlopCounterMode(display=False) as backward:
        driver.backward(run, hs, None, x, w_x, w_h, torch.zeros(1, 20), *state, hs, cs, gates, need)
    assert forward.get_total_flops() == flops(x.shape, w_x.shape, w_h.shape, with_state)
    assert backward.get_total_flops() == flops(x.shape, w_x.shape, w_h.shape, with_state, need)


def test_operators_are_counted_forward_and_backward_and_views_are_not() -> None:
    scaling = module("scaling_trace")
    a, b = torch.ones(4, 6, requires_grad=True), torch.ones(6, 8)
    with scaling.Tracer() as tracer:
        (a @ b).t().sum().backward()
    products = [op for op in tracer.events if op.flops]
    assert [op.flops for op in products] == [2 * 4 * 6 * 8] * 2 and not any(op.half for op in products)
    assert products[0].bytes == 4 * (4 * 6 + 6 * 8 + 4 * 8)
    with scaling.Tracer() as tracer:
        torch.ones(6, 8).t().expand(3, 8, 6).detach()
        torch.empty(1000)
    assert [op.bytes for op in tracer.events] == [4 * 6 * 8]
    with scaling.Tracer() as tracer:
        torch.ones(1000).expand(5, 1000) + torch.zeros(5, 1, dtype=torch.bfloat16)
    assert tracer.events[-1].bytes == 4 * 1000 + 2 * 5 + 4 * 5000


def test_a_ring_by_hand() -> None:
    model = module("scaling_model")
    link = model.Link("", latency=1e-3, bandwidth=1e6)
    assert link.all_reduce(1e6, 4) == pytest.approx(6e-3 + 1.5)
    assert link.all_gather(1e6, 4) == pytest.approx(3e-3 + 3.0)
    slow = model.between_nodes(link, model.Link("", latency=1e-4, bandwidth=1e5))
    assert (slow.latency, slow.bandwidth) == (1e-3, 1e5)


def test_what_hides_behind_the_backward_and_what_does_not() -> None:
    model, scaling = module("scaling_model"), module("scaling_trace")
    bucket = scaling.Send("all_reduce", 1, False)
    waits, mark = replace(bucket, waits=True), scaling.Mark

    def exposed(*events: object) -> float:
        step = model.play([*events, mark("numbers"), mark("control")], lambda _: 2.0)
        assert step.compute == sum(event for event in events if isinstance(event, float))
        return step.exposed

    phase, end = mark("generators"), mark("all_reduce")
    assert exposed(1.0, bucket, 3.0, phase, end, 1.0) == 0.0  # 2 of the 3 that are left
    assert exposed(1.0, bucket, 0.5, phase, end, 1.0) == 1.5
    assert exposed(1.0, bucket, 1.0, bucket, phase, end, 5.0) == 3.0  # the second waits for the first
    assert exposed(1.0, waits, 3.0) == 2.0
    assert exposed(1.0, bucket, waits, 3.0) == 4.0  # in the order they were asked for
    step = model.play([1.0, bucket, 1.0, mark("numbers"), bucket, mark("control")], lambda _: 2.0)
    assert (step.exposed, step.sent) == (1.0, 2.0)  # control go another way
    step = model.play([1.0, bucket, 1.0, phase, end], lambda _: 3.0, scale=2.0)
    assert (step.compute, step.exposed, step.sent) == (4.0, 1.0, 3.0) and step.efficiency == 0.8


def test_a_card_takes_as_long_as_its_slowest_part() -> None:
    model, scaling = module("scaling_model"), module("scaling_trace")
    card = model.Card("", half=4.0, single=2.0, bandwidth=10.0)
    op, peaks = scaling.Op(8.0, 30.0, True), model.Case("", True, 1.0, 0.0)
    assert card.seconds(op, peaks) == 3.0 and card.seconds(replace(op, half=False), peaks) == 4.0
    assert card.seconds(op, replace(peaks, moves=False)) == 2.0
    assert card.seconds(op, replace(peaks, share=0.5)) == 6.0 and card.seconds(op, replace(peaks, floor=7.0)) == 7.0
    line = model.timeline([op, op, scaling.Mark("critics"), op], lambda _: 1.0)
    assert line == [2.0, scaling.Mark("critics"), 1.0]


def test_the_line_through_times() -> None:
    fit = module("scaling_model").fit
    sizes = [4096.0 * 4**k for k in range(8)]
    latency, bandwidth, errors = fit(sizes, [1e-4 + size / 2e9 for size in sizes])
    assert latency == pytest.approx(1e-4) and bandwidth == pytest.approx(2e9) and max(map(abs, errors)) < 1e-9
    off = [1e-4 + size / 2e9 for size in sizes]
    off[3] *= 1.5
    assert fit(sizes, off)[2][3] == pytest.approx(-1 / 3, abs=0.1)
    with pytest.raises(ValueError, match="two sizes"):
        fit([1.0, 1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="grow"):
        fit([1.0, 2.0], [2.0, 1.0])


def test_a_measured_line_is_the_link_of_its_ring() -> None:
    link = module("scaling").measured_link({"backend": "nccl", "ranks": 4, "latency_us": 60.0, "gb_s": 2.0})
    assert link.all_reduce(1e6, 4) == pytest.approx(60e-6 + 1e6 / 2e9)


def test_the_bench_measures_counts_and_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = module("scaling")
    monkeypatch.setitem(scaling.PRESETS, "tiny", SMALL | {"rl_every": 1, "steps": 4})
    few: dict[str, Any] = {"measured": "tiny", "presets": ("tiny",), "batches": (1,), "sizes": (4096, 1 << 24)}
    few |= {"rounds": 1, "cycles": 2, "repeats": 3, "device": "cpu"}
    scaling.main(scaling.Args(json=tmp_path / "out.json", **few))
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == json.loads((tmp_path / "out.json").read_text())
    rows = said["rows"]
    assert [(row["ranks"], row["runs_at_once"]) for row in rows if row["pass"] == "step"] == [(1, 1), (1, 2), (2, 1)]
    assert all(row["p20_us"] <= row["median_us"] <= row["p80_us"] for row in rows)
    reduces = [row for row in rows if row["pass"] == "all_reduce" and row["ranks"] == 2]
    assert [row["bytes"] for row in reduces] == [4096, 1 << 24]
    check = said["validation"]
    assert check["predicted_us"] <= check["predicted_nothing_hidden_us"]
    predicted = said["predictions"]
    assert all(row["efficiency"] == 1.0 for row in predicted if row["gpus"] == 1)
    by_link = {
        row["link"]: row["efficiency"]
        for row in predicted
        if (row["card"], row["gpus"], row["nodes"], row["case"]) == ("RTX 3070", 4, 1, "at its peaks")
    }
    x16, x8 = (by_link[scaling.LINKS[f"PCIe 4.0 {lanes}"].name] for lanes in ("x16", "x8"))
    assert 0 < x8 < x16 < 1
    with pytest.raises(UserError, match="--measured"):
        scaling.main(scaling.Args(**(few | {"measured": "huge"})))
    with pytest.raises(UserError, match="--batches"):
        scaling.main(scaling.Args(**(few | {"batches": (2,)})))
