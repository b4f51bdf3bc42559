"""Tests of what ranks average, gather and agree on, against one process with all data; `dist_worker.py` is one rank."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).parent))

from dist_worker import PER_RANK, Net, inputs, normalise, patches

from rlv2v.runtime import device
from rlv2v.runtime import distributed as dist
from rlv2v.runtime.device import is_wsl
from rlv2v.runtime.distributed import Reducer, StepControl, connect, restarts

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.thorough)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("ranks")
    run_ranks(request.param, ROOT / "tests" / "runtime" / "dist_worker.py", out)
    return [torch.load(out / f"{rank}.pt") for rank in range(request.param)]


def test_batch_statistics_are_those_of_all_ranks(results: Results) -> None:
    clips = inputs(len(results))
    expected = normalise(clips["x"].clone(), clips["g"])
    norms = [f["norm"] for f in results]
    torch.testing.assert_close(torch.cat([f["y"] for f in norms]), expected["y"])
    # each rank's loss is the mean over its clips: their mean over ranks is the whole's
    torch.testing.assert_close(torch.cat([f["dx"] for f in norms]) / len(results), expected["dx"])
    torch.testing.assert_close(torch.stack([f["dw"] for f in norms]).mean(0), expected["dw"])
    alone = normalise(clips["x"][:PER_RANK].clone(), clips["g"][:PER_RANK])["alone"]
    torch.testing.assert_close(norms[0]["alone"], alone, msg="local statistics are those of this rank's clips")


def test_the_distance_of_patches_is_that_of_all_ranks(results: Results) -> None:
    clips, num = inputs(len(results)), len(results)
    expected = patches(clips["a"].clone(), clips["b"], num, range(num))
    for f in results:
        torch.testing.assert_close(f["patches"]["gap"], expected["gap"])
    torch.testing.assert_close(torch.cat([f["patches"]["da"] for f in results]) / num, expected["da"])


def test_gradients_are_averaged_in_few_buckets_that_go_early(results: Results) -> None:
    wanted = []
    for rank in range(len(results)):
        net = Net()
        net(torch.full((300,), float(rank + 1))).backward()
        wanted.append([p.grad for p in net.parameters()])
    for f in results:
        for mine, theirs in zip(f["grads"], zip(*wanted, strict=True), strict=True):
            if theirs[0] is None:
                assert mine is None, "a weight without gradient stays without"
            else:
                assert mine.norm() > 1e-2
                torch.testing.assert_close(mine, torch.stack(theirs).mean(0))
        (early, _), *later = f["counts"]
        assert early == 0, "the first pass shows the order"
        assert all(2 <= count <= 4 and early >= count - 1 for early, count in later), "all but the unused weight's"
        assert f["closed"] == 0
        for ours, theirs in zip(f["grads"], results[0]["grads"], strict=True):
            assert ours is None or torch.equal(ours, theirs)


def test_the_answer_of_all_agree_is_a_step_old_and_alike(results: Results) -> None:
    for f in results:
        assert f["agreed"] == [(False, 0.0, False), (False, 0.0, False), (False, 10.0, True), (True, 20.0, False)]
        assert f["last"] == (False, 30.0, False)


def test_rank_0_shares_what_it_has(results: Results) -> None:
    for f in results:
        assert f["shared"] == "rank 0" and not f["weights"].any()


def test_a_process_alone_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    world = connect("cpu")
    assert (world.rank, world.size, world.first) == (0, 1, True)
    assert world.all_agree(StepControl(True, 3.0, False)) == StepControl(True, 3.0, False)
    assert world.broadcast_object(lambda: 7) == 7
    x = torch.randn(3)
    assert dist.mean(x) is x and dist.gather(x) is x
    net = Net()
    reducer = Reducer(list(net.parameters()))
    with reducer:
        net(torch.ones(300)).backward()
    grads = [p.grad for p in net.parameters()]
    reducer.finish()
    assert all(grad is p.grad for grad, p in zip(grads, net.parameters(), strict=True))
    world.barrier()
    world.close()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert restarts() == 2


def test_segments_grow_but_under_wsl_or_where_the_user_says_how(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", changes.append)
    for variable in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)
    for number, release in enumerate(("6.8.0-45-generic", "5.15.153.1-microsoft-standard-WSL2")):
        file = tmp_path / str(number)
        file.write_text(release + "\n")
        assert is_wsl(file) == bool(number)
        monkeypatch.setattr(device, "is_wsl", partial(is_wsl, file))
        device.grow_segments()
    assert not is_wsl(tmp_path / "none")
    monkeypatch.setattr(device, "is_wsl", lambda: False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    device.grow_segments()
    assert changes == ["expandable_segments:True"]


@pytest.mark.parametrize("ranks", [False, True])
def test_a_process_works_on_the_gpu_it_was_given(ranks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, events and recordings are those of torch's current device."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "grow_segments", lambda: None)
    monkeypatch.setattr(dist, "pick_device", torch.device)
    monkeypatch.setattr(dist.dist, "rendezvous", lambda url: iter(()))  # nobody to meet
    if ranks:
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(StopIteration):
            connect("auto")
    else:
        assert connect("cuda:1").device == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]


def test_a_rank_that_is_gone_is_reported_in_one_line(results: Results) -> None:
    for f in results[:-1]:
        assert "lost another rank" in f["lost"] and "--resume" in f["lost"] and "\n" not in f["lost"]
