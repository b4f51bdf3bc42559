"""bench/train_step.py: the plain twin takes the same steps as `Algorithm`, and the bench sees where one does not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import train_step
from oracle.plain_nets import plain_weights
from oracle.plain_step import Plain
from train_step import Args, Pair, difference, steps_of_round

from rlv2v.config import Config
from rlv2v.method.step import Algorithm

pytestmark = pytest.mark.usefixtures("one_thread")
CLOSE = 1e-9
NETS = ("g_x", "g_y", "p_x", "p_y", "d_x", "d_y", "q_x", "q_y")
SMALL: dict[str, Any] = {"size": 16, "frames": 4, "widths": (4, 8), "disc_widths": (4, 8, 8), "replay_capacity": 5}
CASES = [
    ("default", 2, {"frames": 3, "size": 8, "batch_pool": 2}),
    (
        "default",
        5,
        {
            "rl": True,
            "lr": 2e-4,
            "eta1": (1.0, 1.0),
            "rl_every": 1,
            "l_tau": 10.0,
            "l_rc": 10.0,
            "batch_pool": 1,
            "chrono": True,
            "seed": 2,
        },
    ),
    ("paint", 4, {"rl_every": 1, "eta1": (1.0, 1.0), "frames": 3, "size": "16x8"}),
    ("paper", 8, {"eta1": (0.5, 0.5), "q_positive": False}),
    ("paint", 8, {"reward": "paper", "gan": "nonsaturating", "distance": "l2", "seed": 1}),
    ("paint", 8, {"rl": False, "identity": 0.0, "patches": 40.0, "average": 0.0, "clip_grad": 0.5}),
    ("default", 1, {"frames": 3, "size": "8x16", "batch_pool": 2}),  # later Adam magnifies rounding of gradients of 0
    ("paper", 8, {"reward": "transition", "gan": "hinge", "gamma": 0.5, "tau": 0.5}),
]


def weights_difference(fast: Algorithm, plain: Plain) -> float:
    """Return the relative difference of all weights: of networks, targets and averages."""
    ours, theirs = list[torch.Tensor](), list[torch.Tensor]()
    for name in ("nets", "targets", "average"):
        converted, state = plain_weights(getattr(fast, name).state_dict()), getattr(plain, name).state_dict()
        ours += [converted[key].flatten() for key in state]
        theirs += [value.flatten() for value in state.values()]
    return (torch.linalg.vector_norm(torch.cat(ours) - torch.cat(theirs)) / torch.cat(theirs).norm()).item()


def slow_beyond(first: int, values: Any) -> list[Any]:
    """Mark all but the first values as thorough."""
    marks = [()] * first + [pytest.mark.thorough] * (len(values) - first)
    return [pytest.param(value, marks=mark) for value, mark in zip(values, marks, strict=True)]


def pair_of(preset: str, **changes: Any) -> Pair:
    comparable = train_step.COMPARABLE[preset] | SMALL | {"steps": 12, "replicas": 1}
    return Pair(Config.of(preset, **(comparable | changes)).check(), torch.device("cpu"), torch.float64)


@pytest.mark.parametrize("case", slow_beyond(3, CASES))
def test_steps_are_equal_in_double_precision(case: tuple[str, int, dict[str, Any]]) -> None:
    """Compare all logs, over steps that draw stored transitions in both domains, and then all weights."""
    preset, steps, changes = case
    pair, drawn = pair_of(preset, **changes), []
    for _ in range(steps):
        logs = pair.step()
        drawn.append(len(pair.ids))
        for gradients in (False, True):
            assert difference(*logs, gradients) <= CLOSE
    assert weights_difference(pair.fast, pair.plain) <= CLOSE
    if pair.config.rl.enabled:
        in_x, in_y = (drawn[turn * pair.config.rl.every :: steps_of_round(pair.config)] for turn in (0, 1))
        assert sum(in_x) and sum(in_y)


@pytest.mark.thorough
def test_the_oldest_go_first() -> None:
    """Transitions that a full buffer has dropped shift those that are left, in both."""
    pair = pair_of("paper", transitions=4, eta1=(0.3, 0.3), steps=40)
    for _ in range(8):
        assert difference(*pair.step(), False) <= CLOSE
    assert all(pair.plain.num_stored[domain] > len(pair.plain.buffers[domain]) == 5 for domain in "xy")


@pytest.mark.parametrize("name", slow_beyond(1, NETS))
def test_a_weight_that_differs_is_seen(name: str) -> None:
    pair = pair_of("paper", q_positive=False, rl_every=1, frames=3, size=8)
    with torch.no_grad():
        next(getattr(pair.plain.nets, name).parameters()).mul_(1 + 1e-4)
    logs = [pair.step() for _ in range(steps_of_round(pair.config))]
    assert max(difference(*step, False) for step in logs) > 100 * CLOSE
    assert weights_difference(pair.fast, pair.plain) > 100 * CLOSE


def test_what_only_one_logs_is_a_difference() -> None:
    assert difference({"a": 1.0, "grad": 2.0}, {"a": 1.0, "grad": 2.5}, False) == 0.0
    assert difference({"a": 1.0, "grad": 2.0}, {"a": 1.0, "grad": 2.5}, True) == pytest.approx(0.2)
    assert difference({"a": 1.0}, {"b": 1.0}, False) == difference({}, {"b": 1.0}, False) == float("inf")
    assert difference({"a": float("nan"), "b": 1.0}, {"a": 1.0, "b": 1.0}, False) == float("inf")


@pytest.mark.thorough
def test_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {name: value for name, value in SMALL.items() if name not in ("size", "frames")}
    monkeypatch.setitem(train_step.COMPARABLE, "paint", train_step.COMPARABLE["paint"] | changes | {"rl_every": 1})
    train_step.main(Args(quick=True))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["backend"] for row in rows] == ["rlv2v", "plain"] and not rows[1]["speedup_over"]
    assert list(rows[0]["speedup_over"]) == ["plain"]
    for row in rows:
        assert row["valid"] and row["case"] == "paint T=3 16x16"
        assert set(row["difference"]) == {"losses", "gradients", "float64"}


@pytest.mark.parametrize("losses, float64", [(1.1e-5, 0.0), (0.0, 1.1e-9)])
def test_what_differs_is_not_timed(losses: float, float64: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_step, "Pair", lambda config, device, dtype=torch.float32: dtype)
    compared = {torch.float32: {"losses": losses, "gradients": 0.0}, torch.float64: {"losses": float64}}
    monkeypatch.setattr(train_step, "compare_steps", lambda pair, rounds: compared[pair])
    rows = train_step.case_rows("paint", 3, Args())
    assert all(not row["valid"] and row["median_us"] is None and not row["speedup_over"] for row in rows)


def test_a_time_is_the_mean_of_a_round() -> None:
    seconds, stretches = itertools.cycle((4.0, 1.0, 2.0, 1.0)), []

    def fast(draws: Sequence[list[int] | None]) -> list[tuple[float, list[int]]]:
        stretches.append(len(draws))
        return [(next(seconds), [k]) for k in range(len(draws))]

    def plain(draws: Sequence[list[int] | None]) -> list[tuple[float, list[int]]]:
        assert draws == [[k] for k in range(stretches[-1])]
        return [(4.0, []) for _ in draws]

    assert train_step.time_rounds(fast, plain, 4, 5) == {"rlv2v": [2e6] * 5, "plain": [4e6] * 5}
    assert stretches == [12, 8]
