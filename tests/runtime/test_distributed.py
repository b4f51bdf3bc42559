"""What ranks average, gather and agree on, against one process that has everything: `dist_worker.py` is one rank."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ROOT, run_ranks, start_ranks

sys.path.insert(0, str(Path(__file__).parent))

from dist_worker import PER_RANK, Net, gaps, inputs, normalise

from rlv2v.runtime import distributed as dist
from rlv2v.runtime.distributed import NUM_BUCKETS, Reducer, StepControl, World, connect, restarts

Found = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    out = tmp_path_factory.mktemp("ranks")
    run_ranks(request.param, [ROOT / "tests" / "runtime" / "dist_worker.py", out], {"PYTHONPATH": str(ROOT)})
    return [torch.load(out / f"{rank}.pt") for rank in range(request.param)]


def test_batch_statistics_are_those_of_all_ranks(found: Found) -> None:
    given = inputs(len(found))
    want = normalise(given["x"].clone(), given["g"])
    ours = [f["norm"] for f in found]
    torch.testing.assert_close(torch.cat([f["y"] for f in ours]), want["y"])
    for f in ours:
        torch.testing.assert_close((f["mean"], f["square"]), (want["mean"], want["square"]))
    # each rank's loss is the mean over its clips: their mean over ranks is the whole's
    torch.testing.assert_close(torch.cat([f["dx"] for f in ours]) / len(found), want["dx"])
    torch.testing.assert_close(torch.stack([f["dw"] for f in ours]).mean(0), want["dw"])
    alone = normalise(given["x"][:PER_RANK].clone(), given["g"][:PER_RANK])["alone"]
    torch.testing.assert_close(ours[0]["alone"], alone, msg="apart: over this rank's clips, whatever others have")


def test_the_domain_gap_is_that_of_all_ranks(found: Found) -> None:
    given = inputs(len(found))
    want = gaps(given["a"].clone(), given["b"])
    for f in found:
        torch.testing.assert_close(f["gaps"]["gap"], want["gap"])
        torch.testing.assert_close(f["gaps"]["floor"], want["floor"])
    torch.testing.assert_close(torch.cat([f["gaps"]["da"] for f in found]) / len(found), want["da"])


def test_gradients_are_averaged_in_few_buckets_that_go_early(found: Found) -> None:
    wanted = []
    for rank in range(len(found)):
        net = Net()
        net(torch.full((300,), float(rank + 1))).backward()
        wanted.append([p.grad for p in net.parameters()])
    for f in found:
        for mine, theirs in zip(f["grads"], zip(*wanted, strict=True), strict=True):
            if theirs[0] is None:
                assert mine is None, "a weight without gradient stays without"
            else:
                assert mine.norm() > 1e-2
                torch.testing.assert_close(mine, torch.stack(theirs).mean(0))
        first, *later, buckets = f["early"]
        assert first == 0 and 2 <= buckets <= NUM_BUCKETS, "the first pass shows the order"
        assert all(count >= buckets - 1 for count in later), "all but what holds the unused weight"
    assert all(
        torch.equal(a, b) for f in found for a, b in zip(f["grads"], found[0]["grads"], strict=True) if a is not None
    )


def test_what_is_agreed_is_a_step_old_and_alike(found: Found) -> None:
    for f in found:
        assert f["control"] == [(False, 0.0, False), (False, 0.0, False), (False, 10.0, True), (True, 20.0, False)]
        assert f["last"] == (False, 30.0, False)


def test_rank_0_shares_what_it_has(found: Found) -> None:
    for f in found:
        assert f["shared"] == "rank 0" and not f["weights"].any()
    assert [f["in turn"] for f in found] == [1, *["x"] * (len(found) - 1)]


def test_alone_everything_is_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    world = connect("cpu")
    assert (world.rank, world.size, world.first) == (0, 1, True)
    assert world.all_agree(StepControl(True, 3.0, False)) == StepControl(True, 3.0, False)
    assert world.broadcast_object(lambda: 7) == 7 and world.rank0_first(lambda: 8) == 8
    x = torch.randn(3)
    assert dist.mean(x) is x and dist.gather(x) is x
    net = Net()
    reducer = Reducer(list(net.parameters()))
    with reducer:
        net(torch.ones(300)).backward()
    before = [p.grad for p in net.parameters()]
    reducer.finish()
    assert [p.grad for p in net.parameters()] == before or all(
        a is b.grad for a, b in zip(before, net.parameters(), strict=True)
    )
    world.barrier()
    world.close()
    assert isinstance(world, World)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert restarts() == 2


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


def test_a_rank_that_is_gone_is_said_in_one_line(tmp_path: Path) -> None:
    script = tmp_path / "gone.py"
    script.write_text(
        "import os, time\n"
        "from rlv2v.runtime.distributed import StepControl, connect\n"
        "from rlv2v.errors import UserError\n"
        "world = connect('cpu')\n"
        "world.barrier()\n"
        "if world.rank == 1:\n"
        "    os._exit(9)\n"
        "try:\n"
        "    for _ in range(1000):\n"
        "        world.all_agree(StepControl(False, 0.0, False))\n"
        "except UserError as error:\n"
        "    print(error)\n"
        "    os._exit(7)\n"
    )
    began = time.monotonic()
    processes = start_ranks(2, [script], {"PYTHONPATH": str(ROOT)})
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [7, 9]
    assert "lost another rank" in said[0] and "--resume" in said[0] and time.monotonic() - began < 50
