"""Numbers that are none: named, with the step, before they reach a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rlv2v.train
from rlv2v.checkpoint.store import Checkpoints
from rlv2v.config import Config
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.errors import UserError
from rlv2v.model.build import Nets, build_nets
from rlv2v.runtime.nan_guard import LAG, NanGuard, check_values, check_weights
from rlv2v.train import train

NAN, INF = float("nan"), float("inf")


def test_numbers_come_back_and_the_first_that_is_none_stops_the_run() -> None:
    watch = NanGuard(torch.device("cpu"))
    assert watch.read() == {}
    watch.record(1, {"loss": torch.tensor(1.5), "grad": torch.tensor(2.0)})
    assert watch.read() == {"loss": 1.5, "grad": 2.0}
    watch.record(3, {"loss": torch.tensor(1.0), "rc_x": torch.tensor(NAN), "grad": torch.tensor(NAN)})
    with pytest.raises(UserError, match=r"loss 'rc_x' is nan at step 3.*checkpoint is whole.*--lr"):
        watch.read()


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"loss": INF}, "loss 'loss' is inf"),
        ({"grad_d": NAN}, "gradient norm 'grad_d' is nan"),
        ({"scale": 0.5, "grad": INF}, "loss scale of fp16, 'scale', fell to 0.5"),
        ({"scale": NAN}, "'scale' is nan"),
    ],
)
def test_what_stops_a_run(values: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_values(values, 7)


def test_a_gradient_beyond_fp16_is_part_of_the_search_for_the_scale() -> None:
    check_values({"scale": 32768.0, "grad": INF, "loss": 1.0}, 7)


@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_weight_that_is_no_number_is_named(bad: float) -> None:
    nets = build_nets(Config.of("paper", widths=(4,), disc_widths=(4,), size=16))
    check_weights(nets.named_children(), 5)
    nets.g_y.encoder[0].norm.running_mean[1] = bad
    with pytest.raises(UserError, match=r"weight 'g_y.encoder.0.norm.running_mean' is (nan|inf) at step 5"):
        check_weights(nets.named_children(), 5)


@pytest.mark.parametrize(("where", "lag"), [("loss", 0), ("loss", LAG), ("weight", 0)])
def test_the_last_good_checkpoint_is_kept(
    tmp_path: Path, where: str, lag: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes wrong at step 6 of 9, with a checkpoint after every step; numbers come late from a GPU."""
    data, run = tmp_path / "data", tmp_path / "run"
    write_dataset(data, size=16, frames=4, counts=Counts(x=8, y=4, z=4, s=4, val=2, test=2))
    from rlv2v.method import step as algorithm

    def poisoned(nets: Nets, *args: object) -> object:
        calls.append(1)
        told, out, back = original(nets, *args)
        if len(calls) == 6 and where == "loss":
            told["tau_y"] = told["tau_y"] * NAN
        if len(calls) == 6 and where == "weight":
            with torch.no_grad():
                nets.q_x.hidden.bias[0] = NAN  # in no loss of this step
        return told, out, back

    class Late(NanGuard):
        def __init__(self, device: torch.device) -> None:
            super().__init__(device)
            self._lag = lag

    monkeypatch.setattr(rlv2v.train, "NanGuard", Late)
    calls: list[int] = []
    original = algorithm.generator_losses
    monkeypatch.setattr(algorithm, "generator_losses", poisoned)
    says = "'tau_y' is nan at step 6" if where == "loss" else "'q_x.hidden.bias' is nan at step 6"
    with pytest.raises(UserError, match=says):
        train(Config.of("tiny", data=data, out=run, steps=9, snapshot_seconds=0.0, rl_every=4))
    store = Checkpoints(run, keep=2, num_replicas=1)
    assert store.newest() == 5
    monkeypatch.setattr(algorithm, "generator_losses", original)
    train(Config.of("tiny", data=data, out=run, steps=9, rl_every=4, resume=True))
    assert store.newest() == 9
