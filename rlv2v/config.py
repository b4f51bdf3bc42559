"""Everything a run depends on: one frozen dataclass, checked once, saved as `config.json`; and its presets."""

from __future__ import annotations

import argparse
import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from rlv2v.errors import UserError

DEFAULT_BUDGET = 300.0  # seconds
# What may change between a run and its resumption; every other field makes it another run.
FREE_ON_RESUME = frozenset(
    {
        *("data", "out", "resume", "steps", "budget", "device", "threads", "loader_threads", "snapshot_seconds"),
        *("memory", "graphs", "replicas", "keep"),
    }
)


@dataclass(frozen=True)
class Config:
    """Train a translator on a folder of videos. Losses are those of RL-V2V-GAN; see docs/method.md."""

    preset: Literal["default", "paper", "tiny", "workstation"] = "default"
    """Where every other flag starts: default (with the additions), paper (nothing beyond it), tiny (seconds; tests),
    workstation (128x128, T=16, bf16, one replica a rank on cards of 8 GB)."""
    data: Path | None = None
    """Folder with trainX, trainY and perhaps trainZ, trainS (or CycleGAN's trainA, trainB). None: the synthetic set."""
    out: Path = Path("runs/rlv2v")
    """Folder of this run."""
    resume: bool = False
    """Go on with the run in `out`; its own settings then serve as defaults."""
    method: Literal["rlv2v", "cyclegan"] = "rlv2v"
    """rlv2v, or the per-frame baseline: every frame is a video of its own; adversarial, cycle and identity losses."""
    steps: int | None = None
    """Length of training in steps; `--budget` otherwise."""
    budget: float | None = None
    """Length of training in seconds, warm-up included (300 when neither is given)."""
    seed: int = 0
    """Seed of every draw."""
    device: str = "auto"
    """Torch device: cpu, cuda, cuda:1; auto: cuda where there is one."""
    threads: int = 1
    """CPU threads; 0: as many as torch finds. One is fastest below 64 pixels."""
    loader_threads: int = 1
    """Threads that read and decode the next batches; without influence on what is drawn."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the networks compute in; weights, statistics, losses and optimisers are float32. fp16 scales its losses."""
    memory: Literal["store", "recompute", "frames"] = "store"
    """What the backward pass finds: all that was computed; without the gates, which are computed again; or only the
    state after every few frames, from which they are run again. Least time first, least memory last."""
    graphs: bool = True
    """Record a GPU's work of a step as CUDA graphs and replay it, instead of launching every kernel anew."""
    replicas: int | None = None
    """Equal shares that the work of a step is cut into: each has the batch below and a replay buffer of its own, and
    the ranks take as many each. None: one a rank."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where clips are decoded and resized: by the loader's threads, or on the CUDA device by DALI and NVDEC."""
    size: int = 32
    """Side of the square training crops, pixels; the short side of a video is resized to it."""
    frames: int = 8
    """Clip length T."""
    augment: Literal["none", "flip", "dihedral"] = "flip"
    """Same for all frames of a clip: left-right, or all eight flips and transposes of the square."""

    batch_x: int = 2
    """Clips of X a step and replica."""
    batch_y: int = 1
    """Clips of Y a step and replica; twice as many when there is no Z."""
    batch_z: int = 2
    """Clips of Z a step and replica."""
    batch_s: int = 4
    """Stills of S a step and replica."""

    widths: tuple[int, ...] = (8, 16, 24)
    """Channels after each RPB of G and P; mirrored by the URBs."""
    disc_widths: tuple[int, ...] = (8, 16, 24, 32, 32)
    """Channels after each RPB of D and Q."""
    patch: int = 2
    """Addition: space-to-depth factor in front of every network; the ConvLSTMs run on frames this much smaller."""
    head: Literal["convlstm", "mask"] = "mask"
    """convlstm: the paper's; mask: addition, a full-resolution head that can copy its input by a soft mask."""
    norm: Literal["clip", "batch"] = "clip"
    """Sequence-wise normalisation of G and P: each clip for itself, or over the mini-batch as in the paper."""
    disc_norm: Literal["clip", "batch", "none"] = "none"
    """The same for D and Q; none lets them see the level of a colour, which normalisation takes away."""
    chrono: bool = True
    """Addition: ConvLSTM biases that start out remembering over all times up to T; off: zero."""
    q_positive: bool = False
    """ReLU at the critics' end, as in the paper; it clips a negative value to zero."""

    gan: Literal["log", "nonsaturating", "hinge"] = "hinge"
    """What D's judgement adds to L: log is the paper's."""
    l_adv: float = 1.0
    """Weight of L_g, eq. 1 and 2."""
    l_v: float = 2.0
    """Weight of L_v, eq. 7."""
    l_tau: float = 10.0
    """Weight of L_tau, eq. 3 and 4."""
    l_rc: float = 10.0
    """Weight of L_rc, eq. 5 and 6."""
    distance: Literal["l1", "l2"] = "l1"
    """||.|| of the recurrent and recycle losses; l2 is the paper's."""
    disc_frames: int = 2
    """Single frames of each clip that D judges a step; 0: all of them, as in the paper."""
    cycle: float = 2.0
    """Addition: weight of |G_X(G_Y(x)) - x| and its mirror."""
    identity: float = 4.0
    """Addition: weight of |G_Y(y) - y|, |G_Y(z) - z|, |G_Y(s) - s|, |G_X(x) - x|."""
    contrast: float = 40.0
    """Addition: weight of the local-contrast loss; doubled for G_X."""
    mask_prior: float = 2.0
    """Addition: weight of the copy mask's prior; 0: the mask stays shut and nothing is copied."""
    colours: float = 3.0
    """Addition: weight of the distance between the colours of translated and target clips, frame index by index."""
    ramp_at: float = 0.3
    """Contrast and mask terms rise when the translations' distance to the target is this share of the domains'."""
    adversarial_end: float = 0.3
    """Share of the adversarial terms that is left after that ramp; 1: they stay as they are."""

    lr: float = 2e-3
    """Adam's learning rate of G and P."""
    disc_lr: float = 2e-3
    """Adam's learning rate of D and Q."""
    betas: tuple[float, float] = (0.5, 0.99)
    """Adam's decay rates."""
    weight_decay: float = 1e-3
    """Decoupled L2 penalty (section 3.4)."""
    clip_grad: float = 5.0
    """Largest norm of the gradient of G and P together, and of D; 0: no limit."""
    average: float = 0.98
    """Addition: decay of the weights' moving average, which is what translates; 0: the last weights."""
    warmup_steps: int = 80
    """Steps of pre-training as auto-encoder and predictor (section 6.2), copied to both domains."""
    warmup_lr: float = 3e-3
    """Adam's learning rate of the warm-up."""
    warmup_cache: bool = True
    """Keep the warmed-up weights in the user's cache folder, for the next run of the same set-up."""

    rl: bool = True
    """The policy gradient; --no-rl leaves critics, replay and reward out."""
    rl_weight: float = 0.3
    """Weight of the actor's loss beside L."""
    transitions: int = 2
    """m: transitions a mini-batch and replica."""
    rl_every: int = 2
    """Steps from one mini-batch of transitions to the next; the two domains take turns."""
    gamma: float = 0.9
    """Discount."""
    tau: float = 0.03
    """Polyak rate of the target networks."""
    eta1: tuple[float, float] = (0.8, 0.8)
    """Probability of a stored transition, at the start and the end of training."""
    eta2: tuple[float, float] = (0.8, 0.8)
    """Probability of the critic's choice over a random frame, at the start and the end."""
    reward: Literal["transition", "paper"] = "transition"
    """log D(a) - c ||a - a_true|| for each transition, or the paper's losses with the sign turned."""
    reward_distance: float = 1.0
    """c of the reward above."""
    replay_capacity: int = 1024
    """Transitions kept for each domain and replica."""
    replay_alpha: float = 0.0
    """Exponent of prioritised replay; 0: uniform, as in the paper."""
    replay_beta: float = 0.4
    """Exponent of its importance weights."""

    snapshot_seconds: float = 60.0
    """Seconds between checkpoints, each with a strip of samples."""
    keep: int = 2
    """How many of the newest checkpoints are kept; the best one is kept besides."""

    @classmethod
    def of(cls, preset: str = "default", method: str = "rlv2v", **changes: Any) -> Config:
        """A preset, the settings that a method brings, and changes on top."""
        base = PRESETS[preset] | (CYCLEGAN if method == "cyclegan" else {})
        return cls(**(base | {"preset": preset, "method": method} | changes))

    @property
    def length(self) -> tuple[str, float]:
        """How long to train: ("step", number) or ("s", seconds)."""
        return ("step", float(self.steps)) if self.steps is not None else ("s", self.budget or DEFAULT_BUDGET)

    @property
    def per_frame(self) -> bool:
        """Every frame is a video of its own: the state is forgotten between frames."""
        return self.method == "cyclegan"

    def check(self) -> Config:
        """Raise UserError for the first value out of its range; returns the config.

        Not in `__post_init__`: the command line's parser would turn the one line into a box of its own.
        """

        def need(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise UserError(f"--{name.replace('_', '-')}: expected {expected}, got {getattr(self, name)!r}")

        need(self.steps is None or self.steps >= 0, "steps", "a number >= 0")
        need(self.budget is None or self.budget > 0, "budget", "seconds > 0")
        need(self.steps is None or self.budget is None, "steps", "--steps or --budget, not both")
        need(0 <= self.seed < 2**63, "seed", "0 <= seed < 2**63")
        need(self.size >= 8, "size", "at least 8 pixels")
        need(self.frames >= 2, "frames", "at least 2")
        need(self.patch in (1, 2, 4), "patch", "1, 2 or 4")
        need(self.patch == 1 or self.head == "mask", "patch", "1 with --head convlstm")
        need(len(self.widths) >= 1 and min(self.widths) > 0, "widths", "positive numbers")
        need(len(self.disc_widths) >= 1 and min(self.disc_widths) > 0, "disc_widths", "positive numbers")
        multiple = self.patch * 2 ** len(self.widths)
        need(self.size % multiple == 0, "size", f"a multiple of {multiple} (patch * 2 ** number of widths)")
        for name in (
            "batch_x",
            "batch_y",
            "batch_z",
            "batch_s",
            "transitions",
            "rl_every",
            "replay_capacity",
            "loader_threads",
            "keep",
        ):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in ("threads", "disc_frames", "warmup_steps"):
            need(getattr(self, name) >= 0, name, "a number >= 0")
        need(self.replicas is None or self.replicas >= 1, "replicas", "at least 1")
        weights = (
            "l_adv",
            "l_v",
            "l_tau",
            "l_rc",
            "cycle",
            "identity",
            "contrast",
            "mask_prior",
            "colours",
            "rl_weight",
        )
        for name in (*weights, "weight_decay", "clip_grad", "reward_distance", "snapshot_seconds", "replay_alpha"):
            need(getattr(self, name) >= 0, name, "a number >= 0")
        for name in ("lr", "disc_lr", "warmup_lr"):
            need(getattr(self, name) > 0, name, "a number > 0")
        for name in ("gamma", "average"):
            need(0 <= getattr(self, name) < 1, name, "0 <= value < 1")
        need(0 < self.tau <= 1, "tau", "0 < tau <= 1")
        for name in ("eta1", "eta2"):
            need(all(0 <= p <= 1 for p in getattr(self, name)), name, "two probabilities")
        return self

    def to_json(self) -> str:
        """The config as JSON text; paths are strings."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def from_arguments(cls, arguments: list[str]) -> Config:
        """Where the command line's flags start: the preset and method named there, or the run that is resumed."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--preset", default="default")
        parser.add_argument("--method", default="rlv2v")
        parser.add_argument("--out", type=Path, default=cls.out)
        for flag in ("--resume", "--steps", "--budget"):
            parser.add_argument(flag, nargs="?", const=True)
        named, _ = parser.parse_known_args(arguments)
        saved = named.out / "config.json"
        if named.resume and saved.is_file():
            start = replace(cls.from_json(saved.read_text(), str(saved)), out=named.out, resume=True)
        else:
            start = cls.of(named.preset if named.preset in PRESETS else "default", named.method)
        if named.budget:
            start = replace(start, steps=None)
        return replace(start, budget=None) if named.steps else start

    @classmethod
    def from_json(cls, text: str, name: str) -> Config:
        """Read what `to_json` wrote; `name` is what an error calls it."""
        try:
            values: dict[str, Any] = json.loads(text)
            unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
            if unknown:
                raise UserError(f"{name}: unknown setting {sorted(unknown)[0]!r}; written by another version of rlv2v?")
            hints = get_type_hints(cls)
            for key, value in values.items():
                if isinstance(value, list):
                    values[key] = tuple(value)
                elif value is not None and "Path" in str(hints[key]):
                    values[key] = Path(value)
            return cls(**values).check()
        except (TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{name}: expected a config written by rlv2v, got {error}") from None


# The per-frame baseline: Zhu et al. 2017 with the same networks; its losses on frames, nothing that looks along time.
CYCLEGAN: dict[str, Any] = {
    "l_v": 0.0,
    "l_tau": 0.0,
    "l_rc": 0.0,
    "cycle": 10.0,
    "identity": 5.0,
    "contrast": 0.0,
    "mask_prior": 0.0,
    "colours": 0.0,
    "adversarial_end": 1.0,
    "rl": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "widths": (8, 16, 24),
        "patch": 1,
        "head": "convlstm",
        "norm": "batch",
        "disc_norm": "batch",
        "q_positive": True,
        "chrono": False,
        "gan": "log",
        "rl_every": 1,
        "distance": "l2",
        "disc_frames": 0,
        "cycle": 0.0,
        "identity": 0.0,
        "contrast": 0.0,
        "mask_prior": 0.0,
        "colours": 0.0,
        "adversarial_end": 1.0,
        "clip_grad": 0.0,
        "average": 0.0,
        "augment": "none",
        "reward": "paper",
    },
    "tiny": {
        "widths": (4, 8),
        "disc_widths": (4, 8, 8),
        "size": 16,
        "frames": 4,
        "warmup_steps": 2,
        "steps": 4,
        "transitions": 2,
        "replay_capacity": 32,
        "warmup_cache": False,
    },
    # Counted by rlv2v.method.memory, with its reserve: 7.1 GB. Widths are multiples of 32, which the tensor
    # cores take whole.
    "workstation": {
        "size": 128,
        "frames": 16,
        "precision": "bf16",
        "graphs": False,  # its recordings would need 0.8 GB more
        "widths": (32, 64, 128),
        "disc_widths": (32, 64, 128, 128, 128),
        "batch_x": 1,
        "batch_y": 1,
        "batch_z": 1,
        "batch_s": 2,
        "transitions": 1,
        "replay_capacity": 256,
        "loader_threads": 4,
        "budget": 14400.0,
        "snapshot_seconds": 300.0,
    },
}
