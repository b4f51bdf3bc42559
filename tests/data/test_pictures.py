"""Pictures as players show them: upright, square, deinterlaced, in the right colours, on black where transparent."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from heic import write_heic
from priority import usual_priority

from rlv2v.data.images import write_image
from rlv2v.data.index import index_folder
from rlv2v.data.readers import FrameReader
from rlv2v.data.video import probe, read_frames, timed_frames
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.translate import Args, main

LEVELS = 3


def write(
    path: Path,
    frames: list[av.VideoFrame],
    codec: str = "libx264",
    setup: Callable[[Any], None] = lambda stream: None,
    **options: str,
) -> Path:
    """Write frames as they are, 10 a second, nearly without losses."""
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream(codec, rate=10, options={"crf": "1", "g": "5", **options})
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, frames[0].format.name
        stream.codec_context.thread_count = 1
        setup(stream)
        for number, frame in enumerate(frames):
            frame.pts, frame.time_base = number, Fraction(1, 10)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def planes(luma: Any, cb: Any, cr: Any, form: str = "yuv444p", size: tuple[int, int] = (64, 48)) -> av.VideoFrame:
    """Return a frame of constant codes."""
    frame = av.VideoFrame(*size, form)
    dtype = "<u2" if "10le" in form else "u1"
    for plane, value in zip(frame.planes, (luma, cb, cr), strict=False):
        np.frombuffer(plane, dtype)[:] = value
    return frame


def rgb_frame(image: np.ndarray, form: str = "yuv444p") -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(format=form)


def quadrants(height: int = 48, width: int = 64) -> np.ndarray:
    """Return a picture whose corners differ, so that no turn or flip leaves it as it is."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2], image[: height // 2, width // 2 :] = 255, 170
    image[height // 2 :, : width // 2] = 85
    return image


def middle(path: Path) -> np.ndarray:
    """Return the colour in the middle of the first frame, of the plain reader and of the one of training."""
    frame = next(read_frames(path))
    (source,) = [s for s in index_folder(path.parent, frames=1) if s.path == path]
    np.testing.assert_array_equal(FrameReader().read(source, 0, 1)[0], frame)
    return frame[frame.shape[0] // 2, frame.shape[1] // 2].astype(int)


@pytest.mark.parametrize("hflip", [False, True])
@pytest.mark.parametrize("vflip", [False, True])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_every_turn_and_flip_of_the_display_matrix(tmp_path: Path, degrees: int, hflip: bool, vflip: bool) -> None:
    image = quadrants()
    turned = np.rot90(image, degrees // 90)
    shown = turned[:: -1 if vflip else 1, :: -1 if hflip else 1]
    path = write(
        tmp_path / "a.mp4",
        [rgb_frame(image) for _ in range(3)],
        setup=lambda stream: stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip),
    )
    (source,) = index_folder(tmp_path, frames=1)
    assert (source.height, source.width) == shown.shape[:2]
    for frame in (next(read_frames(path)), FrameReader().read(source, 1, 1)[0]):
        assert np.abs(frame.astype(int) - shown).mean() < LEVELS


def test_a_selfie_is_translated_as_it_is_shown(tiny_run: Path, tmp_path: Path) -> None:
    frames = [rgb_frame(quadrants()) for _ in range(3)]
    path = write(tmp_path / "a.mp4", frames, setup=lambda s: s.set_display_rotation(90, hflip=True))
    main(Args(tiny_run, path, tmp_path / "out.mp4"))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert next(container.decode(video=0)).side_data.get("DISPLAYMATRIX") is None
    shown = np.rot90(quadrants())[:, ::-1]
    assert np.abs(next(read_frames(tmp_path / "out.mp4")).astype(int) - shown).mean() < LEVELS


@pytest.mark.parametrize("degrees", [0, 90])
def test_pixel_aspect_is_kept_and_trained_on_as_square(tiny_run: Path, tmp_path: Path, degrees: int) -> None:
    def setup(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = Fraction(3, 2)
        stream.set_display_rotation(degrees)

    path = write(tmp_path / "a.mp4", [rgb_frame(quadrants()) for _ in range(3)], setup=setup)
    (source,) = index_folder(tmp_path, frames=1)
    square = (96, 48) if degrees == 0 else (48, 96)
    assert (source.width, source.height) == square
    assert next(read_frames(path)).shape == FrameReader().read(source, 0, 1)[0].shape == (*square[::-1], 3)
    main(Args(tiny_run, path, tmp_path / "out.mp4"))
    out = probe(tmp_path / "out.mp4")
    assert (out.width, out.height, out.pixel_aspect) == (
        (64, 48, Fraction(3, 2)) if degrees == 0 else (48, 64, Fraction(2, 3))
    )


WHITE_BALANCE = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]])


def pq(nits: float) -> float:
    """Return the code of SMPTE ST 2084, in [0, 1]."""
    root = (nits / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * root) / (1 + 2392 / 128 * root)) ** (2523 / 32)


def screen(nits: float) -> float:
    """Return the 8-bit level of a grey by BT.2390 from 1000 to 203 cd/m2, for a screen of exponent 2.4."""
    peak, x = 203 / 1000, min(pq(nits) / pq(1000), 1)
    most = pq(203) / pq(1000)
    knee = 1.5 * most - 0.5
    if x >= knee:
        t = (x - knee) / (1 - knee)
        x = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (-2 * t**3 + 3 * t**2) * most
    low, high = 0.0, 1000.0
    for _ in range(60):
        half = (low + high) / 2
        low, high = (half, high) if pq(half) < x * pq(1000) else (low, half)
    return 255 * min(low / 1000 / peak, 1) ** (1 / 2.4)


def hdr(curve: ColorTrc, level: float, cb: float = 0, cr: float = 0) -> av.VideoFrame:
    """Return a frame of 10 bits, BT.2020 limited range."""
    frame = planes(round(64 + 876 * level), round(512 + 896 * cb), round(512 + 896 * cr), "yuv420p10le")
    frame.color_trc, frame.color_primaries, frame.colorspace = curve, ColorPrimaries.BT2020, 9
    frame.color_range = ColorRange.MPEG
    return frame


def hdr_setup(curve: ColorTrc) -> Callable[[Any], None]:
    def setup(stream: Any) -> None:
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = curve, ColorPrimaries.BT2020, 9
        context.color_range = ColorRange.MPEG

    return setup


@pytest.mark.parametrize("nits", [0, 1, 20, 100, 203, 500, 1000, 4000])
def test_pq_is_tone_mapped(tmp_path: Path, nits: float) -> None:
    curve = ColorTrc.SMPTE2084
    path = write(tmp_path / "a.mp4", [hdr(curve, pq(nits))] * 2, setup=hdr_setup(curve))
    np.testing.assert_allclose(middle(path), screen(nits), atol=LEVELS)


def test_hlg_is_tone_mapped_and_its_white_is_that_of_pq(tmp_path: Path) -> None:
    curve = ColorTrc.ARIB_STD_B67
    for name, level, nits in (("white", 0.75, 203), ("peak", 1.0, 1000), ("grey", 0.5, (1 / 12) ** 1.2 * 1000)):
        path = write(tmp_path / f"{name}.mp4", [hdr(curve, level)] * 2, setup=hdr_setup(curve))
        np.testing.assert_allclose(middle(path), screen(nits), atol=LEVELS)


def test_hdr_colours_are_those_of_bt709(tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A red of BT.709 at 60 cd/m2, below the knee, so that nothing but its primaries change."""
    light = 60 * np.array([0.9, 0.1, 0.1])
    wide = np.linalg.solve(WHITE_BALANCE, light)
    red, green, blue = (pq(max(value, 0)) for value in wide)
    luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
    curve = ColorTrc.SMPTE2084
    frame = hdr(curve, luma, (blue - luma) / 1.8814, (red - luma) / 1.4746)
    path = write(tmp_path / "a.mp4", [frame] * 2, setup=hdr_setup(curve))
    expected = 255 * (light / 203) ** (1 / 2.4)
    np.testing.assert_allclose(middle(path), expected, atol=LEVELS)
    with caplog.at_level(logging.WARNING):
        main(Args(tiny_run, path, tmp_path / "out.mp4"))
    assert caplog.text.count("HDR (PQ)") == 1
    np.testing.assert_allclose(middle(tmp_path / "out.mp4"), expected, atol=LEVELS)


@pytest.mark.parametrize(("height", "matrix"), [(576, Colorspace.ITU601), (720, Colorspace.ITU709)])
def test_untagged_pictures_are_bt709_from_720_lines_on(tmp_path: Path, height: int, matrix: Colorspace) -> None:
    image = np.full((height, 64, 3), (200, 40, 90), np.uint8)
    frame = av.VideoFrame.from_ndarray(image, format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=matrix, dst_color_range=ColorRange.MPEG)
    frame.colorspace, frame.color_range = 2, ColorRange.UNSPECIFIED
    path = write(tmp_path / "a.mp4", [frame] * 2)
    np.testing.assert_allclose(middle(path), (200, 40, 90), atol=LEVELS)


def tagged(path: Path, codec: str, matrix: int, num: int = 2, **options: str) -> Path:
    """Write a red picture of BT.601 that says its matrix has that number."""
    frame = av.VideoFrame.from_ndarray(np.full((96, 128, 3), (200, 40, 90), np.uint8), format="rgb24")
    frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG)
    frame.colorspace = matrix
    with usual_priority():
        return write(path, [frame] * num, codec, lambda s: setattr(s.codec_context, "colorspace", matrix), **options)


@pytest.mark.skipif("libsvtav1" not in av.codecs_available, reason="this PyAV has no encoder that takes any number")
@pytest.mark.parametrize("matrix", [3, 32, 255])
def test_a_matrix_that_has_no_meaning_is_no_tag(tmp_path: Path, matrix: int) -> None:
    path = tagged(tmp_path / "a.mp4", "libsvtav1", matrix, preset="12", **{"svtav1-params": "lp=1"})
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).colorspace == matrix
    np.testing.assert_allclose(middle(path), (200, 40, 90), atol=LEVELS)
    frame = next(timed_frames(path, deinterlace="on")).rgb
    np.testing.assert_allclose(frame[48, 64], (200, 40, 90), atol=LEVELS)


def test_a_matrix_that_cannot_be_converted_is_refused_by_the_index_as_by_a_reader(tmp_path: Path) -> None:
    path = tagged(tmp_path / "a.mp4", "libx264", 14)
    words = r"a frame of 128x96 yuv420p, matrix 14 of H.273, cannot be converted to RGB: "
    (source,) = index_folder(tmp_path, frames=1)
    assert source.status == "excluded"
    assert re.match(f"no frame can be decoded: decoding stops after frame 0: {words}", source.reason)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}: {words}"):
        next(read_frames(path))


def test_frames_before_one_that_cannot_be_converted_are_used(tmp_path: Path) -> None:
    good, bad = (tagged(tmp_path / f"{matrix}.h264", "libx264", matrix, 5).read_bytes() for matrix in (6, 14))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.h264").write_bytes(good + bad)
    (source,) = index_folder(tmp_path / "set", frames=1)
    assert (source.status, source.num_frames) == ("truncated", 4)
    assert source.reason.startswith("decoding stops after frame 5: a frame of 128x96 yuv420p, matrix 14 of H.273")
    assert FrameReader().read(source, 0, 4).shape == (4, 96, 128, 3)


def combed(number: int) -> np.ndarray:
    """Return an interlaced frame of a bar that moves by 3 pixels from field to field."""
    image = np.full((48, 64, 3), 30, np.uint8)
    for field in (0, 1):
        left = (6 * number + 3 * field) % 40
        image[field::2, left : left + 16] = 220
    return image


def combing(frame: np.ndarray) -> float:
    """Return how far the odd lines are from their neighbours."""
    grey = frame.mean(2)
    return float(np.abs(grey[1:-1:2] - (grey[:-2:2] + grey[2::2]) / 2).mean())


def interlaced(path: Path, tags: bool = True) -> Path:
    options = {"x264-params": "tff=1"} if tags else {}
    return write(path, [rgb_frame(combed(k), "yuv420p") for k in range(12)], **options)


def test_interlaced_pictures_are_deinterlaced_in_translation(tiny_run: Path, tmp_path: Path) -> None:
    path = interlaced(tmp_path / "a.mp4")
    for mode, most, least in (("auto", 3, 0), ("on", 3, 0), ("off", 99, 10)):
        out = tmp_path / f"{mode}.mp4"
        main(Args(tiny_run, path, out, deinterlace=mode))
        frames = list(read_frames(out))
        assert len(frames) == 12 and least <= np.mean([combing(f) for f in frames[1:-1]]) <= most, mode
    hidden = interlaced(tmp_path / "hidden.mp4", tags=False)
    main(Args(tiny_run, hidden, tmp_path / "hidden_auto.mp4"))
    main(Args(tiny_run, hidden, tmp_path / "hidden_on.mp4", deinterlace="on"))
    assert combing(list(read_frames(tmp_path / "hidden_auto.mp4"))[5]) > 10
    assert combing(list(read_frames(tmp_path / "hidden_on.mp4"))[5]) < 3


def test_training_deinterlaces_with_the_bits_of_a_plain_read(tmp_path: Path) -> None:
    path = interlaced(tmp_path / "a.mp4")
    (source,) = index_folder(tmp_path, frames=1)
    assert source.interlaced and source.num_frames == 12
    frames, reader = np.stack(list(read_frames(path))), FrameReader()
    assert len(frames) == 12 and np.mean([combing(f) for f in frames[1:-1]]) < 3
    for start in (5, 0, 8, 4, 9, 10, 2):
        np.testing.assert_array_equal(reader.read(source, start, 2), frames[start : start + 2], f"{start}")


HALF = np.dstack([np.full((48, 64, 3), (200, 60, 120), np.uint8), np.full((48, 64), 128, np.uint8)])
HALF[:, :32, 3] = 0


@pytest.mark.parametrize(
    ("name", "codec", "form"),
    [("a.mov", "prores_ks", "yuva444p10le"), ("a.webm", "libvpx-vp9", "yuva420p"), ("a.mov", "png", "rgba")],
)
def test_transparent_videos_are_on_black(tmp_path: Path, name: str, codec: str, form: str) -> None:
    frame = av.VideoFrame.from_ndarray(HALF, format="rgba").reformat(format=form)
    options = {"profile": "4444"} if codec == "prores_ks" else {}
    path = write(tmp_path / name, [frame] * 3, codec, **options)
    (source,) = index_folder(tmp_path, frames=1)
    for shown in (next(read_frames(path)), FrameReader().read(source, 1, 1)[0]):
        np.testing.assert_allclose(shown[24, 10], 0, atol=LEVELS)
        np.testing.assert_allclose(shown[24, 50], (100, 30, 60), atol=LEVELS)


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_transparent_images_are_on_black(tmp_path: Path, suffix: str) -> None:
    cv2.imwrite(str(tmp_path / f"0.{suffix}"), HALF[..., [2, 1, 0, 3]], [cv2.IMWRITE_WEBP_QUALITY, 101])
    (frame,) = read_frames(tmp_path)
    np.testing.assert_allclose(frame[24, 10], 0, atol=1)
    np.testing.assert_allclose(frame[24, 50], (100, 30, 60), atol=1)


def test_an_opaque_image_keeps_its_bits(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    write_image(tmp_path / "0.png", image)
    cv2.imwrite(str(tmp_path / "1.png"), np.dstack([image[..., ::-1], np.full((9, 7), 255, np.uint8)]))
    for frame in read_frames(tmp_path):
        np.testing.assert_array_equal(frame, image)


@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_an_animated_image_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    animation = cv2.Animation()
    animation.frames = [np.full((16, 16, 3), 40 * k, np.uint8) for k in range(5)]
    animation.durations = np.full(5, 100)
    (tmp_path / "set").mkdir()
    assert cv2.imwriteanimation(str(tmp_path / "set" / f"a.{suffix}"), animation)
    with pytest.raises(UserError, match=rf"a\.{suffix}: an animated image; expected a still one"):
        list(read_frames(tmp_path / "set" / f"a.{suffix}"))
    (source,) = index_folder(tmp_path / "set", frames=1, stills=True)
    assert source.status == "excluded" and "an animated image" in source.reason


@pytest.mark.parametrize("suffix", ["avif", "apng"])
def test_an_animation_that_is_a_video_has_all_frames(tmp_path: Path, suffix: str) -> None:
    animation = cv2.Animation()
    animation.frames = [np.full((16, 16, 3), 40 * k, np.uint8) for k in range(5)]
    animation.durations = np.full(5, 100)
    name = tmp_path / ("a.png" if suffix == "apng" else f"a.{suffix}")
    assert cv2.imwriteanimation(str(name), animation)
    path = name.rename(tmp_path / f"a.{suffix}")
    frames = list(read_frames(path))
    np.testing.assert_allclose([frame.mean() for frame in frames], [0, 40, 80, 120, 160], atol=LEVELS)
    (source,) = index_folder(tmp_path, frames=1)
    assert (source.status, source.num_frames) == ("ok", 5)


@pytest.mark.skipif("libx265" not in av.codecs_available, reason="no encoder")
@pytest.mark.parametrize(("turns", "mirror"), [(0, None), (1, None), (3, 0), (2, 1)])
def test_a_heic_in_tiles_is_whole_and_upright(tmp_path: Path, turns: int, mirror: int | None) -> None:
    image = quadrants(100, 180)  # 2 x 3 tiles, the last ones cut
    write_heic(tmp_path / "a.heic", image, tmp_path / "tile.mp4", turns=turns, mirror=mirror)
    (tmp_path / "tile.mp4").unlink()
    shown = np.rot90(image, turns)
    shown = shown if mirror is None else shown[::-1] if mirror == 0 else shown[:, ::-1]
    (source,) = index_folder(tmp_path, frames=1, stills=True)
    assert (source.kind, source.status, source.height, source.width) == ("image", "ok", *shown.shape[:2])
    assert np.abs(FrameReader().read(source, 0, 1)[0].astype(int) - shown).mean() < LEVELS


def test_a_damaged_heic_is_named(tmp_path: Path) -> None:
    path = write_heic(tmp_path / "a.heic", quadrants(64, 128), tmp_path / "tile.mp4")
    data = path.read_bytes()
    for content in (b"", data[:100], data.replace(b"idat", b"none"), data.replace(b"pitm", b"none"), data[:-700]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.heic: cannot be read as a HEIC picture"):
            list(read_frames(path))


def test_odd_sizes_play_everywhere_unless_asked(tiny_run: Path, tmp_path: Path) -> None:
    image = quadrants(47, 63)
    write_clip(tmp_path / "in.mp4", np.stack([image] * 3), 10)
    main(Args(tiny_run, tmp_path / "in.mp4", tmp_path / "even.mp4"))
    main(Args(tiny_run, tmp_path / "in.mp4", tmp_path / "exact.mp4", exact_size=True))
    for name, form, size in (("even", "yuv420p", (48, 64)), ("exact", "yuv444p", (47, 63))):
        with av.open(str(tmp_path / f"{name}.mp4")) as container:
            assert container.streams.video[0].codec_context.pix_fmt == form
        frame = next(read_frames(tmp_path / f"{name}.mp4"))
        assert frame.shape == (*size, 3)
        expected = np.pad(image, ((0, size[0] - 47), (0, size[1] - 63), (0, 0)), mode="edge")
        assert np.abs(frame.astype(int) - expected)[-2:].mean() < LEVELS > np.abs(frame.astype(int) - expected).mean()
