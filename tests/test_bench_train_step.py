"""bench/train_step.py: the plain twin takes the same steps as `Algorithm`, and the bench sees where one does not."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rlv2v.config import Config

pytestmark = pytest.mark.usefixtures("bench_folder", "one_thread")
CPU = torch.device("cpu")
CLOSE = 1e-9
SMALL: dict[str, Any] = {"size": 16, "frames": 4, "widths": (4, 8), "disc_widths": (4, 8, 8), "replay_capacity": 5}


def bench() -> ModuleType:
    return importlib.import_module("train_step")


def pair_of(preset: str, **changes: Any) -> Any:
    comparable = bench().COMPARABLE[preset] | SMALL | {"steps": 12, "replicas": 1}
    return bench().Pair(Config.of(preset, **(comparable | changes)).check(), CPU, torch.float64)


@pytest.mark.parametrize(
    "preset, changes",
    [
        ("default", {}),
        ("default", {"reward": "paper", "gan": "nonsaturating", "distance": "l2", "seed": 1}),
        ("default", {"rl": False, "identity": 0.0, "colours": 0.0, "average": 0.0, "clip_grad": 0.5}),
        ("paper", {"eta1": (0.5, 0.5), "q_positive": False}),
        ("paper", {"reward": "transition", "gan": "hinge", "gamma": 0.5, "tau": 0.5}),
    ],
)
def test_steps_are_equal_in_double_precision(preset: str, changes: dict[str, Any]) -> None:
    """All that a step tells, over steps that draw stored transitions in both domains, and then all weights."""
    pair, recalled = pair_of(preset, **changes), []
    for _ in range(8):
        told = pair.step()
        recalled.append(len(pair.ids))
        for gradients in (False, True):
            assert bench().difference(told.fast, told.plain, gradients) <= CLOSE
    assert bench().weights_difference(pair.fast, pair.plain) <= CLOSE
    if pair.config.rl.enabled:
        in_x, in_y = (recalled[turn * pair.config.rl.every :: bench().steps_of_round(pair.config)] for turn in (0, 1))
        assert sum(in_x) and sum(in_y)


def test_the_oldest_go_first() -> None:
    """Transitions that a full buffer has dropped shift those that are left, in both."""
    pair = pair_of("paper", transitions=4, eta1=(0.3, 0.3), steps=40)
    for _ in range(8):
        told = pair.step()
        assert bench().difference(told.fast, told.plain, False) <= CLOSE
    assert all(pair.plain.num_stored[domain] > len(pair.plain.buffers[domain]) == 5 for domain in "xy")


@pytest.mark.parametrize("name", ["g_x", "g_y", "p_x", "p_y", "d_x", "d_y", "q_x", "q_y"])
def test_a_weight_that_differs_is_seen(name: str) -> None:
    pair = pair_of("paper", q_positive=False)
    with torch.no_grad():
        next(getattr(pair.plain.nets, name).parameters()).mul_(1 + 1e-4)
    told = [pair.step() for _ in range(bench().steps_of_round(pair.config))]
    assert max(bench().difference(step.fast, step.plain, False) for step in told) > 100 * CLOSE


def test_what_only_one_tells_is_a_difference() -> None:
    difference = bench().difference
    assert difference({"a": 1.0, "grad": 2.0}, {"a": 1.0, "grad": 2.5}, False) == 0.0
    assert difference({"a": 1.0, "grad": 2.0}, {"a": 1.0, "grad": 2.5}, True) == pytest.approx(0.2)
    assert difference({"a": 1.0}, {"b": 1.0}, False) == difference({}, {"b": 1.0}, False) == float("inf")
    assert difference({"a": float("nan"), "b": 1.0}, {"a": 1.0, "b": 1.0}, False) == float("inf")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {name: value for name, value in SMALL.items() if name not in ("size", "frames")}
    monkeypatch.setitem(bench().COMPARABLE, "default", changes)


@pytest.mark.usefixtures("small")
def test_rows(tmp_path: Path) -> None:
    """Times are means of whole rounds of steps; the JSON is the house's."""
    file = tmp_path / "train_step.json"
    bench().main(
        bench().Args(frames=(3,), paper_frames=(), size=16, rounds=2, warm=1, check=1, device="cpu", json=file)
    )
    found = json.loads(file.read_text())
    assert found["bench"] == "train_step" and found["machine"]["threads"] == 1
    assert [(row["backend"], *row["speedup_over"]) for row in found["rows"]] == [("rlv2v", "plain"), ("plain", "rlv2v")]
    for row in found["rows"]:
        assert row["valid"] and row["case"] == "default T=3 16x16" and 0 < row["p20_us"] <= row["p80_us"]
        assert row["difference"].keys() == bench().LIMITS.keys()
    ratio, back = (next(iter(row["speedup_over"].values())) for row in found["rows"])
    assert ratio * back == pytest.approx(1, rel=0.01)


@pytest.mark.usefixtures("small")
def test_what_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = importlib.import_module("train_step_plain").Plain
    actor = plain.actor
    monkeypatch.setattr(plain, "actor", lambda *given: 1.001 * actor(*given))
    with pytest.raises(SystemExit) as exit_:
        bench().main(bench().Args(frames=(3,), paper_frames=(), size=16, rounds=2, warm=1, check=1, device="cpu"))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert exit_.value.code == 1
    assert all(not row["valid"] and row["median_us"] is None and not row["speedup_over"] for row in rows)


def test_a_time_is_the_mean_of_a_round() -> None:
    timed, seconds, stretches = bench().Timed, itertools.cycle((4.0, 1.0, 2.0, 1.0)), []

    def fast(num: int) -> list[Any]:
        stretches.append(num)
        return [timed(next(seconds), [k]) for k in range(num)]

    def plain(ids: list[list[int]]) -> list[float]:
        assert ids == [[k] for k in range(stretches[-1])]
        return [4.0] * len(ids)

    assert bench().time_rounds(fast, plain, 4, 3, 2) == {"rlv2v": [2e6] * 3, "plain": [4e6] * 3}
    assert stretches == [8, 4]
