"""Read batches by a DALI graph for each set: frames of the sampled clips in, uint8 (B,T,size,size,3) out.

    raw    -> fn.readers.numpy, the sampled frames as its region of interest    every source is a `.npy`
    video  -> fn.experimental.readers.video, fed a list `file label start end`  every source is decodable on the device
    frames -> PyAV (or OpenCV), already scaled, behind fn.external_source       anything else, or a mixture
    then   -> resize (short side `size`, antialias), crop, flips, transposition of the sample

On the CPU DALI decodes VP8, VP9 and MJPEG; on a GPU NVDEC decodes. DALI converts by BT.601 whatever a file says, so a
file tagged otherwise goes by PyAV. The readers go through a list of samples made ahead, so no state of DALI's is saved:
a resumed run makes the list anew from its step. The label of each clip and the shape that was decoded are checked, for
DALI skips a file that it cannot open without a message. An error in a graph is sticky: a new one is built. A raw file
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

from rlv2v.data.inspect import Source, is_limited_601, short_reason
from rlv2v.data.sampler import ClipSample, ClipSampler, Unreadable
from rlv2v.data.video import fit_size, open_video, stream_of
from rlv2v.errors import UserError

Route = Literal["raw", "video", "frames"]
Device = Literal["cpu", "gpu"]
MAX_LISTED = 512
"""Clips in one list: DALI opens the file of each line when a graph is built, 0.1 ms a line on a local disk."""
PREFETCH = 2
NVDEC_MIN_SIZE = {"h264": (48, 16), "hevc": (144, 144), "vp9": (128, 128), "mpeg4": (48, 16)}
"""Codecs that every GPU since Turing decodes, and their least width and height; AV1 needs a newer one."""


def has_dali() -> bool:
    """Return whether DALI is installed."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return False
    return True


def nvdec_decodes(source: Source) -> bool:
    """Return whether NVDEC gives the frames that PyAV gives: 8-bit 4:2:0, upright, undamaged, BT.601 or untagged."""
    width, height = NVDEC_MIN_SIZE.get(source.codec, (0, 0))
    if source.kind != "video" or source.status != "ok" or not width or source.width < width or source.height < height:
        return False
    try:
        with open_video(source.path) as container:
            stream = stream_of(container)
            trimmed = stream.frames not in (0, source.num_frames)  # DALI may number what an edit list hides
            frame = next(container.decode(stream))
    except (UserError, av.FFmpegError, OSError, StopIteration):
        return False
    return frame.format.name == "yuv420p" and is_limited_601(frame) and frame.rotation == 0 and not trimmed


def choose_route(sources: Sequence[Source], device: Device) -> Route:
    """Return how a set is read; all of its sources decide, so that the route stays when one of them breaks."""
    if all(source.kind == "raw" and source.status == "ok" for source in sources):
        return "raw"
    decodes = nvdec_decodes if device == "gpu" else lambda source: source.kind == "video" and source.dali
    return "video" if all(map(decodes, sources)) else "frames"


@dataclass(frozen=True)
class GraphOptions:
    """Hold what a graph is built for; `size` and `frames` are H = W and T of the clips that come out."""

    route: Route
    device: Device
    batch: int
    frames: int
    size: int
    threads: int = 1
    prefetch: int = PREFETCH
    device_id: int | None = None
    """The CUDA device; a graph for `gpu` without one can be serialised, not built."""

    def input_shape(self, source: Source) -> tuple[int, int, int, int]:
        """Return (T,H,W,3) of the frames that the reader gives of a source."""
        width, height = source.width, source.height
        if self.route == "frames":
            width, height = fit_size(width, height, self.size)
        return self.frames, height, width, 3


def read_node(options: GraphOptions, listed: Any) -> tuple[Any, Any]:
    """Return the graph's (frames FHWC on the device or still on the CPU, label of each clip or None)."""
    from nvidia import dali

    fn: Any = dali.fn
    types = dali.types.DALIDataType
    in_order = {"initial_fill": options.batch, "random_shuffle": False}
    if options.route == "video":
        frames, label = fn.experimental.readers.video(
            name="reader",
            device=options.device,
            file_list=listed,
            file_list_format="frames",
            file_list_include_end=False,
            sequence_length=options.frames,
            **in_order,
        )
        return frames, label
    if options.route == "frames":
        return fn.external_source(name="reader", device="cpu", dtype=types.UINT8, layout="FHWC"), None
    start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
    region = {"roi_start": start, "roi_shape": [options.frames], "roi_axes": [0]}
    frames = fn.readers.numpy(name="reader", device="cpu", files=listed, **region, **in_order)
    return fn.reshape(frames, layout="FHWC"), None


def new_graph(options: GraphOptions, listed: Any) -> Any:
    """Return the graph, not yet built, with outputs clips (device), shape as read (CPU), and for videos label (CPU).

    listed: for `raw` the file of each clip in order, for `video` the path of the list, for `frames` nothing. Fed for
    each clip: `target` (height, width after the resize), `corner` (top, left), `flip` (left-right, up-down),
    `transpose` (255 or 0); for `raw` also `start`, for `frames` the frames themselves as `reader`.
    """
    from nvidia import dali

    fn: Any = dali.fn
    types = dali.types.DALIDataType
    pipeline: Any = dali.pipeline.Pipeline
    graph = pipeline(
        batch_size=options.batch,
        num_threads=options.threads,
        device_id=options.device_id,
        prefetch_queue_depth=options.prefetch,
    )
    with graph:
        frames, label = read_node(options, listed)
        target = fn.external_source(name="target", dtype=types.FLOAT, ndim=1)
        corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=1)
        mask = fn.external_source(name="transpose", dtype=types.UINT8, ndim=0)
        shape = frames.shape()
        frames = frames.gpu() if options.device == "gpu" else frames
        clips = fn.resize(frames, name="resize", size=target, antialias=True)
        clips = fn.slice(clips, name="crop", start=corner, shape=[options.size, options.size], axis_names="HW")
        clips = fn.flip(clips, name="flips", horizontal=flip[0], vertical=flip[1])
        transposed = fn.transpose(clips, name="transposed", perm=[0, 2, 1, 3], transpose_layout=False)
        clips = clips ^ ((clips ^ transposed) & mask)  # a choice for each clip, without a branch in the graph
        graph.set_outputs(clips, shape, *([] if label is None else [label.cpu()]))
    return graph


def is_changed(source: Source) -> bool:
    """Return whether a file is gone or has another size than the index found."""
    try:
        return source.path.stat().st_size != source.num_bytes
    except OSError:
        return True


class GraphRun:
    """Run a graph through the samples of the steps `first, first+1, ...`, given as one tuple of samples a step."""

    def __init__(
        self,
        options: GraphOptions,
        first: int,
        steps: Sequence[tuple[ClipSample, ...]],
        links: dict[Path, str],
        read: Callable[[ClipSample], Future[np.ndarray]],
    ) -> None:
        options = replace(options, prefetch=min(options.prefetch, len(steps)))
        self.first, self.step, self.end = first, first, first + len(steps)
        self.faults: dict[int, dict[Source, str]] = {}
        self._options, self._steps, self._read = options, steps, read
        self._futures: dict[int, list[Future[np.ndarray]]] = {}
        self._stream = torch.cuda.Stream(options.device_id) if options.device == "gpu" else None
        samples = [sample for step in steps for sample in step]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            if options.route == "video":
                for k, s in enumerate(samples):
                    file.write(f"{links[s.source.path]} {k} {s.start} {s.start + options.frames}\n")
                file.flush()
            files = [str(s.source.path.absolute()) for s in samples]
            self._graph = new_graph(options, file.name if options.route == "video" else files)
            self._graph.build()
        self._num_fed = 0
        for _ in range(options.prefetch):
            self._feed()

    def gives(self, step: int, samples: tuple[ClipSample, ...]) -> bool:
        """Return whether the next batch is that of `step`, made of `samples`."""
        return step == self.step < self.end and self._steps[step - self.first] == samples

    def _feed(self) -> None:
        """Give the graph what it needs for one more step, and run it in the background."""
        options, samples = self._options, self._steps[self._num_fed]
        sizes = [fit_size(s.source.width, s.source.height, options.size) for s in samples]
        inputs = {
            "target": [np.array([height, width], np.float32) for width, height in sizes],
            "corner": [np.array(s.corner(options.size), np.int32) for s in samples],
            "flip": [np.array(s.flips[:2], np.int32) for s in samples],
            "transpose": [np.array(255 * s.flips[2], np.uint8) for s in samples],
        }
        if options.route == "raw":
            inputs["start"] = [np.array([s.start], np.int32) for s in samples]
        if options.route == "frames":
            inputs["reader"] = self._read_frames(self._num_fed)
        for name, values in inputs.items():
            self._graph.feed_input(name, values)
        self._num_fed += 1
        if self._num_fed >= options.prefetch:  # the first run takes all that were fed till then
            self._graph.schedule_run()

    def _read_frames(self, index: int) -> list[np.ndarray]:
        """Return what PyAV read for step `first + index`; black frames, and a fault, for a file it could not read."""
        for ahead in range(index, min(index + 2, len(self._steps))):
            if ahead not in self._futures:
                self._futures[ahead] = [self._read(sample) for sample in self._steps[ahead]]
        clips = []
        for sample, future in zip(self._steps[index], self._futures.pop(index), strict=True):
            try:
                clips.append(future.result())
            except (UserError, OSError) as error:
                faults = self.faults.setdefault(self.first + index, {})
                faults[sample.source] = short_reason(error, sample.source.path)
                clips.append(np.zeros(self._options.input_shape(sample.source), np.uint8))
        return clips

    def take(self) -> torch.Tensor:
        """Return the clips of this step. Raises `RuntimeError` when DALI fails or gives frames that were not listed."""
        index = self.step - self.first
        samples = self._steps[index]
        outputs = self._graph.outputs()
        shapes = [tuple(int(n) for n in outputs[1].at(k)) for k in range(len(samples))]
        expected = [self._options.input_shape(sample.source) for sample in samples]
        if shapes != expected:
            raise RuntimeError(f"expected frames {expected}, got {shapes}")
        if self._options.route == "video":
            labels = [int(outputs[2].at(k)[0]) for k in range(len(samples))]
            if labels != [index * len(samples) + k for k in range(len(samples))]:
                raise RuntimeError("a listed file was left out")
            if any(is_changed(sample.source) for sample in samples):  # DALI makes up frames that a new file lacks
                raise RuntimeError("the file changed while in use")
        clips = self._copy(outputs[0].as_tensor())
        self.step += 1
        if self._num_fed < len(self._steps):
            self._feed()
        return clips

    def _copy(self, output: Any) -> torch.Tensor:
        """Return a tensor of torch's own: DALI uses its memory again."""
        from nvidia.dali.plugin.pytorch.torch_utils import feed_ndarray

        if self._stream is None:
            clips: torch.Tensor = feed_ndarray(output, torch.empty(output.shape(), dtype=torch.uint8))
            return clips
        with torch.cuda.stream(self._stream):  # beside the training step, which may still be running
            clips = torch.empty(output.shape(), dtype=torch.uint8, device=self._stream.device)
            feed_ndarray(output, clips, cuda_stream=self._stream)
        self._stream.synchronize()
        clips.record_stream(torch.cuda.current_stream())
        return clips


class GraphReader:
    """Read the batches of one set by a graph, as `rlv2v.data.loader.ThreadReader` does by threads.

    sampler, name: what to read.  read: starts to read the frames of a sample by PyAV.  size: H = W of the clips.
    device: where the batches are.
    """

    def __init__(
        self,
        sampler: ClipSampler,
        name: str,
        read: Callable[[ClipSample], Future[np.ndarray]],
        *,
        size: int,
        device: Device,
        threads: int = 1,
    ) -> None:
        device_id = torch.cuda.current_device() if device == "gpu" else None  # of this thread, not of the builder
        sources, batch = sampler.dataset.sets[name], sampler.batch[name]
        route = choose_route(sources, device)
        self.options = GraphOptions(route, device, batch, sampler.length(name), size, threads, PREFETCH, device_id)
        self._sampler, self._name, self._read = sampler, name, read
        self._folder = tempfile.TemporaryDirectory(prefix="rlv2v-")
        self._links = self._link(sources) if route == "video" else {}
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="rlv2v-graph")
        self._run: GraphRun | None = None
        self._next: Future[GraphRun] | None = None
        self._error = RuntimeError("not prepared")
        self._num_steps = max(MAX_LISTED // batch, 2 * PREFETCH)

    def _link(self, sources: Sequence[Source]) -> dict[Path, str]:
        """Return a link without spaces to each source, for DALI splits the lines of a list at them."""
        if re.search(r"\s", self._folder.name):
            raise UserError(f"temporary folder {self._folder.name}: expected a name without spaces; set TMPDIR")
        links = {}
        for k, source in enumerate(sources):
            links[source.path] = os.path.join(self._folder.name, f"{k}.video")
            os.symlink(source.path.absolute(), links[source.path])
        return links

    def _build(self, first: int, num: int) -> GraphRun:
        steps = [self._sampler.compute(self._name, first + k) for k in range(num)]
        return GraphRun(self.options, first, steps, self._links, self._read)

    def prepare(self, step: int) -> None:
        """Have a graph under way to `step`, and build the one after it before its list ends."""
        samples = self._sampler.samples(self._name, step)
        if self._run is None or not self._run.gives(step, samples):
            self._run = None  # frees its memory before the next one takes some
            ready, self._next = self._next, None
            try:
                self._run = ready.result() if ready is not None else None
                if self._run is None or not self._run.gives(step, samples):
                    self._run = self._build(step, self._num_steps)
            except RuntimeError as error:
                self._error = error
        if self._run is not None and self._next is None and 4 * (self._run.end - step) <= self._num_steps:
            self._next = self._builder.submit(self._build, self._run.end, self._num_steps)

    def take(self, step: int) -> torch.Tensor:
        """Return the batch of `step`, uint8 (B,T,size,size,3) on the device.

        Where the graph fails, each file of the step is read by a graph of its own: the ones that fail are reported as
        `Unreadable`. If none does, a later step may have broken the graph: one of this step alone gives the batch, and
        `UserError` quotes DALI if that fails too.
        """
        try:
            if self._run is None:
                raise self._error
            if faults := self._run.faults.get(step):
                raise Unreadable(faults)
            return self._run.take()
        except RuntimeError as error:
            self._run = None
            if faults := self._find_faults(self._sampler.samples(self._name, step)):
                raise Unreadable(faults) from error
        try:
            return self._build(step, 1).take()
        except RuntimeError as error:
            raise UserError(f"step {step}: DALI reads each file but not the batch: {dali_reason(error)}") from error

    def _find_faults(self, samples: Sequence[ClipSample]) -> dict[Source, str]:
        """Return the sources of these samples that DALI does not read, each tried alone."""
        faults = {}
        for sample in samples:
            path = sample.source.path
            try:
                GraphRun(replace(self.options, batch=1), 0, [(sample,)], self._links, self._read).take()
            except RuntimeError as error:
                reason = dali_reason(error).replace(self._links.get(path, "\0"), path.name)
                faults[sample.source] = short_reason(f"cannot be read by DALI: {reason}", path)
        return faults

    def close(self) -> None:
        """Drop the graph and the list."""
        self._builder.shutdown(cancel_futures=True)
        self._run = self._next = None
        self._folder.cleanup()


def dali_reason(error: Exception) -> str:
    """Return the part of a DALI message that names the fault."""
    text = str(error).partition("encountered:")[2] or str(error)
    return text.partition("C++ context")[0].strip()[:300]
