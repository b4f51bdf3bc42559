"""One DALI graph a set: frames of the drawn clips in, batches uint8 (B,T,size,size,3) out; only reader and device vary.

    raw    -> fn.readers.numpy, the drawn frames as its region of interest     every source is a `.npy`
    video  -> fn.experimental.readers.video, fed a list `file label start end` every source is decodable on the device
    frames -> PyAV (or OpenCV), already scaled, behind fn.external_source      anything else, or a mixture
    then   -> resize (short side `size`, antialias), crop, flips, transposition as drawn

On the CPU DALI decodes VP8, VP9 and MJPEG; on a GPU NVDEC decodes. DALI converts by BT.601 whatever a file says, so a
file tagged otherwise goes by PyAV. The readers go through a list of draws made ahead, so no state of DALI's is kept: a
resumed run makes the list anew from its step. The label of each clip and the shape that was decoded are checked, for
DALI skips a file that it cannot open without a word. An error in a graph is sticky: a new one is built. A raw file
stays mapped: deleted or replaced it can still be read, but cut short in place it ends the process (SIGBUS).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange

from rlv2v.data.index import Source
from rlv2v.data.inspect import BT601
from rlv2v.data.sampler import Draw, Unreadable
from rlv2v.data.video import fit_size, open_video, stream_of
from rlv2v.errors import UserError, one_line

Route = Literal["raw", "video", "frames"]
CHUNK = 512
"""Clips in one list: DALI opens the file of each line when a graph is built, 0.1 ms a line on a local disk."""
PREFETCH = 2
NVDEC_LEAST = {"h264": (48, 16), "hevc": (144, 144), "vp9": (128, 128), "mpeg4": (48, 16)}
"""Codecs that every GPU since Turing decodes, and their least width and height; AV1 needs a newer one."""


def nvdec_takes(source: Source) -> bool:
    """Whether NVDEC gives the frames that PyAV gives: 8-bit 4:2:0, upright, whole, BT.601 or untagged."""
    width, height = NVDEC_LEAST.get(source.codec, (0, 0))
    if source.kind != "video" or source.status != "ok" or not width or source.width < width or source.height < height:
        return False
    try:
        with open_video(source.path) as container:
            stream = stream_of(container)
            trimmed = stream.frames not in (0, source.num_frames)  # DALI may number what an edit list hides
            frame = next(container.decode(stream))
    except (UserError, av.FFmpegError, OSError, StopIteration):
        return False
    limited_601 = frame.colorspace in BT601 and frame.color_range != ColorRange.JPEG
    return frame.format.name == "yuv420p" and limited_601 and frame.rotation == 0 and not trimmed


def route_of(sources: Sequence[Source], device: Literal["cpu", "gpu"]) -> Route:
    """How a set is read; by all of its sources together, so that it does not change when one of them breaks."""
    if all(source.kind == "raw" and source.status == "ok" for source in sources):
        return "raw"
    decodable = nvdec_takes if device == "gpu" else lambda source: source.kind == "video" and source.dali
    return "video" if all(map(decodable, sources)) else "frames"


@dataclass(frozen=True)
class Options:
    """What a graph is built for. `size` and `frames` are H = W and T of the clips that come out."""

    route: Route
    device: Literal["cpu", "gpu"]
    batch: int
    frames: int
    size: int
    threads: int = 1
    prefetch: int = PREFETCH
    device_id: int | None = None
    """The CUDA device; a graph for `gpu` without one can be serialised, not built."""


def read_node(options: Options, listed: Any) -> tuple[Any, Any]:
    """(frames FHWC on the device or still on the CPU, label of each clip or None)."""
    from nvidia import dali

    fn: Any = dali.fn
    types = dali.types
    if options.route == "video":
        frames, label = fn.experimental.readers.video(
            name="reader",
            device=options.device,
            file_list=listed,
            file_list_format="frames",
            file_list_include_end=False,
            sequence_length=options.frames,
            initial_fill=options.batch,
            random_shuffle=False,
        )
        return frames, label
    if options.route == "frames":
        return fn.external_source(name="reader", device="cpu", dtype=types.DALIDataType.UINT8, layout="FHWC"), None
    start = fn.external_source(name="start", dtype=types.DALIDataType.INT32, ndim=1)
    frames = fn.readers.numpy(
        name="reader",
        device="cpu",
        files=listed,
        roi_start=start,
        roi_shape=[options.frames],
        roi_axes=[0],
        initial_fill=options.batch,
        random_shuffle=False,
    )
    return fn.reshape(frames, layout="FHWC"), None


def new_graph(options: Options, listed: Any) -> Any:
    """The graph, not yet built, with the outputs clips (device), shape as read (CPU) and, for videos, label (CPU).

    listed: for `raw` the file of each clip in order, for `video` the path of the list, for `frames` nothing. Fed for
    each clip: `target` (height, width after the resize), `corner` (top, left), `flip` (left-right, up-down),
    `transpose` (255 or 0); for `raw` also `start`, for `frames` the frames themselves as `reader`.
    """
    from nvidia import dali

    fn: Any = dali.fn
    types = dali.types
    pipeline: Any = dali.pipeline.Pipeline
    graph = pipeline(
        batch_size=options.batch,
        num_threads=options.threads,
        device_id=options.device_id,
        prefetch_queue_depth=options.prefetch,
    )
    with graph:
        frames, label = read_node(options, listed)
        target = fn.external_source(name="target", dtype=types.DALIDataType.FLOAT, ndim=1)
        corner = fn.external_source(name="corner", dtype=types.DALIDataType.INT32, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.DALIDataType.INT32, ndim=1)
        mask = fn.external_source(name="transpose", dtype=types.DALIDataType.UINT8, ndim=0)
        shape = frames.shape()
        frames = frames.gpu() if options.device == "gpu" else frames
        clips = fn.resize(frames, name="resize", size=target, antialias=True)
        clips = fn.slice(clips, name="crop", start=corner, shape=[options.size, options.size], axis_names="HW")
        clips = fn.flip(clips, name="flips", horizontal=flip[0], vertical=flip[1])
        turned = fn.transpose(clips, name="turned", perm=[0, 2, 1, 3], transpose_layout=False)
        clips = clips ^ ((clips ^ turned) & mask)  # a choice for each clip, without a branch in the graph
        graph.set_outputs(clips, shape, *([] if label is None else [label.cpu()]))
    return graph


class Run:
    """A graph on its way through the draws of the steps `first, first+1, ...`, one tuple of draws a step."""

    def __init__(
        self,
        options: Options,
        first: int,
        plan: Sequence[tuple[Draw, ...]],
        names: dict[Path, str],
        read: Callable[[Draw], Future[np.ndarray]],
    ) -> None:
        self.step, self.plan, self.first = first, plan, first
        self.faults: dict[int, dict[Source, str]] = {}
        options = replace(options, prefetch=min(options.prefetch, len(plan)))
        self._options, self._read = options, read
        self._futures: dict[int, list[Future[np.ndarray]]] = {}
        draws = [draw for step in plan for draw in step]
        self._stream = torch.cuda.Stream(options.device_id) if options.device == "gpu" else None
        if options.route == "video":
            with tempfile.NamedTemporaryFile("w", suffix=".txt") as listed:
                listed.writelines(
                    f"{names[d.source.path]} {k} {d.start} {d.start + options.frames}\n" for k, d in enumerate(draws)
                )
                listed.flush()
                self._graph = new_graph(options, listed.name)
                self._graph.build()
        else:
            self._graph = new_graph(options, [str(draw.source.path.absolute()) for draw in draws])
            self._graph.build()
        self._fed = first
        for _ in range(options.prefetch):
            self._feed()

    def draws(self, step: int) -> tuple[Draw, ...] | None:
        """The draws that this run gives at `step`, if it comes there next."""
        return self.plan[step - self.first] if step == self.step and step - self.first < len(self.plan) else None

    def _shape(self, draw: Draw) -> tuple[int, int, int, int]:
        """Of the frames that a clip's reader gives."""
        source, options = draw.source, self._options
        width, height = source.width, source.height
        if options.route == "frames":
            width, height = fit_size(width, height, options.size)
        return options.frames, height, width, 3

    @property
    def left(self) -> int:
        """Steps still to be taken."""
        return len(self.plan) - (self.step - self.first)

    def _feed(self) -> None:
        """Give the graph what it needs for one more step, and run it in the background."""
        options, step = self._options, self._fed
        draws = self.plan[step - self.first]
        sizes = [fit_size(draw.source.width, draw.source.height, options.size) for draw in draws]
        fed = {
            "target": [np.array([height, width], np.float32) for width, height in sizes],
            "corner": [np.array(draw.corner(options.size), np.int32) for draw in draws],
            "flip": [np.array(draw.flips[:2], np.int32) for draw in draws],
            "transpose": [np.array(255 * draw.flips[2], np.uint8) for draw in draws],
        }
        if options.route == "raw":
            fed["start"] = [np.array([draw.start], np.int32) for draw in draws]
        if options.route == "frames":
            fed["reader"] = self._clips(step)
        for name, values in fed.items():
            self._graph.feed_input(name, values)
        self._fed += 1
        if self._fed - self.first >= options.prefetch:  # the first run takes all that were fed till then
            self._graph.schedule_run()

    def _clips(self, step: int) -> list[np.ndarray]:
        """The frames that PyAV read for `step`; black ones, and a fault, for a file that it could not read."""
        for ahead in range(step, min(step + 2, self.first + len(self.plan))):
            if ahead not in self._futures:
                self._futures[ahead] = [self._read(draw) for draw in self.plan[ahead - self.first]]
        clips = []
        for draw, future in zip(self.plan[step - self.first], self._futures.pop(step), strict=True):
            try:
                clips.append(future.result())
            except (UserError, OSError) as error:
                reason = one_line(error).removeprefix(f"{one_line(draw.source.path)}: ")
                self.faults.setdefault(step, {})[draw.source] = reason
                clips.append(np.zeros(self._shape(draw), np.uint8))
        return clips

    def take(self) -> torch.Tensor:
        """The clips of this step. Raises `RuntimeError` when DALI fails or gives other frames than were listed."""
        at = self.step - self.first
        draws = self.plan[at]
        outputs = self._graph.outputs()
        shapes = [tuple(int(n) for n in outputs[1].at(k)) for k in range(len(draws))]
        expected = [self._shape(draw) for draw in draws]
        if shapes != expected:
            raise RuntimeError(f"expected frames {expected}, got {shapes}")
        listed = [at * len(draws) + k for k in range(len(draws))]
        if self._options.route == "video" and [int(outputs[2].at(k)[0]) for k in range(len(draws))] != listed:
            raise RuntimeError("a listed file was left out")
        clips = self._copy(outputs[0].as_tensor())
        self.step += 1
        if self._fed < self.first + len(self.plan):
            self._feed()
        return clips

    def _copy(self, found: Any) -> torch.Tensor:
        """A tensor of torch's own: DALI uses its memory again."""
        from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray

        if self._stream is None:
            clips: torch.Tensor = feed_ndarray(found, torch.empty(found.shape(), dtype=torch.uint8))
            return clips
        with torch.cuda.stream(self._stream):  # beside the training step, which may still be running
            clips = torch.empty(found.shape(), dtype=torch.uint8, device=self._stream.device)
            feed_ndarray(found, clips, cuda_stream=self._stream)
        self._stream.synchronize()
        clips.record_stream(torch.cuda.current_stream())
        return clips


class GraphReader:
    """The batches of one set by a graph; a `rlv2v.data.loader.SetReader`.

    draws, plan: what a step is made of, called from this thread and from one in the background.  read: starts to read
    the frames of a draw by PyAV.  batch, frames, size: B, T and H = W.  device: where the batches are.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        draws: Callable[[int], tuple[Draw, ...]],
        plan: Callable[[int], tuple[Draw, ...]],
        read: Callable[[Draw], Future[np.ndarray]],
        *,
        batch: int,
        frames: int,
        size: int,
        device: Literal["cpu", "gpu"],
        threads: int = 1,
    ) -> None:
        device_id = torch.cuda.current_device() if device == "gpu" else None  # of this thread, not of the builder
        self.options = Options(route_of(sources, device), device, batch, frames, size, threads, PREFETCH, device_id)
        self._draws, self._plan, self._read = draws, plan, read
        self._folder = tempfile.TemporaryDirectory(prefix="rlv2v-")
        self._names = self._link(sources) if self.options.route == "video" else {}
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="rlv2v-graph")
        self._run: Run | None = None
        self._next: Future[Run] | None = None
        self._error = RuntimeError("not prepared")
        self._steps = max(CHUNK // batch, 2 * PREFETCH)

    def _link(self, sources: Sequence[Source]) -> dict[Path, str]:
        """A name without spaces for each source, for a list of DALI's is split at them."""
        if re.search(r"\s", self._folder.name):
            raise UserError(f"temporary folder {self._folder.name}: expected a name without spaces; set TMPDIR")
        names = {}
        for k, source in enumerate(sources):
            names[source.path] = os.path.join(self._folder.name, f"{k}.video")
            os.symlink(source.path.absolute(), names[source.path])
        return names

    def _build(self, first: int, steps: int) -> Run:
        return Run(self.options, first, [self._plan(first + k) for k in range(steps)], self._names, self._read)

    def prepare(self, step: int) -> None:
        """See that a graph is on its way to `step`, and build the one after it before its list ends."""
        draws = self._draws(step)
        if self._run is None or self._run.draws(step) != draws:
            self._run = None  # frees its memory before the next one takes some
            ready, self._next = self._next, None
            try:
                self._run = ready.result() if ready is not None else None
                if self._run is None or self._run.draws(step) != draws:
                    self._run = self._build(step, self._steps)
            except RuntimeError as error:
                self._error = error
        if self._run is not None and self._next is None and 4 * self._run.left <= self._steps:
            self._next = self._builder.submit(self._build, step + self._run.left, self._steps)

    def take(self, step: int) -> torch.Tensor:
        """The batch of `step`, uint8 (B,T,size,size,3) on the device.

        Where the graph fails, each file of the step is read by a graph of its own: the ones that fail are reported as
        `Unreadable`. If none does, a later step may have broken the graph: one of this step alone gives the batch, and
        `UserError` says what DALI said if that fails too.
        """
        try:
            if self._run is None:
                raise self._error
            if faults := self._run.faults.get(step):
                raise Unreadable(faults)
            return self._run.take()
        except RuntimeError as error:
            self._run = None
            if faults := self._probe(self._draws(step)):
                raise Unreadable(faults) from error
        try:
            return self._build(step, 1).take()
        except RuntimeError as error:
            raise UserError(f"step {step}: DALI reads each file but not the batch: {reason_of(error)}") from error

    def _probe(self, draws: Sequence[Draw]) -> dict[Source, str]:
        """The sources of these draws that DALI does not read, each tried alone."""
        faults = {}
        for draw in draws:
            try:
                Run(replace(self.options, batch=1), 0, [(draw,)], self._names, self._read).take()
            except RuntimeError as error:
                reason = reason_of(error).replace(self._names.get(draw.source.path, "\0"), draw.source.path.name)
                faults[draw.source] = f"cannot be read by DALI: {one_line(reason)}"
        return faults

    def close(self) -> None:
        """Drop the graph and the list."""
        self._builder.shutdown(cancel_futures=True)
        self._run = self._next = None
        self._folder.cleanup()


def reason_of(error: Exception) -> str:
    """The one line of a DALI message that says what is wrong."""
    text = str(error).partition("encountered:")[2] or str(error)
    return one_line(text.partition("C++ context")[0].strip())[:300]
