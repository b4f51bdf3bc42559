"""The log of a run: a progress bar, `metrics.jsonl`, TensorBoard, and grids of samples."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class RunLog:
    """Write the values of a run as they come; `metrics.jsonl` goes on where an interrupted run stopped.

    Args:
        run: the run's folder.
        step: where the run starts; lines of later steps, left by a run killed after its last checkpoint, are dropped.
        total: (unit, amount) of the whole run, ("step", 300) or ("s", 300.0), for the progress bar.
        frames: frames that a step takes in, over all ranks, for `frames_per_second`.
    """

    def __init__(self, run: Path, *, step: int, seconds: float, total: tuple[str, float], frames: int) -> None:
        path = run / "metrics.jsonl"
        lines = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.file = path.open("a", buffering=1)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)
        self.unit, self.total = total
        self.frames, self.last = frames, (step, seconds)
        self.shown: dict[str, str] = {}
        self.bar = tqdm(
            total=self.total,
            initial=min(self.total, step if self.unit == "step" else round(seconds, 1)),
            unit=self.unit,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} [ETA {remaining}{postfix}]",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def advance(self, step: int, seconds: float) -> None:
        """Move the bar to the run's step or seconds."""
        self.bar.update(min(step if self.unit == "step" else seconds, self.total) - self.bar.n)

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Log one line of values; it has the frames a second since the last line if time has passed."""
        (last_step, last_seconds), self.last = self.last, (step, seconds)
        values, shown = dict(values), {"step": str(step)}
        if seconds > last_seconds:
            rate = self.frames * (step - last_step) / (seconds - last_seconds)
            values["frames_per_second"], shown["frames/s"] = round(rate, 2), f"{rate:.0f}"
        self.file.write(json.dumps({"step": step, "seconds": round(seconds, 3), **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        shown |= {name: f"{values[name]:.3g}" for name in ("loss", "loss_d") if name in values}
        self.bar.set_postfix(shown | self.shown)

    def write_checkpoint(self, step: int, values: Mapping[str, float]) -> None:
        """Show a checkpoint's criterion and the best so far in the bar, and all values of it in TensorBoard."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.shown = {name: f"{values[name]:.3g}" for name in ("criterion", "best_criterion")}

    def sample_grid(self, path: Path, rows: list[np.ndarray]) -> None:
        """Save clips (T,H,W,3) uint8 as rows of one PNG, a frame a column."""
        image = np.concatenate([np.concatenate(list(clip), 1) for clip in rows], 0)
        if not cv2.imwrite(str(path), np.ascontiguousarray(image[..., ::-1])):
            raise OSError(f"{path}: could not be written")
        self.board.add_image("samples", image, int(path.stem), dataformats="HWC")

    def close(self) -> None:
        """Close the bar and the files."""
        self.bar.close()
        self.board.close()
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a `metrics.jsonl`, without a last line that a kill cut off."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
