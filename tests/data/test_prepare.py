"""The prepare command: every kind of source gives the right frames, evenly timed, under names that tell it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data_clips import (
    HEIGHT,
    WIDTH,
    encode,
    numbers_of,
    only_x,
    open_loader,
    prepared_files,
    prepared_rows,
    stamped_clip,
    write_frames,
)

from rlv2v.data import video
from rlv2v.data.dali import has_dali
from rlv2v.data.index import examine, index_folder, open_dataset
from rlv2v.data.prepare import plan
from rlv2v.data.prepare.convert import frame_times
from rlv2v.data.writer import write_image
from rlv2v.errors import UserError
from rlv2v.prepare import Args, main

N = 24
CLIP = stamped_clip(range(N))
VFR = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 25, 26, 27, 30, 33, 36, 39, 42, 43, 44, 45]
LAGGED = {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"}
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": "3"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "12", "svtav1-params": "lp=1"}),
    "vp8.webm": ("libvpx", "yuv420p", {**LAGGED, "deadline": "good"}),
    "vp9.webm": ("libvpx-vp9", "yuv420p", LAGGED),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {"bf": "2"}),
    "mjpeg.mov": ("mjpeg", "yuvj420p", {}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "ten bits.mp4": ("libx264", "yuv420p10le", {}),
    "full chroma.mkv": ("libx264", "yuv444p", {}),
    "anim.gif": ("gif", "rgb8", {}),
}
EXCLUDED = {
    "short.mp4": "3 frames, fewer than --frames 4",
    "zero\n.mp4": "the file is empty",
    "text.mp4": "cannot be opened as a video",
    "empty": "a folder without images",
}


def nearest(times: Sequence[float], fps: float, num: int) -> list[int]:
    """The rule for time, as a loop: of the frames nearest to k/fps the first."""
    return [min(range(len(times)), key=lambda i: (round(abs(times[i] - k / fps), 6), i)) for k in range(num)]


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of every kind and fault."""
    folder = tmp_path_factory.mktemp("prepare") / "src" / "trainX"
    folder.mkdir(parents=True)
    for name, (codec, pixels, options) in CODECS.items():
        if codec in av.codecs_available:  # MPEG-2 knows no 10 frames a second
            encode(folder / name, CLIP, codec, pixels, rate=25 if name == "mpeg2.ts" else 10, **options)
    encode(folder / "odd.mkv", stamped_clip(range(N), 95, 63), "libx264", "yuv444p")
    encode(folder / "rotated.mp4", CLIP, rotation=90)
    encode(folder / "vfr.mp4", CLIP, times=VFR)
    small, large = folder / "small.h264", folder / "large.h264"
    encode(small, CLIP[:10], bf="0")
    encode(large, stamped_clip(range(10, N), 144, 96), bf="0")
    (folder / "size change.h264").write_bytes(small.read_bytes() + large.read_bytes())
    small.unlink()
    large.unlink()
    encode(folder / "cut.mp4", CLIP, faststart=True, g="4", bf="0", crf="1")
    content = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) * 4 // 5])
    write_frames(folder / "frames", CLIP)
    np.save(folder / "array.npy", CLIP)
    encode(folder / "größe\n東京 -.mp4", CLIP[:8])
    encode(folder / "short.mp4", CLIP[:3])
    (folder / "zero\n.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty").mkdir()
    return folder.parent


@pytest.fixture(scope="module", params=["raw", "video"])
def prepared(request: pytest.FixtureRequest, src: Path) -> tuple[str, Path]:
    out = src.parent / request.param
    main(Args(src, out, size=32, store=request.param, frames=4, jobs=2))
    return request.param, out


def test_every_source_gives_the_right_frames(src: Path, prepared: tuple[str, Path]) -> None:
    store, out = prepared
    rows = prepared_rows(out)
    assert set(rows) == {p.name for p in (src / "trainX").iterdir()}
    for name, reason in EXCLUDED.items():
        row = rows.pop(name)
        assert row["status"] == "excluded" and reason in row["reason"] and row["output"] == "", row
    outputs = {name: Path(row["output"]).name for name, row in rows.items()}
    assert len(set(outputs.values())) == len(rows) >= 20
    assert outputs["größe\n東京 -.mp4"].startswith("größe_東京-") and outputs["ten bits.mp4"].startswith("ten_bits-")
    assert not [n for n in outputs.values() if set(n) & set(" \n\t/\\:*?\"'<>|") or n.startswith((".", "-"))]
    for name, row in rows.items():
        assert row["status"] == "made", row
        path = out / row["output"]
        assert path.suffix == {"raw": ".npy", "video": ".mp4"}[store]
        frames = np.stack(list(video.read_frames(path)))
        if store == "raw":
            assert np.load(path).dtype == np.uint8 and path.stat().st_size == frames.nbytes + 128 == row["bytes"]
        turned = name == "rotated.mp4"
        side = 32 if store == "raw" else 128
        long = round(95 / 63 * side) if name == "odd.mkv" else side * 3 // 2
        long += long % 2 if store == "video" else 0
        assert frames.shape[1:3] == ((long, side) if turned else (side, long)), (name, frames.shape)
        assert (row["height"], row["width"]) == frames.shape[1:3] and row["frames"] == len(frames), name
        expected = list(range({"größe\n東京 -.mp4": 8}.get(name, N)))
        if name == "vfr.mp4":
            expected = nearest([t / 10 for t in VFR], (N - 1) / 4.5, N)
            assert expected != sorted(set(expected)), "the case must repeat frames"
            assert row["fps"] == pytest.approx((N - 1) / 4.5, rel=1e-4)
        elif name == "cut.mp4":
            assert 4 <= len(frames) < N and row["reason"], row
            expected = expected[: len(frames)]
        if turned:
            with av.open(str(src / "trainX" / name)) as container:
                angle = next(container.decode(video=0)).rotation
            assert abs(angle) == 90, "the file must carry the rotation"
            frames = np.rot90(frames, -angle // 90, axes=(1, 2))
        assert numbers_of(frames) == expected, name
        if name not in ("vfr.mp4", "mpeg2.ts", "frames", "array.npy", "size change.h264"):
            assert row["fps"] == 10, row


@pytest.mark.parametrize("prepared", ["video"], indirect=True)
def test_the_video_store_is_what_dali_and_nvdec_read(prepared: tuple[str, Path]) -> None:
    _, out = prepared
    for path in sorted((out / "trainX").iterdir()):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.size]
            context = stream.codec_context
            assert (context.name, context.pix_fmt) in (("vp9", "yuv420p"), ("libvpx-vp9", "yuv420p"))
            assert min(context.width, context.height) >= 128 and not context.width % 2 and not context.height % 2
            assert context.colorspace in (5, 6) and context.color_range == 1
        keys = [t for t, packet in enumerate(packets) if packet.is_keyframe]
        assert keys[0] == 0 and max(np.diff([*keys, len(packets)])) <= 12, keys
        steps = set(np.diff([p.pts for p in packets]))
        assert len(steps) == 1 and all(p.pts == p.dts for p in packets), steps
    sources = index_folder(out / "trainX", frames=1)
    assert all(source.dali and source.status == "ok" for source in sources)
    if has_dali():
        options = {"batch": {"x": len(sources)}, "frames": min(s.num_frames for s in sources), "size": 128}
        batches = [next(open_loader(only_x(sources), backend=backend, **options)).x for backend in ("auto", "dali")]
        assert torch.equal(*batches), "the same bits"


def test_colours_survive(tmp_path: Path) -> None:
    """A mix-up of BT.601 with BT.709, or of limited with full range, costs far more than these bounds."""
    y, x = np.mgrid[:128, :128] / 128
    picture = np.stack([255 * x, 255 * y, 255 * (1 - x)], -1).astype(np.uint8)
    write_frames(tmp_path / "src" / "clip", [picture] * 3)
    main(Args(tmp_path / "src", tmp_path / "raw", size=128, store="raw", jobs=1))
    main(Args(tmp_path / "src", tmp_path / "video", size=128, store="video", jobs=1))
    np.testing.assert_array_equal(np.load(next((tmp_path / "raw" / "trainX").iterdir()))[1], picture)
    frame = list(video.read_frames(next((tmp_path / "video" / "trainX").iterdir())))[1]
    assert np.abs(frame.astype(float) - picture).mean() < 2.5


def test_a_second_run_makes_and_reads_nothing(
    src: Path, prepared: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = prepared
    files, seen = prepared_files(out), []
    survey = plan.survey_source
    monkeypatch.setattr(plan, "survey_source", lambda path, fps: (seen.append(path.name), survey(path, fps))[1])
    main(Args(src, out, size=32, store="auto", frames=4, jobs=1))
    lines = capsys.readouterr().out.splitlines()
    assert prepared_files(out) == files and f"{out}: 0 made, {len(files)} already there, 4 left out" in lines
    assert f"left out: {src}/trainX/zero\\n.mp4: the file is empty (0 bytes)" in lines, "a name cannot break a line"
    assert any(line.startswith("in part: ") and "cut.mp4: " in line for line in lines)
    assert set(seen) == set(EXCLUDED) - {"short.mp4"}, "only what could not be used is tried again"
    with pytest.raises(UserError, match=r"was prepared with --size 32 --store \w+; give the same"):
        main(Args(src, out, size=48, store="auto", jobs=1))
    assert prepared_files(out) == files


@pytest.mark.parametrize("fps", [4, 5, 25, 29.97])
def test_fps_takes_the_nearest_frame(tmp_path: Path, fps: float) -> None:
    (tmp_path / "src").mkdir()
    encode(tmp_path / "src" / "even.mp4", CLIP)
    encode(tmp_path / "src" / "vfr.mp4", CLIP, times=VFR)
    main(Args(tmp_path / "src", tmp_path / "out", size=32, store="raw", fps=fps, jobs=1, into="trainY"))
    rows = prepared_rows(tmp_path / "out")
    for name, times in (("even.mp4", range(N)), ("vfr.mp4", VFR)):
        seconds = [t / 10 for t in times]
        length = seconds[-1] * N / (N - 1)  # the last frame is shown for the average step
        expected = nearest(seconds, fps, round(length * fps))
        assert numbers_of(np.load(tmp_path / "out" / rows[name]["output"])) == expected
        assert rows[name]["fps"] == pytest.approx(fps) and rows[name]["output"].startswith("trainY/")


def test_packet_times_and_decoded_times_agree(src: Path) -> None:
    """The quick way to a frame's time must give the times of the decoded frames."""
    for path in sorted((src / "trainX").iterdir()):
        source = examine(path, None, threading.Event()).source
        if source.kind != "video" or source.status == "excluded":
            continue
        with av.open(str(path)) as container:
            shown = [f.time for f, _ in zip(container.decode(video=0), range(source.num_frames), strict=False)]
        if None in shown or (np.diff(shown) <= 0).any():
            shown = [t / source.fps for t in range(source.num_frames)]
        np.testing.assert_allclose(frame_times(source), np.array(shown) - shown[0], atol=1e-6, err_msg=path.name)


def test_cyclegan_layout_becomes_ours_and_pairs_share_a_name(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for seed, name in enumerate(("trainA", "trainB", "testA", "testTruth")):
        (src / name).mkdir(parents=True)
        encode(src / name / "1.mp4", CLIP[: 6 + seed])
        encode(src / name / "2.mp4", CLIP[: 9 + seed])
    (src / "trainS").mkdir()
    for t in range(3):
        write_image(src / "trainS" / f"still {t}.jpg", CLIP[t])
    write_frames(src / "valA", CLIP[:3])  # loose images: one video, named after its folder
    write_frames(src / "valTruth", CLIP[3:6])
    main(Args(src, tmp_path / "out", size=32, store="raw", jobs=1))
    out = {p.name: sorted(f.name for f in p.iterdir()) for p in (tmp_path / "out").iterdir() if p.is_dir()}
    sizes = {"trainX": 2, "trainY": 2, "testX": 2, "testTruth": 2, "trainS": 3, "valX": 1, "valTruth": 1}
    assert {name: len(names) for name, names in out.items()} == sizes and out["valX"] == out["valTruth"]
    assert out["testX"] == out["testTruth"] and not set(out["trainX"]) & set(out["trainY"])
    stills = [video.read_image(tmp_path / "out" / "trainS" / name) for name in out["trainS"]]
    assert [s.shape for s in stills] == [(32, WIDTH * 32 // HEIGHT, 3)] * 3 and numbers_of(stills) == [0, 1, 2]
    data = open_dataset(tmp_path / "out", frames=6)
    assert [len(data.sets[k]) for k in "xyzs"] == [2, 2, 0, 3] and not data.excluded
    (src / "trainX").mkdir()
    with pytest.raises(UserError, match="of which two mean the same set"):
        main(Args(src, tmp_path / "out2", jobs=1))
