"""The prepare command: every kind of source gives the right frames; kills, repeats, full disks do no harm."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from rlv2v.data import index, readers, video
from rlv2v.data import prepare as work
from rlv2v.data.readers import DaliReader, PyAVReader
from rlv2v.data.video import write_image
from rlv2v.data.workers import run_all
from rlv2v.errors import UserError
from rlv2v.prepare import Args, main

N, HEIGHT, WIDTH, BITS = 24, 64, 96, 6


def stamped(num: int = N, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A clip whose frame t shows t in binary: BITS columns, dark for 0 and light for 1, upper half inverted."""
    bits = (np.arange(num)[:, None] >> np.arange(BITS)) & 1
    column = np.arange(width) * BITS // width
    lower = 40 + 176 * bits[:, column]  # (T,W)
    rows = np.arange(height)[None, :, None]
    grey = np.where(rows < height // 2, 256 - lower[:, None], lower[:, None])
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)


def stamps(frames: np.ndarray) -> list[int]:
    """The number that each frame of (T,H,W,3) shows; -1 where the halves do not agree."""
    height, width = frames.shape[1:3]
    at = (np.arange(BITS) * 2 + 1) * width // (2 * BITS)
    lower = frames[:, height * 3 // 4, at, 1] > 128
    upper = frames[:, height // 4, at, 1] < 128
    numbers = (lower << np.arange(BITS)).sum(1)
    return [int(n) if agree else -1 for n, agree in zip(numbers, (lower == upper).all(1), strict=True)]


def encode(
    path: Path,
    clip: np.ndarray,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    *,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    **options: str,
) -> None:
    """Encode at 10 frames a second, or frame t at `times[t]` tenths of a second."""
    faststart = {"movflags": "+faststart"} if path.suffix in (".mp4", ".mov") else {}
    with av.open(str(path), "w", options=faststart) as output:
        stream = output.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = clip.shape[1], clip.shape[2], pixels
        if rotation:
            stream.set_display_rotation(rotation)
        for t, frame in enumerate(clip):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = t if times is None else times[t], Fraction(1, 10)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))


VFR = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 25, 26, 27, 30, 33, 36, 39, 42, 43, 44, 45]
CODECS: dict[str, tuple[str, str, dict[str, str]]] = {
    "h264.mp4": ("libx264", "yuv420p", {"bf": "3"}),
    "hevc.mp4": ("libx265", "yuv420p", {"x265-params": "log-level=none"}),
    "av1.mp4": ("libsvtav1", "yuv420p", {"preset": "12", "svtav1-params": "lp=1"}),
    "vp8.webm": (
        "libvpx",
        "yuv420p",
        {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "good", "cpu-used": "5"},
    ),
    "vp9.webm": ("libvpx-vp9", "yuv420p", {"auto-alt-ref": "1", "lag-in-frames": "16", "cpu-used": "5"}),
    "mpeg4.avi": ("mpeg4", "yuv420p", {"bf": "2"}),
    "mpeg2.ts": ("mpeg2video", "yuv420p", {"bf": "2"}),
    "mjpeg.mov": ("mjpeg", "yuvj420p", {}),
    "prores.mov": ("prores_ks", "yuv422p10le", {}),
    "ten bits.mp4": ("libx264", "yuv420p10le", {}),
    "full chroma.mkv": ("libx264", "yuv444p", {}),
    "anim.gif": ("gif", "rgb8", {}),
}


def nearest(times: Sequence[float], fps: float, num: int) -> list[int]:
    """The rule for time, as a loop: of the frames nearest to k/fps the first."""
    return [min(range(len(times)), key=lambda i: (round(abs(times[i] - k / fps), 6), i)) for k in range(num)]


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of every kind and fault."""
    folder = tmp_path_factory.mktemp("prepare") / "src" / "trainX"
    folder.mkdir(parents=True)
    clip = stamped()
    for name, (codec, pixels, options) in CODECS.items():
        if codec not in av.codecs_available:
            continue
        if name == "mpeg2.ts":  # MPEG-2 knows no 10 frames a second
            with av.open(str(folder / name), "w") as output:
                stream = output.add_stream(codec, rate=25, options=options)
                stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, pixels
                for frame in clip:
                    output.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
                output.mux(stream.encode(None))
        else:
            encode(folder / name, clip, codec, pixels, **options)
    encode(folder / "odd.mkv", stamped(height=63, width=95), "libx264", "yuv444p")
    encode(folder / "rotated.mp4", clip, rotation=90)
    encode(folder / "vfr.mp4", clip, times=VFR)
    for part, size in ((clip[:10], (64, 96)), (clip[10:], (96, 144))):
        scaled = np.stack([video.resize(f, size[1], size[0]) for f in part])
        encode(folder / f"part{size[0]}.h264", scaled, "libx264", "yuv420p", bf="0")
    parts = [folder / "part64.h264", folder / "part96.h264"]
    (folder / "size change.h264").write_bytes(b"".join(p.read_bytes() for p in parts))
    for part in parts:
        part.unlink()
    encode(folder / "cut.mp4", clip, g="4", bf="0", crf="1")
    whole = (folder / "cut.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) * 4 // 5])
    (folder / "frames").mkdir()
    for t, frame in enumerate(clip):
        write_image(folder / "frames" / f"frame{t}.png", frame)
    np.save(folder / "array.npy", clip)
    encode(folder / "größe\n東京 -.mp4", clip[:8])
    encode(folder / "short.mp4", clip[:3])
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    (folder / "empty").mkdir()
    return folder.parent


EXCLUDED = {
    "short.mp4": "3 frames, fewer than --frames 4",
    "zero.mp4": "cannot be opened as a video",
    "text.mp4": "cannot be opened as a video",
    "empty": "a folder without images",
}


def rows_of(out: Path) -> dict[str, dict]:
    return {Path(row["source"]).name: row for row in json.loads((out / "prepared.json").read_text())["sources"]}


def state(out: Path) -> dict[str, tuple[str, int, int]]:
    """Hash, inode and time of every prepared file."""
    files = [p for p in out.rglob("*") if p.is_file() and p.name != "prepared.json"]
    return {
        str(p.relative_to(out)): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_ino, p.stat().st_mtime_ns)
        for p in files
    }


def contents(out: Path) -> dict[str, str]:
    return {name: sha for name, (sha, _, _) in state(out).items()}


@pytest.fixture(scope="module", params=["raw", "video"])
def prepared(request: pytest.FixtureRequest, src: Path) -> tuple[str, Path]:
    out = src.parent / request.param
    main(Args(src, out, size=32, store=request.param, frames=4, jobs=2))
    return request.param, out


def test_every_source_gives_the_right_frames(src: Path, prepared: tuple[str, Path]) -> None:
    store, out = prepared
    rows = rows_of(out)
    assert set(rows) == {p.name for p in (src / "trainX").iterdir()}
    for name, reason in EXCLUDED.items():
        row = rows.pop(name)
        assert row["status"] == "excluded" and reason in row["reason"] and row["output"] == "", row
    assert len({row["output"] for row in rows.values()}) == len(rows) >= 20
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
        assert stamps(frames) == expected, name
        if name not in ("vfr.mp4", "mpeg2.ts", "frames", "array.npy", "size change.h264"):
            assert row["fps"] == 10, row


def test_the_video_store_is_what_dali_and_nvdec_read(prepared: tuple[str, Path]) -> None:
    store, out = prepared
    if store == "raw":
        pytest.skip("of the other store")
    for path in sorted((out / "trainX").iterdir()):
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.size]
            about = stream.codec_context
            assert (stream.codec_context.name, about.pix_fmt) in (("vp9", "yuv420p"), ("libvpx-vp9", "yuv420p"))
            assert min(about.width, about.height) >= 128 and not about.width % 2 and not about.height % 2
            assert about.colorspace in (5, 6) and about.color_range == 1, (about.colorspace, about.color_range)
        keys = [t for t, packet in enumerate(packets) if packet.is_keyframe]
        assert keys[0] == 0 and max(np.diff([*keys, len(packets)])) <= 12, keys
        steps = set(np.diff([p.pts for p in packets]))
        assert len(steps) == 1 and all(p.pts == p.dts for p in packets), steps
        source = index.inspect(path)
        assert source.dali and source.status == "ok"
        if readers.has_dali():
            a, b = (reader.read(source, 0, source.num_frames) for reader in (DaliReader(), PyAVReader()))
            luma = [frames @ np.array([0.299, 0.587, 0.114]) for frames in (a, b)]
            assert 10 * np.log10(255**2 / max(np.mean((luma[0] - luma[1]) ** 2), 1e-9)) > 40, path.name


def test_names_are_safe_and_tell_the_source(prepared: tuple[str, Path]) -> None:
    _, out = prepared
    names = {Path(name).stem: Path(row["output"]).name for name, row in rows_of(out).items() if row["output"]}
    assert names["größe\n東京 -"].startswith("größe_東京-") and names["ten bits"].startswith("ten_bits-")
    assert all(not set(name) & set(" \n\t/\\:*?\"'<>|") and not name.startswith((".", "-")) for name in names.values())


def test_colours_survive(tmp_path: Path) -> None:
    """A mix-up of BT.601 with BT.709, or of limited with full range, costs far more than these bounds."""
    y, x = np.mgrid[:128, :128] / 128
    picture = np.stack([255 * x, 255 * y, 255 * (1 - x)], -1).astype(np.uint8)
    (tmp_path / "src" / "clip").mkdir(parents=True)
    for t in range(3):
        write_image(tmp_path / "src" / "clip" / f"{t}.png", picture)
    main(Args(tmp_path / "src", tmp_path / "raw", size=128, store="raw", jobs=1))
    main(Args(tmp_path / "src", tmp_path / "video", size=128, store="video", jobs=1))
    np.testing.assert_array_equal(np.load(next((tmp_path / "raw" / "trainX").iterdir()))[1], picture)
    found = list(video.read_frames(next((tmp_path / "video" / "trainX").iterdir())))[1]
    assert np.abs(found.astype(float) - picture).mean() < 2.5, np.abs(found.astype(float) - picture).mean()


def test_a_second_run_makes_and_reads_nothing(
    src: Path, prepared: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = prepared
    before, seen = state(out), []
    survey = work.survey
    monkeypatch.setattr(work, "survey", lambda path, fps: (seen.append(path.name), survey(path, fps))[1])
    main(Args(src, out, size=32, store="auto", frames=4, jobs=1))
    assert state(out) == before and f"0 made, {len(before)} already there" in capsys.readouterr().out
    assert set(seen) == set(EXCLUDED) - {"short.mp4"}, "only what could not be used is tried again"
    with pytest.raises(UserError, match=r"was prepared with --size 32 --store \w+; give the same"):
        main(Args(src, out, size=48, store="auto", jobs=1))
    assert state(out) == before


@pytest.mark.parametrize("fps", [4, 5, 25, 29.97])
def test_fps_takes_the_nearest_frame(tmp_path: Path, fps: float) -> None:
    (tmp_path / "src").mkdir()
    encode(tmp_path / "src" / "even.mp4", stamped())
    encode(tmp_path / "src" / "vfr.mp4", stamped(), times=VFR)
    main(Args(tmp_path / "src", tmp_path / "out", size=32, store="raw", fps=fps, jobs=1, into="trainY"))
    rows = rows_of(tmp_path / "out")
    for name, times in (("even.mp4", range(N)), ("vfr.mp4", VFR)):
        seconds = [t / 10 for t in times]
        length = seconds[-1] * N / (N - 1)  # the last frame is shown for the average step
        expected = nearest(seconds, fps, round(length * fps))
        assert stamps(np.load(tmp_path / "out" / rows[name]["output"])) == expected
        assert rows[name]["fps"] == pytest.approx(fps) and rows[name]["output"].startswith("trainY/")


def test_packet_times_and_decoded_times_agree(src: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quick way to a frame's time must give what the frames say themselves."""
    for path in sorted((src / "trainX").iterdir()):
        source = index.inspect(path)
        if source.kind != "video" or source.status == "excluded":
            continue
        with av.open(str(path)) as container:
            shown = [f.time for f, _ in zip(container.decode(video=0), range(source.num_frames), strict=False)]
        if None in shown or (np.diff(shown) <= 0).any():
            shown = [t / source.fps for t in range(source.num_frames)]
        np.testing.assert_allclose(work.frame_times(source), np.array(shown) - shown[0], atol=1e-6, err_msg=path.name)


class Stdin:
    """A terminal on which `answer` is typed, or none."""

    def __init__(self, answer: str | None) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return self.answer is not None

    def readline(self) -> str:
        assert self.answer is not None, "nobody may be asked"
        return self.answer


def layout(root: Path, names: Sequence[str]) -> Path:
    for seed, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for num, clip in (("1", stamped(6 + seed)), ("2", stamped(9 + seed))):
            encode(root / name / f"{num}.mp4", clip)
    return root


def test_cyclegan_layout_becomes_ours_and_pairs_keep_one_name(tmp_path: Path) -> None:
    src = layout(tmp_path / "src", ("trainA", "trainB", "testA", "testTruth"))
    (src / "trainS").mkdir()
    for t in range(3):
        write_image(src / "trainS" / f"still {t}.jpg", stamped()[t])
    for name in ("valA", "valTruth"):  # loose images: one video, named after its folder
        (src / name).mkdir()
        for t in range(3):
            write_image(src / name / f"{t}.png", stamped()[t if name == "valA" else t + 3])
    main(Args(src, tmp_path / "out", size=32, store="raw", jobs=1))
    out = {p.name: sorted(f.name for f in p.iterdir()) for p in (tmp_path / "out").iterdir() if p.is_dir()}
    sizes = {"trainX": 2, "trainY": 2, "testX": 2, "testTruth": 2, "trainS": 3, "valX": 1, "valTruth": 1}
    assert {name: len(names) for name, names in out.items()} == sizes and out["valX"] == out["valTruth"]
    assert out["testX"] == out["testTruth"] and not set(out["trainX"]) & set(out["trainY"])
    stills = [video.read_image(tmp_path / "out" / "trainS" / name) for name in out["trainS"]]
    assert [s.shape for s in stills] == [(32, 48, 3)] * 3 and stamps(np.stack(stills)) == [0, 1, 2]
    data = index.open_dataset(tmp_path / "out", frames=6)
    assert [len(data.sets[k]) for k in "xyzs"] == [2, 2, 0, 3] and not data.excluded
    (src / "trainX").mkdir()
    with pytest.raises(UserError, match="of which two mean the same set"):
        main(Args(src, tmp_path / "out2", jobs=1))


def wait_for_group(group: int) -> None:
    """Until no process of the group is left: workers must not outlive their parent."""
    end = time.monotonic() + 20
    with suppress(ProcessLookupError):
        while True:
            os.killpg(group, 0)
            assert time.monotonic() < end, "a worker outlives its parent"
            time.sleep(0.02)


def test_killed_in_the_middle_it_goes_on_to_the_same_result(tmp_path: Path) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    clip = np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8)
    for num in range(12):
        np.save(src / f"{num}.npy", np.roll(clip, num, axis=0))
    main(Args(src, tmp_path / "whole", size=64, store="video", jobs=1))
    command = [sys.executable, "-m", "rlv2v.prepare", str(src), str(out), "--store", "video", "--jobs", "2"]
    for stop in (signal.SIGKILL, signal.SIGINT):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        before = len(list(out.glob("trainX/[0-9]*.mp4")))
        end = time.monotonic() + 60
        while len(list(out.glob("trainX/[0-9]*.mp4"))) <= before or not list(out.glob("trainX/.*")):
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.002)
        if stop == signal.SIGKILL:
            process.kill()
        else:
            os.killpg(process.pid, stop)  # as a terminal does it
        said = process.communicate(timeout=30)[1].decode()
        wait_for_group(process.pid)
        done = contents(out)
        if stop == signal.SIGINT:
            assert process.returncode == 130 and "stopped; the same command goes on" in said
            assert not list(out.glob("*/.*")), "Ctrl-C leaves no half file"
        assert 0 < len([name for name in done if "/." not in name]) < 12
    kept = state(out)
    main(Args(src, out, size=64, store="video", jobs=1))
    assert contents(out) == contents(tmp_path / "whole") and len(contents(out)) == 12
    assert all(state(out)[name] == value for name, value in kept.items()), "what was whole is not made again"


def test_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    encode(src / "a.mp4", stamped())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(sys, "stdin", Stdin(None))
    with pytest.raises(UserError, match=r"are needed, .* are free; free space, use --store video .* or give --yes"):
        main(Args(src, out, store="raw", jobs=1))
    assert contents(out) == {}

    monkeypatch.setattr(sys, "stdin", Stdin("\n"))
    with pytest.raises(UserError, match="nothing was written"):
        main(Args(src, out, store="raw", jobs=1))
    assert contents(out) == {}
    monkeypatch.setattr(sys, "stdin", Stdin("y\n"))
    main(Args(src, out, store="raw", jobs=1))
    assert len(contents(out)) == 1
    monkeypatch.setattr(sys, "stdin", Stdin(None))
    main(Args(src, tmp_path / "yes", store="raw", jobs=1, yes=True))
    assert contents(tmp_path / "yes") == contents(out)


def test_auto_takes_raw_while_half_the_disk_holds_it_and_stays_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    src = tmp_path / "src"
    src.mkdir()
    encode(src / "a.mp4", stamped())
    usage, raw = shutil.disk_usage(tmp_path), 4096 + N * 64 * 96 * 3
    for free, store, why in ((2 * raw, "raw", "at most 50%"), (2 * raw - 2, "video", "more than 50%")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        main(Args(src, tmp_path / store, jobs=1))
        assert f"{store} (raw needs" in (said := capsys.readouterr().out) and why in said
    main(Args(src, tmp_path / "raw", jobs=1))
    assert "0 made, 1 already there" in capsys.readouterr().out, "less free disk does not change what was chosen"


def test_a_full_disk_ends_the_run_and_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    np.save(tmp_path / "src" / "a.npy", np.random.default_rng(0).integers(0, 256, (40, 64, 96, 3), dtype=np.uint8))
    limit = "import resource, signal; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
    run = "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from rlv2v.prepare import *; run_command(main, Args)"
    for store in ("raw", "video"):
        flags = [str(tmp_path / "src"), str(tmp_path / store), "--store", store, "--jobs", "1"]
        done = subprocess.run([sys.executable, "-c", limit + run, *flags], capture_output=True, text=True)
        assert done.returncode == 2 and "File too large; free space or choose another" in done.stderr, done.stderr
        assert contents(tmp_path / store) == {}


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    src, out = tmp_path / "src", tmp_path / "out"
    src.mkdir()
    encode(src / "a.mp4", stamped())
    encode(src / "b.mp4", stamped(9))
    main(Args(src, out, store="raw", jobs=1))
    damaged = out / rows_of(out)["a.mp4"]["output"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    encode(src / "b.mp4", stamped(12))
    shutil.copy(src / "a.mp4", src / "a.mov")
    before = state(out)
    main(Args(src, out, store="raw", jobs=1))
    assert all(state(out)[name] == value for name, value in before.items()) and len(state(out)) == 3
    rows, said = rows_of(out), capsys.readouterr().out
    assert [row["status"] for row in rows.values()].count("excluded") == 1 and "the same bytes as a.mov" in said
    failed = next(row for row in rows.values() if row["status"] == "failed")
    assert "is there but damaged; remove it" in failed["reason"]
    assert said.count("not from these sources") == 1 and "b-" in said.split("not from these sources")[1].split(";")[0]
    (out / "prepared.json").write_text("{")
    with pytest.raises(UserError, match=r"prepared.json: cannot be read as this command's report"):
        main(Args(src, out, store="raw", jobs=1))


def test_mistakes_are_named(tmp_path: Path) -> None:
    src = tmp_path / "src"
    (src / "empty").mkdir(parents=True)
    (src / "bad.mp4").write_text("no")
    out = tmp_path / "out"
    for changes, message in (
        ({}, r"src: nothing usable: bad.mp4: cannot be opened.*; empty: a folder without images"),
        ({"src": tmp_path / "none"}, "none: no such folder"),
        ({"size": 0}, "--size: expected 1 to 4096, got 0"),
        ({"fps": 0.0}, "--fps: expected more than 0"),
        ({"fps": float("nan")}, "--fps: expected more than 0"),
        ({"into": "trainA"}, "--into: expected trainX"),
        ({"jobs": -1}, "--jobs: expected 0 to 1024"),
        ({"out": src / "inside"}, "lies in the source folder"),
        ({"out": src / "bad.mp4"}, "is a file; expected a folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            main(Args(**{"src": src, "out": out, "jobs": 1, **changes}))
        assert "\n" not in str(caught.value)
    assert contents(out) == {} and rows_of(out)["empty"]["status"] == "excluded"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "src").mkdir()
    (tmp_path / "out").mkdir()
    held = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another prepare is writing there"):
        main(Args(tmp_path / "src", tmp_path / "out", jobs=1))
    os.close(held)


def crash_on_two(task: int) -> int:
    if task == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 3:
        raise UserError("three")
    return task


def test_a_crash_costs_one_file() -> None:
    found = dict(run_all(crash_on_two, range(6), 2))
    assert {t: r for t, r in found.items() if not isinstance(r, UserError)} == {t: t for t in (0, 1, 4, 5)}
    assert str(found[3]) == "three" and "its process died" in str(found[2])


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """Peak memory of writing 400 frames, 118 MB, beside that of 4, each in a process of its own."""
    run = "import resource; from rlv2v.prepare import *; main(tyro.cli(Args)); "
    run += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    peaks = []
    for num in (4, 400):
        src, out = tmp_path / f"src{num}", tmp_path / f"out{num}"
        src.mkdir()
        np.save(src / "a.npy", np.arange(num * 16 * 24 * 3).astype(np.uint8).reshape(num, 16, 24, 3))
        flags = [str(src), str(out), "--store", "raw", "--size", "256", "--jobs", "1"]
        done = subprocess.run([sys.executable, "-c", run, *flags], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        assert next(out.glob("trainX/*")).stat().st_size == 128 + num * 256 * 384 * 3
    assert peaks[1] - peaks[0] < 40, f"MiB: {peaks}"
