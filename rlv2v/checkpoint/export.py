"""The exported models of a run: the weights of g_x and g_y, with the config in the metadata.

`RUN/model.safetensors` is the newest checkpoint's. `RUN/best.safetensors` is that of the best by the criterion, which
translates unless the newest is asked for. Reading one runs no code. It is replaced atomically, so that a reader sees
the old one or the new one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from rlv2v.config import Config
from rlv2v.errors import UserError, first_line
from rlv2v.method.baselines import METHODS
from rlv2v.model import Generator

VERSION = 2  # of model.safetensors and of manifests; 1: before configs had sections


def pack_translators(g_x: Generator, g_y: Generator, config: Config) -> bytes:
    """Return the bytes of a `model.safetensors`: both generators and, in the metadata, the config."""
    tensors: dict[str, Tensor] = {}
    for name, net in (("g_x", g_x), ("g_y", g_y)):
        tensors |= {f"{name}.{key}": value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    return save(tensors, {"config": config.to_json(), "version": str(VERSION)})


def load_translator(
    run: Path, direction: str = "x2y", device: str | torch.device = "cpu", *, newest: bool = False
) -> tuple[Generator, Config]:
    """Return a generator of a run, ready to translate, and the run's config.

    Args:
        run: folder of a run.
        direction: "x2y" (G_Y) or "y2x" (G_X).
        device: where it will run.
        newest: read the newest checkpoint's model, `model.safetensors`, instead of the best one's, `best.safetensors`.
            A run without a best one has its newest read.

    Raises:
        UserError: there is no model, or one of another version or program.
    """
    best = run / "best.safetensors"
    path = run / "model.safetensors" if newest or not best.exists() else best
    if direction not in ("x2y", "y2x"):
        raise UserError(f"direction: expected 'x2y' or 'y2x', got {direction!r}")
    if not path.is_file():
        raise UserError(f"{run}: expected a trained run with {path.name}, found none; train one first")
    prefix = {"x2y": "g_y.", "y2x": "g_x."}[direction]
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("version", str(VERSION)) != str(VERSION):
                raise ValueError(
                    f"version {metadata['version']} instead of {VERSION}; train anew, or use the rlv2v that wrote it"
                )
            config = Config.from_json(metadata.get("config", ""), "its config")
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            weights = {name[len(prefix) :]: file.get_tensor(name) for name in names}
        generators = METHODS[config.method].generators(config)
        g = generators.g_y if direction == "x2y" else generators.g_x
        g.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{path}: expected a model written by rlv2v.train, got {first_line(error)}") from None
    return g.to(device).eval(), config
