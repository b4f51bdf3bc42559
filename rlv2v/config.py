"""Everything a run depends on: frozen dataclasses by section, checked once, saved as `config.json`.

A setting has a flag of its own name, without its section's; `FLAGS` says which section holds it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlv2v.errors import UserError, nearest
from rlv2v.method.baselines import METHODS
from rlv2v.method.rewards import REWARDS
from rlv2v.method.terms import TERMS

DEFAULT_BUDGET = 300.0  # seconds
SYNTHETIC = Path("@synthetic")
BATCH = ("batch_x", "batch_y", "batch_z", "batch_s", "transitions")  # what a step takes of each


@dataclass(frozen=True)
class DataConfig:
    """Which clips are drawn, and how a batch is made of them."""

    folder: Path = SYNTHETIC
    """Folder with trainX, trainY and perhaps trainZ, trainS (or CycleGAN's trainA, trainB); @synthetic: the synthetic
    set, which the run writes to data/synth-<size>x<frames>."""
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
    loader_threads: int = 1
    """Threads that read and decode the next batches; without influence on what is drawn."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where clips are decoded and resized: by the loader's threads, or on the CUDA device by DALI and NVDEC."""


@dataclass(frozen=True)
class ModelConfig:
    """The networks."""

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

    @property
    def multiple(self) -> int:
        """Of how many pixels the height and width of a frame must be multiples."""
        return self.patch * 2 ** len(self.widths)


@dataclass(frozen=True)
class EquationConfig:
    """The objective of eq. 10."""

    gan: Literal["log", "nonsaturating", "hinge"] = "hinge"
    """What D's logits add to L: log is the paper's."""
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
    ramp_at: float = 0.3
    """Contrast and mask terms rise when the translations' distance to the target is this share of the domains'."""
    adversarial_end: float = 0.3
    """Share of the adversarial terms that is left after that ramp; 1: they stay as they are."""

    def term(self, name: str) -> float:
        """Return the weight of an added term of `rlv2v.method.terms`."""
        return float(getattr(self, name))


if TYPE_CHECKING:
    LossConfig = EquationConfig
else:  # a weight for each term of the registry
    LossConfig = make_dataclass(
        "LossConfig",
        [(name, float, term.default) for name, term in TERMS.items()],
        bases=(EquationConfig,),
        namespace={"__module__": __name__},  # by which pickle finds it: ranks send each other the config
        frozen=True,
    )


@dataclass(frozen=True)
class OptimConfig:
    """The optimisers, the pre-training and the moving average."""

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


@dataclass(frozen=True)
class RLConfig:
    """The policy gradient (section 3.3)."""

    enabled: bool = True
    """The policy gradient; --no-rl leaves critics, replay and reward out."""
    weight: float = 0.3
    """Weight of the actor's loss beside L."""
    transitions: int = 2
    """m: transitions a mini-batch and replica."""
    every: int = 2
    """Steps from one mini-batch of transitions to the next; the two domains take turns."""
    gamma: float = 0.9
    """Discount."""
    tau: float = 0.03
    """Polyak rate of the target networks."""
    eta1: tuple[float, float] = (0.8, 0.8)
    """Probability of a stored transition, at the start and the end of training."""
    eta2: tuple[float, float] = (0.8, 0.8)
    """Probability of the critic's choice over a random frame, at the start and the end."""
    reward: str = "transition"
    """What a transition earns."""
    reward_distance: float = 1.0
    """c of the reward above."""
    replay_capacity: int = 1024
    """Transitions kept for each domain and replica."""
    replay_alpha: float = 0.0
    """Exponent of prioritised replay; 0: uniform, as in the paper."""
    replay_beta: float = 0.4
    """Exponent of its importance weights."""


@dataclass(frozen=True)
class RuntimeConfig:
    """The machine: without influence on what is learned, but for rounding."""

    device: str = "auto"
    """Torch device: cpu, cuda, cuda:1; auto: cuda where there is one."""
    threads: int = 1
    """CPU threads; 0: as many as torch finds. One is fastest below 64 pixels."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the networks compute in; weights, statistics, losses and optimisers are float32. fp16 scales its losses."""
    memory: Literal["store", "recompute", "frames"] = "store"
    """What the backward pass finds: all that was computed; without the gates, which are computed again; or only the
    state after every few frames, from which they are run again. Least time first, least memory last."""
    graphs: bool = True
    """Record a GPU's work of a step as CUDA graphs and replay it, instead of launching every kernel anew."""
    replicas: int = 0
    """Equal shares that the work of a step is cut into: each has the batch of the config and a replay buffer of its
    own, and every rank takes as many. 0: one a rank."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of a run."""

    snapshot_seconds: float = 60.0
    """Seconds between checkpoints, each with a strip of samples."""
    keep: int = 2
    """How many of the newest checkpoints are kept; the best one is kept besides."""


@dataclass(frozen=True)
class Config:
    """The settings of a run; `Config.of("tiny", size=16)` names them as the flags do."""

    preset: str = "default"
    """Where every other flag starts: default (with the additions), paper (nothing beyond it), tiny (seconds; tests),
    workstation (128x128, T=16, bf16, one replica a rank on cards of 8 GB)."""
    method: str = "rlv2v"
    """What is trained."""
    out: Path = Path("runs/rlv2v")
    """Folder of this run."""
    resume: bool = False
    """Go on with the run in `out`; its own settings then serve as defaults."""
    steps: int | None = None
    """Length of training in steps; `--budget` otherwise."""
    budget: float | None = None
    """Length of training in seconds, warm-up included (300 when neither is given)."""
    seed: int = 0
    """Seed of every draw."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    rl: RLConfig = field(default_factory=RLConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    @classmethod
    def of(cls, preset: str = "default", method: str = "rlv2v", **changes: Any) -> Config:
        """Return a preset, with the settings that a method brings, and changes on top, all by their flags' names.

        Raises:
            UserError: no such preset or method.
        """
        from rlv2v.presets import PRESETS

        check_name("preset", preset, PRESETS)
        check_name("method", method, METHODS)
        settings = {**PRESETS[preset], **METHODS[method].settings, **changes}
        return cls(preset=preset, method=method).replace(**settings)

    def replace(self, **changes: Any) -> Config:
        """Return the config with these settings, by their flags' names."""
        by_section: dict[str, dict[str, Any]] = {}
        for flag, value in changes.items():
            section, name = FLAGS[flag]
            by_section.setdefault(section, {})[name] = value
        own = by_section.pop("", {})
        return replace(
            self, **own, **{section: replace(getattr(self, section), **new) for section, new in by_section.items()}
        )

    def get(self, flag: str) -> Any:
        """Return a setting by its flag's name."""
        section, name = FLAGS[flag]
        return getattr(getattr(self, section) if section else self, name)

    @property
    def length(self) -> tuple[str, float]:
        """How long to train: ("step", number) or ("s", seconds)."""
        return ("step", float(self.steps)) if self.steps is not None else ("s", self.budget or DEFAULT_BUDGET)

    @property
    def per_frame(self) -> bool:
        """Whether every frame is a video of its own: the state is forgotten between frames."""
        return METHODS[self.method].per_frame

    def check(self) -> Config:
        """Raise UserError for the first value out of its range; return the config.

        Not in `__post_init__`: the command line's parser would turn the one line into a box of its own.
        """

        def need(ok: bool, flag: str, expected: str) -> None:
            if not ok:
                raise UserError(f"--{flag.replace('_', '-')}: expected {expected}, got {self.get(flag)!r}")

        for flag, names in (("method", METHODS), ("reward", REWARDS)):
            check_name(flag, self.get(flag), names)
        need(self.budget is None or self.budget > 0, "budget", "seconds > 0")
        need(self.steps is None or self.budget is None, "steps", "--steps or --budget, not both")
        need(0 <= self.seed < 2**63, "seed", "0 <= seed < 2**63")
        need(self.data.size >= 8, "size", "at least 8 pixels")
        need(self.data.frames >= 2, "frames", "at least 2")
        need(self.model.patch in (1, 2, 4), "patch", "1, 2 or 4")
        need(self.model.patch == 1 or self.model.head == "mask", "patch", "1 with --head convlstm")
        for flag in ("widths", "disc_widths"):
            need(min(self.get(flag), default=0) > 0, flag, "positive numbers")
        multiple = self.model.multiple
        need(self.data.size % multiple == 0, "size", f"a multiple of {multiple} (patch * 2 ** number of widths)")
        for flag in (*BATCH, "rl_every", "replay_capacity", "loader_threads", "keep"):
            need(self.get(flag) >= 1, flag, "at least 1")
        not_negative = ("threads", "disc_frames", "warmup_steps", "replicas", "weight_decay", "clip_grad")
        weights = ("l_adv", "l_v", "l_tau", "l_rc", "rl_weight", "reward_distance", *TERMS)
        for flag in (*not_negative, *weights, "snapshot_seconds", "replay_alpha"):
            need(self.get(flag) >= 0, flag, "a number >= 0")
        need(self.steps is None or self.steps >= 0, "steps", "a number >= 0")
        for flag in ("lr", "disc_lr", "warmup_lr"):
            need(self.get(flag) > 0, flag, "a number > 0")
        for flag in ("gamma", "average"):
            need(0 <= self.get(flag) < 1, flag, "0 <= value < 1")
        need(0 < self.rl.tau <= 1, "tau", "0 < tau <= 1")
        for flag in ("eta1", "eta2"):
            need(all(0 <= p <= 1 for p in self.get(flag)), flag, "two probabilities")
        return self

    def to_json(self) -> str:
        """Return the config as JSON text, an object a section; paths are strings."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str)

    @classmethod
    def from_json(cls, text: str, name: str) -> Config:
        """Return the config that `to_json` wrote; `name` is what an error calls it.

        Raises:
            UserError: the text is something else, or of another version of rlv2v.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            if not isinstance(values["data"], dict):
                raise KeyError("the sections of settings")
            settings = {flag: _from_json(flag, values) for flag in FLAGS}
            if len(settings) != sum(len(v) if isinstance(v, dict) else 1 for v in values.values()):
                raise KeyError("a setting that this version does not know")
            return cls().replace(**settings).check()
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise UserError(
                f"{name}: expected a config of this version of rlv2v, got one that lacks or adds {error}; "
                "train anew, or use the version that wrote it"
            ) from None


def _flags() -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield every flag with its section, "" for the config's own, and its field."""
    names = {
        ("data", "folder"): "data",
        ("rl", "enabled"): "rl",
        ("rl", "weight"): "rl_weight",
        ("rl", "every"): "rl_every",
    }
    for own in dataclasses.fields(Config):
        if own.default_factory is dataclasses.MISSING:
            yield own.name, ("", own.name)
        else:
            for part in dataclasses.fields(own.default_factory()):
                yield names.get((own.name, part.name), part.name), (own.name, part.name)


FLAGS: Mapping[str, tuple[str, str]] = dict(_flags())
"""The section and the field of every flag; the section "" is the config itself."""


def _from_json(flag: str, values: Mapping[str, Any]) -> Any:
    """Return a setting out of parsed JSON, as its field has it: tuples and paths instead of lists and strings."""
    section, name = FLAGS[flag]
    value = (values[section] if section else values)[name]
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(Config().get(flag), Path) else value


def check_name(flag: str, name: str, names: Iterable[str]) -> None:
    """Raise UserError, with the nearest name, for one that is not in a registry."""
    if name not in names:
        raise UserError(f"--{flag}: expected {', '.join(names)}, got {name!r}{nearest(name, names)}")
