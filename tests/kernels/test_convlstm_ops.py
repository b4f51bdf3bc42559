"""ConvLSTM as PyTorch sees it: torch.library's own checks, compile, export, autocast, derivatives, bytes kept."""

from __future__ import annotations

import itertools
from typing import Any

import convlstm_cases as cases
import pytest
import torch
from convlstm_cases import NAMES, Shape, arguments, fast, gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from rlv2v.kernels import convlstm, convlstm_cells
from rlv2v.kernels.casts import weights_cast_once
from rlv2v.kernels.layout import dense, empty_frames, state_dtype

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = Shape(batch=2, steps=3, inputs=2, channels=3, height=4, width=5, kernel=3)
HALVES = [torch.bfloat16, torch.float16]
# C_in 1, and C 1 with k 1: there layouts are ambiguous and the library's choice shows.
SHAPES = [*(SHAPE._replace(groups=groups) for groups in (1, 2)), Shape(1, 2, 1, 3, 4, 5, 1, 1)]
SHAPES += [Shape(0, 2, 2, 1, 3, 3, 3, 1)]
OPCHECKS = list(itertools.product(SHAPES, (True, False), ("state", "zero"), (torch.float32, torch.bfloat16)))


def operands(shape: Shape, dtype: torch.dtype, state: str) -> cases.Tensors:
    """Return arguments of the operators: leaves with groups, x (G,T,B,C_in,H,W) dense, c0 in the cells' dtype."""
    x, w_x, w_h, bias, h0, c0 = (None if a is None else a.detach() for a in arguments(shape, dtype, state))
    leaves = [dense(x.transpose(1, 2)), w_x, w_h, bias, h0, None if c0 is None else c0.to(state_dtype(dtype))]
    return [None if a is None else a.requires_grad_() for a in leaves]


@pytest.mark.parametrize("case", fast(OPCHECKS, 0, 23), ids=str)
def test_the_operators_pass_torchs_own_check(case: tuple[Any, ...]) -> None:
    shape, keep_gates, state, dtype = case
    inputs = operands(shape, dtype, state)
    if state == "state":  # with channels-last weights, whose gradients have that layout too
        inputs[1:3] = (dense(a.detach()).requires_grad_() for a in inputs[1:3])
    opcheck(torch.ops.rlv2v.convlstm, (*inputs, "cpu", keep_gates))
    with torch.no_grad():
        hs, cs, gates = torch.ops.rlv2v.convlstm(*inputs, "cpu", keep_gates)
        saved = [None if a is None else a.detach() for a in inputs]
    dcs = torch.randn_like(cs) if state == "state" else None
    need = [True] * 4 + [state == "state"] * 2
    opcheck(torch.ops.rlv2v.convlstm_backward, (torch.randn_like(hs), dcs, *saved, hs, cs, gates, "cpu", need))


def step(*inputs: Tensor) -> tuple[Tensor, ...]:
    hs, cs = convlstm_cells(*inputs)
    return hs, cs, hs.square().mean() + cs.mean()


def results(run: Any, inputs: list[Tensor]) -> list[Tensor]:
    hs, cs, loss = run(*inputs)
    return [hs, cs, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compiler", fast(["aot_eager", "inductor"], 0))
def test_a_compiled_call_is_one_graph_with_the_same_numbers(compiler: str, autocast: bool) -> None:
    torch._dynamo.reset()
    # One input channel: the library returns the gradient of such a weight in a layout of its own.
    for shape in (SHAPE, SHAPE._replace(inputs=1)):
        inputs = cases.present(arguments(shape, torch.float32))
        compiled = torch.compile(step, fullgraph=True, backend=compiler)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ours, want = results(compiled, inputs), results(step, inputs)
        assert ours[0].dtype == (torch.bfloat16 if autocast else torch.float32)
        for a, b in zip(ours, want, strict=True):
            if compiler == "inductor" and autocast:  # it fuses the loss, and does not round it to 16 bits in between
                assert (a - b).norm() <= 2 * torch.finfo(torch.bfloat16).eps * b.norm()
            else:
                torch.testing.assert_close(a, b, rtol=0, atol=cases.value_limit(torch.float32, shape.value_terms))


@pytest.mark.thorough
def test_one_compiled_graph_serves_many_shapes() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    # All sizes of the first differ: the compiler takes equal ones for one and the same.
    for shape in (Shape(2, 8, 6, 7, 4, 5, 3), Shape(3, 4, 6, 7, 6, 9, 3), Shape(5, 2, 6, 7, 8, 8, 3)):
        inputs = cases.present(arguments(shape, torch.float32))
        for a, b in zip(results(compiled, inputs), results(step, inputs), strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count == 1


def test_an_exported_program_holds_the_operator() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return convlstm_cells(*inputs)

    inputs = [a.detach() for a in cases.present(arguments(SHAPE, torch.float32))]
    program = torch.export.export(Layer(), tuple(inputs))
    assert "rlv2v.convlstm.default" in {str(node.target) for node in program.graph.nodes}
    for a, b in zip(program.module()(*inputs), convlstm_cells(*inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["auto", "eager", "cpu", "reference"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_autocast_is_casting_by_hand(dtype: torch.dtype, backend: str) -> None:
    inputs = arguments(SHAPE, torch.float32)
    with torch.autocast("cpu", dtype):
        hs, cs = convlstm_cells(*inputs, backend=backend)
        last = convlstm(*inputs, backend=backend)[1]
    by_hand = [a.to(dtype) for a in inputs[:5]] + [inputs[5]]
    hs_hand, cs_hand = convlstm_cells(*by_hand, backend=backend)
    assert (hs.dtype, cs.dtype) == (dtype, torch.float32)
    assert [a.dtype for a in last] == [dtype, torch.float32]
    assert torch.equal(hs, hs_hand)
    assert torch.equal(cs, cs_hand)
    ours, want = (gradients("hs and cs", *states, inputs, dtype) for states in ((hs, cs), (hs_hand, cs_hand)))
    for name, gradient in ours.items():
        assert gradient is not None and gradient.dtype == torch.float32, name
        assert torch.equal(gradient, want[name]), name
        assert gradient.any(), name


class CountCasts(TorchDispatchMode):
    """Count the casts of weights, which have four axes, to 16 bits."""

    num = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        self.num += op is torch.ops.aten._to_copy.default and result.dtype in HALVES and result.dim() == 4
        return result


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_are_cast_once_and_their_gradients_summed_in_their_own_dtype(dtype: torch.dtype) -> None:
    x, w_x, w_h, bias, *_ = (a.detach() for a in arguments(SHAPE, torch.float32))
    weights = [w.requires_grad_() for w in (w_x, w_h, bias)]

    def run() -> tuple[list[Tensor], int]:
        with CountCasts() as count, torch.autocast("cpu", dtype, cache_enabled=False):
            with torch.no_grad():  # as the burn-in: what is cast first knows of no gradient
                first = convlstm(x, *weights)[0]
            outputs = [first] + [convlstm(x.roll(shift, -1), *weights)[0] for shift in range(4)]
        loss = torch.stack([output.float().square().sum() for output in outputs[1:]]).sum()
        return [*outputs, *torch.autograd.grad(loss, weights)], count.num

    want, num = run()
    with weights_cast_once():
        got, num_once = run()
    assert (num, num_once) == (2 * 5, 2)
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    with weights_cast_once(), torch.autocast("cpu", dtype):
        convlstm(x, *weights)
        with torch.autocast("cpu", enabled=False):
            assert convlstm(x, *weights)[0].dtype == torch.float32, "what is kept is of another dtype"
    with torch.no_grad():
        w_h.mul_(2)
    with weights_cast_once():
        assert not torch.equal(run()[0][0], want[0]), "a change is seen by the next ones"


def test_autocast_leaves_float64_alone() -> None:
    inputs = arguments(SHAPE, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        hs, cs = convlstm_cells(*inputs)
    assert torch.equal(hs, convlstm_cells(*inputs)[0])
    assert (hs.dtype, cs.dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("keep_gates", [True, False], ids=["keep", "recompute"])
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_autocast_does_not_reach_inside_the_operators(backend: str, keep_gates: bool) -> None:
    inputs = operands(SHAPE._replace(groups=1), torch.float32, "state")

    def run() -> list[Tensor]:
        hs, cs, _ = torch.ops.rlv2v.convlstm(*inputs, backend, keep_gates)
        dstates = cases.loss_weights(hs.shape, torch.float32)
        return [hs, cs, *torch.autograd.grad((hs, cs), cases.present(inputs), dstates)]

    want = run()
    with torch.autocast("cpu", torch.bfloat16):
        got = run()
    for a, b in zip(want, got, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_second_derivative_is_refused_by_name(backend: str) -> None:
    inputs = arguments(SHAPE, torch.float32)
    hs = convlstm(*inputs, backend=backend)[0]
    (dx,) = torch.autograd.grad(hs.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(ValueError, match=rf"backend must be 'reference' for a second derivative, got '{backend}'"):
        dx.square().sum().backward()


def test_the_reference_has_a_second_derivative() -> None:
    inputs = cases.present(arguments(Shape(1, 2, 1, 1, 1, 2, 1), torch.float64))
    assert torch.autograd.gradgradcheck(lambda *a: convlstm_cells(*a, backend="reference"), inputs)


class Calls(TorchDispatchMode):
    """Note the last argument of each call of our operators: keep_gates of the forward, need of the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: list[bool] = []
        self.backward: list[list[bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.rlv2v.convlstm.default:
            self.forward.append(args[-1])
        if func is torch.ops.rlv2v.convlstm_backward.default:
            self.backward.append(args[-1])
        return func(*args, **(kwargs or {}))


def test_gates_are_kept_for_a_backward_only() -> None:
    inputs = arguments(SHAPE, torch.float32)
    with Calls() as calls:
        convlstm(*inputs)
        convlstm(*inputs, recompute=True)
        with torch.no_grad():
            convlstm(*inputs)
        with torch.inference_mode():
            convlstm(*inputs)
        convlstm(*(a.detach() for a in cases.present(inputs)))
        convlstm(*(a.detach() for a in cases.present(inputs)[:5]), inputs[5])
    assert calls.forward == [True, False, False, False, False, True]


SUBSETS = [*[{name} for name in NAMES], {"w_x", "w_h", "bias"}, {"h0", "c0"}, {"x", "h0"}, {"w_h", "c0"}]


@pytest.mark.parametrize("wanted", SUBSETS, ids=lambda names: "+".join(sorted(names)))
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("backend", ["eager", "cpu", "reference"])
def test_only_the_gradients_that_are_wanted_are_made(backend: str, recompute: bool, wanted: set[str]) -> None:
    inputs = arguments(SHAPE, torch.float32)
    options: dict[str, Any] = {"backend": backend, "recompute": recompute}
    want = gradients("hs and cs", *convlstm_cells(*inputs, **options), inputs, torch.float32)
    some = [a.detach().requires_grad_(name in wanted) for name, a in zip(NAMES, inputs, strict=True)]
    with Calls() as calls:
        ours = gradients("hs and cs", *convlstm_cells(*some, **options), some, torch.float32)
    assert ours.keys() == wanted
    cases.assert_gradients(ours, {name: want[name].double() for name in ours}, torch.float32, SHAPE.gradient_terms)
    if backend != "reference":
        assert calls.backward == [[name in wanted for name in NAMES]]


@pytest.mark.parametrize(("recompute", "most"), [(False, 14), (True, 6)])
@pytest.mark.parametrize("state", cases.STATES)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bytes_kept_for_the_backward(dtype: torch.dtype, state: str, recompute: bool, most: int) -> None:
    shape = Shape(2, 8, 8, 8, 16, 16, 3)
    x, *rest = operands(shape._replace(groups=1), dtype, state)
    frames = empty_frames(x.detach(), shape.steps, shape.batch, *x.shape[3:]).copy_(x.detach()[0]).transpose(0, 1)
    inputs = [frames.requires_grad_(), *(None if a is None else a.detach()[0].requires_grad_() for a in rest)]
    callers = {a.untyped_storage().data_ptr() for a in cases.present(inputs)}
    saved: dict[int, int] = {}
    dtypes: set[torch.dtype] = set()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in callers:
            saved[storage.data_ptr()] = storage.nbytes()
            dtypes.add(tensor.dtype)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hs, _ = convlstm_cells(*inputs, backend="cpu", recompute=recompute)
    # The gates are float16 also where x is bfloat16.
    assert dtypes == {dtype, torch.float32} | (set() if recompute else {torch.float16})
    assert 6 * hs.numel() <= sum(saved.values()) <= most * hs.numel(), saved
