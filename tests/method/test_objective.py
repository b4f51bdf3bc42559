"""What G sees of D depends on real clips exactly where D normalises over its mini-batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlv2v.config import Config
from rlv2v.method.clips import Clips, Gains
from rlv2v.method.objective import generator_losses
from rlv2v.model.build import build_nets


@pytest.mark.parametrize(("norm", "depends"), [("batch", True), ("clip", False), ("none", False)])
def test_fakes_are_judged_beside_real_clips_where_d_normalises_over_the_batch(norm: str, depends: bool) -> None:
    torch.manual_seed(0)
    config = Config.of("tiny", disc_norm=norm)
    nets = build_nets(config)
    x, y, z = (torch.rand(2, 4, 3, 16, 16) * 2 - 1 for _ in range(3))
    at, directions = torch.tensor([1, 3]), torch.eye(3)

    def adversarial(clips: Clips) -> dict[str, float]:
        terms, _, _ = generator_losses(nets, clips, config, Gains(1.0, 1.0), at, directions)
        return {name: terms[name].item() for name in ("g_y", "v_y")}

    clips = Clips(x, y, z, None)
    before, after = adversarial(clips), adversarial(replace(clips, y=0.2 * y + 0.7))
    assert (before != after) == depends
