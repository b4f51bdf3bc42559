"""The DALI graph: the draws of the CPU path, the exact frames, resume, and what is built for a GPU."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import av
import numpy as np
import pytest
import torch
from odd_files import trim

from rlv2v.data import dali as graph
from rlv2v.data import readers
from rlv2v.data.dali import GraphReader, Options, new_graph, nvdec_takes, route_of
from rlv2v.data.index import Source, index_folder, open_dataset
from rlv2v.data.loader import Batch, Loader
from rlv2v.data.readers import FrameReader
from rlv2v.data.sampler import Draw
from rlv2v.data.writer import write_clip, write_image
from rlv2v.errors import UserError

pytestmark = pytest.mark.skipif(not readers.has_dali(), reason="DALI is not made for this platform")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
T = 4
CODECS = {
    "h264": ("libx264", {"g": "9", "bf": "2", "crf": "12"}),
    "vp9": ("libvpx-vp9", {"g": "12", "crf": "10", "b": "0", "auto-alt-ref": "0", "lag-in-frames": "0"}),
}


def encode(path: Path, clip: np.ndarray, codec: str) -> None:
    """Write (T,H,W,3) as yuv420p, the way `rlv2v.prepare` would."""
    name, options = CODECS[codec]
    with av.open(str(path), "w") as output:
        stream = output.add_stream(name, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "yuv420p"
        for frame in clip:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


def smooth(frames: int, height: int, width: int, phase: float = 0) -> np.ndarray:
    """Moving waves with some detail, so that neighbouring frames differ and codecs keep them."""
    t, y, x = np.mgrid[:frames, :height, :width].astype(float)
    waves = [
        128 + 100 * np.sin(x / width * 9 + t + phase),
        128 + 80 * np.cos(y / height * 12 + t / 2),
        60 + 140 * x / width,
    ]
    return np.stack(waves, -1).astype(np.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.square(a.astype(float) - b).mean(), 1e-9)))


def luma(frames: np.ndarray) -> np.ndarray:
    return frames @ np.array([0.299, 0.587, 0.114])


def fill(root: Path, kind: str, height: int = 24, width: int = 40) -> Path:
    """X and Y of three sources of one kind, S of two images."""
    for name in ("trainX", "trainY", "trainS"):
        (root / name).mkdir(parents=True)
    for k in range(6):
        clip, at = smooth(3 * T + k, height, width + 2 * k, k), root / ("trainX", "trainY")[k % 2] / f"clip {k}"
        if kind == "raw":
            np.save(at.with_suffix(".npy"), clip)
        elif kind == "video":
            write_clip(at.with_suffix(".mp4"), clip, 8, "vp9-lossless")
        else:
            at.mkdir()
            for t, frame in enumerate(clip):
                write_image(at / f"{t}.png", frame)
    for k in range(2):
        write_image(root / "trainS" / f"{k}.png", smooth(1, height, width, k)[0])
    return root


def loader(root: Path, **changes: object) -> Loader:
    options: dict[str, object] = {"batch": {"x": 3, "y": 2, "s": 2}, "frames": T, "size": 24, "seed": 0, **changes}
    return Loader(open_dataset(root, frames=T), **{"backend": "dali", **options})  # type: ignore[arg-type]


def tensors(batch: Batch) -> list[torch.Tensor]:
    return [getattr(batch, name) for name in "xys"]


def take(source: Iterator[Batch], num: int) -> list[list[torch.Tensor]]:
    return [tensors(next(source)) for _ in range(num)]


def same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> bool:
    return all(torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


KINDS = ["raw", "video", "frames"]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_resize_the_graph_gives_the_bits_of_the_cpu_path(tmp_path: Path, kind: str) -> None:
    root = fill(tmp_path / "with space", kind)
    ours, theirs = loader(root, augment="dihedral"), loader(root, augment="dihedral", backend="auto")
    assert ours._readers["x"].options.route == kind  # type: ignore[attr-defined]
    assert ours._readers["s"].options.route == "frames"  # type: ignore[attr-defined]
    assert same(take(ours, 20), take(theirs, 20))
    drawn = {d.flips for step in range(20) for d in ours.draws("x", step)}
    assert len(drawn) == 8, "every way to flip occurred"
    ours.close()


@pytest.mark.parametrize(("height", "width", "size", "least"), [(96, 128, 32, 45), (24, 40, 32, 45)])
def test_resampling_is_close_to_the_cpu_path(tmp_path: Path, height: int, width: int, size: int, least: float) -> None:
    """A triangle filter where OpenCV takes the mean of the area: 48 dB and more here, 29 without antialiasing."""
    root = fill(tmp_path / "data", "raw", height, width)
    for file in root.rglob("*.npy"):  # detail that only antialiasing takes out
        clip = np.load(file) // 2
        np.save(file, clip + 20 * (np.indices(clip.shape).sum(0) % 2).astype(np.uint8))
    ours, theirs = (
        loader(root, augment="dihedral", size=size),
        loader(root, augment="dihedral", size=size, backend="auto"),
    )
    for a, b in zip(take(ours, 8), take(theirs, 8), strict=True):
        for x, y in zip(a, b, strict=True):
            for clip, other in zip(x.numpy(), y.numpy(), strict=True):
                assert psnr(clip, other) >= least
        assert max(psnr(a[0][k].numpy(), np.roll(b[0][k].numpy(), 1, axis=-2)) for k in range(3)) < 34, "a shift shows"


@pytest.mark.parametrize("kind", KINDS)
def test_resume_threads_and_the_ends_of_lists_change_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fill(tmp_path / "data", kind)
    whole = loader(root, size=16)
    expected = take(whole, 40)
    monkeypatch.setattr(graph, "CHUNK", 1)  # lists of 4 steps
    short = loader(root, size=16, threads=3)
    assert same(take(short, 19), expected[:19])
    resumed = loader(root, size=16, threads=2)
    next(resumed)
    resumed.load_state_dict(short.state_dict())
    assert same(take(resumed, 21), expected[19:])
    for source in (whole, short, resumed):
        source.close()


def test_the_next_list_is_ready_before_the_first_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "CHUNK", 48)  # 16 steps of X
    source = loader(fill(tmp_path / "data", "raw"), batch={"x": 3})
    reader = source._readers["x"]
    assert isinstance(reader, GraphReader)
    take(source, 13)
    first, ahead = reader._run, reader._next
    assert first is not None and ahead is not None and first.left == 3
    following = ahead.result()
    take(source, 4)
    assert reader._run is following and following is not first


def sources_of(folder: Path, codec: str, num: int, height: int, width: int) -> list[Source]:
    """Videos of one codec whose frames tell file and number in black and white blocks, 6 bits each."""
    for k in range(num):
        clip = np.zeros((40, height, width, 3), np.uint8)
        for t in range(40):
            for bit in range(6):
                x = bit * width // 6
                clip[t, : height // 2, x : x + width // 6] = 235 * (k >> bit & 1)
                clip[t, height // 2 :, x : x + width // 6] = 235 * (t >> bit & 1)
        encode(folder / f"{k}.mp4", clip, codec)
    return index_folder(folder, frames=T)


def stamp(frame: np.ndarray) -> tuple[int, int]:
    """(file, frame number) that a frame (H,W,3) of `sources_of` shows."""
    height, width = frame.shape[:2]
    columns = [bit * width // 6 + width // 12 for bit in range(6)]
    file, number = (
        sum(int(frame[row, x].mean() > 117) << bit for bit, x in enumerate(columns))
        for row in (height // 4, 3 * height // 4)
    )
    return file, number


def graph_reader(sources: list[Source], draws: list[Draw], device: Literal["cpu", "gpu"], size: int) -> GraphReader:
    """A reader of one draw a step."""

    def at(step: int) -> tuple[Draw, ...]:
        return (draws[step % len(draws)],)

    def no_read(draw: Draw) -> None:
        raise AssertionError("PyAV must not be asked")

    return GraphReader(sources, at, at, no_read, batch=1, frames=T, size=size, device=device)  # type: ignore[arg-type]


DEVICES = [("cpu", "vp9"), pytest.param("gpu", "vp9", marks=needs_cuda), pytest.param("gpu", "h264", marks=needs_cuda)]


@pytest.mark.parametrize(("device", "codec"), DEVICES)
def test_the_video_route_gives_exactly_the_drawn_frames(
    tmp_path: Path, device: Literal["cpu", "gpu"], codec: str
) -> None:
    sources = sources_of(tmp_path, codec, 5, 128, 128)
    rng = np.random.default_rng(0)
    picks = [(int(rng.integers(5)), int(rng.integers(40 - T + 1))) for _ in range(400)]
    draws = [Draw(sources[k], start, (0.0, 0.0), (False, False, False)) for k, start in picks]
    reader = graph_reader(sources, draws, device, 128)
    for step, (k, start) in enumerate(picks):
        reader.prepare(step)
        (clip,) = reader.take(step).cpu().numpy()
        assert [stamp(frame) for frame in clip] == [(k, start + t) for t in range(T)]
    reader.close()


@pytest.mark.parametrize(("device", "codec"), DEVICES)
def test_decoded_frames_are_those_of_pyav(tmp_path: Path, device: Literal["cpu", "gpu"], codec: str) -> None:
    encode(tmp_path / "a.mp4", smooth(30, 128, 192), codec)
    (source,) = index_folder(tmp_path, frames=T)
    starts = [0, 1, 7, 12, 13, 25]
    draws = [Draw(source, start, (0.0, 0.0), (False, False, False)) for start in starts]
    reader = graph_reader([source], draws, device, 128)
    everything = luma(FrameReader().read(source, 0, 30)[:, :, :128])
    for step, start in enumerate(starts):
        reader.prepare(step)
        (clip,) = luma(reader.take(step).cpu().numpy())
        for t in range(T):
            right = psnr(clip[t], everything[start + t])
            beside = [psnr(clip[t], everything[i]) for i in (start + t - 1, start + t + 1) if 0 <= i < 30]
            assert right >= 40 and max(beside) < 30
    reader.close()


def test_routes(tmp_path: Path) -> None:
    for codec in CODECS:
        (tmp_path / codec).mkdir()
        encode(tmp_path / codec / "a.mp4", smooth(8, 128, 128), codec)
        encode(tmp_path / codec / "b.mp4", smooth(8, 64, 128), codec)
    write_clip(tmp_path / "h264" / "c.mp4", smooth(8, 128, 128), 8)  # BT.709
    write_clip(tmp_path / "vp9" / "c.mp4", smooth(8, 128, 128), 8, "vp9-lossless")  # planar RGB
    h264, vp9 = (index_folder(tmp_path / codec, frames=T) for codec in ("h264", "vp9"))
    assert [nvdec_takes(source) for source in h264] == [True, True, False]
    assert [nvdec_takes(source) for source in vp9] == [True, False, False], "NVDEC takes VP9 from 128x128 on, 4:2:0"
    assert [route_of(vp9, "cpu"), route_of(h264, "cpu"), route_of(vp9 + h264, "cpu")] == ["video", "frames", "frames"]
    assert [route_of(vp9, "gpu"), route_of(vp9[:1] + h264[:2], "gpu")] == ["frames", "video"]
    for codec, device in (("h264", "gpu"), ("vp9", "gpu"), ("vp9", "cpu")):
        path = tmp_path / f"{codec} {device}" / "a.mp4"
        path.parent.mkdir()
        shutil.copy(tmp_path / codec / "a.mp4", path)
        assert route_of(index_folder(path.parent, frames=T), device) == "video"
        trim(path, 3)
        (source,) = index_folder(path.parent, frames=T)
        assert (source.status, source.num_frames, route_of([source], device)) == ("ok", 5, "frames")
    np.save(tmp_path / "raw.npy", smooth(8, 16, 16))
    (raw,) = (s for s in index_folder(tmp_path, frames=T) if s.kind == "raw")
    os.truncate(raw.path, raw.num_bytes - 1)
    (cut,) = (s for s in index_folder(tmp_path, frames=T) if s.kind == "raw")
    assert [route_of([raw], "cpu"), route_of([raw, cut], "cpu")] == ["raw", "frames"]


def fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a protocol buffer message: (number, content)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(message):
        number, kind = divmod(varint(), 8)
        if kind == 2:
            size = varint()
            yield number, message[at : at + size]
            at += size
        elif kind == 0:
            varint()
        else:
            at += struct.calcsize("<d" if kind == 1 else "<f")


def operators(serialised: bytes) -> dict[str, tuple[str, str]]:
    """First output -> (operator, device) of a serialised pipeline; its operators are field 5, their outputs field 3."""
    found = {}
    for operator in (list(fields(content)) for number, content in fields(serialised) if number == 5):
        name = next(content for number, content in operator if number == 1).decode()
        first = dict(fields(next(content for number, content in operator if number == 3)))
        found[first[1].decode().removesuffix("[0]")] = (name, first[2].decode())
    return found


@pytest.mark.parametrize("route", KINDS)
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_the_serialised_graph_differs_in_reader_and_device_alone(tmp_path: Path, device: str, route: str) -> None:
    (tmp_path / "list.txt").write_text("none.mp4 0 0 4\n")
    listed = {"raw": ["none.npy"], "video": str(tmp_path / "list.txt"), "frames": None}[route]
    built = new_graph(Options(route, device, batch=2, frames=T, size=16), listed)  # type: ignore[arg-type]
    found = operators(built.serialize())
    assert (
        found["reader"]
        == {
            "raw": ("readers__Numpy", "cpu"),
            "video": ("experimental__readers__Video", device),
            "frames": ("ExternalSource", "cpu"),
        }[route]
    )
    assert {name: found[name] for name in ("resize", "crop", "flips", "turned")} == {
        "resize": ("Resize", device),
        "crop": ("Slice", device),
        "flips": ("Flip", device),
        "turned": ("Transpose", device),
    }
    assert {where for op, where in found.values() if op == "_ArithmeticGenericOp"} == {device}
    assert {name for name, (op, _) in found.items() if op == "ExternalSource"} >= {
        "target",
        "corner",
        "flip",
        "transpose",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_said(tmp_path: Path) -> None:
    root = fill(tmp_path / "data", "raw")
    with pytest.raises(UserError, match="device gpu: expected a CUDA GPU, found none"):
        loader(root, device="gpu")
    with pytest.raises(UserError, match="device: expected cpu or gpu, got tpu"):
        loader(root, device="tpu")


@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_gives_the_batches_of_the_cpu(tmp_path: Path, kind: str) -> None:
    root = fill(tmp_path / "data", kind)
    for a, b in zip(take(loader(root, device="gpu", size=16), 20), take(loader(root, size=16), 20), strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.is_cuda and (x.cpu().int() - y.int()).abs().max() <= 1
