"""The videos of `rlv2v.report`: what an evaluation shows, kept while it runs, and one video a clip of all of it.

The panels of a clip (source, each run's translation, truth) are tiles of the frames of one video, a sheet. The page
draws each tile on a canvas of its own. So the panels of a clip are the same frame by construction, and a clip with many
runs takes one decoder.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np

from rlv2v.data.index import index_folder
from rlv2v.data.scaling import resize
from rlv2v.data.video import read_frames
from rlv2v.data.writer import VideoWriter
from rlv2v.metrics.base import Scene
from rlv2v.metrics.evaluation import Record

MAX_LINES = 720  # of the short side; larger clips are shown smaller
MAX_FRAMES = 128
SMALL = 128  # lines; smaller clips are shown by whole pixels
ENLARGE = 4  # small clips in a sheet: the middle of a pixel keeps its colour, though H.264 halves and smooths chroma
SHEET = (4096, 2304)  # pixels, width and height that H.264 decoders in hardware take (level 5.2)
MACROBLOCK = 16  # pixels
MARGIN = 4  # pixels around a tile, which repeat its edge, so that no neighbour bleeds into it
DRAFT = {"crf": "4", "preset": "ultrafast", "g": "1"}  # of the panels, which are encoded again
EXACT_SEEK = {"preset": "veryfast", "g": "8", "bf": "0"}  # a seek decodes 8 frames at most, in the order of display
SOURCE, TRUTH = "source", "truth"


@dataclass
class ShownClip:
    """Hold where the panels of a clip are kept, in order: the source, each run by its number, the truth."""

    name: str
    height: int
    width: int
    files: dict[str, Path] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether the page enlarges it by whole pixels."""
        return min(self.height, self.width) <= SMALL

    @property
    def panels(self) -> list[str]:
        """The names of its panels from left to right."""
        return sorted(self.files, key=lambda name: (name != SOURCE, name == TRUTH))


@dataclass(frozen=True)
class Sheet:
    """Hold a clip's video and its first frame as URI-ready text, and where its tiles are.

    A frame has tiles of (tile_height, tile_width) pixels, the first at (MARGIN, MARGIN), `stride` (x, y) apart,
    `columns` in a row.
    """

    clip: ShownClip
    tile_width: int
    tile_height: int
    stride: tuple[int, int]
    columns: int
    video: str
    poster: str


class Recorder:
    """Keep the first frames of the first clips of an evaluation, of several runs one after the other.

    folder: where the panels are written, an empty one.  num_clips: how many clips are kept.
    """

    def __init__(self, folder: Path, num_clips: int) -> None:
        self.folder, self.num_clips = folder, num_clips
        self.clips: dict[str, ShownClip] = {}

    @contextmanager
    def record(self, number: int) -> Iterator[Record]:
        """Yield what `evaluate_run(record=...)` calls for run `number`; the first one brings source and truth too."""
        writers: dict[str, VideoWriter] = {}
        current = ""

        def write(name: str, scene: Scene, output: np.ndarray) -> None:
            nonlocal current
            if name != current:
                files.close()
                writers.clear()
                current = name
            if number == 0 and name not in self.clips and len(self.clips) < self.num_clips:
                self.clips[name] = ShownClip(name, *scene.source.shape[:2])
            if name not in self.clips:
                return
            panels = {str(number): output}
            if number == 0:
                panels |= {SOURCE: scene.source} | ({} if scene.truth is None else {TRUTH: scene.truth})
            for panel, frame in panels.items():
                if panel not in writers:
                    writers[panel] = files.enter_context(self._open(self.clips[name], panel))
                if writers[panel].count < MAX_FRAMES:
                    writers[panel].write(at_shown_size(frame))

        with ExitStack() as files:
            yield write

    def _open(self, clip: ShownClip, panel: str) -> VideoWriter:
        clip.files[panel] = self.folder / f"{list(self.clips).index(clip.name)}-{panel}.mp4"
        return VideoWriter(clip.files[panel], 25, options=DRAFT)


def at_shown_size(frame: np.ndarray) -> np.ndarray:
    """Return a frame as a sheet holds it: enlarged by whole pixels if small, at most 720 lines, else as it is."""
    short = min(frame.shape[:2])
    if short <= SMALL:
        return frame.repeat(ENLARGE, axis=0).repeat(ENLARGE, axis=1)
    scale = min(1.0, MAX_LINES / short)
    return resize(frame, round(frame.shape[1] * scale), round(frame.shape[0] * scale))


def pack(num: int, width: int, height: int) -> tuple[int, float]:
    """Return how many tiles to put in a row, and the factor by which tiles must shrink for a decoder's largest frame.

    Of the arrangements with the largest factor, it is the one of the fewest pixels, then the most square one.
    """

    def cost(columns: int) -> tuple[float, int, int]:
        rows = -(-num // columns)
        scale = min(1.0, SHEET[0] / (columns * padded(width)), SHEET[1] / (rows * padded(height)))
        return -scale, rows * columns, max(columns * width, rows * height)

    columns = min(range(1, num + 1), key=cost)
    return columns, -cost(columns)[0]


def padded(side: int) -> int:
    """Return a side with its margins, up to the next multiple of a macroblock."""
    return -(-(side + 2 * MARGIN) // MACROBLOCK) * MACROBLOCK


def make_sheet(clip: ShownClip, fps: Fraction) -> Sheet:
    """Return the video of a clip's panels; every frame of it lasts 1 / fps."""
    paths = [clip.files[name] for name in clip.panels]
    height, width = next(read_frames(paths[0], num=1)).shape[:2]
    columns, scale = pack(len(paths), width, height)
    if scale < 1:
        width, height = (math.floor(padded(side) * scale) // MACROBLOCK * MACROBLOCK for side in (width, height))
        width, height = width - 2 * MARGIN, height - 2 * MARGIN
    stride = padded(width), padded(height)
    path = paths[0].with_name(f"sheet-{paths[0].name}")
    options = EXACT_SEEK | {"crf": "10" if clip.small else "21"}
    with VideoWriter(path, fps, options=options) as writer:
        for tiles in zip(*map(read_frames, paths), strict=True):
            frame = tiled([resize(tile, width, height) for tile in tiles], columns, stride)
            if not writer.count:
                poster = still_uri(frame, lossless=clip.small)
            writer.write(frame)
    return Sheet(clip, width, height, stride, columns, base64.b64encode(path.read_bytes()).decode(), poster)


def tiled(tiles: Sequence[np.ndarray], columns: int, stride: tuple[int, int]) -> np.ndarray:
    """Return images (H,W,3) as tiles of one image; their edges are repeated around them."""
    height, width = tiles[0].shape[:2]
    margin = ((MARGIN, stride[1] - height - MARGIN), (MARGIN, stride[0] - width - MARGIN), (0, 0))
    large = [np.pad(tile, margin, mode="edge") for tile in tiles]
    large += [np.zeros_like(large[0])] * (-len(large) % columns)
    return np.concatenate([np.concatenate(large[i : i + columns], 1) for i in range(0, len(large), columns)], 0)


def still_uri(image: np.ndarray, *, lossless: bool) -> str:
    """Return an RGB image (H,W,3) as a data URI, PNG or JPEG."""
    kind, options = ("png", []) if lossless else ("jpeg", [cv2.IMWRITE_JPEG_QUALITY, 92])
    content = cv2.imencode(f".{kind}", np.ascontiguousarray(image[..., ::-1]), options)[1].tobytes()
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


def source_fps(folder: Path, names: Sequence[str]) -> dict[str, Fraction]:
    """Return the frame rate of each source as the index has it."""
    rates = {source.path.name: source.fps for source in index_folder(folder, frames=2)}
    return {name: Fraction(rates[name]).limit_denominator(60060) for name in names}


def common_fps(rates: Sequence[Fraction]) -> Fraction:
    """Return the rate that most clips have, at most 60: all clips of the page step together, frame by frame."""
    most: Fraction = Counter(rates).most_common(1)[0][0]
    return min(most, Fraction(60))
