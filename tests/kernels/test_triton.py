"""The Triton recurrence against the literal one in fp64, each output written whole and nothing beyond it.

Without a GPU in Triton's interpreter, with one on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from rlv2v.kernels.reference import LIMITS
from rlv2v.kernels.triton import recurrence
from rlv2v.kernels.triton.recurrence import DTYPES, TritonRecurrence, available
from rlv2v.kernels.triton.tiles import SHARED_LIMIT, Tile, architecture, backward_tile, forward_tile

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
GUARD = 64  # elements on either side of every tensor

# (G, T, B, C, H, W, k)
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 3, 2, 3, 1, 1, 3),
    (2, 2, 3, 5, 4, 6, 3),
    (1, 2, 1, 3, 7, 2, 5),
    (1, 3, 1, 17, 3, 4, 3),
    (2, 2, 1, 33, 5, 9, 1),
]


class Guarded:
    """Makes tensors that are full of NaN and lie between NaN, to see what a kernel wrote and what it read."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, *size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        numel = torch.Size(size).numel()
        buffer = torch.full((numel + 2 * GUARD,), NAN, dtype=dtype, device=device)
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + numel].view(size)

    def copy(self, tensor: Tensor | None) -> Tensor | None:
        """The same numbers, dense with the channels last."""
        if tensor is None:
            return None
        last = tensor.movedim(-3, -1)
        return self.empty(*last.shape, dtype=tensor.dtype, device=DEVICE).copy_(last).movedim(-1, -3)

    def check(self) -> None:
        """The guards are as they were, and all between them was written."""
        for buffer in self.buffers:
            assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()
            assert not buffer[GUARD:-GUARD].isnan().any()


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """Also the backend's own allocations."""
    guarded = Guarded()
    monkeypatch.setattr(recurrence.torch, "empty", guarded.empty)
    yield guarded


def literal(a: Tensor, w_h: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, cells, gates and pre-activations; Shi et al. 2015, eq. 3, a step and a group at a time."""
    zeros = torch.zeros_like(a[:, 0, :, : w_h.shape[2]])
    h, c = zeros if h is None else h, zeros if c is None else c
    rows = []
    for t in range(a.shape[1]):
        products = [conv2d(frames, w, padding=w.shape[-1] // 2) for frames, w in zip(h, w_h, strict=True)]
        before = a[:, t] + torch.stack(products)
        i, f, o, g = before.chunk(4, 2)
        i, f, o, g = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o), torch.tanh(g)
        c = f * c + i * g
        h = o * torch.tanh(c)
        rows.append((h, c, torch.cat((i, f, o, g), 2), before))
    hs, cs, gates, pre_activations = (torch.stack(column, 1) for column in zip(*rows, strict=True))
    return hs, cs, gates, pre_activations


def inputs(shape: tuple[int, ...], dtype: torch.dtype, *, state: bool, seed: int = 0) -> dict[str, Tensor | None]:
    """In fp64, but numbers of the dtypes that the backend takes."""
    groups, steps, batch, c, height, width, k = shape
    rng = torch.Generator().manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64).to(dtype).double()

    frames = (groups, steps, batch, c, height, width)
    return {
        "a": normal(groups, steps, batch, 4 * c, height, width),
        "w_h": (normal(groups, 4 * c, c, k, k) / (c * k * k) ** 0.5).to(dtype).double(),
        "h0": normal(groups, batch, c, height, width) if state else None,
        "c0": normal(groups, batch, c, height, width, dtype=torch.float32) if state else None,
        "dhs": normal(*frames),
        "dcs": normal(*frames, dtype=torch.float32),
    }


def run(
    backend: TritonRecurrence,
    given: dict[str, Tensor | None],
    dtype: torch.dtype,
    guarded: Guarded,
    *,
    with_dcs: bool,
    activated: bool,
) -> dict[str, Tensor | None]:
    """Forward and backward of the backend; where the backward takes pre-activations, they are rounded exact ones."""
    single = {"c0", "dcs"}
    cast = {
        name: None if tensor is None else tensor.to(DEVICE, torch.float32 if name in single else dtype)
        for name, tensor in given.items()
    }
    w_h = cast.pop("w_h")
    a, h0, c0, dhs, dcs = (guarded.copy(cast[name]) for name in ("a", "h0", "c0", "dhs", "dcs"))
    hs, cs, gates = backend.recur(a, w_h, h0, c0, activated)
    saved = gates
    if not activated:
        assert gates is None
        exact = literal(given["a"], given["w_h"], given["h0"], given["c0"])[3]
        saved = guarded.copy(exact.to(DEVICE, dtype))
    need_state = given["h0"] is not None
    da, dh0, dc0 = backend.backward(dhs, dcs if with_dcs else None, saved, activated, cs, c0, w_h, need_state)
    assert (dh0 is None, dc0 is None) == (not need_state, not need_state)
    return {"hs": hs, "cs": cs, "gates": gates, "da": da, "dh0": dh0, "dc0": dc0}


@pytest.mark.parametrize("activated", [True, False], ids=["saved", "recomputed"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_textbook(
    shape: tuple[int, ...], dtype: torch.dtype, state: bool, activated: bool, guarded: Guarded
) -> None:
    compare(TritonRecurrence(), inputs(shape, dtype, state=state), dtype, guarded, with_dcs=state, activated=activated)


@pytest.mark.parametrize("tile", [Tile(64, 32, 64), Tile(32, 16, 16)], ids=str)
def test_a_tile_changes_no_number_beyond_rounding(tile: Tile, guarded: Guarded) -> None:
    given = inputs((1, 2, 1, 20, 7, 11, 3), torch.float16, state=True)
    compare(TritonRecurrence(tile=tile), given, torch.float16, guarded, with_dcs=False, activated=True)


@pytest.mark.parametrize("alone", ["h0", "c0"])
def test_one_half_of_the_state_may_be_left_out(alone: str, guarded: Guarded) -> None:
    given = inputs(SHAPES[2], torch.float32, state=True)
    given["h0" if alone == "c0" else "c0"] = None
    exact = literal(given["a"], given["w_h"], given["h0"], given["c0"])
    got = run(TritonRecurrence(), given, torch.float32, guarded, with_dcs=False, activated=True)
    for name, want in zip(("hs", "cs", "gates"), exact, strict=False):
        torch.testing.assert_close(got[name].double().cpu(), want, rtol=0, atol=2e-6)


def compare(
    backend: TritonRecurrence,
    given: dict[str, Tensor | None],
    dtype: torch.dtype,
    guarded: Guarded,
    *,
    with_dcs: bool,
    activated: bool,
) -> None:
    """All six outputs within the dtype's limits, of the right dtype, whole, and written nowhere else."""
    leaves = {name: given[name].requires_grad_() for name in ("a", "h0", "c0") if given[name] is not None}
    hs, cs, gates, _ = literal(given["a"], given["w_h"], given["h0"], given["c0"])
    loss = (hs * given["dhs"]).sum() + ((cs * given["dcs"]).sum() if with_dcs else 0)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    got = run(backend, given, dtype, guarded, with_dcs=with_dcs, activated=activated)
    guarded.check()
    value_limit, gradient_limit = LIMITS[dtype]
    gate_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    values = {"hs": (hs, dtype), "cs": (cs, torch.float32), "gates": (gates, gate_dtype)}
    for name, (want, kind) in values.items():
        if name == "gates" and not activated:
            continue
        assert got[name].dtype == kind and got[name].shape == want.shape
        error = (got[name].double().cpu() - want).abs().max()
        assert error <= value_limit * want.abs().max().clamp(min=1), f"{name}: {error}"
    kinds = {"a": ("da", dtype), "h0": ("dh0", dtype), "c0": ("dc0", torch.float32)}
    for leaf, want in zip(leaves, gradients, strict=True):
        name, kind = kinds[leaf]
        assert got[name].dtype == kind and got[name].shape == want.shape
        error = (got[name].double().cpu() - want).norm() / want.norm()
        assert error <= gradient_limit, f"{name}: {error}"


@pytest.mark.parametrize("state", [True, False], ids=["state", "zero"])
@pytest.mark.parametrize("steps", [1, 8])
def test_launches_are_one_a_step_and_one_that_packs(steps: int, state: bool, guarded: Guarded) -> None:
    launches: Counter[str] = Counter()

    def count(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        launches[kernel.__name__] += 1
        recurrence.launch(kernel, grid, arguments)

    given = inputs((1, steps, 1, 2, 2, 3, 1), torch.float32, state=state)
    run(TritonRecurrence(count), given, torch.float32, guarded, with_dcs=False, activated=True)
    packs = 2 if state or steps > 1 else 0
    want = {"forward_step": steps, "backward_step": steps, "backward_state": int(state), "pack_weight": packs}
    assert launches == {name: number for name, number in want.items() if number}


def test_wide_offsets_give_the_same_bits(guarded: Guarded) -> None:
    def wide(kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        recurrence.launch(kernel, grid, arguments | ({"WIDE": True} if "WIDE" in arguments else {}))

    given = inputs(SHAPES[2], torch.float32, state=True)
    options: dict[str, Any] = {"with_dcs": True, "activated": True}
    plain = run(TritonRecurrence(), given, torch.float32, guarded, **options)
    for name, tensor in run(TritonRecurrence(wide), given, torch.float32, guarded, **options).items():
        assert torch.equal(tensor, plain[name]), name


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_extreme_numbers_saturate(guarded: Guarded) -> None:
    given = inputs((1, 2, 1, 2, 2, 3, 1), torch.float32, state=True)
    given["a"] *= 1e4
    got = run(TritonRecurrence(), given, torch.float32, guarded, with_dcs=True, activated=True)
    assert all(tensor.isfinite().all() for tensor in got.values())
    for name, want in zip(("hs", "cs"), literal(given["a"], given["w_h"], given["h0"], given["c0"]), strict=False):
        torch.testing.assert_close(got[name].double().cpu(), want, rtol=0, atol=2e-6)


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
    assert available(DEVICE) is None
    monkeypatch.setattr(recurrence, "interpreted", lambda: False)
    assert available(torch.device("cpu")) == "a cpu tensor needs TRITON_INTERPRET=1, set before triton is imported"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert available(torch.device("cuda")) == "compute capability 7.5 is below 8.0"
    monkeypatch.setattr(recurrence, "find_spec", lambda name: None)
    assert available(torch.device("cuda")) == "triton is not installed"


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("choose", [forward_tile, backward_tile])
def test_every_tile_keeps_to_four_warps_and_64_sums(
    choose: Any, dtype: torch.dtype, capability: tuple[int, int]
) -> None:
    for channels in (1, 3, 16, 17, 32, 33, 64, 256, 1000):
        for pixels in (1, 64, 8192, 10**6):
            tile = choose(channels, pixels, dtype, capability)
            columns = 4 * tile.bc if choose is forward_tile else tile.bc
            assert tile.num_warps == 4 and tile.bm * columns // 128 <= 64
            buffers = tile.num_stages * (tile.bm + columns) * tile.bk * dtype.itemsize
            assert buffers <= SHARED_LIMIT[architecture(capability)]
    assert choose(32, 64, dtype, capability).bm == 32 and choose(32, 64 * 128, dtype, capability).bm == 64
