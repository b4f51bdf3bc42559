"""The settings of a run: frozen dataclasses by section, checked once, saved as `config.json`.

A setting has a flag of its own name, without its section's; `FLAGS` says which section holds it. The docstring of a
field is the flag's text in `--help`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlv2v.crop_size import CropSize
from rlv2v.errors import UserError, first_line, nearest
from rlv2v.method.baselines import METHODS
from rlv2v.method.rewards import REWARDS
from rlv2v.method.terms import TERMS
from rlv2v.presets import PRESETS

DEFAULT_BUDGET = 300.0  # seconds
SYNTHETIC = Path("@synthetic")
BATCH = ("batch_x", "batch_y", "batch_z", "batch_s", "transitions")  # the sizes of a step's mini-batches


@dataclass(frozen=True)
class DataConfig:
    """Say which clips are drawn, and how a batch is made of them."""

    folder: Path = SYNTHETIC
    """Folder with trainX, trainY and perhaps trainZ, trainS (or CycleGAN's trainA, trainB). @synthetic is the synthetic
    set, which the run writes to data/synth-<long side>x<frames>."""
    size: CropSize = field(default=CropSize(32, 32))
    """Training crops in pixels: the side of a square, or height x width as 96x160. A video is scaled so that it just
    covers a crop, which is cut at random. A whole frame is shown to the model with the crop's short side."""
    frames: int = 8
    """Clip length T in frames."""
    augment: Literal["none", "flip", "dihedral"] = "flip"
    """Random left-right flips, or all eight flips and transposes of a square; the same for all frames of a clip."""
    batch_x: int = 2
    """Clips of X in a step, per replica."""
    batch_y: int = 1
    """Clips of Y in a step, per replica; doubled when there is no Z."""
    batch_z: int = 2
    """Clips of Z in a step, per replica."""
    batch_s: int = 4
    """Stills of S in a step, per replica."""
    batch_pool: int = 6
    """More clips of each set in a step, per replica, at which `patches` alone looks."""
    loader_threads: int = 1
    """Threads that read and decode the next batches; their number does not change what is drawn."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Decode and resize clips on the loader's threads, or on the CUDA device by DALI and NVDEC."""


@dataclass(frozen=True)
class ModelConfig:
    """Describe the networks."""

    widths: tuple[int, ...] = (8, 16, 24)
    """Channels after each RPB of G and P; the URBs mirror them."""
    disc_widths: tuple[int, ...] = (8, 16, 24, 32, 32)
    """Channels after each RPB of D and Q."""
    patch: int = 2
    """Addition: space-to-depth factor in front of every network; the ConvLSTMs run on frames this much smaller."""
    head: Literal["convlstm", "letter", "mask", "grid"] = "grid"
    """Of G. convlstm is the paper's, as logits; letter is it without them. Additions: mask, a full-resolution head that
    can copy its input by a soft mask; grid, a bilateral grid of colour transforms, which translates frames of any size
    at their own."""
    bins: int = 6
    """Bins of the guide of head grid, 1 to 8."""
    norm: Literal["clip", "batch"] = "clip"
    """Sequence-wise normalisation of G and P: over each clip, or over the mini-batch as in the paper."""
    disc_norm: Literal["clip", "batch", "none"] = "none"
    """The same for D and Q; none lets them see the level of a colour, which normalisation removes."""
    chrono: bool = False
    """Addition: start with ConvLSTM biases that remember over all times up to T, a clock for clips that are aligned in
    time, and head grid without burn-in; off: they start at zero."""
    q_positive: bool = False
    """End the critics in a ReLU, as in the paper; it clips negative values to zero."""

    @property
    def multiple(self) -> int:
        """The number of pixels that the height and width of a frame must be multiples of."""
        return self.patch * 2 ** len(self.widths)


@dataclass(frozen=True)
class EquationConfig:
    """Weigh the objective of eq. 10."""

    gan: Literal["log", "nonsaturating", "hinge"] = "hinge"
    """Form of the adversarial loss; log is the paper's."""
    l_adv: float = 0.3
    """Weight of L_g, eq. 1 and 2."""
    l_v: float = 0.6
    """Weight of L_v, eq. 7."""
    l_tau: float = 0.0
    """Weight of L_tau, eq. 3 and 4."""
    l_rc: float = 0.0
    """Weight of L_rc, eq. 5 and 6."""
    distance: Literal["l1", "l2"] = "l1"
    """Norm of the recurrent and recycle losses; l2 is the paper's."""
    disc_frames: int = 2
    """Single frames of each clip that D sees in a step; 0: all of them, as in the paper."""

    def term(self, name: str) -> float:
        """Return the weight of an added term of `rlv2v.method.terms`."""
        return float(getattr(self, name))


if TYPE_CHECKING:
    LossConfig = EquationConfig
else:  # eq. 10 and a weight for each term of the registry
    LossConfig = make_dataclass(
        "LossConfig",
        [(name, float, term.default) for name, term in TERMS.items()],
        bases=(EquationConfig,),
        namespace={"__module__": __name__},  # by which pickle finds it: ranks send each other the config
        frozen=True,
    )


@dataclass(frozen=True)
class OptimConfig:
    """Set the optimisers, the pre-training and the moving average."""

    lr: float = 5e-3
    """Learning rate of G and P."""
    disc_lr: float = 2e-3
    """Learning rate of D and Q."""
    betas: tuple[float, float] = (0.5, 0.99)
    """Adam's decay rates."""
    weight_decay: float = 1e-3
    """Decoupled L2 penalty (section 3.4)."""
    clip_grad: float = 5.0
    """Largest norm of the gradient of G and P together, and of D; 0: no limit."""
    average: float = 0.98
    """Addition: decay of the weights' moving average, which is what translates; 0: the last weights do."""
    warmup_steps: int = 0
    """Steps of pre-training as auto-encoder and predictor (section 6.2); both domains start from its weights."""
    warmup_lr: float = 3e-3
    """Learning rate of the pre-training."""


@dataclass(frozen=True)
class RLConfig:
    """Set the policy gradient (section 3.3)."""

    enabled: bool = False
    """Train with the policy gradient: critics, replay, reward."""
    weight: float = 0.3
    """Weight of the actor's loss, which is added to L."""
    transitions: int = 2
    """Transitions m in a mini-batch, per replica."""
    every: int = 2
    """Steps from one mini-batch of transitions to the next; the two domains take turns."""
    gamma: float = 0.9
    """Discount factor."""
    tau: float = 0.03
    """Polyak rate of the target networks."""
    eta1: tuple[float, float] = (0.8, 0.8)
    """Probability of a stored transition instead of a new one, at the start and the end of training."""
    eta2: tuple[float, float] = (0.8, 0.8)
    """Probability of the critic's choice instead of a random frame, at the start and the end."""
    reward: str = "transition"
    """What a transition earns."""
    reward_distance: float = 1.0
    """Weight c in the reward."""
    replay_capacity: int = 1024
    """Transitions that a replay buffer holds; there is one for each domain and replica."""
    replay_alpha: float = 0.0
    """Exponent of prioritised replay; 0: uniform, as in the paper."""
    replay_beta: float = 0.4
    """Exponent of its importance weights."""


@dataclass(frozen=True)
class RuntimeConfig:
    """Say how the machine is used; but for rounding, this does not change what is learned."""

    device: str = "auto"
    """Torch device: cpu, cuda, cuda:1; auto: cuda where there is one."""
    threads: int = 1
    """CPU threads; 0: as many as torch finds. One is fastest below 64 pixels."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Number format of the networks; weights, statistics, losses and optimisers stay float32. fp16 scales its losses.
    """
    tf32: bool = True
    """On a GPU, multiply float32 numbers in TF32, with 10 bits of mantissa, in convolutions and ConvLSTMs alike."""
    memory: Literal["store", "recompute", "frames"] = "store"
    """What is kept for the backward pass: all activations; all but the gates, which are computed again; or only the
    state every few frames, from which they are run again. The first is fastest, the last needs least memory."""
    graphs: bool = True
    """Record a GPU's work of a step as CUDA graphs and replay it, instead of launching every kernel anew; where the
    recordings do not fit the card's memory, a step runs without."""
    replicas: int = 0
    """Equal shares that a step is cut into; each has the batch of the config and a replay buffer of its own, and every
    rank takes as many. 0: one per rank."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Say when a run is saved, and what stays of it."""

    snapshot_seconds: float = 60.0
    """Seconds between checkpoints; each comes with a grid of samples."""
    keep: int = 2
    """How many of the newest checkpoints are kept; the best one is kept as well."""
    patience: int = 0
    """Stop after this many checkpoints in a row that are no better than the best one before, by the criterion that
    needs no truth; 0: never."""


def rules() -> Iterator[tuple[Iterable[str], str, Callable[[Any], bool]]]:
    """Yield the ranges of single settings: flags, what is expected, and whether a value is in range (NaN is not)."""
    yield ["budget"], "seconds > 0", lambda value: value is None or value > 0
    yield ["steps"], "a number >= 0", lambda value: value is None or value >= 0
    yield ["seed"], "0 <= seed < 2**63", lambda value: 0 <= value < 2**63
    yield ["size"], "at least 8 pixels a side", lambda value: value.short_side >= 8
    yield ["frames"], "at least 2", lambda value: value >= 2
    yield ["patch"], "1, 2 or 4", lambda value: value in (1, 2, 4)
    yield ["bins"], "1 to 8", lambda value: 1 <= value <= 8
    yield ["widths", "disc_widths"], "positive numbers", lambda value: min(value, default=0) > 0
    counts = ("rl_every", "replay_capacity", "loader_threads", "keep")
    yield [*BATCH, *counts], "at least 1", lambda value: value >= 1
    weights = ("l_adv", "l_v", "l_tau", "l_rc", "rl_weight", "reward_distance", "replay_alpha", *TERMS)
    settings = ("threads", "replicas", "disc_frames", "warmup_steps", "weight_decay", "clip_grad")
    others = (*settings, "snapshot_seconds", "patience", "batch_pool")
    yield [*weights, *others], "a number >= 0", lambda value: value >= 0
    yield ["lr", "disc_lr", "warmup_lr"], "a number > 0", lambda value: value > 0
    yield ["gamma", "average"], "0 <= value < 1", lambda value: 0 <= value < 1
    yield ["tau"], "0 < tau <= 1", lambda value: 0 < value <= 1
    yield ["betas"], "two numbers >= 0 and < 1", lambda value: all(0 <= beta < 1 for beta in value)
    yield ["eta1", "eta2"], "two probabilities", lambda value: all(0 <= share <= 1 for share in value)


@dataclass(frozen=True)
class Config:
    """Hold the settings of a run; `Config.of("tiny", size=16)` names them as the flags do."""

    preset: str = "default"
    """Where every other flag starts: default (a generator that transforms colours), paint (one that paints, for flat
    scenes), paper (nothing beyond it), paper-letter (its most literal form), tiny (seconds, for tests), laptop (default
    at 128x128, 15 minutes); for GPUs default at 256x256 in bf16, four hours: workstation (cards of 8 GB), gpu24 (wider
    and larger batches, 24 GB), gpu80 (T=16 as well, 80 GB)."""
    method: str = "rlv2v"
    """What is trained."""
    out: Path = Path("runs/rlv2v")
    """Folder of this run."""
    resume: bool = False
    """Resume the run in `out`; its own settings are then the defaults."""
    from_run: Path | None = None
    """Folder of an earlier run whose weights a new one starts from; without --preset and --method its settings are the
    defaults."""
    steps: int | None = None
    """Length of training in steps, instead of `--budget`."""
    budget: float | None = None
    """Length of training in seconds, pre-training included (300 when neither is given)."""
    seed: int = 0
    """Seed of every random draw."""
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
        check_name("preset", preset, PRESETS)
        check_name("method", method, METHODS)
        settings = {**PRESETS[preset], **METHODS[method].settings, **changes}
        return cls(preset=preset, method=method).replace(**settings)

    def replace(self, **changes: Any) -> Config:
        """Return the config with these settings, by their flags' names."""
        by_section: dict[str, dict[str, Any]] = {}
        for flag, value in changes.items():
            section, name = FLAGS[flag]
            by_section.setdefault(section, {})[name] = CropSize.of(value) if flag == "size" else value
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
        """The length of training: ("step", number) or ("s", seconds)."""
        return ("step", float(self.steps)) if self.steps is not None else ("s", self.budget or DEFAULT_BUDGET)

    def check(self) -> Config:
        """Raise UserError for the first value out of its range; return the config.

        Not in `__post_init__`: the command line's parser would turn the one line into a box of its own.
        """

        def need(ok: bool, flag: str, expected: str) -> None:
            if not ok:
                raise UserError(f"--{flag.replace('_', '-')}: expected {expected}, got {self.get(flag)!r}")

        check_name("method", self.method, METHODS)
        check_name("reward", self.rl.reward, REWARDS)
        for flags, expected, in_range in rules():
            for flag in flags:
                need(in_range(self.get(flag)), flag, expected)
        min_frames = METHODS[self.method].min_frames
        need(self.data.frames >= min_frames, "frames", f"at least {min_frames} with --method {self.method}")
        need(self.steps is None or self.budget is None, "steps", "--steps or --budget, not both")
        need(self.model.patch == 1 or self.model.head in ("mask", "grid"), "patch", f"1 with --head {self.model.head}")
        size, multiple = self.data.size, self.model.multiple
        expected = f"a multiple of {multiple} (patch * 2 ** number of widths): {size.multiples_near(multiple)}"
        need(size.height % multiple == size.width % multiple == 0, "size", expected)
        need(size.is_square or self.data.augment != "dihedral", "augment", f"none or flip with --size {size}")
        return self

    def to_json(self) -> str:
        """Return the config as JSON text, an object a section; paths are strings."""
        values = dataclasses.asdict(self)
        values["data"]["size"] = self.data.size.plain
        return json.dumps(values, indent=2, default=str)

    @classmethod
    def read(cls, path: Path) -> Config:
        """Return the config of a run's `config.json`. Raises as `from_json`, and if it is missing."""
        if not path.is_file():
            raise UserError(f"{path}: expected the config of a run, found no file")
        return cls.from_json(path.read_text(errors="replace"), str(path))

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
            values.setdefault("from_run", None)  # runs from before there was --from
            settings = {flag: _from_json(flag, values) for flag in FLAGS}
            if len(settings) != sum(len(v) if isinstance(v, dict) else 1 for v in values.values()):
                raise TypeError("a setting more than it has")
            return cls().replace(**settings).check()
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            got = f"one without {error}" if isinstance(error, KeyError) else first_line(error)
            raise UserError(
                f"{name}: expected a config of this version of rlv2v, got {got}; train anew, or use the version that "
                "wrote it"
            ) from None


def _flags() -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield every flag with its section, "" for the config's own, and its field."""
    names = {
        ("data", "folder"): "data",
        ("rl", "enabled"): "rl",
        ("rl", "weight"): "rl_weight",
        ("rl", "every"): "rl_every",
        ("", "from_run"): "from",
    }
    for own in dataclasses.fields(Config):
        if own.default_factory is dataclasses.MISSING:
            yield names.get(("", own.name), own.name), ("", own.name)
        else:
            for setting in dataclasses.fields(own.default_factory()):
                yield names.get((own.name, setting.name), setting.name), (own.name, setting.name)


FLAGS: Mapping[str, tuple[str, str]] = dict(_flags())
"""The section and the field of every flag; the section "" is the config itself."""


def _from_json(flag: str, values: Mapping[str, Any]) -> Any:
    """Return a setting from parsed JSON, with the field's own type: tuples and paths instead of lists and strings."""
    section, name = FLAGS[flag]
    value = (values[section] if section else values)[name]
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if value is not None and flag in ("out", "data", "from") else value


def check_name(flag: str, name: str, names: Iterable[str]) -> None:
    """Raise UserError, with the nearest name, for one that is not in a registry."""
    if name not in names:
        raise UserError(f"--{flag}: expected {', '.join(names)}, got {name!r}{nearest(name, names)}")
