"""bench/convlstm*.py: peers compute what the reference does, a wrong number is refused, counts are those by hand."""

from __future__ import annotations

from typing import Any

import convlstm
import convlstm_layer as layer
import convlstm_peers as peers
import harness
import pytest
import torch
from harness import Args, Bench, Contender
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels import dispatch
from rlv2v.kernels.eager import EagerRecurrence

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = layer.Shape(2, 3, 4, 5, 6, 7)
B, T, C_IN, C, H, W, _ = SHAPE
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(harness, "MAX_REPEATS", 1)
    return Bench("convlstm", Args())


def form(name: str, dtype: torch.dtype = F32) -> layer.Form:
    return next(one for one in peers.cpu_forms(quick=True) if (one.name, one.dtype) == (name, dtype))


def aten_cell(a: Tensor, a_h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, None]:
    """Compute what the GPU's operator does: gates i, f, g, o of (N,4C)."""
    i, f, g, o = (a + a_h).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c, None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_form_returns_the_references_numbers(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_thnn_fused_lstm_cell", aten_cell, raising=False)
    data = layer.solved(SHAPE)
    forms = peers.cpu_forms(quick=True) if device == "cpu" else peers.cuda_forms(F32, quick=True)
    forms = [one for one in forms if one.backend in ("", "cpu", "eager")]
    assert len(forms) == (15 if device == "cpu" else 5)
    for one in forms:
        difference = layer.Layer(one, [data]).check()
        contender = layer.checked(Contender(one.name, ours=bool(one.backend)), difference, one.dtype)
        assert contender.valid, (one.name, one.dtype, difference)


def test_ours_may_be_off_by_the_limits_and_peers_by_twice_those() -> None:
    limit, nan = layer.LIMITS[F32], float("nan")
    for value, gradient, valid in (
        (0.0, 0.0, (True, True)), (1.5, 0.0, (False, True)), (0.0, 1.5, (False, True)), (2.5, 0.0, (False, False)),
        (nan, 0.0, (False, False)), (0.0, nan, (False, False)),
    ):  # fmt: skip
        difference = {"value": value * limit.value, "gradient": gradient * limit.gradient}
        assert valid == tuple(layer.checked(Contender("a", ours=o), difference, F32).valid for o in (True, False))


def test_inputs_lie_as_their_form_says() -> None:
    def inputs(name: str, dtype: torch.dtype = F32) -> tuple[Tensor, ...]:
        leaves, dhs, _ = layer.Layer(form(name, dtype), [layer.solved(SHAPE)]).networks[0]
        return leaves[0], leaves[1], dhs

    x, w, _ = inputs("eager")
    assert x.is_contiguous() and w.shape == (4 * C, C_IN + C, 3, 3)
    x, w, dhs = inputs("cpu frame-major", BF16)
    assert x.stride() == (C_IN * H * W, B * C_IN * H * W, 1, W * C_IN, C_IN)
    assert dhs.stride() == (C * H * W, B * C * H * W, 1, W * C, C) and w.dtype == BF16
    assert inputs("cpu autocast", BF16)[0].dtype == F32


def test_work_is_what_a_zero_state_leaves() -> None:
    flops = 2 * B * H * W * 4 * C * 9 * (T * C_IN + (T - 1) * C)
    states = B * T * H * W
    assert SHAPE.work("forward", BF16) == {"gflop_s": flops, "gb_s": states * (2 * C_IN + 2 * C + 4 * C)}
    both = SHAPE.work("forward+backward", F32)
    assert both == {"gflop_s": 3 * flops, "gb_s": states * (12 * C_IN + 12 * C + 8 * C + 32 * C)}
    elements = 10
    assert convlstm.moved_bytes(elements, F32) == elements * 4 * (4 + 1 + 1 + 1 + 4 + 1 + 1 + 4 + 1 + 1 + 4 + 1)
    assert convlstm.moved_bytes(elements, BF16) == elements * (2 * 18 + 4 * 6)


def test_ratios_are_like_for_like(bench: Bench) -> None:
    """bfloat16 over eager bfloat16 and autocast, float32 over eager float32."""
    rows = layer.layer_rows(bench, SHAPE, peers.cpu_forms(quick=True), 2, ["forward+backward"])
    assert bench.missing == {} and len(rows) == 15 + 6 and all(row["valid"] for row in rows)
    eager = {"eager", "eager batched", "eager channels-last"}
    over = {(row["backend"], row["dtype"]): set(row["speedup_over"]) for row in rows}
    assert over["cpu", "float32"] == eager
    assert over["cpu", "bfloat16"] == over["cpu autocast", "bfloat16"] == eager | {"autocast", "autocast channels-last"}
    bare = {"GEMM", "convolution", "copy"}
    assert all((row["percent_of_limit"] is None) == (row["backend"] in bare) for row in rows)
    groups = {(one.dtype, one.group) for one in peers.cpu_forms(quick=False)}
    assert groups == {(F32, ""), (F32, "compiled"), (BF16, ""), (BF16, "compiled"), (BF16, "autocast+compile")}


class Wrong(EagerRecurrence):
    """A backend that is a little off in the gradient alone."""

    def backward(self, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
        da, *state = super().backward(*args)
        return da * (1 + 1e-4), *state


def test_a_wrong_backend_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    right = dispatch.TABLE["cpu"]
    monkeypatch.setitem(dispatch.TABLE, "cpu", right._replace(recurrence=Wrong()))
    eager, ours = layer.layer_rows(bench, SHAPE, [form("eager"), form("cpu")], 2, ["forward+backward"])[:2]
    assert eager["valid"] and not ours["valid"] and ours["median_us"] is None
    assert ours["difference"]["gradient"] > 5e-6 and ours["ours"]


def test_a_peer_that_raises_is_named_and_one_of_ours_is_a_bug(bench: Bench) -> None:
    def broken(*leaves: Tensor) -> Tensor:
        raise RuntimeError("no compiler\nwith more lines")

    rows = layer.layer_rows(bench, SHAPE, [form("eager"), layer.Form("compile", F32, broken)], 2, ["forward"])
    assert bench.missing == {"layer B2 T3 4->5 6x7, compile float32": "RuntimeError: no compiler"}
    assert not any(row["backend"] == "compile" for row in rows)
    with pytest.raises(RuntimeError, match="no compiler"):
        layer.layer_rows(bench, SHAPE, [layer.Form("cpu", F32, broken, backend="cpu")], 2, ["forward"])


def test_networks_in_one_call_are_timed_beside_four_calls(bench: Bench) -> None:
    rows = layer.layer_rows(bench, SHAPE, peers.network_forms(F32, ["cpu"]), 2, networks=4)
    names = [row["backend"] for row in rows if row["ours"]]
    assert names == ["cpu calls", "cpu grouped"] * 2 and all(row["valid"] for row in rows)
    assert rows[0]["case"] == f"4 networks {SHAPE}" and rows[1]["speedup_over"].keys() == {"eager"}


@pytest.mark.parametrize("tamper", [None, "forward", "backward"])
def test_gates_are_checked(tamper: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if tamper is not None:
        monkeypatch.setattr(_native, f"gates_{tamper}", lambda *args: None)
    contenders = convlstm.gates_contenders(SHAPE, with_compiled=False)
    names = ["eager", "eager by hand", "cpu", "copy"]
    assert [one.key for one in contenders] == [(name, dtype) for dtype in ("float32", "bfloat16") for name in names]
    assert all(one.valid != (one.ours and tamper is not None) for one in contenders)


def test_bytes_saved_are_those_counted_by_hand() -> None:
    x, w = (torch.ones(8, 5, requires_grad=True) for _ in range(2))  # 160 bytes each
    assert convlstm.saved_bytes(lambda: x * w, [x, w]) == 0 and convlstm.saved_bytes(lambda: x * w, [x]) == 160
    assert convlstm.saved_bytes(lambda: x.sigmoid(), [x, w]) == 160
    # Two views of one storage: sigmoid keeps its result, whose halves are multiplied.
    assert convlstm.saved_bytes(lambda: torch.mul(*x.sigmoid().chunk(2)), [x, w]) == 160
    rows = convlstm.saved_rows(layer.Shape(2, 4, 6, 6, 5, 5))
    names = ("backend", "pass", "dtype", "bytes_per_element_step")
    saved = {tuple(row[name] for name in names) for row in rows}
    # eager: cat of x and h 2, i f o g 4, c 1, tanh c 1.  Ours: gates 4, c 1, h 1.
    expected = {("eager", "store", "float32", 32), ("eager", "store", "bfloat16", 16)}
    expected |= {("cpu", "store", "float32", 24), ("cpu", "recompute", "float32", 8)}
    for dtype in ("float16", "bfloat16"):
        expected |= {("cpu", "store", dtype, 14), ("cpu", "recompute", dtype, 6)}
    assert saved == expected
