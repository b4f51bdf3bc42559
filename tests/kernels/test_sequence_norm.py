"""The end of a block: every backend that runs on the CPU against literal float64, both ways, at odd shapes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from convlstm_cases import fast
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from rlv2v import _native
from rlv2v.kernels.aot import run_norm_without_storage
from rlv2v.kernels.sequence_norm import Moments, activate_and_pool, sequence_norm
from rlv2v.kernels.triton.recurrence import unavailable_reason

pytestmark = pytest.mark.usefixtures("one_thread")

TRITON = unavailable_reason(torch.device("cpu")) is None
BACKENDS = ["cpu", *(["triton"] if TRITON else [])]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS, SLOPE = 1e-3, 0.2
INPUTS = ("x", "residual", "weight", "bias", "mean", "square", "moments.mean", "moments.square")


class Case(NamedTuple):
    """A shape, a window, and what is there besides: `with_` names residual, state, moments."""

    shape: tuple[int, int, int, int, int]
    pool: tuple[int, int] = (1, 1)
    with_: tuple[str, ...] = ()
    slope: float = SLOPE


CASES = [
    Case((2, 3, 8, 6, 4), (2, 2), ("residual",)),
    Case((1, 4, 5, 7, 3), (2, 2), ("residual", "state")),
    Case((3, 2, 24, 4, 4), (2, 2), ("residual", "moments")),
    Case((2, 2, 16, 5, 9), (1, 1), ("residual", "state")),
    Case((2, 1, 3, 1, 1), (1, 1), ("state", "moments"), 1.0),
    Case((1, 2, 33, 3, 8), (1, 2), (), 1.0),
    Case((2, 3, 7, 2, 5), (2, 1), ()),
    Case((1, 2, 1, 21, 19), (1, 1), (), 1.0),
]
RUNS = [(backend, case, dtype) for backend in BACKENDS for case in CASES for dtype in DTYPES]
FAST = [*range(0, 24, 3), 1, 2, *range(24, 48, 6), 25, 26]


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def arguments(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Leaves that want gradients, by name; frames not within 0.05 of the LeakyReLU's kink, where slopes jump."""
    rng = torch.Generator().manual_seed(seed)
    batch, steps, channels, *_ = case.shape
    x, residual = normal(rng, *case.shape) + 0.5, normal(rng, *case.shape)
    if "residual" not in case.with_:
        residual = torch.zeros_like(x)
    a = x + residual
    x = torch.where(a.abs() < 0.05, x + 0.1, x)
    made = {"x": x.to(dtype), "residual": residual.to(dtype)}
    made |= {"weight": 1 + 0.3 * normal(rng, channels).float(), "bias": normal(rng, channels).float()}
    for prefix, shape in (("", (batch, channels)), ("moments.", (batch, steps, channels))):
        mean = normal(rng, *shape)
        made |= {f"{prefix}mean": mean, f"{prefix}square": mean.square() + 0.5 + normal(rng, *shape).square()}
    return {name: value.requires_grad_() for name, value in made.items() if name in names_of(case)}


def names_of(case: Case) -> list[str]:
    """Return the names of the arguments that a case has."""
    absent = {"residual": ["residual"], "state": ["mean", "square"], "moments": ["moments.mean", "moments.square"]}
    without = [name for part, names in absent.items() if part not in case.with_ for name in names]
    return [name for name in INPUTS if name not in without]


def frames_seen(case: Case) -> Tensor:
    return torch.arange(1, case.shape[0] + 1, dtype=torch.float64)


def run(case: Case, of: dict[str, Tensor], backend: str) -> tuple[Tensor, Tensor, Moments]:
    state = Moments(frames_seen(case), of["mean"], of["square"]) if "state" in case.with_ else None
    moments = (of["moments.mean"], of["moments.square"]) if "moments" in case.with_ else None
    return sequence_norm(
        of["x"], of["weight"], of["bias"], state, residual=of.get("residual"), slope=case.slope, pool=case.pool,
        moments=moments, eps=EPS, backend=backend,
    )  # fmt: skip


def literal(case: Case, of: dict[str, Tensor]) -> tuple[Tensor, Tensor, Moments]:
    """Return the same by the formulas, a clip, a frame and a window at a time."""
    a = of["x"] + of.get("residual", torch.zeros((), dtype=torch.float64))
    a = torch.where(a > 0, a, a * case.slope)
    down, right = case.pool
    rows, columns = a.shape[3] // down, a.shape[4] // right
    p = torch.stack([a[:, :, :, y : rows * down : down, x : columns * right : right]
                     for y in range(down) for x in range(right)]).mean(0)  # fmt: skip
    outs, states = [], []
    for b, clip in enumerate(p):
        seen = frames_seen(case)[b] if "state" in case.with_ else 0.0
        mean_sum, square_sum = (seen * of[name][b] if "state" in case.with_ else 0.0 for name in ("mean", "square"))
        for t, frame in enumerate(clip):
            if "moments" in case.with_:
                mean_sum, square_sum = mean_sum + of["moments.mean"][b, t], square_sum + of["moments.square"][b, t]
            else:
                mean_sum, square_sum = mean_sum + frame.mean((1, 2)), square_sum + frame.square().mean((1, 2))
            count = seen + t + 1
            mean, square = mean_sum / count, square_sum / count
            scale = of["weight"] / torch.sqrt(square - mean.square() + EPS)
            outs.append((frame - mean[:, None, None]) * scale[:, None, None] + of["bias"][:, None, None])
            states.append((torch.as_tensor(count, dtype=torch.float64), mean, square))
    shape = case.shape[:2]
    return torch.stack(outs).unflatten(0, shape), a, Moments(
        *(torch.stack(values).unflatten(0, shape) for values in zip(*states, strict=True))
    )  # fmt: skip


def loss(outs: tuple[Tensor, Tensor, Moments], used: str) -> Tensor:
    """Weigh the outputs that `used` names by fixed numbers."""
    rng = torch.Generator().manual_seed(9)
    y, a, states = outs
    terms = [(out, normal(rng, *out.shape)) for out in (y, a, states.mean, states.square)]
    return torch.stack([(out.double() * w).sum() for n, (out, w) in enumerate(terms) if "yams"[n] in used]).sum()


def check(case: Case, dtype: torch.dtype, backend: str, used: str = "yams", seed: int = 0) -> None:
    leaves = arguments(case, dtype, seed)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    ours, right = run(case, leaves, backend), literal(case, exact)
    eps = torch.finfo(dtype).eps
    variance = (right[2].square - right[2].mean.square()).detach()
    scale = max(1.0, float((exact["weight"].detach() / (variance + EPS).sqrt()).abs().max()))
    for got, want in zip((*ours[:2], *ours[2]), (*right[:2], *right[2]), strict=True):
        assert got.shape == want.shape
        # A frame is rounded as a, as p and as y, the first two before they are scaled.
        torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=16 * eps * scale)
    assert ours[0].dtype == ours[1].dtype == dtype
    assert all(state.dtype == torch.float64 for state in ours[2])
    got_grads = torch.autograd.grad(loss(ours, used), list(leaves.values()), allow_unused=True)
    want_grads = torch.autograd.grad(loss(right, used), list(exact.values()), allow_unused=True)
    for name, got, want in zip(leaves, got_grads, want_grads, strict=True):
        assert want is not None and got is not None and got.shape == want.shape, name
        assert got.dtype == leaves[name].dtype, name
        # Sums of products with y over all frames: a rounding of y counts as often as there are pixels.
        size = want.norm() + want.numel() ** 0.5
        assert (got.double() - want).norm() <= 32 * eps * scale * size, name


@pytest.mark.parametrize("run", fast(RUNS, *(n for n in FAST if n < len(RUNS))), ids=str)
def test_values_and_gradients_are_those_of_the_formulas(run: tuple[str, Case, torch.dtype]) -> None:
    backend, case, dtype = run
    check(case, dtype, backend)


@pytest.mark.parametrize("used", ["y", "a", "ya", "ms"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_output_that_nobody_uses_adds_no_gradient(backend: str, used: str) -> None:
    case = CASES[1]._replace(with_=("residual", "state"))
    leaves = arguments(case, torch.float32)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    got = torch.autograd.grad(loss(run(case, leaves, backend), used), list(leaves.values()), allow_unused=True)
    want = torch.autograd.grad(loss(literal(case, exact), used), list(exact.values()), allow_unused=True)
    for ours, right in zip(got, want, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            (zero if ours is None else ours).double().norm(),
            (zero if right is None else right).double().norm(),
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_reference_in_float64_is_the_definition() -> None:
    for case in CASES:
        leaves = arguments(case, torch.float64)
        exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
        ours, right = run(case, leaves, "auto"), literal(case, exact)  # no other backend takes float64
        torch.testing.assert_close((*ours[:2], *ours[2]), (*right[:2], *right[2]), rtol=0, atol=1e-12)
        got, want = (
            torch.autograd.grad(loss(outs, "yams"), list(of.values())) for outs, of in ((ours, leaves), (right, exact))
        )
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-6, atol=1e-6)  # weights are float32


def test_every_instruction_set_gives_the_same(isa: str) -> None:
    assert _native.isa() == isa
    for case in CASES:
        check(case, torch.float32, "cpu")


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)),
    pool=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    with_=st.sets(st.sampled_from(["residual", "state", "moments"])),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_any_shape(shape: Any, pool: tuple[int, int], with_: set[str], dtype: torch.dtype, seed: int) -> None:
    pool = min(pool[0], shape[3]), min(pool[1], shape[4])
    check(Case(shape, pool, tuple(sorted({"residual", *with_}))), dtype, "cpu", seed=seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_with_their_state_are_one_run(backend: str) -> None:
    case = CASES[0]
    of = arguments(case, torch.float32)
    whole, _, states = run(case, of, backend)
    first, _, before = run(case, of | {"x": of["x"][:, :2], "residual": of["residual"][:, :2]}, backend)
    state = Moments(*(s[:, -1] for s in before))
    rest, _, after = sequence_norm(
        of["x"][:, 2:], of["weight"], of["bias"], state, residual=of["residual"][:, 2:], slope=case.slope,
        pool=case.pool, eps=EPS, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(torch.cat((first, rest), 1), whole, rtol=1e-6, atol=1e-6)
    for one, other in zip(after, states, strict=True):
        torch.testing.assert_close(one[:, -1], other[:, -1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=str)
def test_the_parts_around_an_average_of_the_moments_are_the_whole(backend: str, case: Case) -> None:
    """What kind "batch" does: activate, moments, something between, normalise; gradients pass all of it."""
    case = case._replace(with_=("residual",))

    def parts(of: dict[str, Tensor], backend: str) -> Tensor:
        a, p, moments = activate_and_pool(
            of["x"], of["residual"], slope=case.slope, pool=case.pool, moments=True, backend=backend
        )
        assert moments is not None
        averaged = tuple(m.mean(0, keepdim=True).expand_as(m) for m in moments)
        y, _, _ = sequence_norm(p, of["weight"], of["bias"], moments=averaged, eps=EPS, backend=backend)
        return (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() + a.square().sum()

    of = arguments(case, torch.float32)
    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in of.items()}
    ours, right = parts(of, backend), parts(exact, "reference")
    torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-4)
    got, want = (torch.autograd.grad(out, list(leaves.values())) for out, leaves in ((ours, of), (right, exact)))
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).norm() <= 2e-5 * (other.norm() + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_norm_it_is_activation_and_pooling(backend: str) -> None:
    of = arguments(CASES[0], torch.float32)
    a, p, nothing = activate_and_pool(of["x"], of["residual"], slope=SLOPE, pool=(2, 2), backend=backend)
    want_a, want_p, _ = activate_and_pool(of["x"], of["residual"], slope=SLOPE, pool=(2, 2), backend="reference")
    assert nothing is None
    torch.testing.assert_close((a, p), (want_a, want_p), rtol=1e-6, atol=1e-6)
    for one, other in ((p, want_p), (a, want_a)):
        ours, right = (torch.autograd.grad(v.square().sum(), of["x"], retain_graph=True)[0] for v in (one, other))
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)
    same, also, _ = activate_and_pool(of["x"], backend=backend)
    assert same is also is of["x"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_nobody_needs_are_not_made(backend: str) -> None:
    case = Case((1, 2, 3, 4, 4), (2, 2), ("residual", "state", "moments"))
    of = arguments(case, torch.float32)
    whole = torch.autograd.grad(loss(run(case, of, backend), "yams"), list(of.values()))
    for name, want in zip(of, whole, strict=True):
        some = {other: leaf if other == name else leaf.detach() for other, leaf in of.items()}
        (got,) = torch.autograd.grad(loss(run(case, some, backend), "yams"), some[name])
        assert torch.equal(got, want), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter_and_an_empty_batch_is_empty(backend: str) -> None:
    case = CASES[1]
    of = {name: leaf.detach() for name, leaf in arguments(case, torch.float32).items()}
    want = run(case, of, backend)
    strided = {name: leaf.mT.contiguous().mT for name, leaf in of.items() if leaf.dim() > 1}
    ours = run(case, of | strided, backend)
    assert all(torch.equal(a, b) for a, b in zip((*ours[:2], *ours[2]), (*want[:2], *want[2]), strict=True))
    empty = Case((0, *case.shape[1:]), case.pool, case.with_)
    leaves = arguments(empty, torch.float32)
    y, a, states = run(empty, leaves, backend)
    assert y.shape == (0, 4, 5, 3, 1) and a.shape == empty.shape and states.mean.shape == (0, 4, 5)
    grads = torch.autograd.grad(loss((y, a, states), "yams"), list(leaves.values()))
    assert all(not g.any() and g.shape == leaf.shape for g, leaf in zip(grads, leaves.values(), strict=True))


def test_no_bit_depends_on_threads_or_on_the_other_clips() -> None:
    case = Case((8, 3, 8, 64, 64), (2, 2), ("residual",))
    of = arguments(case, torch.float32)

    def outcome(clips: slice) -> list[Tensor]:
        some = {name: leaf[clips] if leaf.dim() == 5 else leaf for name, leaf in of.items()}
        y, a, states = run(case, some, "cpu")
        return [y, a, *states, *torch.autograd.grad((y * y + y).sum() + a.sum(), [some["x"]])]

    alone = outcome(slice(None))
    halves = zip(outcome(slice(3)), outcome(slice(3, None)), strict=True)
    assert all(torch.equal(whole, torch.cat(half)) for whole, half in zip(alone, halves, strict=True))
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(one, other) for one, other in zip(alone, outcome(slice(None)), strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_own_checks_and_one_graph_when_compiled(backend: str) -> None:
    case = Case((2, 2, 3, 4, 5), (2, 2), ("residual", "state"))
    of = arguments(case, torch.float32)
    inputs = (of["x"], of["residual"], of["weight"], of["bias"], None, None, frames_seen(case), of["mean"],
              of["square"], SLOPE, [2, 2], EPS, False, backend)  # fmt: skip
    opcheck(torch.ops.rlv2v.sequence_norm, inputs)
    plain = (of["x"], None, None, None, None, None, None, None, None, 1.0, [1, 1], 0.0, True, backend)
    opcheck(torch.ops.rlv2v.sequence_norm, plain)
    y, activated, pooled, _, means, squares = (out.detach() for out in torch.ops.rlv2v.sequence_norm(*inputs))
    saved = (torch.randn_like(y), None, None, None, activated, pooled, of["weight"].detach(), frames_seen(case),
             means, squares, SLOPE, [2, 2], EPS, False, backend, [True, False, True])  # fmt: skip
    opcheck(torch.ops.rlv2v.sequence_norm_backward, saved)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, want = compiled(case, of, backend), run(case, of, backend)
    for a, b in zip((*ours[:2], *ours[2]), (*want[:2], *want[2]), strict=True):
        assert torch.equal(a, b)
    leaves = list(of.values())
    for a, b in zip(*(torch.autograd.grad(loss(out, "yams"), leaves) for out in (ours, want)), strict=True):
        assert torch.equal(a, b)
    (slope,) = torch.autograd.grad(run(case, of, backend)[0].square().sum(), of["x"], create_graph=True)
    with pytest.raises(ValueError, match=f"backend must be 'reference' for a second derivative, got '{backend}'"):
        slope.sum().backward()


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(
    ("kind", "kernels"),
    [
        ("start", ["activate", "normalise", "sums", "spread", "add_clips"]),
        ("state", ["activate", "normalise", "sums", "spread", "add_clips"]),
        ("none", ["activate", "spread"]),
    ],
)
def test_the_end_of_a_block_is_few_launches(kind: str, kernels: list[str]) -> None:
    """Two forward and three backward, one and one without a normalisation; PyTorch's operators were some 70."""
    launched = list[str]()

    def record(kernel: Any, grid: tuple[int, int, int], named: dict[str, Any]) -> None:
        launched.append(getattr(kernel, "fn", kernel).__name__)

    run_norm_without_storage(8, torch.float32, (2, 2), kind, record)
    assert launched == kernels


def test_residuals_of_another_dtype_are_added_in_that_of_their_sum() -> None:
    of = arguments(CASES[0], torch.float32)
    y, a, _ = run(CASES[0], of | {"residual": of["residual"].bfloat16()}, "cpu")
    assert y.dtype == a.dtype == torch.float32


X = torch.zeros(2, 3, 4, 5, 6)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(3, 4, 5, 6)}, r"x must be \(B,T,C,H,W\) of one of .*, got torch.float32 \(3, 4, 5, 6\)"),
    ({"x": torch.zeros(2, 3, 4, 5, 6, dtype=torch.int32)}, "x must be .*, got torch.int32"),
    ({"x": torch.zeros(2, 0, 4, 5, 6)}, "x must be"),
    ({"residual": torch.zeros(2, 3, 4, 6, 5)}, r"residual must be floating-point \(2, 3, 4, 5, 6\) on cpu, got .*6, 5"),
    ({"weight": torch.ones(5)}, r"weight must be floating-point \(4,\) on cpu, got torch.float32 \(5,\)"),
    ({"bias": torch.ones(4, device="meta")}, r"bias must be .* on cpu, got torch.float32 \(4,\) on meta"),
    ({"pool": (6, 1)}, r"pool must be two sides from 1 to \(5, 6\), got \(6, 1\)"),
    ({"pool": (0, 1)}, "pool must be"),
    ({"state": Moments(torch.zeros(2), torch.zeros(2, 4), torch.zeros(2, 4))}, r"state.frames must be torch.float64"),
    ({"state": Moments(*(torch.zeros(2, n).double().squeeze(1) for n in (1, 4, 3)))}, r"state.square must be .*\(2, 4"),
    ({"moments": (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))}, r"moments must be torch.float64 \(2, 3, 4\) on cpu"),
    ({"backend": "cuda"}, r"backend must be 'auto' or one of \['reference', 'cpu', 'triton'\], got 'cuda'"),
    ({"x": X.double(), "backend": "cpu"}, "backend 'cpu' cannot run this: it computes in float32 at most"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    fitting = {"x": X, "weight": torch.ones(4), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=f"sequence_norm: {message}"):
        sequence_norm(**fitting | change)
