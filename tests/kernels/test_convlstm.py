"""ConvLSTM: every backend that runs on the CPU against the textbook in float64, both ways, at awkward shapes."""

from __future__ import annotations

import convlstm_cases as cases
import pytest
import torch
from convlstm_cases import NAMES, RUNS, Run, Shape, arguments, fast, gradients
from torch import Tensor

from rlv2v import _native
from rlv2v.kernels import convlstm, convlstm_cells, cpu
from rlv2v.kernels.triton.recurrence import unavailable_reason

pytestmark = pytest.mark.usefixtures("one_thread")

CPU_RUNS = [run for run in RUNS if run.backend == "cpu"]
REAL_SIZE = Shape(batch=2, steps=8, inputs=32, channels=32, height=16, width=16, kernel=3)
TINY = Shape(batch=2, steps=2, inputs=2, channels=3, height=2, width=3, kernel=3)
needs_triton = pytest.mark.skipif(unavailable_reason(torch.device("cpu")) is not None, reason="Triton: not interpreted")


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("state", cases.STATES)
@pytest.mark.parametrize("shape", fast(cases.SHAPES, 0, 6, 9), ids=str)
def test_values_and_gradients_are_those_of_the_textbook(shape: Shape, state: str, run: Run) -> None:
    cases.check_call(shape, state, run)


@pytest.mark.parametrize("run", fast(RUNS, 1, 4, 7, 9, 13), ids=str)
def test_a_layer_of_real_size_keeps_the_limits(run: Run) -> None:
    cases.check_call(REAL_SIZE, "state", run)


@pytest.mark.parametrize("run", CPU_RUNS, ids=str)
@pytest.mark.parametrize("shape", fast(cases.SHAPES, 0, 6), ids=str)
def test_every_instruction_set_keeps_the_limits(shape: Shape, run: Run, isa: str) -> None:
    assert _native.isa() == isa
    for state in ("state", "zero"):
        cases.check_call(shape, state, run)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
@pytest.mark.parametrize("steps_at_once", [1, 3])
def test_pre_activations_may_be_made_a_few_steps_at_a_time(
    steps_at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(2, 7, 3, 5, 4, 6, 3, groups=2)
    step_bytes = shape.batch * shape.height * shape.width * 4 * shape.channels * dtype.itemsize
    monkeypatch.setattr(cpu, "CHUNK_BYTES", steps_at_once * step_bytes)
    cases.check_call(shape, "state", Run("cpu", dtype))


@pytest.mark.parametrize("dtype", fast(cases.DTYPES[1:], 0), ids=str)
@pytest.mark.parametrize("channels", fast([33, 64], 0))
def test_two_threads_give_what_one_gives(channels: int, dtype: torch.dtype) -> None:
    shape = Shape(2, 3, 4, channels, 24, 22, 3)
    inputs = arguments(shape, dtype)

    def results() -> list[Tensor]:
        hs, cs = convlstm_cells(*inputs, backend="cpu")
        return [hs, cs, *gradients("hs and cs", hs, cs, inputs, dtype).values()]

    one = results()
    torch.set_num_threads(2)
    for name, a, b in zip(("hs", "cs", *NAMES), one, results(), strict=True):
        # A sum over all pixels, of weights and bias, may be split among threads; nothing else is.
        assert name in ("w_x", "w_h", "bias") or torch.equal(a, b), name
        assert (a.double() - b).norm() <= cases.gradient_limit(dtype, shape.gradient_terms) * a.double().norm(), name


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("state", fast(list(cases.STATES), 0, 1))
def test_groups_are_to_the_bit_as_many_calls(state: str, run: Run) -> None:
    inputs = arguments(Shape(2, 3, 3, 5, 4, 6, 3, groups=3), run.dtype, state)
    hs, cs = convlstm_cells(*inputs, **run.options)
    ours = gradients("hs and cs", hs, cs, inputs, run.dtype)
    dhs, dcs = cases.loss_weights(hs.shape, run.dtype)
    for n in range(3):
        alone = [None if a is None else a.detach()[n].clone().requires_grad_() for a in inputs]
        alone_hs, alone_cs = convlstm_cells(*alone, **run.options)
        assert torch.equal(hs[n], alone_hs)
        assert torch.equal(cs[n], alone_cs)
        wanted = torch.autograd.grad((alone_hs, alone_cs), cases.present(alone), (dhs[n], dcs[n]))
        for name, want in zip(ours, wanted, strict=True):
            assert torch.equal(ours[name][n], want), name


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_chunks_with_the_state_carried_over_are_one_sequence(run: Run) -> None:
    shape = Shape(2, 6, 3, 5, 7, 6, 3)
    inputs, (right_hs, right_cs, right) = arguments(shape, run.dtype), cases.answer(shape, run.dtype)
    x, w_x, w_h, bias, h, c = inputs
    hs, cs = [], []
    for chunk in x.split((1, 2, 3), 1):
        chunk_hs, (h, c) = convlstm(chunk, w_x, w_h, bias, h, c, **run.options)
        assert torch.equal(h, chunk_hs[:, -1])
        hs.append(chunk_hs)
        cs.append(c)
    # The cells between the ends of the chunks are not returned: the right ones stand for them.
    all_cs = right_cs.to(cs[0].dtype)
    all_cs[:, [0, 2, 5]] = torch.stack(cs, 1).detach()
    cases.assert_values(torch.cat(hs, 1), all_cs, (right_hs, right_cs), run.dtype, shape.value_terms)
    dc = cases.loss_weights(right_cs.shape, run.dtype)[1][:, -1]
    ours = dict(zip(NAMES, torch.autograd.grad(cs[-1], cases.present(inputs), dc), strict=True))
    cases.assert_gradients(ours, right["c_T"], run.dtype, shape.gradient_terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "cpu", "reference"])
def test_the_first_cell_may_have_either_dtype(backend: str, dtype: torch.dtype) -> None:
    *rest, c0 = arguments(cases.SHAPES[0], dtype)
    wide = c0.detach().float().requires_grad_()
    results = []
    for cell in (c0, wide):
        hs, cs = convlstm_cells(*rest, cell, backend=backend)
        results.append((hs, cs, gradients("hs and cs", hs, cs, [*rest, cell], dtype)["c0"]))
    (hs, cs, dc0), (hs_wide, cs_wide, dc0_wide) = results
    assert torch.equal(hs, hs_wide)
    assert torch.equal(cs, cs_wide)
    assert (dc0.dtype, dc0_wide.dtype) == (dtype, torch.float32)
    assert torch.equal(dc0, dc0_wide.to(dtype))
    # Finer than 16 bits can tell, and still in the cells.
    step = 1e-4 * wide.detach()
    _, cs_finer = convlstm_cells(*rest, wide.detach() + step, backend=backend)
    f = (cs_finer - cs)[:, 0] / step
    assert ((f > 0) & (f < 1)).float().mean() > 0.98


@pytest.mark.parametrize("run", RUNS, ids=str)
@pytest.mark.parametrize("groups", [0, 2])
def test_an_empty_batch_gives_empty_results_and_zero_gradients(groups: int, run: Run) -> None:
    inputs = arguments(Shape(0, 3, 2, 4, 5, 6, 3, groups), run.dtype)
    hs, cs = convlstm_cells(*inputs, **run.options)
    assert hs.shape == cs.shape == (*([groups] if groups else []), 0, 3, 4, 5, 6)
    for loss in cases.LOSSES:
        for tensor, gradient in zip(inputs, gradients(loss, hs, cs, inputs, run.dtype).values(), strict=True):
            assert gradient.shape == tensor.shape
            assert not gradient.any()


def test_large_results_lie_in_memory_that_is_reused_but_never_while_it_is_referred_to() -> None:
    inputs = arguments(Shape(batch=2, steps=4, inputs=2, channels=32, height=40, width=40, kernel=1), torch.float32)

    def run() -> Tensor:
        return convlstm(*inputs, backend="cpu")[0]

    first = run()
    assert first.numel() * 4 > 1 << 20
    view, values = first[0, 1, 3:5], first.clone()
    del first
    for _ in range(3):  # the view keeps all of its memory, whatever is made meanwhile
        torch.testing.assert_close(run(), values, rtol=0, atol=0)
    assert torch.equal(view, values[0, 1, 3:5])
    del view
    pool_bytes = sum(_native.pool_bytes())
    assert pool_bytes > values.numel() * 4
    for _ in range(3):
        run()
    assert sum(_native.pool_bytes()) == pool_bytes


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "cpu", pytest.param("triton", marks=needs_triton)])
def test_channels_last_weights_give_the_same_and_such_gradients(backend: str, groups: int) -> None:
    inputs = arguments(TINY._replace(groups=groups), torch.float32)
    turned = [
        a.detach().movedim(-3, -1).contiguous().movedim(-1, -3).requires_grad_() if n in (1, 2) else a
        for n, a in enumerate(inputs)
    ]
    (hs, cs), (hs_turned, cs_turned) = (convlstm_cells(*tensors, backend=backend) for tensors in (inputs, turned))
    torch.testing.assert_close(hs_turned, hs, rtol=0, atol=1e-6)
    want = gradients("hs and cs", hs, cs, inputs, torch.float32)
    got = gradients("hs and cs", hs_turned, cs_turned, turned, torch.float32)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], rtol=1e-4, atol=1e-4)
    for name, weight in zip(("w_x", "w_h"), turned[1:3], strict=True):
        assert got[name].stride() == weight.stride() != want[name].stride()
