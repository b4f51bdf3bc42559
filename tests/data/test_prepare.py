"""The prepare command: every kind of source gives the right frames, evenly timed, under names that tell it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data_clips import (
    HEIGHT,
    WIDTH,
    by_name,
    encode,
    numbers_of,
    only_x,
    open_loader,
    prepared_files,
    prepared_rows,
    stamped_clip,
    write_frames,
)
from odd_files import Expected

from rlv2v.data import prepare, video
from rlv2v.data.dali import decodes, has_dali
from rlv2v.data.images import read_image, write_image
from rlv2v.data.index import index_folder, open_dataset
from rlv2v.data.readers import FrameReader
from rlv2v.errors import UserError
from rlv2v.prepare import Args, main

N = 24
CLIP = stamped_clip(range(N))
VFR = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 25, 26, 27, 30, 33, 36, 39, 42, 43, 44, 45]
Corpus = tuple[Path, dict[str, Expected]]


def nearest(times: Sequence[float], fps: float, num: int) -> list[int]:
    """The rule for time, as a loop: of the frames nearest to k/fps the first."""
    return [min(range(len(times)), key=lambda i: (round(abs(times[i] - k / fps), 6), i)) for k in range(num)]


@pytest.fixture(scope="module", params=["raw", "video"])
def prepared(request, odd_files, tmp_path_factory) -> tuple[str, Path]:  # type: ignore[no-untyped-def]
    out = tmp_path_factory.mktemp(request.param)
    main(Args(odd_files[0] / "trainX", out, size=32, store=request.param, frames=4, jobs=2))
    return request.param, out


def test_every_source_gives_the_right_frames(odd_files: Corpus, prepared: tuple[str, Path]) -> None:
    (_, expected), (store, out) = odd_files, prepared
    rows, outputs, reader = prepared_rows(out), set(), FrameReader()
    sources = by_name(index_folder(odd_files[0] / "trainX", frames=1))
    assert rows.keys() == expected.keys()
    assert "1 frames, fewer than --frames 4" in rows.pop("one_frame.mp4")["reason"]
    for name, row in rows.items():
        about = expected[name]
        if about.status == "excluded":
            assert (row["status"], row["output"]) == ("excluded", "") and re.search(about.reason, row["reason"]), row
            continue
        assert row["status"] == "made" and bool(row["reason"]) == (about.status == "truncated"), row
        path = out / row["output"]
        outputs.add(path.name)
        assert path.suffix == {"raw": ".npy", "video": ".mp4"}[store]
        frames = np.stack(list(video.read_frames(path)))
        if store == "raw":
            assert np.load(path).dtype == np.uint8 and path.stat().st_size == frames.nbytes + 128 == row["bytes"]
            if not name.startswith("vfr"):
                read = reader.read(sources[name], 0, len(frames), (row["width"], row["height"]))
                np.testing.assert_array_equal(frames, read, f"{name}: not what training would read")
        scale = (32 if store == "raw" else 128) / min(about.height, about.width)
        shape = [round(side * scale) for side in (about.height, about.width)]
        shape = shape if store == "raw" else [side + side % 2 for side in shape]
        assert [*frames.shape[1:3]] == [row["height"], row["width"]] == shape, (name, frames.shape)
        assert row["frames"] == len(frames) and about.frames[0] <= len(frames) <= about.frames[1], row
        numbers, rate = list(range(len(frames))), 10.0
        if name.startswith("vfr"):
            times = [n * n / 100 if name == "vfr.webm" else (10 * n + 3 * (n % 3)) / 100 for n in numbers]
            numbers, rate = nearest(times, 19 / times[-1], 20), 19 / times[-1]
            assert len(set(numbers)) < 20 or name == "vfr.mp4", "the case must repeat frames"
        if name != "1x1.mp4":  # too small to carry a number that survives the scaling
            assert numbers_of(frames) == numbers, name
        if about.status == "ok" and name.endswith((".mp4", ".webm", ".mov")):
            assert row["fps"] == pytest.approx(rate, rel=1e-3), row
    assert len(outputs) >= 40 and {name.rpartition("-")[0] for name in outputs} >= {"ünïcödé_動画", "new_line", "flag"}
    assert not [n for n in outputs if set(n) & set(" \n\t/\\:*?\"'<>|") or n.startswith((".", "-"))]


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
    assert all(decodes(source, "cpu") and source.status == "ok" for source in sources)
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
    odd_files: Corpus, prepared: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (src, expected), (_, out) = odd_files, prepared
    files, seen = prepared_files(out), []
    survey = prepare.survey_source
    monkeypatch.setattr(prepare, "survey_source", lambda path, fps: (seen.append(path.name), survey(path, fps))[1])
    main(Args(src / "trainX", out, size=32, store="auto", frames=4, jobs=1))
    lines = capsys.readouterr().out.splitlines()
    assert prepared_files(out) == files
    assert f"{out}: 0 made, {len(files)} already there, {len(expected) - len(files)} left out" in lines
    assert f"left out: {src}/trainX/zero.mp4: the file is empty (0 bytes)" in lines
    assert any(line.startswith("in part: ") and "cut_h264.mp4: " in line for line in lines)
    excluded = {name for name, about in expected.items() if about.status == "excluded"}
    assert set(seen) == excluded, "only what could not be used is tried again"
    with pytest.raises(UserError, match=r"was prepared with --size 32 --store \w+; give the same"):
        main(Args(src / "trainX", out, size=48, store="auto", jobs=1))
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
    stills = [read_image(tmp_path / "out" / "trainS" / name) for name in out["trainS"]]
    assert [s.shape for s in stills] == [(32, WIDTH * 32 // HEIGHT, 3)] * 3 and numbers_of(stills) == [0, 1, 2]
    data = open_dataset(tmp_path / "out", frames=6)
    assert [len(data.sets[k]) for k in "xyzs"] == [2, 2, 0, 3] and not data.excluded
    (src / "trainX").mkdir()
    with pytest.raises(UserError, match="of which two mean the same set"):
        main(Args(src, tmp_path / "out2", jobs=1))
