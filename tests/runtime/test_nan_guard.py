"""Tests of the NaN guard: a NaN or infinity is named, with its step, before it reaches a checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

import rlv2v.train
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.method import step as step_module
from rlv2v.model.build import Nets, build_nets
from rlv2v.runtime.nan_guard import NanGuard, check_values, check_weights
from rlv2v.train import train

NAN, INF = float("nan"), float("inf")
CPU = torch.device("cpu")


@pytest.mark.parametrize("lag", [0, 2])
def test_values_come_back_after_the_lag_and_the_first_nan_is_named(lag: int) -> None:
    guard = NanGuard(CPU, lag)
    steps = [{"loss": torch.tensor(step + 0.5), "grad": torch.tensor(2.0)} for step in range(3)]
    newest = []
    for step, values in enumerate(steps):
        guard.record(step, values)
        newest.append(guard.read().get("loss"))
    assert newest == [None] * lag + [step + 0.5 for step in range(3 - lag)]
    guard.record(3, {"loss": torch.tensor(1.0), "rc_x": torch.tensor(NAN), "grad": torch.tensor(NAN)})
    guard.record(4, steps[0])
    with pytest.raises(UserError, match=r"loss 'rc_x' is nan at step 3.*checkpoint is whole.*--lr"):
        guard.read(everything=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss": INF}, "loss 'loss' is inf"),
        ({"grad_d": NAN}, "gradient norm 'grad_d' is nan"),
        ({"scale": 0.5, "grad": INF}, "loss scale of fp16, 'scale', fell to 0.5"),
        ({"scale": NAN}, "'scale' is nan"),
    ],
)
def test_values_that_stop_a_run(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_values(values, 7)


def test_an_infinite_gradient_is_part_of_the_search_for_the_scale_of_fp16() -> None:
    check_values({"scale": 32768.0, "grad": INF, "loss": 1.0}, 7)


@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_bad_weight_is_named(bad: float) -> None:
    nets = build_nets(Config.of("paper", widths=(4,), disc_widths=(4,), size=16))
    check_weights(nets.named_children(), 5)
    nets.g_y.encoder[0].norm.weight.data[1] = bad
    with pytest.raises(UserError, match=r"weight 'g_y.encoder.0.norm.weight' is (nan|inf) at step 5"):
        check_weights(nets.named_children(), 5)


@pytest.mark.parametrize(
    ("poisoned", "lag"),
    [("loss", 4), *(pytest.param(name, 0, marks=pytest.mark.thorough) for name in ("loss", "weight"))],
)
def test_a_run_that_goes_wrong_keeps_its_last_good_checkpoint(
    data: Path, tmp_path: Path, poisoned: str, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes wrong at step 6 of 9, with a checkpoint after every step; values come late from a GPU."""
    run = tmp_path / "run"
    original, calls = step_module.generator_losses, 0

    def generator_losses(nets: Nets, *args: object) -> object:
        nonlocal calls
        calls += 1
        terms, *others = original(nets, *args)  # type: ignore[arg-type]
        if calls == 6 and poisoned == "loss":
            terms["tau_y"] = terms["tau_y"] * NAN
        if calls == 6 and poisoned == "weight":
            with torch.no_grad():
                nets.q_x.hidden.bias[0] = NAN  # in no loss of this step
        return terms, *others

    monkeypatch.setattr(rlv2v.train, "NanGuard", partial(NanGuard, lag=lag))
    monkeypatch.setattr(step_module, "generator_losses", generator_losses)
    message = "'tau_y' is nan at step 6" if poisoned == "loss" else "'q_x.hidden.bias' is nan at step 6"
    config = Config.of("tiny", data=data, out=run, steps=9, snapshot_seconds=0.0, rl_every=4)
    with pytest.raises(UserError, match=message):
        train(config)
    store = Checkpoints(run, keep=2, num_replicas=1)
    assert store.newest() == 5
    monkeypatch.setattr(step_module, "generator_losses", original)
    train(config.replace(resume=True))
    assert store.newest() == 9
