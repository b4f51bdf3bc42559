"""ConvLSTM: every backend that runs on the CPU against the textbook in fp64, both ways, at shapes that are not kind."""

from __future__ import annotations

from collections.abc import Iterator

import convlstm_cases as cases
import pytest
import torch
from convlstm_cases import LOSSES, STATES, Shape, answer, arguments, assert_gradients, assert_values, given, gradients
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels import convlstm, convlstm_cells, cpu
from rlv2v.kernels.reference import LIMITS
from rlv2v.kernels.triton.recurrence import available

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = list(LIMITS)
# Such that no gradient of few numbers comes out near zero by chance, where a ratio of norms says nothing.
SHAPES = [
    Shape(batch=2, steps=4, inputs=3, channels=5, height=7, width=6, kernel=3),
    Shape(batch=1, steps=3, inputs=4, channels=2, height=6, width=9, kernel=1),
    Shape(batch=2, steps=3, inputs=1, channels=3, height=11, width=4, kernel=5),
    Shape(batch=3, steps=1, inputs=2, channels=2, height=4, width=4, kernel=3),
    Shape(batch=3, steps=5, inputs=3, channels=4, height=1, width=1, kernel=3),
    Shape(batch=2, steps=2, inputs=2, channels=1, height=5, width=4, kernel=3),
    Shape(batch=1, steps=2, inputs=5, channels=17, height=6, width=5, kernel=3),
    Shape(batch=3, steps=3, inputs=2, channels=33, height=2, width=3, kernel=1),
    Shape(batch=1, steps=1, inputs=1, channels=16, height=1, width=8, kernel=5),
]
RUNS = [
    (backend, dtype, recompute)
    for backend in ("auto", "eager", "cpu", "reference")
    for dtype in DTYPES
    for recompute in (False, True)
    if not (backend == "cpu" and dtype == torch.float64) and not (backend == "reference" and recompute)
]


def run_id(run: tuple[str, torch.dtype, bool]) -> str:
    backend, dtype, recompute = run
    return f"{backend}-{str(dtype).removeprefix('torch.')}{'-recompute' if recompute else ''}"


def check(shape: Shape, state: str, run: tuple[str, torch.dtype, bool]) -> None:
    """Values, and the gradients of every loss, of one call."""
    backend, dtype, recompute = run
    inputs, right = arguments(shape, dtype, state), answer(shape, dtype, state)
    hs, cs = convlstm_cells(*inputs, backend=backend, recompute=recompute)
    assert_values(hs, cs, (right.hs, right.cs), dtype)
    for loss in LOSSES:
        found = gradients(loss, hs, cs, inputs, dtype)
        assert all(gradient is None or gradient.dtype == dtype for gradient in found.values()), loss
        assert_gradients(found, right.weighed[loss], dtype)


@pytest.mark.parametrize("run", RUNS, ids=run_id)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:-1])))
def test_values_and_gradients_are_those_of_the_textbook(
    shape: Shape, state: str, run: tuple[str, torch.dtype, bool]
) -> None:
    check(shape, state, run)


@pytest.mark.parametrize("run", [run for run in RUNS if run[0] != "auto"], ids=run_id)
def test_a_layer_of_real_size_keeps_the_limits(run: tuple[str, torch.dtype, bool]) -> None:
    check(Shape(batch=2, steps=8, inputs=32, channels=32, height=16, width=16, kernel=3), "state", run)


@pytest.mark.skipif(available(torch.device("cpu")) is not None, reason="on a GPU Triton does not interpret")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recompute"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[6]], ids=lambda shape: "x".join(map(str, shape[:-1])))
def test_triton_keeps_the_limits_as_an_operator(shape: Shape, recompute: bool, dtype: torch.dtype) -> None:
    for state in ("state", "zero"):
        check(shape, state, ("triton", dtype, recompute))


@pytest.fixture(params=_native.gates_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.gates_isa()
    _native.gates_set_isa(request.param)
    yield request.param
    _native.gates_set_isa(before)


@pytest.mark.parametrize("run", [run for run in RUNS if run[0] == "cpu"], ids=run_id)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:-1])))
def test_every_instruction_set_keeps_the_limits(shape: Shape, run: tuple[str, torch.dtype, bool], isa: str) -> None:
    assert _native.gates_isa() == isa
    for state in ("state", "zero"):
        check(shape, state, run)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("steps_at_once", [1, 3])
def test_pre_activations_may_be_made_a_few_steps_at_a_time(
    steps_at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(2, 7, 3, 5, 4, 6, 3, groups=2)
    step_bytes = shape.batch * shape.height * shape.width * 4 * shape.channels * dtype.itemsize
    monkeypatch.setattr(cpu, "CHUNK_BYTES", steps_at_once * step_bytes)
    check(shape, "state", ("cpu", dtype, False))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("channels", [33, 64])
def test_two_threads_give_what_one_gives(channels: int, dtype: torch.dtype) -> None:
    inputs = arguments(Shape(2, 3, 4, channels, 24, 22, 3), dtype)

    def outcome() -> list[Tensor]:
        hs, cs = convlstm_cells(*inputs, backend="cpu")
        return [hs, cs, *gradients("hs and cs", hs, cs, inputs, dtype).values()]

    hs, cs, *one = outcome()
    torch.set_num_threads(2)
    hs_two, cs_two, *two = outcome()
    assert torch.equal(hs, hs_two)
    assert torch.equal(cs, cs_two)
    for name, a, b in zip(cases.NAMES, one, two, strict=True):
        # A sum over all pixels, of weights and bias, may be split among threads; nothing else is.
        assert name in ("w_x", "w_h", "bias") or torch.equal(a, b), name
        assert (a.double() - b).norm() <= LIMITS[dtype].gradient * a.double().norm(), name


@pytest.mark.parametrize("run", RUNS, ids=run_id)
@pytest.mark.parametrize("state", STATES)
def test_groups_are_as_many_calls(state: str, run: tuple[str, torch.dtype, bool]) -> None:
    backend, dtype, recompute = run
    shape = Shape(2, 3, 3, 5, 4, 6, 3, groups=3)
    inputs = arguments(shape, dtype, state)
    hs, cs = convlstm_cells(*inputs, backend=backend, recompute=recompute)
    found = gradients("hs and cs", hs, cs, inputs, dtype)
    last = convlstm(*inputs, backend=backend, recompute=recompute)[1]
    assert torch.equal(last[0], hs[:, :, -1])
    assert torch.equal(last[1], cs[:, :, -1])
    dhs, dcs = cases.loss_weights(hs.shape, dtype)
    for n in range(3):
        alone = [None if a is None else a.detach()[n].clone().requires_grad_() for a in inputs]
        alone_hs, alone_cs = convlstm_cells(*alone, backend=backend, recompute=recompute)
        assert torch.equal(hs[n], alone_hs)
        assert torch.equal(cs[n], alone_cs)
        wanted = torch.autograd.grad((alone_hs, alone_cs), given(alone), (dhs[n], dcs[n]))
        for name, want in zip(found, wanted, strict=True):
            assert torch.equal(found[name][n], want), name


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_groups_keep_the_limits(run: tuple[str, torch.dtype, bool]) -> None:
    for state in STATES:
        check(Shape(2, 3, 3, 5, 4, 6, 3, groups=2), state, run)


@pytest.mark.parametrize("run", RUNS, ids=run_id)
def test_chunks_with_the_state_carried_over_are_the_whole(run: tuple[str, torch.dtype, bool]) -> None:
    backend, dtype, recompute = run
    shape = Shape(2, 6, 3, 5, 7, 6, 3)
    inputs, right = arguments(shape, dtype), answer(shape, dtype)
    x, w_x, w_h, bias, h, c = inputs
    hs, cs = [], []
    for chunk in x.split((1, 2, 3), 1):
        of_chunk, (h, c) = convlstm(chunk, w_x, w_h, bias, h, c, backend=backend, recompute=recompute)
        assert torch.equal(h, of_chunk[:, -1])
        assert h.dtype == dtype
        assert c.dtype == (torch.float32 if dtype.itemsize == 2 else dtype)
        hs.append(of_chunk)
        cs.append(c)
    torch.testing.assert_close(torch.cat(hs, 1).double(), right.hs, rtol=0, atol=LIMITS[dtype].value)
    assert_values(hs[-1][:, -1], cs[-1], (right.hs[:, -1], right.cs[:, -1]), dtype)
    dc = cases.loss_weights(right.cs.shape, dtype)[1][:, -1]
    found = dict(zip(cases.NAMES, torch.autograd.grad(cs[-1], given(inputs), dc), strict=True))
    assert_gradients(found, right.weighed["c_T"], dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "cpu", "reference"])
def test_the_first_cell_may_have_either_dtype(backend: str, dtype: torch.dtype) -> None:
    *rest, c0 = arguments(SHAPES[0], dtype)
    wide = c0.detach().float().requires_grad_()
    outcomes = []
    for cell in (c0, wide):
        hs, cs = convlstm_cells(*rest, cell, backend=backend)
        outcomes.append((hs, cs, gradients("hs and cs", hs, cs, [*rest, cell], dtype)))
    (hs, cs, narrow_found), (hs_wide, cs_wide, wide_found) = outcomes
    assert torch.equal(hs, hs_wide)
    assert torch.equal(cs, cs_wide)
    assert narrow_found["c0"].dtype == dtype
    assert wide_found["c0"].dtype == torch.float32
    assert torch.equal(narrow_found["c0"], wide_found["c0"].to(dtype))
    # Finer than 16 bits can tell, and still in the cells.
    step = 1e-4 * wide.detach()
    _, cs_finer = convlstm_cells(*rest, wide.detach() + step, backend=backend)
    f = (cs_finer - cs)[:, 0] / step
    assert ((f > 0) & (f < 1)).float().mean() > 0.98


@pytest.mark.parametrize("run", RUNS, ids=run_id)
@pytest.mark.parametrize("groups", [0, 2])
def test_no_sequence_at_all_gives_empty_results_and_zero_gradients(
    groups: int, run: tuple[str, torch.dtype, bool]
) -> None:
    backend, dtype, recompute = run
    inputs = arguments(Shape(0, 3, 2, 4, 5, 6, 3, groups), dtype)
    hs, cs = convlstm_cells(*inputs, backend=backend, recompute=recompute)
    lead = (groups,) if groups else ()
    assert hs.shape == cs.shape == (*lead, 0, 3, 4, 5, 6)
    for loss in LOSSES:
        for name, found in gradients(loss, hs, cs, inputs, dtype).items():
            expected = dict(zip(cases.NAMES, inputs, strict=True))[name]
            assert found is not None and found.shape == expected.shape, name
            assert not found.any(), name


def test_large_results_lie_in_memory_that_is_used_again_but_never_while_it_is_referred_to() -> None:
    shape = Shape(batch=2, steps=4, inputs=2, channels=32, height=40, width=40, kernel=1)
    inputs = arguments(shape, torch.float32)

    def run() -> Tensor:
        return convlstm(*inputs, backend="cpu")[0]

    first = run()
    assert first.numel() * 4 >= cpu.POOLED_BYTES
    view, values = first[0, 1, 3:5], first.clone()
    del first
    for _ in range(3):  # the view keeps the whole of its memory, whatever is made meanwhile
        torch.testing.assert_close(run(), values, rtol=0, atol=0)
    assert torch.equal(view, values[0, 1, 3:5])
    del view
    before = sum(_native.pool_bytes())
    for _ in range(3):
        run()
    assert sum(_native.pool_bytes()) == before


@pytest.mark.parametrize("groups", [0, 2])
@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_channels_last_weights_give_the_same_and_such_gradients(backend: str, groups: int) -> None:
    if backend == "triton" and available(torch.device("cpu")) is not None:
        pytest.skip("on a GPU Triton does not interpret")
    inputs = arguments(SHAPES[0]._replace(groups=groups), torch.float32)
    turned = [
        a.detach().movedim(-3, -1).contiguous().movedim(-1, -3).requires_grad_() if n in (1, 2) else a
        for n, a in enumerate(inputs)
    ]
    (hs, cs), (hs_turned, cs_turned) = (convlstm_cells(*given, backend=backend) for given in (inputs, turned))
    torch.testing.assert_close(hs_turned, hs, rtol=0, atol=1e-6)
    want = gradients("hs and cs", hs, cs, inputs, torch.float32)
    got = gradients("hs and cs", hs_turned, cs_turned, turned, torch.float32)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-4)
    for name, weight in zip(("w_x", "w_h"), turned[1:3], strict=True):
        assert got[name].stride() == weight.stride() != want[name].stride()
