"""A run's networks, and `RUN/model.safetensors` to translate with: g_x and g_y, the config in the metadata.

Nothing read here runs code. Every file is written beside its place, flushed to the disk and renamed: a reader sees the
old one or the new one. What a run needs to go on is in `rlv2v.store`.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rlv2v.config import Config
from rlv2v.errors import UserError
from rlv2v.losses import Nets
from rlv2v.model import Judge, Translator

VERSION = 1


def build_nets(config: Config, *, judges: bool = True) -> Nets:
    """The networks of a config, Xavier-initialised; without `judges` the generators alone."""

    shared: dict[str, Any] = {"patch": config.patch, "memory": config.memory}
    shared["horizon"] = config.frames if config.chrono else 0

    def translator() -> Translator:
        return Translator(config.widths, head=config.head, norm=config.norm, **shared)

    def judge(heads: int, norm: str, positive: bool = False) -> Judge:
        return Judge(config.judge_widths, heads=heads, norm=norm, positive=positive, **shared)

    norm_q = (
        "clip" if config.judge_norm == "batch" else config.judge_norm
    )  # states of unequal length share no statistics
    nets = Nets()
    nets.g_x, nets.g_y = translator(), translator()
    if judges:
        nets.p_x, nets.p_y = translator(), translator()
        nets.d_x, nets.d_y = judge(1, config.judge_norm), judge(2, config.judge_norm)
        nets.q_x, nets.q_y = (judge(1, norm_q, config.q_positive) for _ in range(2))
    return nets


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write beside `path`, flush to the disk, and rename into place; nothing is left on failure.

    Raises:
        OSError: with the number the system gave, naming `path`.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        flush_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        beside.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk: what was renamed in it stays renamed after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems do it of themselves only
            raise
    finally:
        os.close(descriptor)


def pack_translators(g_x: Translator, g_y: Translator, config: Config) -> bytes:
    """A `model.safetensors`: both generators and, in the metadata, the config."""
    tensors: dict[str, Tensor] = {}
    for name, net in (("g_x", g_x), ("g_y", g_y)):
        tensors |= {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    return save(tensors, {"config": config.to_json(), "version": str(VERSION)})


def save_translators(run: Path, g_x: Translator, g_y: Translator, config: Config) -> None:
    """Write `RUN/model.safetensors`."""
    write_atomically(run / "model.safetensors", pack_translators(g_x, g_y, config))


def load_translator(
    run: Path, direction: str = "x2y", device: str | torch.device = "cpu", *, best: bool = False
) -> tuple[Translator, Config]:
    """The generator of a run, ready to translate, and the run's config.

    Args:
        run: folder with a `model.safetensors`.
        direction: "x2y" (G_Y) or "y2x" (G_X).
        device: where it shall run.
        best: that of the best checkpoint, `best.safetensors`, instead of the newest.

    Raises:
        UserError: no model there, or not one of this package's.
    """
    path = run / ("best.safetensors" if best else "model.safetensors")
    if direction not in ("x2y", "y2x"):
        raise UserError(f"direction: expected 'x2y' or 'y2x', got {direction!r}")
    if not path.is_file():
        raise UserError(f"{run}: expected a trained run with {path.name}, found none; train one first")
    prefix = {"x2y": "g_y.", "y2x": "g_x."}[direction]
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            config = Config.from_json((file.metadata() or {}).get("config", ""), f"{path}: config")
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            weights = {name[len(prefix) :]: file.get_tensor(name) for name in names}
        generators = build_nets(config, judges=False)
        g = generators.g_y if direction == "x2y" else generators.g_x
        g.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{path}: expected a model written by rlv2v.train, got {brief(error)}") from None
    return g.to(device).eval(), config


def brief(error: BaseException) -> str:
    """The first line of an error, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
