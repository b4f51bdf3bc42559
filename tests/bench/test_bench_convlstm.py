"""bench/convlstm.py: peers compute what the reference does, a wrong number is refused, rows say what was counted."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels import dispatch, fused_triton
from rlv2v.kernels.plain import PlainRecurrence

pytestmark = pytest.mark.usefixtures("bench_folder")

KEYS = {"case", "backend", "pass", "dtype", "median_us", "p20_us", "p80_us", "percent_of_limit", "speedup_over"}
SIZES = (2, 3, 4, 5, 6, 7)  # B, T, C_in, C, H, W


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As the bench runs: two threads that wait for each other on a busy machine take a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def tiny() -> Any:
    return module("convlstm_layer").Shape(*SIZES)


def form(name: str, dtype: torch.dtype = torch.float32) -> Any:
    forms = module("convlstm_peers").cpu_forms(quick=True)
    return next(one for one in forms if one.name == name and one.dtype == dtype)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_form_gives_the_references_numbers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_thnn_fused_lstm_cell", aten_cell, raising=False)
    layer, peers = module("convlstm_layer"), module("convlstm_peers")
    data = layer.solved(layer.noise(tiny()))
    forms = peers.cpu_forms(quick=True) if device == "cpu" else peers.cuda_forms(torch.float32, quick=True)
    forms = [one for one in forms if one.backend in ("", "cpu", "plain")]
    assert len(forms) == (13 if device == "cpu" else 5)
    for one in forms:
        found = layer.Layer(one, data).check()
        assert module("convlstm_rows").within(found, one.dtype), (one.label, found)


def aten_cell(a: Tensor, a_h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, None]:
    """What the GPU's operator computes: gates i, f, g, o of (N,4C)."""
    i, f, g, o = (a + a_h).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c, None


def test_inputs_lie_as_their_form_says() -> None:
    layer = module("convlstm_layer")
    data = layer.noise(tiny())
    b, _, c_in, c, h, w = SIZES
    plain, ours = layer.Layer(form("eager"), data), layer.Layer(form("cpu frame-major", torch.bfloat16), data)
    assert plain.leaves[0].is_contiguous() and plain.dhs.is_contiguous()
    assert plain.leaves[1].shape == (4 * c, c_in + c, 3, 3)
    assert ours.leaves[0].stride() == (c_in * h * w, b * c_in * h * w, 1, w * c_in, c_in)
    assert ours.dhs.stride() == (c * h * w, b * c * h * w, 1, w * c, c)
    assert all(leaf.dtype == torch.bfloat16 for leaf in ours.leaves)
    assert layer.Layer(form("eager channels-last"), data).leaves[1].is_contiguous(memory_format=torch.channels_last)
    assert layer.Layer(form("cpu autocast", torch.bfloat16), data).leaves[0].dtype == torch.float32


def test_work_is_what_is_left_without_a_state() -> None:
    b, t, c_in, c, h, w = SIZES
    flops = 2 * b * h * w * 4 * c * 9 * (t * c_in + (t - 1) * c)
    states = b * t * h * w
    forward = tiny().work("forward", torch.bfloat16)
    assert forward == {"gflop_s": flops, "gb_s": states * (2 * c_in + 2 * c + 4 * c)}
    both = tiny().work("forward+backward", torch.float32)
    assert both == {"gflop_s": 3 * flops, "gb_s": states * (12 * c_in + 12 * c + 8 * c + 32 * c)}


def test_rows_have_the_form_that_scripts_read(capsys: pytest.CaptureFixture[str]) -> None:
    layer, peers = module("convlstm_layer"), module("convlstm_peers")
    rows, missing = layer.layer_rows(tiny(), peers.cpu_forms(quick=True), 2)
    printed = capsys.readouterr().out
    assert missing == {} and len(printed.splitlines()) == len(rows) == 2 * (13 + 6) - 2
    for row in rows:
        assert row.keys() >= KEYS and row["valid"] and row["case"] == "layer B2 T3 4->5 6x7"
        assert 0 < row["p20_us"] <= row["median_us"] <= row["p80_us"]
        bare = row["backend"] in ("GEMM", "convolution", "copy")
        assert (row["percent_of_limit"] is None) == bare == (row["speedup_over"] == {})
        assert ("difference" in row) == (not bare) and row["backend"] not in row["speedup_over"]
    ours = next(row for row in rows if row["backend"] == "cpu" and row["pass"] == "forward+backward")
    eager = next(row for row in rows if row["backend"] == "eager" and row["pass"] == "forward+backward")
    assert ours["speedup_over"].keys() == {
        "eager", "eager batched", "eager channels-last", "autocast", "autocast channels-last", "eager bfloat16"
    }  # fmt: skip
    assert ours["speedup_over"]["eager"] == pytest.approx(eager["median_us"] / ours["median_us"], rel=0.02)
    assert "best compiled" not in ours["speedup_over"]


def contender(name: str, us: float, **more: Any) -> tuple[Any, float]:
    more = {"work": {"gflop_s": 1e6}, **more}
    return module("convlstm_rows").Contender(name, torch.float32, lambda: None, **more), us


def test_the_fastest_of_a_group_is_a_peer_and_the_floor_is_the_longer_one() -> None:
    rows = module("convlstm_rows")
    timed = [
        contender("eager", 9.0),
        contender("compile", 7.0, group="compiled"),
        contender("compile channels-last", 5.0, group="compiled"),
        contender("cpu", 4.0, ours=True, work={"gflop_s": 1e6, "gb_s": 6e3}),
    ]
    medians = {one.name: us for one, us in timed}
    assert rows.peers_of([one for one, _ in timed], medians) == {
        "eager": 9.0, "compile": 7.0, "compile channels-last": 5.0, "best compiled": 5.0
    }  # fmt: skip
    limits = [
        contender("GEMM", 2.0, limit=True, work={"gflop_s": 1e6}),
        contender("convolution", 1.0, limit=True, work={"gflop_s": 1e6}),
        contender("copy", 1.0, limit=True, work={"gb_s": 2e3}),
    ]
    ours = timed[-1][0]
    assert rows.floor_us(ours, limits) == 3.0 and rows.floor_us(ours, limits[:2]) == 1.0
    assert rows.floor_us(ours, []) is None


class Wrong(PlainRecurrence):
    """A backend that is a little off in the gradient alone."""

    def backward(self, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        da, *state = super().backward(*args)
        return da * (1 + 1e-4), *state


def test_a_wrong_backend_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = dispatch.RUNNERS["cpu"]
    monkeypatch.setitem(dispatch.RUNNERS, "cpu", right._replace(recurrence=Wrong()))
    forms = [form("eager"), form("cpu")]
    rows, _ = module("convlstm_layer").layer_rows(tiny(), forms, 2, ["forward+backward"])
    eager, ours = rows[:2]
    assert eager["valid"] and not ours["valid"] and ours["median_us"] is None and ours["speedup_over"] == {}
    assert ours.keys() >= KEYS and ours["difference"]["gradient"] > 5e-6
    assert "REFUSED" in capsys.readouterr().out
    assert module("convlstm").ours_failed(rows) and not module("convlstm").ours_failed([eager])
    assert not module("convlstm").ours_failed([ours | {"ours": False}])


def test_what_is_not_a_number_is_refused() -> None:
    within = module("convlstm_rows").within
    assert not within({"value": math.nan, "gradient": 0.0}, torch.float32)
    assert not within({"value": 0.0, "gradient": math.nan}, torch.float32)


def test_a_peer_that_raises_is_named_and_one_of_ours_is_a_bug() -> None:
    layer = module("convlstm_layer")

    def broken(*leaves: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nwith more lines")

    peer = layer.Form("compile", torch.float32, broken)
    rows, missing = layer.layer_rows(tiny(), [form("eager"), peer], 2, ["forward"])
    assert missing == {"layer B2 T3 4->5 6x7, compile": "RuntimeError: no compiler"}
    assert not any(row["backend"] == "compile" for row in rows)
    with pytest.raises(RuntimeError, match="no compiler"):
        layer.layer_rows(tiny(), [layer.Form("cpu", torch.float32, broken, backend="cpu")], 2, ["forward"])


@pytest.mark.parametrize("tamper", [None, "forward", "backward"])
def test_gates_are_checked(tamper: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gates = module("convlstm_gates")
    if tamper is not None:
        monkeypatch.setattr(_native, f"gates_{tamper}", lambda *args: None)
    case = gates.gates_case(tiny(), with_compiled=False)
    names = ["eager", "eager by hand", "cpu float32", "copy float32"]
    names += ["eager bfloat16", "eager by hand bfloat16", "cpu bfloat16", "copy bfloat16"]
    assert [one.name for one in case.contenders] == names
    assert all(case.valid(one) != (one.ours and tamper is not None) for one in case.contenders)
    if tamper is None:
        rows = module("convlstm_rows").case_rows(case, 2)
        assert all(row.keys() >= KEYS and row["gb_s"] > 0 for row in rows)
    elements = 10
    assert gates.moved_bytes(elements, torch.float32) == elements * 4 * (4 + 1 + 1 + 1 + 4 + 1 + 1 + 4 + 1 + 1 + 4 + 1)
    assert gates.moved_bytes(elements, torch.bfloat16) == elements * (2 * 18 + 4 * 6)


def test_bytes_held_are_those_counted_by_hand() -> None:
    counts = module("convlstm_counts")
    x, w = (torch.ones(8, 5, requires_grad=True) for _ in range(2))  # 160 bytes each
    product = counts.held_bytes(lambda: x * w, [x, w])
    assert product == {"saved": 0, "given": 320, "with_result": 160}
    assert counts.held_bytes(lambda: x.sigmoid(), [x, w]) == {"saved": 160, "given": 0, "with_result": 160}
    # Two views of one storage: sigmoid keeps its result, whose halves are multiplied.
    halves = counts.held_bytes(lambda: torch.mul(*x.sigmoid().chunk(2)), [x, w])
    assert halves == {"saved": 160, "given": 0, "with_result": 240}
    shape = module("convlstm_layer").Shape(2, 4, 6, 6, 5, 5)
    rows, missing = counts.saved_rows(shape)
    found = {(row["backend"], row["pass"], row["dtype"]): row for row in rows}
    assert missing == {} and len(found) == len(rows) == 8

    def of(backend: str, mode: str, dtype: str) -> tuple[float, float]:
        row = found[backend, mode, dtype]
        return row["bytes_per_element_step"], row["bytes_with_result"]

    # eager: cat of x and h 2, i f o g 4, c 1, tanh c 1; the stack of all h as result.  Ours: gates 4, c 1, h 1.
    assert of("eager", "store", "float32") == (8 * 4, 9 * 4)
    assert of("eager", "store", "bfloat16") == (8 * 2, 9 * 2)
    assert of("cpu", "store", "float32") == (6 * 4, 6 * 4)
    for dtype in ("float16", "bfloat16"):
        assert of("cpu", "store", dtype) == (4 * 2 + 4 + 2,) * 2
        assert of("cpu", "recompute", dtype) == (4 + 2,) * 2
        assert found["cpu", "store", dtype]["at_most"] == 14 and found["cpu", "recompute", dtype]["at_most"] == 6


def test_launches_are_those_counted_by_hand() -> None:
    launches = module("convlstm_launches")
    x, w, bias = torch.ones(1, 2, 4, 4), torch.ones(6, 2, 3, 3, requires_grad=True), torch.ones(6, requires_grad=True)
    with launches.Counting() as counting:
        y = torch.nn.functional.conv2d(x, w, bias, padding=1)  # 2
        a, b, _ = y.chunk(3, 1)
        out = a.permute(0, 2, 3, 1) * torch.empty_like(b).copy_(b).permute(0, 2, 3, 1)  # 2
    assert +counting.counts == {"convolution": 2, "copy_": 1, "mul": 1}
    with launches.Counting() as counting:
        torch.autograd.grad(out.sum(), (w, bias))
    assert counting.counts["convolution_backward"] == 2 and counting.counts["sum"] == 1

    def inside(name: str) -> dict[str, int]:
        forms = module("convlstm_peers")
        one = forms.mine(name, torch.float32, "frame-major")
        return dict(launches.counted(one))

    plain = inside("plain")  # its steps are inside our operators
    steps = launches.SHAPE.steps
    assert plain["sigmoid_"] == steps and plain["convolution"] == 2 + 2 * (steps - 1)
    assert plain["convolution_backward"] == 3 - 1 + 1  # x, w_x; w_h


def fake_available(_: torch.device) -> str:
    return "no triton today"


def test_launches_of_a_backend_that_cannot_run_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_triton, "available", fake_available)
    forms, missing = module("convlstm_launches").forms("cpu")
    assert missing == {"triton": "no triton today"} and [one.name for one in forms] == ["eager"]


def test_launches_of_a_sequence_in_a_process_of_their_own() -> None:
    rows, missing = module("convlstm_launches").launch_rows("cpu")
    found = {row["backend"]: row for row in rows}
    eager = found["eager"]["kernels"]
    # Eight steps: a convolution with its bias, cat of x and h, three sigmoids and two tanh.
    assert (eager["convolution"], eager["sigmoid"], eager["tanh"]) == (16, 24, 16)
    assert found["eager"]["launches"] == sum(eager.values()) > 200
    if "triton" in found:
        assert found["triton"]["launches"] <= 25
    else:
        assert missing["launches, triton"]


def test_four_networks_in_one_call_are_checked_against_each_alone() -> None:
    cuda = module("convlstm_cuda")
    rows, missing = cuda.grouped_rows(tiny(), torch.float32, "cpu", 2, "cpu")
    assert missing == {} and all(row["valid"] for row in rows)
    names = ["eager", "cpu 4 calls", "cpu grouped", "convolution", "GEMM", "copy"]
    assert [row["backend"] for row in rows] == 2 * names
    rows, missing = cuda.grouped_rows(tiny(), torch.float64, "cpu", 2, "cpu")
    assert rows == [] and "float32 at most" in next(iter(missing.values()))
    assert math.isnan(cuda.worst([{"value": 1.0}, {"value": math.nan}])["value"])


def test_targets_say_what_was_not_measured() -> None:
    bench = module("convlstm")
    row = {"case": "layer B1", "backend": "cpu", "pass": "forward+backward", "dtype": "float32"}
    row |= {"speedup_over": {"eager": 1.2}}
    counted = {"case": "launches T=8", "backend": "triton", "pass": "forward+backward", "dtype": "float16"}
    found = bench.aims([row, row | {"pass": "forward"}, counted | {"launches": 26, "at_most": 25, "speedup_over": {}}])
    assert [(aim["what"], aim["measured"], aim["met"]) for aim in found] == [
        ("x eager", 1.2, True),
        ("x best compiled", None, None),
        ("launches, forward+backward", 26, False),
    ]


def test_turns_are_shuffled_and_short_calls_repeated() -> None:
    calls: list[str] = []

    def call(name: str) -> Callable[[], None]:
        return lambda: calls.append(name)

    def clock(one: Callable[[], object]) -> float:
        one()
        return 500.0 if calls[-1] == "short" else 5000.0

    times = module("convlstm_rows").in_turn({"short": call("short"), "long": call("long")}, 6, clock)
    assert len(times["short"]) == 6 * 4 and len(times["long"]) == 6
    assert calls.count("short") == 2 + 6 * 5 and calls.count("long") == 2 + 6
    assert len({tuple(calls[4 + 6 * n : 10 + 6 * n]) for n in range(6)}) == 2


def test_the_whole_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench, gates = module("convlstm"), module("convlstm_gates")
    monkeypatch.setattr(bench, "CPU_SHAPES", [tiny()])
    case = gates.gates_case
    monkeypatch.setattr(gates, "gates_case", lambda shape, *, with_compiled: case(shape, with_compiled=False))
    path = tmp_path / "found.json"
    bench.main(bench.Args(quick=True, rounds=2, json=path, only=("layer", "gates", "saved")))
    line = capsys.readouterr().out.splitlines()[-1]
    told = json.loads(line)
    assert json.loads(path.read_text()) == told and told["bench"] == "convlstm"
    assert told["machine"].keys() == {"cpu", "gpu", "threads", "torch", "triton"} and told["machine"]["threads"] == 1
    assert {row["case"].split()[0] for row in told["rows"]} == {"layer", "gates", "saved"}
    assert any(aim["met"] for aim in told["targets"])

    monkeypatch.setattr(_native, "gates_backward", lambda *args: None)
    with pytest.raises(SystemExit) as stop:
        bench.main(bench.Args(quick=True, rounds=2, only=("gates",)))
    assert stop.value.code == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert {row["backend"] for row in rows if not row["valid"]} == {"cpu"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"json": Path("nowhere/at/all.json")}, "its folder does not exist"),
        ({"rounds": 1}, "expected at least 2, 1, got 1, 1"),
        ({"only": ("nothing",)}, "no case is called so"),
    ],
)
def test_a_users_mistake_is_named(given: dict[str, Any], message: str) -> None:
    bench = module("convlstm")
    with pytest.raises(bench.UserError, match=message):
        bench.main(bench.Args(**given))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named() -> None:
    bench = module("convlstm")
    with pytest.raises(bench.UserError, match="sees no GPU"):
        bench.main(bench.Args(device="cuda"))
