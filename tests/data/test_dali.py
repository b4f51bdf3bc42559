"""The DALI graph: the samples of the CPU path, the exact frames, resume, and what is built for a GPU."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from data_clips import encode, needs_dali, numbers_of, open_loader, psnr, smooth, stamped_clip, trim

from rlv2v.crop_size import CropSize
from rlv2v.data import dali
from rlv2v.data.dali import GraphOptions, GraphReader, GraphRun, decodes, new_graph
from rlv2v.data.images import write_image
from rlv2v.data.index import Source, index_folder, open_dataset
from rlv2v.data.loader import Loader
from rlv2v.data.readers import FrameReader
from rlv2v.data.sampler import ClipSample
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError

pytestmark = needs_dali
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
Device = Literal["cpu", "gpu"]
T = 4
CODECS = {
    "h264": ("libx264", {"g": "9", "bf": "2", "crf": "12"}),
    "vp9": ("libvpx-vp9", {"g": "12", "crf": "10", "b": "0", "auto-alt-ref": "0", "lag-in-frames": "0"}),
}
DEVICES = [("cpu", "vp9"), pytest.param("gpu", "vp9", marks=needs_cuda), pytest.param("gpu", "h264", marks=needs_cuda)]


def write(path: Path, clip: np.ndarray, codec: str) -> None:
    """Write (T,H,W,3) as yuv420p, the way `rlv2v.prepare` would."""
    encode(path, clip, CODECS[codec][0], **CODECS[codec][1])


def fill(root: Path, height: int = 24, width: int = 40, *, grid: bool = False, codec: str = "lossless") -> Path:
    """Write X and Y of three videos each, S of two images; `grid`: with a detail that only antialiasing takes out."""
    for name in ("trainX", "trainY", "trainS"):
        (root / name).mkdir(parents=True)
    for k in range(6):
        clip = smooth(3 * T + k, height, width + 2 * k, k)
        if grid:
            clip = clip // 2 + 20 * (np.indices(clip.shape).sum(0) % 2).astype(np.uint8)
        path = root / ("trainX", "trainY")[k % 2] / f"clip {k}.mp4"
        if codec == "lossless":
            write_clip(path, clip, 8, "vp9-lossless")
        else:
            write(path, clip, codec)
    for k in range(2):
        write_image(root / "trainS" / f"{k}.png", smooth(1, height, width, k)[0])
    return root


def loader(root: Path, **changes: Any) -> Loader:
    defaults = {"batch": {"x": 3, "y": 2, "s": 2}, "size": 24, "backend": "dali"}
    return open_loader(open_dataset(root, frames=T), **{**defaults, **changes})


def take(source: Loader, num: int) -> list[list[torch.Tensor]]:
    batches = [next(source) for _ in range(num)]
    return [[getattr(batch, name) for name in "xys" if source.sampler.batch[name]] for batch in batches]


def same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def test_without_a_resize_the_graph_gives_the_bits_of_the_cpu_path(tmp_path: Path) -> None:
    root = fill(tmp_path / "with space")
    graph, threads = loader(root, augment="dihedral"), loader(root, augment="dihedral", backend="auto")
    sets = graph.sampler.dataset.sets
    assert [decodes(source, "cpu") for name in "xs" for source in sets[name]] == [True] * 3 + [False] * 2
    assert same(take(graph, 20), take(threads, 20))
    assert len({s.flips for step in range(20) for s in graph.sampler.samples("x", step)}) == 8, "every flip occurred"
    graph.close()


@pytest.mark.parametrize(("height", "width"), [(96, 128), (24, 40)])
def test_resampling_is_close_to_the_cpu_path(tmp_path: Path, height: int, width: int) -> None:
    """A triangle filter where OpenCV takes the mean of the area: 48 dB and more, 29 without antialiasing."""
    root = fill(tmp_path / "data", height, width, grid=True)
    graph, threads = (loader(root, augment="dihedral", size=32, backend=backend) for backend in ("dali", "auto"))
    for a, b in zip(take(graph, 8), take(threads, 8), strict=True):
        for x, y in zip(a, b, strict=True):
            assert min(psnr(clip, other) for clip, other in zip(x.numpy(), y.numpy(), strict=True)) >= 45
        shifted = np.roll(b[0].numpy(), 1, axis=-2)
        assert max(psnr(clip, other) for clip, other in zip(a[0].numpy(), shifted, strict=True)) < 40, "a shift shows"


def test_a_rectangle_has_the_samples_of_the_cpu_path(tmp_path: Path) -> None:
    root = fill(tmp_path / "data")
    for size, exact in (("24x32", True), ("40x20", False)):  # the first needs no resize
        graph, threads = (loader(root, size=size, augment="flip", backend=backend) for backend in ("dali", "auto"))
        for a, b in zip(take(graph, 12), take(threads, 12), strict=True):
            for x, y in zip(a, b, strict=True):
                assert x.shape == y.shape and f"{x.shape[-3]}x{x.shape[-2]}" == size
                assert torch.equal(x, y) if exact else psnr(x.numpy(), y.numpy()) >= 40
        assert {s.flips[0] for step in range(12) for s in graph.sampler.samples("x", step)} == {False, True}
        graph.close()


def test_resume_threads_and_the_ends_of_lists_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = fill(tmp_path / "data")
    reference = loader(root, size=16)
    expected = take(reference, 40)
    monkeypatch.setattr(dali, "MAX_LISTED", 1)  # lists of 4 steps
    short = loader(root, size=16, threads=3)
    assert same(take(short, 19), expected[:19])
    resumed = loader(root, size=16, threads=2)
    next(resumed)
    resumed.load_state_dict(short.state_dict())
    assert same(take(resumed, 21), expected[19:])
    for source in (reference, short, resumed):
        source.close()


def test_the_next_list_is_built_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[tuple[int, bool]] = []

    class Recorded(GraphRun):
        def __init__(self, options: GraphOptions, first: int, *args: Any) -> None:
            built.append((first, threading.current_thread() is threading.main_thread()))
            super().__init__(options, first, *args)

    monkeypatch.setattr(dali, "GraphRun", Recorded)
    monkeypatch.setattr(dali, "MAX_LISTED", 48)  # 16 steps of X
    source = loader(fill(tmp_path / "data"), batch={"x": 3})
    take(source, 20)
    assert built == [(0, True), (16, False)]
    source.close()


def graph_reader(sources: list[Source], samples: list[ClipSample], device: Device) -> GraphReader:
    """Return a reader of one sample a step, 128x128."""

    def at_step(name: str, step: int) -> tuple[ClipSample, ...]:
        return (samples[step % len(samples)],)

    sampler: Any = SimpleNamespace(
        dataset=SimpleNamespace(sets={"x": sources}),
        batch={"x": 1},
        length=lambda name: T,
        samples=at_step,
        compute=at_step,
    )
    return GraphReader(sampler, "x", size=CropSize(128, 128), device=device)


def unchanged(source: Source, start: int) -> ClipSample:
    return ClipSample(source, start, (0.0, 0.0), (False, False, False))


@pytest.mark.parametrize(("device", "codec"), DEVICES)
def test_the_graph_gives_exactly_the_frames_asked_for(tmp_path: Path, device: Device, codec: str) -> None:
    for k in range(5):
        write(tmp_path / f"{k}.mp4", stamped_clip(range(40 * k, 40 * k + 40), 128, 128), codec)
    sources, rng = index_folder(tmp_path, frames=T), np.random.default_rng(0)
    picks = [(int(rng.integers(5)), int(rng.integers(40 - T + 1))) for _ in range(100)]
    reader = graph_reader(sources, [unchanged(sources[k], start) for k, start in picks], device)
    for step, (k, start) in enumerate(picks):
        reader.prepare(step)
        (clip,) = reader.take(step).cpu().numpy()
        assert numbers_of(clip) == [40 * k + start + t for t in range(T)]
    reader.close()


def luma(frames: np.ndarray) -> np.ndarray:
    return frames @ np.array([0.299, 0.587, 0.114])


@pytest.mark.parametrize(("device", "codec"), DEVICES)
def test_decoded_frames_are_those_of_pyav(tmp_path: Path, device: Device, codec: str) -> None:
    write(tmp_path / "a.mp4", smooth(30, 128, 192), codec)
    (source,) = index_folder(tmp_path, frames=T)
    starts = [0, 1, 7, 12, 13, 25]
    reader = graph_reader([source], [unchanged(source, start) for start in starts], device)
    expected = luma(FrameReader().read(source, 0, 30)[:, :, :128])
    for step, start in enumerate(starts):
        reader.prepare(step)
        (clip,) = luma(reader.take(step).cpu().numpy())
        for t in range(T):
            neighbours = [psnr(clip[t], expected[i]) for i in (start + t - 1, start + t + 1) if 0 <= i < 30]
            assert psnr(clip[t], expected[start + t]) >= 40 and max(neighbours) < 30
    reader.close()


def test_what_dali_decodes_as_pyav_does(tmp_path: Path) -> None:
    for codec in CODECS:
        (tmp_path / codec).mkdir()
        write(tmp_path / codec / "a.mp4", smooth(8, 128, 128), codec)
        write(tmp_path / codec / "b.mp4", smooth(8, 64, 128), codec)
    write_clip(tmp_path / "h264" / "c.mp4", smooth(8, 128, 128), 8)  # BT.709
    write_clip(tmp_path / "vp9" / "c.mp4", smooth(8, 128, 128), 8, "vp9-lossless")  # planar RGB
    np.save(tmp_path / "vp9" / "d.npy", smooth(8, 16, 16))
    h264, vp9 = (index_folder(tmp_path / codec, frames=T) for codec in ("h264", "vp9"))
    assert [decodes(source, "gpu") for source in h264] == [True, True, False]
    assert [decodes(s, "gpu") for s in vp9] == [True, False, False, False], "NVDEC: VP9 from 128x128 on, 4:2:0"
    assert [decodes(source, "cpu") for source in h264 + vp9] == [False] * 3 + [True] * 3 + [False]
    devices: list[tuple[str, Device]] = [("h264", "gpu"), ("vp9", "gpu"), ("vp9", "cpu")]
    for codec, device in devices:
        path = tmp_path / f"{codec} {device}" / "a.mp4"
        path.parent.mkdir()
        shutil.copy(tmp_path / codec / "a.mp4", path)
        trim(path, 3)
        (source,) = index_folder(path.parent, frames=T)
        assert (source.status, source.num_frames, decodes(source, device)) == ("ok", 5, False)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_serialised_graph_differs_in_its_device_alone(tmp_path: Path, device: Device) -> None:
    (tmp_path / "list.txt").write_text("none.mp4 0 0 4\n")
    built = new_graph(GraphOptions(device, batch=2, frames=T, size=CropSize(16, 16)), str(tmp_path / "list.txt"))
    serialised = built.serialize()
    # in protocol buffers, an operator's output is field 3: its name, field 1, and its device, field 2
    outputs = dict(re.findall(rb"\x1a.\x0a.(\w+)(?:\[0\])?\x12.(cpu|gpu)", serialised, re.DOTALL))
    operators = (b"experimental__readers__Video", b"Resize", b"Slice", b"Flip", b"Transpose")
    assert all(operator in serialised for operator in operators)
    assert {outputs[name] for name in (b"reader", b"resize", b"crop", b"flips", b"transposed")} == {device.encode()}
    assert {place for name, place in outputs.items() if b"ArithmeticGenericOp" in name} == {device.encode()}
    assert outputs.keys() >= {b"target", b"corner", b"flip", b"transpose"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="device gpu: expected a CUDA GPU, found none"):
        loader(fill(tmp_path / "data"), device="gpu")


@needs_cuda
@pytest.mark.parametrize(("codec", "limit"), [("lossless", 0), ("h264", 1), ("vp9", 1)])
def test_the_gpu_gives_the_batches_of_the_cpu(tmp_path: Path, codec: str, limit: int) -> None:
    """NVDEC does not decode planar RGB: threads read that and the images."""
    root = fill(tmp_path / "data", 128, 128, codec=codec)
    for a, b in zip(take(loader(root, device="gpu"), 20), take(loader(root, backend="auto"), 20), strict=True):
        for x, y in zip(a, b, strict=True):
            error = (x.cpu().float() - y.float()).abs()
            assert x.is_cuda and (error.max() == 0 if limit == 0 else error.mean() < limit)
