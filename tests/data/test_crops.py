"""Crops of unequal sides: what `--size` takes, and which window of which scaled frame a clip is."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from data_clips import open_loader, write_frames

from rlv2v.crop_size import CropSize
from rlv2v.data.images import write_image
from rlv2v.data.index import Dataset, open_dataset
from rlv2v.data.loader import evaluation_clips
from rlv2v.data.prepare.convert import Format
from rlv2v.data.scaling import cover_size, fit_size, resize, shrink
from rlv2v.data.video import read_frames
from rlv2v.errors import UserError
from rlv2v.prepare import Args, main

T = 4
CROP = CropSize(48, 80)
SCALED = {"4x3": (80, 60), "16x9": (85, 48), "anamorphic": (85, 48), "portrait": (80, 142), "frames": (96, 48)}
"""Width and height of each source of X, scaled to cover the crop; of the third, 96x72 with pixels of 4:3."""
SOURCES = {"4x3": (128, 96), "16x9": (192, 108), "anamorphic": (96, 72), "portrait": (108, 192), "frames": (144, 72)}


@pytest.mark.parametrize(
    ("typed", "sides"),
    [
        ("64", (64, 64)),
        ("64x64", (64, 64)),
        ("96x160", (96, 160)),
        ("160x96", (160, 96)),
        (48, (48, 48)),
        ("0", (0, 0)),
    ],
)
def test_what_size_takes(typed: int | str, sides: tuple[int, int]) -> None:
    size = CropSize.of(typed)
    assert (size.height, size.width, size.short_side) == (*sides, min(sides))
    assert CropSize.of(size) is size and CropSize.of(size.plain) == size
    assert isinstance(size.plain, int) == (sides[0] == sides[1]) == size.is_square
    assert str(size) == repr(size) == str(size.plain)


@pytest.mark.parametrize(
    "typed",
    [
        *("", "x", "64x", "x64", "64x64x3", "64X96", "64 x 96", "64*96", "-64x64", "6.5", "big", "64x96\n", "123456"),
        *("\u0661\u0666", None, 6.5, (64, 96)),
    ],
)
def test_what_it_refuses(typed: Any) -> None:
    with pytest.raises(UserError, match=r"--size: expected a side as 64, or height x width as 96x160, got "):
        CropSize.of(typed)


def test_the_nearest_sides_that_work_are_named() -> None:
    assert CropSize(20, 20).multiples_near(8) == "16 or 24"
    assert CropSize(12, 12).multiples_near(16) == "16"
    assert CropSize(96, 165).multiples_near(16) == "96 high and 160 or 176 wide"


def test_a_scaled_frame_just_covers_the_crop_and_a_square_is_as_it_was() -> None:
    rng = np.random.default_rng(0)
    for width, height, rows, columns in rng.integers(8, 2000, (2000, 4)).tolist():
        scaled = cover_size(width, height, CropSize(rows, columns))
        assert scaled[0] >= columns and scaled[1] >= rows and (scaled[0] == columns or scaled[1] == rows)
        scale = max(Fraction(columns, width), Fraction(rows, height))
        assert max(abs(scaled[0] - width * scale), abs(scaled[1] - height * scale)) <= Fraction(1, 2)
        short = min(width, height)  # the rule of before there were rectangles
        was = max(rows, round(width * rows / short)), max(rows, round(height * rows / short))
        assert cover_size(width, height, CropSize(rows, rows)) == fit_size(width, height, rows) == was
    assert cover_size(1280, 720, CropSize(96, 160)) == (171, 96)
    assert cover_size(720, 1280, CropSize(96, 160)) == (160, 284)


def ramps(frames: int, width: int, height: int) -> np.ndarray:
    """Return a clip (T,H,W,3) whose red tells the column, from 0 to 250, green the row, and blue the frame."""
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[..., 0] = np.rint(250 * (np.arange(width) + 0.5) / width)
    clip[..., 1] = np.rint(250 * (np.arange(height) + 0.5) / height)[:, None]
    clip[..., 2] = 10 * np.arange(frames)[:, None, None]
    return clip


def write_lossless(path: Path, clip: np.ndarray, aspect: Fraction = Fraction(1)) -> None:
    """Write a clip with the pixel aspect ratio in the container, as VP9 has none."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("libvpx-vp9", rate=10, options={"lossless": "1", "cpu-used": "8"})
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], "gbrp"
        stream.codec_context.sample_aspect_ratio = aspect
        for frame in clip:
            output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        output.mux(stream.encode(None))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """X: a video of each shape, and a folder of frames; Y and S: in portrait."""
    root = tmp_path_factory.mktemp("data")
    for name in ("trainX", "trainY", "trainS"):
        (root / name).mkdir()
    for name, sides in SOURCES.items():
        aspect = Fraction(4, 3) if name == "anamorphic" else Fraction(1)
        if name == "frames":
            write_frames(root / "trainX" / name, ramps(6, *sides))
        else:
            write_lossless(root / "trainX" / f"{name}.mp4", ramps(6, *sides), aspect)
    write_lossless(root / "trainY" / "portrait.mp4", ramps(6, 54, 96))
    write_image(root / "trainS" / "still.png", ramps(1, 90, 160)[0])
    return root


@pytest.fixture(scope="module")
def data(root: Path) -> Dataset:
    return open_dataset(root, frames=T)


OPTIONS: dict[str, Any] = {"batch": {"x": 5, "y": 1, "s": 1}, "size": CROP}


@pytest.mark.parametrize(
    ("height", "width", "halvings"), [(720, 1280, 1), (1440, 1280, 1), (718, 1279, 0), (640, 640, 0)]
)
def test_a_small_picture_is_that_of_resize_to_a_level_or_so(height: int, width: int, halvings: int) -> None:
    y, x = np.mgrid[:height, :width]
    wave = 128 + 60 * np.sin(x / 40) * np.cos(y / 30) + 40 * ((x // 90 + y // 70) % 2)
    image = (wave[..., None] + [0, 10, -10]).clip(0, 255).astype(np.uint8)
    small = shrink(image, 112, 72)
    error = np.abs(small.astype(int) - resize(image, 112, 72))
    assert small.shape == (72, 112, 3) and error.mean() < 0.5 and error.max() <= 6
    assert (error.max() > 0) == bool(halvings), "it is exact where nothing is halved"


def test_a_clip_is_a_window_of_the_frames_scaled_to_cover_it(data: Dataset) -> None:
    loader, seen = open_loader(data, **OPTIONS), set()
    for _ in range(4):
        samples, clips = loader.sampler.samples("x", loader.step), next(loader).x
        assert clips is not None and clips.shape == (5, T, 48, 80, 3)
        for sample, clip in zip(samples, clips.numpy(), strict=True):
            name = sample.source.path.stem
            width, height = SCALED[name]
            frames = np.stack(list(read_frames(sample.source.path, size=(width, height))))[sample.start :][:T]
            top, left = (math.floor(s * (n + 1)) for s, n in zip(sample.crop, (height - 48, width - 80), strict=True))
            expected = frames[:, top : top + 48, left : left + 80]
            expected = expected[:, :, ::-1] if sample.flips[0] else expected
            np.testing.assert_array_equal(clip, expected, err_msg=name)
            # independent of any scaler: the ramps say where in the source each row and column lies
            columns = clip[..., 0].mean((0, 1)) / 250 * width
            columns = columns[::-1] if sample.flips[0] else columns
            rows = clip[..., 1].mean((0, 2)) / 250 * height
            assert np.abs(columns - left - np.arange(80) - 0.5).max() < 1, name
            assert np.abs(rows - top - np.arange(48) - 0.5).max() < 1, name
            seen.add(name)
    assert seen == set(SOURCES)
    loader.close()


def test_stills_and_clips_in_portrait_are_covered_by_their_width(data: Dataset) -> None:
    batch = next(open_loader(data, **OPTIONS))
    assert batch.y is not None and batch.s is not None
    assert batch.y.shape == (1, T, 48, 80, 3) and batch.s.shape == (1, 48, 80, 3)
    for frame in (batch.y[0, 0], batch.s[0]):
        across = frame[..., 0].float().mean(0)
        assert across.min() < 5 and across.max() > 245, "the whole width"
        assert frame[..., 1].float().mean(1).diff().sum() < 130, "of the height a part"


def test_addresses_threads_cache_and_resume_are_those_of_squares(data: Dataset) -> None:
    square, wide = (open_loader(data, **OPTIONS | {"size": size, "batch": {"x": 3}}) for size in (16, "48x80"))
    assert all(square.sampler.samples("x", k) == wide.sampler.samples("x", k) for k in range(9))
    expected = [next(wide).x for _ in range(6)]
    other = open_loader(data, **OPTIONS | {"batch": {"x": 3}}, threads=3, cache_mib=0)
    state = other.state_dict()
    assert state["size"] == "48x80" and square.state_dict()["size"] == 16, "as checkpoints of squares have it"
    assert all(torch.equal(next(other).x, x) for x in expected[:4])
    state = other.state_dict()
    resumed = open_loader(data, **OPTIONS | {"batch": {"x": 3}})
    resumed.load_state_dict(state)
    assert all(torch.equal(next(resumed).x, x) for x in expected[4:])
    with pytest.raises(UserError, match="resume: size must stay as saved: expected 48x80, got 80x48"):
        open_loader(data, **OPTIONS | {"batch": {"x": 3}, "size": "80x48"}).load_state_dict(state)


def test_a_transposed_rectangle_is_refused(data: Dataset) -> None:
    with pytest.raises(UserError, match="augment: expected none or flip for crops of 48x80, got dihedral"):
        open_loader(data, **OPTIONS, augment="dihedral")


def test_samples_are_the_middle(root: Path) -> None:
    clips = dict(evaluation_clips(root / "trainX", frames=T, size=CROP))
    assert {clip.shape for clip in clips.values()} == {(T, 48, 80, 3)}
    for name, (width, height) in SCALED.items():
        for channel, side, length in ((0, 80, width), (1, 48, height)):
            middle = clips[name][..., channel].mean() / 250
            assert abs(middle - 0.5) < 1 / length, name
            extent = float(np.ptp(clips[name][0, ..., channel].astype(int))) / 250
            assert abs(extent - (side - 1) / length) < 2 / length, name


def test_prepared_videos_cover_the_crop_and_load_as_the_originals(root: Path, data: Dataset, tmp_path: Path) -> None:
    main(Args(root, tmp_path, size=CROP, store="raw", jobs=1))
    prepared = open_dataset(tmp_path, frames=T)
    sizes = {source.path.name.split("-")[0]: (source.width, source.height) for source in prepared.sets["x"]}
    assert sizes == SCALED and all(source.kind == "raw" for source in prepared.sets["x"])
    for first, second in zip(open_loader(data, **OPTIONS), open_loader(prepared, **OPTIONS), strict=False):
        assert torch.equal(first.x, second.x) and torch.equal(first.s, second.s)
        break
    with pytest.raises(UserError, match="was prepared with --size 48x80 --store raw; give the same"):
        main(Args(root, tmp_path, size=CropSize(80, 48), store="raw", jobs=1))


def test_prepared_vp9_covers_what_gpus_need_too(data: Dataset) -> None:
    sources = {source.path.stem: source for source in data.sets["x"]}
    assert Format(CROP, "video", None).target_size(sources["16x9"]) == (228, 128)
    assert Format(CropSize(96, 300), "video", None).target_size(sources["16x9"]) == (300, 170), "169, made even"
    assert Format(CropSize(64, 64), "video", None).target_size(sources["4x3"]) == (172, 128), "171, made even"
