"""Whatever a network stores for its backward pass, outputs, gradients and running averages are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlv2v.model import Discriminator, Translator, activation_memory, norm
from rlv2v.model.norm import Scope, stats_over

B, T, SIZE = 2, 5, 8
pytestmark = pytest.mark.usefixtures("one_thread")


def video(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(B, T, 3, SIZE, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1)) * 2 - 1


def translator(memory: str, kind: str = "clip", dtype: torch.dtype = torch.float64) -> Translator:
    torch.manual_seed(0)
    return Translator((4, 6), head="mask", norm=kind, memory=memory).to(dtype)


def outcome(memory: str, kind: str, *, scope: Scope = "ranks") -> dict[str, Tensor]:
    """Return the outputs and gradients of runs in all three modes and of a frozen critic."""
    net, x = translator(memory, kind), video().requires_grad_()
    q = Discriminator((4, 6), norm="clip", memory=memory).double()
    q.requires_grad_(False)
    with stats_over(scope, net):
        _, first = net(x[:, :2])
        y, mask, last = net.forward_with_mask(x[:, 2:], first)
        _, states = net(x, all_states=True)
        steps, _ = net(x.flip(1), states, one_step_from_each=True)
        score = q(y)[0]
    q.requires_grad_(True)  # the critic is trained again by the time of the backward pass
    (y.square().mean() + mask.mean() + steps.mean() + last[0][0].h.mean() + score.sum()).backward()
    assert all(p.grad is None for p in q.parameters())
    outputs = {"y": y, "mask": mask, "steps": steps, "h": states[0][0].h, "score": score, "dx": x.grad}
    outputs |= {name: p.grad for name, p in net.named_parameters()}
    return outputs


@pytest.mark.parametrize(
    ("memory", "chunk", "kind", "scope"),
    [
        ("recompute", 8, "clip", "ranks"),
        ("frames", 2, "clip", "ranks"),
        ("frames", 2, "batch", "clip"),
        ("frames", 1, "batch", "rank"),
        ("frames", 8, "batch", "ranks"),
    ],
)
def test_the_numbers_are_the_same_whatever_is_stored(
    memory: str, chunk: int, kind: str, scope: Scope, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activation_memory, "CHUNK", chunk)
    expected = outcome("store", kind, scope=scope)
    outputs = outcome(memory, kind, scope=scope)
    torch.testing.assert_close(outputs, expected, rtol=1e-10, atol=1e-12)
    assert outputs["h"].shape[:2] == (B, T)


def test_frames_are_run_again_in_the_precision_of_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_memory, "CHUNK", 2)
    grads = {}
    for memory, enabled in (("store", True), ("frames", True), ("store", False)):
        net = translator(memory, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=False):
            y, _ = net(video(torch.float32))
        assert y.dtype == torch.float32
        y.square().mean().backward()
        grads[memory, enabled] = net.encoder[0].residual.convlstm.w_x.grad
    stored, again, exact = grads.values()
    assert (again - stored).norm() < 0.02 * stored.norm()
    assert (again - exact).norm() > 1e-4 * exact.norm(), "it was bfloat16 that ran"


def test_frames_stores_less_than_recompute_and_recompute_less_than_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_memory, "CHUNK", 1)
    stored = {}
    for memory in ("store", "recompute", "frames"):
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y, _ = translator(memory)(video())
        stored[memory] = sum(sizes.values())
        del y
    assert stored["store"] > stored["recompute"] > stored["frames"]


def test_a_chunk_with_local_statistics_is_run_again_with_local_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean over ranks in the backward pass would wait for ranks that take none."""
    calls: list[Tensor] = []
    monkeypatch.setattr(norm, "mean_over_ranks", lambda moments: calls.append(moments) or moments)
    d = Discriminator((4, 6), norm="batch", memory="frames")
    with stats_over("rank", d):
        y, _ = d(video(torch.float32))
    y.sum().backward()
    assert not calls
    d(video(torch.float32))[0].sum().backward()
    assert len(calls) == 2, "once forward, and once more in the backward pass"


def test_without_gradients_nothing_is_run_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(activation_memory, "checkpoint", lambda *args, **_: calls.append(args) or (args[1], None, None))
    d = Discriminator((4, 6), memory="frames")
    with torch.no_grad():
        d(video(torch.float32))
    assert not calls
    d(video(torch.float32))
    assert calls


def test_an_unknown_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Discriminator: memory must be one of .*'frames'.*, got 'disk'"):
        Discriminator((4,), memory="disk")
