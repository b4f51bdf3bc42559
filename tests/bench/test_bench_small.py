"""The small benches, each by its smallest case: losses, checkpoint, all_reduce, memory, survive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import all_reduce
import checkpoint
import losses
import memory
import pytest
import survive
import torch

from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.presets import PRESETS

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = PRESETS["tiny"] | {"replay_capacity": 8}


def result_of(main: Any, args: Any, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(args)
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_losses_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two equal forms one is made wrong by 1e-4: that is the whole difference, and nothing is timed."""
    monkeypatch.setattr(losses, "PAPER_TERMS", losses.PAPER_TERMS | {"widths": (4, 8), "disc_widths": (4, 8)})
    literal = losses.generator_losses_ref
    wrong = lambda *inputs: {name: value * (1 + 1e-4) for name, value in literal(*inputs).items()}  # noqa: E731
    monkeypatch.setattr(losses, "generator_losses_ref", wrong)
    rows = losses.case_rows(2, losses.Args(size=16))
    assert not any(row["valid"] for row in rows) and rows[0]["difference"]["value"] == pytest.approx(1e-4, rel=0.1)


@pytest.mark.thorough
def test_losses_rows() -> None:
    ours, peer = losses.case_rows(2, losses.Args(size=16, rounds=2))
    assert ours["valid"] and set(ours["speedup_over"]) == {"literal"} and peer["backend"] == "literal"


def test_checkpoint_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(checkpoint, "CASES", {"small": SMALL})
    result = result_of(checkpoint.main, checkpoint.Args(case=("small",), folder=tmp_path, rounds=2), capsys)
    ours, peer, limit = result["rows"]
    assert (ours["backend"], peer["backend"], limit["backend"]) == ("rlv2v", "torch.save", "copy")
    assert ours["valid"] and ours["percent_of_limit"] is not None
    assert not any(tmp_path.iterdir())
    with pytest.raises(UserError, match="--case: expected some of small, got 'large'"):
        checkpoint.main(checkpoint.Args(case=("large",)))


def test_a_checkpoint_that_is_not_the_run_is_seen(tmp_path: Path) -> None:
    run, store = checkpoint.full_run(Config.of("default", **SMALL)), Checkpoints(tmp_path, keep=1, num_replicas=1)
    assert not checkpoint.same(store, run)
    state, replica = checkpoint.states(run)
    assert replica["replay_x"]
    store.save(1, state, {0: replica})
    store.wait()
    assert checkpoint.same(store, run)
    with torch.no_grad():
        next(run.nets.q_y.parameters()).flatten()[0] += 1
    assert not checkpoint.same(store, run)


def test_memory_is_counted() -> None:
    row = memory.counted_row(memory.Args(preset="tiny").config)
    assert row["backend"] == "counted" and row["with_reserve"] > row["total"] > 0


@pytest.mark.thorough
def test_memory_is_timed_and_what_fits_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    args = memory.Args(preset="tiny")
    monkeypatch.setattr(memory, "ROUNDS", 2)
    rows = memory.timed_rows(args.config)
    assert [each["pass"] for each in rows] == list(memory.MEMORY) and rows[0]["peak"] > 0
    assert rows[0]["time_ratio"] == 1.0 and all(set(each["speedup_over"]) == {"store"} for each in rows[1:])
    rows = memory.fitting_rows(args, 16)
    assert all(row["frames"] > 1 and row["batch_factor"] >= 1 for row in rows)


def test_kills_are_compared_bit_by_bit() -> None:
    state = [torch.ones(3), 1, "a"]
    assert survive.same(state, [torch.ones(3), 1, "a"])
    for other in ([torch.ones(3), 2, "a"], [torch.tensor([1.0, 1.0, 1.0 + 1e-6]), 1, "a"], state[:2]):
        assert not survive.same(state, other)
    assert survive.finish(["sh", "-c", "echo first >&2; echo why >&2; exit 3"]) == "exit code 3: why"


@pytest.mark.thorough
def test_all_reduce_of_two_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(all_reduce.main, all_reduce.Args(rounds=3, widths=(4, 8)), capsys)
    ours, flat = result["rows"]
    assert (ours["backend"], flat["backend"]) == ("Reducer", "flat") and set(ours["speedup_over"]) == {"flat"}
    assert ours["gb_s"] > 0 and result["ranks"] == 2


@pytest.mark.thorough
def test_a_killed_run_and_a_lost_rank(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(survive.main, survive.Args(kills=1, rank_kills=1, steps=10), capsys)
    assert [row["valid"] for row in result["rows"]] == [True, True]
    assert result["summary"]["identical"] == result["summary"]["ended_by_themselves"] == 1
