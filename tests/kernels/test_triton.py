"""The Triton recurrence: the textbook's numbers, each output written completely and nothing beyond it.

Without a GPU it runs in Triton's interpreter, with one on it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from convlstm_cases import fast, literal_recurrence
from recurrence_cases import check_recurrence, recurrence_inputs, run_recurrence
from torch import Tensor

from rlv2v.kernels.triton import recurrence
from rlv2v.kernels.triton.recurrence import DTYPES, TritonRecurrence, unavailable_reason
from rlv2v.kernels.triton.tiles import SHARED_LIMIT, Tile, architecture, backward_tile, forward_tile

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
GUARD = 64  # elements on either side of every tensor
SMALL = (2, 2, 1, 3, 2, 3, 3)
# (G, T, B, C, H, W, k)
SHAPES = [SMALL, (1, 1, 1, 1, 1, 1, 1), (1, 3, 2, 3, 1, 1, 3), (2, 2, 3, 5, 4, 6, 3), (1, 2, 1, 3, 7, 2, 5)]
SHAPES += [(1, 3, 1, 17, 3, 4, 3), (2, 2, 1, 33, 5, 9, 1)]
CASES = list(itertools.product(SHAPES, DTYPES, ("state", "zero"), (True, False)))
CASES += [(SMALL, torch.float32, state, True) for state in ("h0 alone", "c0 alone")]
FAST = [n for n, (shape, _, state, activated) in enumerate(CASES) if shape == SMALL and (state == "state" or activated)]
FAST += [n for n, case in enumerate(CASES) if case == (SHAPES[5], torch.float16, "state", True)]


class Guarded:
    """Make tensors that are full of NaN and lie between NaN, to see what a kernel wrote and what it read."""

    def __init__(self) -> None:
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
        return self.empty(*last.shape, dtype=frames.dtype, device=DEVICE).copy_(last).movedim(-1, -3)

    def check(self) -> None:
        """Assert that the guards are as they were, and that everything between them was written."""
        for buffer in self.buffers:
            assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()
            assert not buffer[GUARD:-GUARD].isnan().any()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """Also the backend's own allocations are guarded."""
    guarded = Guarded()
    monkeypatch.setattr(recurrence.torch, "empty", guarded.empty)
    yield guarded


def run(backend: TritonRecurrence, inputs: dict[str, Tensor | None], guarded: Guarded) -> dict[str, Tensor | None]:
    """Run a backend in float32 with all that can be given to it."""
    return run_recurrence(backend, inputs, torch.float32, DEVICE, with_dcs=True, activated=True, copy=guarded.copy)


@pytest.mark.parametrize("case", fast(CASES, *FAST), ids=str)
def test_values_and_gradients_are_those_of_the_textbook(case: tuple[Any, ...], guarded: Guarded) -> None:
    shape, dtype, state, activated = case
    options: dict[str, Any] = {"with_dcs": state != "zero", "activated": activated, "copy": guarded.copy}
    check_recurrence(TritonRecurrence(), shape, dtype, DEVICE, state=state, **options)
    guarded.check()


@pytest.mark.parametrize("tile", fast([Tile(32, 16, 16), Tile(64, 32, 64)], 1), ids=str)
def test_a_tile_changes_no_number_beyond_rounding(tile: Tile, guarded: Guarded) -> None:
    options: dict[str, Any] = {"with_dcs": False, "activated": True, "copy": guarded.copy}
    check_recurrence(
        TritonRecurrence(tile=tile), (1, 2, 1, 20, 7, 11, 3), torch.float16, DEVICE, state="state", **options
    )
    guarded.check()


@pytest.mark.parametrize("state", ["state", "zero"])
@pytest.mark.parametrize("steps", [1, 3])
def test_launches_are_one_a_step_and_one_that_packs(steps: int, state: str, guarded: Guarded) -> None:
    launches: Counter[str] = Counter()

    def count(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        launches[kernel.__name__] += 1
        recurrence.launch(kernel, grid, arguments)

    run(TritonRecurrence(count), recurrence_inputs((1, steps, 1, 2, 2, 3, 1), torch.float32, state=state), guarded)
    packs = 2 if state == "state" or steps > 1 else 0
    want = {
        "forward_step": steps,
        "backward_step": steps,
        "backward_state": int(state == "state"),
        "pack_weight": packs,
    }
    assert launches == {name: number for name, number in want.items() if number}


def test_wide_offsets_give_the_same_bits(guarded: Guarded) -> None:
    def wide(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        recurrence.launch(kernel, grid, arguments | ({"WIDE": True} if "WIDE" in arguments else {}))

    inputs = recurrence_inputs(SMALL, torch.float32, state="state")
    narrow = run(TritonRecurrence(), inputs, guarded)
    for name, tensor in run(TritonRecurrence(wide), inputs, guarded).items():
        assert torch.equal(tensor, narrow[name]), name


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_extreme_numbers_saturate(guarded: Guarded) -> None:
    inputs = recurrence_inputs((1, 2, 1, 2, 2, 3, 1), torch.float32, state="state")
    inputs["a"] *= 1e4
    ours = run(TritonRecurrence(), inputs, guarded)
    assert all(tensor.isfinite().all() for tensor in ours.values())
    exact = literal_recurrence(inputs["a"], inputs["w_h"], inputs["h0"], inputs["c0"])
    for name, want in zip(("hs", "cs"), exact, strict=False):
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
