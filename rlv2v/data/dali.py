"""Read the batches of a set whose videos DALI decodes as PyAV does, by a DALI graph, uint8 (B,T,H,W,3) out.

    fn.experimental.readers.video, fed a list `file label start end`, the sampled frames
    then resize (to cover the crop, antialias), crop, flips, transposition of the sample

On the CPU DALI decodes VP8, VP9 and MJPEG; on a GPU NVDEC decodes. DALI converts by BT.601 whatever a file says, so a
set with a file that is tagged otherwise goes by the loader's threads, as does one that is not all videos. The reader
goes through a list of samples made ahead, so no state of DALI's is saved: a resumed run makes the list anew from its
step. The label of each clip and the shape that was decoded are checked, for DALI skips a file that it cannot open
without a message. An error in a graph is sticky: a new one is built.
"""

from __future__ import annotations

import math
import os
import re
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from rlv2v.crop_size import CropSize
from rlv2v.data.inspect import Source, short_reason
from rlv2v.data.sampler import ClipSample, ClipSampler, Unreadable
from rlv2v.data.scaling import cover_size
from rlv2v.errors import UserError
from rlv2v.runtime.device import out_of_memory

Device = Literal["cpu", "gpu"]
Samples = tuple[ClipSample, ...]
MAX_LISTED = 512
"""Clips in one list: DALI opens the file of each line when a graph is built, 0.1 ms a line on a local disk."""
LIBRARIES = ("libnvcuvid", "nvcuvid.so", "libcuda.so")
"""Of NVIDIA's driver, which DALI opens when it decodes."""
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


def decodes(source: Source, device: Device) -> bool:
    """Return whether DALI gives the frames of a source that PyAV gives; on a GPU NVDEC takes 8-bit 4:2:0 alone."""
    if device == "cpu":
        return source.codec == "vp9" and source.pixels in ("yuv420p", "yuv444p", "gbrp")
    width, height = NVDEC_MIN_SIZE.get(source.codec, (math.inf, math.inf))
    return source.pixels == "yuv420p" and source.width >= width and source.height >= height


@dataclass(frozen=True)
class GraphOptions:
    """Hold what a graph is built for; `size` and `frames` are H, W and T of the clips that come out."""

    device: Device
    batch: int
    frames: int
    size: CropSize
    threads: int = 1
    prefetch: int = PREFETCH
    device_id: int | None = None
    """The CUDA device; a graph for `gpu` without one can be serialised, not built."""


def new_graph(options: GraphOptions, listed: str) -> Any:
    """Return the graph, not yet built, with outputs clips (device), shape as read (CPU), label (CPU).

    listed: the path of the list. Fed for each clip: `target` (height, width after the resize), `corner` (top, left),
    `flip` (left-right, up-down), and for squares `transpose` (255 or 0).
    """
    from nvidia import dali

    fn: Any = dali.fn
    types = dali.types.DALIDataType
    pipeline: Any = dali.pipeline.Pipeline
    form = {"file_list_format": "frames", "file_list_include_end": False, "sequence_length": options.frames}
    in_order = {"initial_fill": options.batch, "random_shuffle": False}
    graph = pipeline(options.batch, options.threads, options.device_id, prefetch_queue_depth=options.prefetch)
    with graph:
        read = fn.experimental.readers.video
        frames, label = read(name="reader", device=options.device, file_list=listed, **form, **in_order)
        target = fn.external_source(name="target", dtype=types.FLOAT, ndim=1)
        corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=1)
        clips = fn.resize(frames, name="resize", size=target, antialias=True)
        clips = fn.slice(
            clips, name="crop", start=corner, shape=[options.size.height, options.size.width], axis_names="HW"
        )
        clips = fn.flip(clips, name="flips", horizontal=flip[0], vertical=flip[1])
        if options.size.is_square:
            mask = fn.external_source(name="transpose", dtype=types.UINT8, ndim=0)
            transposed = fn.transpose(clips, name="transposed", perm=[0, 2, 1, 3], transpose_layout=False)
            clips = clips ^ ((clips ^ transposed) & mask)  # a choice for each clip, without a branch in the graph
        graph.set_outputs(clips, frames.shape(), label.cpu())
    return graph


def is_changed(source: Source) -> bool:
    """Return whether a file is gone or has another size than the index found."""
    try:
        return source.path.stat().st_size != source.num_bytes
    except OSError:
        return True


class GraphRun:
    """Run a graph through the samples of the steps `first, first+1, ...`, given as one tuple of samples a step."""

    def __init__(self, options: GraphOptions, first: int, steps: Sequence[Samples], links: dict[Path, str]) -> None:
        options = replace(options, prefetch=min(options.prefetch, len(steps)))
        self.first, self.step, self.end = first, first, first + len(steps)
        self._options, self._steps = options, steps
        self._stream = torch.cuda.Stream(options.device_id) if options.device == "gpu" else None
        samples = [sample for step in steps for sample in step]
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            for k, s in enumerate(samples):
                file.write(f"{links[s.source.path]} {k} {s.start} {s.start + options.frames}\n")
            file.flush()
            self._graph = new_graph(options, file.name)
            self._graph.build()
        self._num_fed = 0
        for _ in range(options.prefetch):
            self._feed()

    def gives(self, step: int, samples: Samples) -> bool:
        """Return whether the next batch is that of `step`, made of `samples`."""
        return step == self.step < self.end and self._steps[step - self.first] == samples

    def _feed(self) -> None:
        """Give the graph what it needs for one more step, and run it in the background."""
        options, samples = self._options, self._steps[self._num_fed]
        sizes = [cover_size(s.source.width, s.source.height, options.size) for s in samples]
        inputs = {
            "target": [np.array([height, width], np.float32) for width, height in sizes],
            "corner": [np.array(s.corner(options.size), np.int32) for s in samples],
            "flip": [np.array(s.flips[:2], np.int32) for s in samples],
        }
        if options.size.is_square:
            inputs["transpose"] = [np.array(255 * s.flips[2], np.uint8) for s in samples]
        for name, values in inputs.items():
            self._graph.feed_input(name, values)
        self._num_fed += 1
        if self._num_fed >= options.prefetch:  # the first run takes all that were fed till then
            self._graph.schedule_run()

    def take(self) -> torch.Tensor:
        """Return the clips of this step. Raises `RuntimeError` when DALI fails or gives frames that were not listed."""
        index = self.step - self.first
        samples = self._steps[index]
        outputs = self._graph.outputs()
        for k, sample in enumerate(samples):
            source, shape = sample.source, tuple(outputs[1].at(k).tolist())
            expected = (self._options.frames, source.height, source.width, 3)
            if shape != expected:
                raise RuntimeError(f"expected frames {expected}, got {shape}")
            if outputs[2].at(k)[0] != index * len(samples) + k:
                raise RuntimeError("a listed file was left out")
            if is_changed(source):  # DALI makes up what it lacks
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

    sampler, name: what to read; DALI `decodes` that set.  size: of the clips.  device: where the batches are.
    """

    def __init__(self, sampler: ClipSampler, name: str, *, size: CropSize, device: Device, threads: int = 1) -> None:
        device_id = torch.cuda.current_device() if device == "gpu" else None  # of this thread, not of the builder
        sources, batch = sampler.dataset.sets[name], sampler.batch[name]
        self.options = GraphOptions(device, batch, sampler.length(name), size, threads, PREFETCH, device_id)
        self._sampler, self._name = sampler, name
        self._folder = tempfile.TemporaryDirectory(prefix="rlv2v-")
        self._links = self._link(sources)
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="rlv2v-graph")
        self._run: GraphRun | None = None
        self._next: Future[GraphRun] | None = None
        self._error = RuntimeError("not prepared")
        self._num_steps = max(MAX_LISTED // batch, 2 * PREFETCH)

    def _link(self, sources: Sequence[Source]) -> dict[Path, str]:
        """Return a link without spaces to each source, for DALI splits the lines of a list at them."""
        if re.search(r"\s", self._folder.name):
            raise UserError(f"temporary folder {self._folder.name}: expected a name without spaces; set TMPDIR")
        links = {source.path: os.path.join(self._folder.name, f"{k}.video") for k, source in enumerate(sources)}
        for path, link in links.items():
            os.symlink(path.absolute(), link)
        return links

    def _build(self, first: int, num: int) -> GraphRun:
        steps = [self._sampler.compute(self._name, first + k) for k in range(num)]
        return GraphRun(self.options, first, steps, self._links)

    def prepare(self, step: int) -> None:
        """Have a graph under way to `step`, and build the one after it before its list ends."""
        samples = self._sampler.samples(self._name, step)
        if self._run is None or not self._run.gives(step, samples):
            self._run = None  # frees its memory before the next one takes some
            ready, self._next = self._next, None
            try:
                self._run = ready.result() if ready else None
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
        `UserError` quotes DALI if that fails too. No file is blamed for a want of memory or a missing library: see
        `blame_machine`.
        """
        try:
            if self._run is None:
                raise self._error
            return self._run.take()
        except RuntimeError as error:
            self._run = None
            blame_machine(error)
            if faults := self._find_faults(self._sampler.samples(self._name, step)):
                raise Unreadable(faults) from error
        try:
            return self._build(step, 1).take()
        except RuntimeError as error:
            blame_machine(error)
            raise UserError(f"step {step}: DALI reads each file but not the batch: {dali_reason(error)}") from error

    def _find_faults(self, samples: Sequence[ClipSample]) -> dict[Source, str]:
        """Return the sources of these samples that DALI does not read, each tried alone."""
        faults = {}
        for sample in samples:
            path = sample.source.path
            try:
                GraphRun(replace(self.options, batch=1), 0, [(sample,)], self._links).take()
            except RuntimeError as error:
                blame_machine(error)
                reason = dali_reason(error).replace(self._links.get(path, "\0"), path.name)
                faults[sample.source] = short_reason(f"cannot be read by DALI: {reason}", path)
        return faults

    def close(self) -> None:
        """Drop the graph and the list."""
        self._builder.shutdown(cancel_futures=True)
        self._run = self._next = None
        self._folder.cleanup()


def blame_machine(error: RuntimeError) -> None:
    """Raise what an error of DALI says of the machine and not of a file.

    Raises:
        RuntimeError: the error itself, where memory is lacking: training then says what a step needs.
        UserError: a library of NVIDIA's driver is missing.
    """
    if out_of_memory(error):
        raise error
    if any(library in str(error) for library in LIBRARIES):
        raise UserError(
            f"--decode gpu: a library of the NVIDIA driver is missing ({dali_reason(error)}); install the driver's "
            "video libraries, or use --decode cpu"
        ) from error


def dali_reason(error: Exception) -> str:
    """Return the part of a DALI message that names the fault."""
    text = str(error).partition("encountered:")[2] or str(error)
    return text.partition("C++ context")[0].strip()[:300]
