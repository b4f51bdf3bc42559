"""The Triton recurrence: the textbook's numbers, each output written completely and nothing beyond it.

Without a GPU it runs in Triton's interpreter, with one on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convlstm_cases import ALL_RUNS, Run, Shape, Tensors, arguments, check_call, fast, gradients, literal
from torch import Tensor

from rlv2v.kernels import convlstm_cells, dispatch
from rlv2v.kernels.driver import BackwardOperands, Operands, Outputs, Problem
from rlv2v.kernels.triton import recurrence
from rlv2v.kernels.triton.recurrence import DTYPES, TritonRecurrence, unavailable_reason
from rlv2v.kernels.triton.tiles import SHARED_LIMIT, Tile, architecture, backward_tile, forward_tile

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
GUARD = 64  # elements on either side of every tensor
SMALL = Shape(1, 2, 1, 3, 2, 3, 3, groups=2)
SHAPES = [SMALL, Shape(2, 1, 2, 1, 1, 1, 1), Shape(2, 3, 1, 3, 1, 1, 3), Shape(3, 2, 1, 5, 4, 6, 3, 2)]
SHAPES += [Shape(1, 2, 1, 3, 7, 2, 5), Shape(1, 3, 1, 17, 3, 4, 3), Shape(1, 2, 1, 33, 5, 9, 1, 2)]
RUNS = [run for run in ALL_RUNS if run.backend == "triton"]
CASES = [(shape, run, state) for shape in SHAPES for run in RUNS for state in ("state", "zero")]
CASES += [(SMALL, RUNS[0], state) for state in ("h0 alone", "c0 alone")]
FAST = [n for n, (shape, run, state) in enumerate(CASES) if shape == SMALL and (state == "state" or not run.recompute)]
FAST += [CASES.index((SHAPES[5], Run("triton", torch.float16), "state"))]
LOSS = {"state": "hs and cs", "c0 alone": "c_T"}  # for the other states: hs


class Guarded:
    """A recurrence whose tensors are full of NaN at first and lie between NaN: what it wrote and read is seen."""

    def __init__(self, recurrence: TritonRecurrence) -> None:
        self.recurrence = recurrence
        self.buffers: list[Tensor] = []

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        numel = torch.Size(size).numel()
        buffer = torch.full((numel + 2 * GUARD,), NAN, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + numel].view(size)

    def copy(self, frames: Tensor | None) -> Tensor | None:
        """Return the same numbers, dense with the channels last."""
        if frames is None:
            return None
        last = frames.movedim(-3, -1)
        return self.empty(*last.shape, dtype=frames.dtype, device=frames.device).copy_(last).movedim(-1, -3)

    def run(self, call: Callable[..., Any], *operands: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", self.empty)
            return call(*operands)

    def unsupported_reason(self, problem: Problem) -> str | None:
        return self.recurrence.unsupported_reason(problem)

    def forward(self, operands: Operands, keep_gates: bool) -> Outputs:
        a, h0, c0 = map(self.copy, (operands.convolve_x(with_bias=False), operands.h0, operands.c0))
        return self.run(self.recurrence.recur, a, operands.w_h, h0, c0, keep_gates, operands.bias)

    def backward(self, operands: BackwardOperands) -> tuple[Tensor, Tensor | None, Tensor | None]:
        frames = {name: self.copy(getattr(operands, name)) for name in ("dhs", "dcs", "gates", "cs", "c0")}
        return self.run(self.recurrence.backward, operands._replace(**frames))

    def check(self) -> None:
        """Assert that the guards are as they were, and that everything between them was written."""
        assert self.buffers
        for buffer in self.buffers:
            assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()
            assert not buffer[GUARD:-GUARD].isnan().any()


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[TritonRecurrence], Guarded]:
    """Return a function that puts a recurrence, guarded, in the backend's place."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the convolution of x is held to float32's limits

    def put(recurrence: TritonRecurrence) -> Guarded:
        guarded = Guarded(recurrence)
        monkeypatch.setitem(dispatch.TABLE, "triton", dispatch.TABLE["triton"]._replace(recurrence=guarded))
        return guarded

    return put


Use = Callable[[TritonRecurrence], Guarded]


def results(inputs: Tensors) -> dict[str, Tensor]:
    """Return hs, cs and every gradient of one call in float32."""
    inputs = [None if a is None else a.detach().to(DEVICE).requires_grad_() for a in inputs]
    hs, cs = convlstm_cells(*inputs, backend="triton")
    return {"hs": hs, "cs": cs} | gradients("hs and cs", hs, cs, inputs, torch.float32)


@pytest.mark.parametrize("case", fast(CASES, *FAST), ids=lambda case: "-".join(map(str, case)))
def test_values_and_gradients_are_those_of_the_textbook(case: tuple[Shape, Run, str], use: Use) -> None:
    shape, run, state = case
    guarded = use(TritonRecurrence())
    check_call(shape, state, run, (LOSS.get(state, "hs"),), DEVICE)
    guarded.check()


@pytest.mark.parametrize("tile", fast([Tile(32, 16, 16), Tile(64, 32, 64)], 1), ids=str)
def test_a_tile_changes_no_number_beyond_rounding(tile: Tile, use: Use) -> None:
    guarded = use(TritonRecurrence(tile=tile))
    check_call(Shape(1, 2, 1, 20, 7, 11, 3), "state", Run("triton", torch.float16), ("hs",), DEVICE)
    guarded.check()


@pytest.mark.parametrize("state", ["state", "zero"])
@pytest.mark.parametrize("steps", [1, 3])
def test_launches_are_one_a_step_and_one_that_packs(steps: int, state: str, use: Use) -> None:
    launches: Counter[str] = Counter()

    def count(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        launches[kernel.__name__] += 1
        recurrence.launch(kernel, grid, arguments)

    use(TritonRecurrence(count))
    results(arguments(Shape(1, steps, 1, 2, 2, 3, 1), torch.float32, state))
    packs = 2 if state == "state" or steps > 1 else 0
    want = Counter(forward_step=steps, backward_step=steps, backward_state=int(state == "state"), pack_weight=packs)
    assert launches == want


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_recurrence_is_in_tf32_where_the_convolutions_are(
    allowed: bool, dtype: torch.dtype, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[bool] = set()

    def watch(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        if "TF32" in arguments:
            seen.add(arguments["TF32"])
        recurrence.launch(kernel, grid, arguments)

    use(TritonRecurrence(watch))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
    results([None if a is None else a.to(dtype) for a in arguments(SMALL, torch.float32)])
    assert seen == {allowed and dtype == torch.float32}


def test_wide_offsets_give_the_same_bits(use: Use) -> None:
    def wide(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        recurrence.launch(kernel, grid, arguments | ({"WIDE": True} if "WIDE" in arguments else {}))

    inputs, both = arguments(SMALL, torch.float32), []
    for backend in (TritonRecurrence(), TritonRecurrence(wide)):
        use(backend)
        both.append(results(inputs))
    for name, tensor in both[0].items():
        assert torch.equal(tensor, both[1][name]), name


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_extreme_numbers_saturate(use: Use) -> None:
    use(TritonRecurrence())
    x, w_x, w_h, bias, *state = arguments(Shape(1, 2, 1, 2, 2, 3, 1), torch.float32)
    inputs = [torch.zeros_like(x), w_x, w_h, 1e4 * bias, *state]
    ours = results(inputs)
    assert all(tensor.isfinite().all() for tensor in ours.values())
    for name, want in zip(("hs", "cs"), literal(*(a.double() for a in inputs)), strict=True):
        torch.testing.assert_close(ours[name].double().cpu(), want, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_tanh_is_good_for_every_number() -> None:
    from rlv2v.kernels.triton.kernels import tanh

    @triton.jit
    def apply(x, y, tanh: tl.constexpr, N: tl.constexpr):
        index = tl.arange(0, N)
        tl.store(y + index, tanh(tl.load(x + index)))

    magnitudes = torch.logspace(-30, 2, 509, dtype=torch.float64)
    special = torch.tensor([0.0, float("inf"), 3e38, NAN, 0.25, 0.2499999], dtype=torch.float64)
    x = torch.cat((magnitudes, special, -magnitudes)).float()[:1024].to(DEVICE)
    x = torch.cat((x, x.new_zeros(1024 - len(x))))
    y = torch.empty_like(x)
    apply[(1,)](x, y, tanh, 1024)
    torch.testing.assert_close(y.double(), x.double().tanh(), rtol=5e-7, atol=0, equal_nan=True)


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert unavailable_reason(DEVICE) is None
    monkeypatch.setattr(recurrence, "interpreted", lambda: False)
    assert unavailable_reason(torch.device("cpu")) == (
        "a cpu tensor needs TRITON_INTERPRET=1, set before triton is imported"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert unavailable_reason(torch.device("cuda")) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(recurrence, "find_spec", lambda name: None)
    assert unavailable_reason(torch.device("cuda")) == "triton is not installed"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile_of", [forward_tile, backward_tile])
def test_every_tile_keeps_to_four_warps_and_64_sums(
    tile_of: Any, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    for channels in (1, 3, 16, 17, 32, 33, 64, 256, 1000):
        for pixels in (1, 64, 8192, 10**6):
            tile = tile_of(channels, pixels, dtype, capability)
            columns = 4 * tile.bc if tile_of is forward_tile else tile.bc
            assert tile.num_warps == 4 and tile.bm * columns // 128 <= 64
            buffers = tile.num_stages * (tile.bm + columns) * tile.bk * dtype.itemsize
            assert buffers <= SHARED_LIMIT[architecture(capability)]
    assert tile_of(32, 64, dtype, capability).bm == 32 and tile_of(32, 64 * 128, dtype, capability).bm == 64
