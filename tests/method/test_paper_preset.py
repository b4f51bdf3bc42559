"""The preset `paper` and the image baselines: every setting that shapes the method, by value."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlv2v.config import FLAGS, Config
from rlv2v.crop_size import CropSize

PAPER = {
    # section 6.1: nothing is augmented
    "size": CropSize(32, 32), "frames": 8, "augment": "none",
    "batch_x": 2, "batch_y": 1, "batch_z": 2, "batch_s": 4, "batch_pool": 6,
    # section 3.2, 3.4, table 1: ConvLSTM head, no patches, statistics over the mini-batch
    "widths": (8, 16, 24), "disc_widths": (8, 16, 24, 32, 32), "patch": 1, "head": "convlstm", "bins": 6,
    "norm": "batch", "disc_norm": "batch", "chrono": False, "q_positive": False,
    # eq. 1-10 with log D and squared distances, on every frame; no added term
    "gan": "log", "l_adv": 1.0, "l_v": 2.0, "l_tau": 10.0, "l_rc": 10.0, "distance": "l2", "disc_frames": 0,
    "cycle": 0.0, "identity": 0.0, "contrast": 0.0, "mask_prior": 0.0, "smoothness": 0.0,
    "patches": 0.0, "order": 0.0, "hue": 0.0,
    # section 3.4, 6.2: L2 penalty 0.001, pre-training; no clipping, no average of the weights
    "lr": 2e-3, "disc_lr": 2e-3, "betas": (0.5, 0.99), "weight_decay": 1e-3, "clip_grad": 0.0, "average": 0.0,
    "warmup_steps": 80, "warmup_lr": 3e-3,
    # section 3.3, Algorithm 1: a mini-batch in every step, eta 0.8, uniform replay, the paper's reward
    "rl": True, "rl_weight": 0.3, "transitions": 2, "rl_every": 1, "gamma": 0.9, "tau": 0.03,
    "eta1": (0.8, 0.8), "eta2": (0.8, 0.8), "reward": "paper", "reward_distance": 1.0,
    "replay_capacity": 1024, "replay_alpha": 0.0, "replay_beta": 0.4,
}  # fmt: skip
MACHINE = {
    "preset": "paper", "method": "rlv2v", "out": Path("runs/rlv2v"), "resume": False, "from": None, "steps": None,
    "budget": None,
    "seed": 0, "data": Path("@synthetic"), "loader_threads": 1, "decode": "cpu", "device": "auto", "threads": 1,
    "precision": "fp32", "tf32": True, "memory": "store", "graphs": True, "replicas": 0,
    "snapshot_seconds": 60.0, "keep": 2, "patience": 0,
}  # fmt: skip


def settings(config: Config) -> dict[str, object]:
    return {flag: config.get(flag) for flag in FLAGS}


def test_every_setting_of_the_preset_paper() -> None:
    assert settings(Config.of("paper").check()) == PAPER | MACHINE


def test_what_the_letter_of_the_paper_changes() -> None:
    letter = {"head": "letter", "q_positive": True, "preset": "paper-letter"}
    assert settings(Config.of("paper-letter").check()) == PAPER | MACHINE | letter


IMAGES = {
    # Zhu et al. 2017, section 4, 7.1, 7.2: Adam with beta1 0.5, one image a step; Bansal et al. 2018 take them over
    "lr": 2e-4, "disc_lr": 2e-4, "betas": (0.5, 0.999), "weight_decay": 0.0, "clip_grad": 0.0, "average": 0.0,
    "batch_x": 1, "batch_z": 1, "batch_s": 1, "batch_pool": 0, "widths": (16, 32, 64),
    "disc_widths": (32, 64, 128), "patch": 1,
    # what they do not have
    "graphs": False,
}  # fmt: skip


@pytest.mark.parametrize("method", ["cyclegan", "recycle-gan"])
def test_every_setting_of_the_image_baselines(method: str) -> None:
    ours, theirs = settings(Config.of("default")), settings(Config.of("default", method).check())
    changed = {flag: value for flag, value in theirs.items() if value != ours[flag]}
    terms = {
        "cyclegan": {"identity": 5.0},  # and the default's cycle loss
        "recycle-gan": {"cycle": 0.0, "identity": 0.0, "l_tau": 10.0, "l_rc": 10.0},
    }[method]
    assert changed == IMAGES | terms | {"method": method}
    assert (theirs["rl"], theirs["warmup_steps"]) == (False, 0)
    assert method != "cyclegan" or theirs["cycle"] == 10.0
