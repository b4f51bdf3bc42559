"""Make a corpus of broken and odd files, each with what the index shall say of it; frame i carries the number i."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from data_clips import VP9_FAST, encode, stamped, stamped_clip, trim, write_frames

NUM, WIDTH, HEIGHT = 20, 64, 48
CLIP = stamped_clip(range(NUM), WIDTH, HEIGHT)
LONG = 90
VP9 = {k: v for k, v in VP9_FAST.items() if k != "cpu-used"}
LONG_FILES: dict[str, tuple[str, dict[str, str]]] = {
    "b_frames.mp4": ("libx264", {"g": "15", "bf": "3", "b_strategy": "0"}),
    "open_gop.mp4": ("libx264", {"g": "20", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}),
    "one_key.mkv": ("libx264", {"g": "250"}),
    "h264.ts": ("libx264", {"g": "12", "bf": "2"}),
    "b_frames.avi": ("libx264", {"g": "15", "bf": "3", "b_strategy": "0"}),
    "alt_ref_vp8.webm": ("libvpx", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "alt_ref_vp9.webm": ("libvpx-vp9", {"g": "30", "auto-alt-ref": "1", "lag-in-frames": "25"}),
    "b_mpeg4.mp4": ("mpeg4", {"g": "12", "bf": "2"}),
}


@dataclass(frozen=True)
class Expected:
    """Hold what `index_folder` shall say of a file for clips of 1 frame."""

    status: str
    reason: str = ""
    """A regular expression that occurs in the reason; empty: the reason is empty."""
    frames: tuple[int, int] = (NUM, NUM)
    """The fewest and the most that are usable."""
    width: int = WIDTH
    height: int = HEIGHT


def write(
    path: Path,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    clip: Iterable[np.ndarray] = CLIP,
    times: Sequence[int] | None = None,
    **options: Any,
) -> Path:
    """Encode with a key frame every 5, at 10 frames a second or at `times` in 1/100 s, on a clock of 1/100 s."""
    frames = list(clip)
    times = times or [10 * n for n in range(len(frames))]
    encode(path, frames, codec, pix_fmt, times=times, ticks=100, **{"g": "5", **options})
    return path


def hidden_start(num: int) -> list[np.ndarray]:
    """Return the clip with `num` more frames in front, for `trim` to hide."""
    return [CLIP[-1]] * num + list(CLIP)


def sound(path: Path, codec: str) -> None:
    """Write a second of silence."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        output.mux(stream.encode(samples) + stream.encode(None))


def with_cover(path: Path) -> None:
    """Write an MP3 with a picture of its cover: an ID3v2.3 tag with an APIC frame in front."""
    sound(path, "libmp3lame")
    apic = b"\0image/jpeg\0\3\0" + cv2.imencode(".jpg", stamped(0))[1].tobytes()
    frame = b"APIC" + len(apic).to_bytes(4, "big") + b"\0\0" + apic
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\3\0\0" + size + frame + path.read_bytes())


def packet(path: Path, index: int) -> tuple[int, int]:
    """Return (place in the file, size) of a packet."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size][index]


def cut(source: Path, path: Path, index: int) -> None:
    """Copy the file up to the middle of a packet."""
    place, size = packet(source, index)
    path.write_bytes(source.read_bytes()[: place + size // 2])


def flip(source: Path, path: Path, index: int) -> None:
    """Copy the file with the bits of a packet flipped, but for its first 4 bytes, where H.264 stores the length."""
    place, size = packet(source, index)
    data = bytearray(source.read_bytes())
    data[place + 4 : place + size] = bytes(byte ^ 0xA5 for byte in data[place + 4 : place + size])
    path.write_bytes(data)


def two_sizes(path: Path) -> None:
    """Write a stream whose pictures change from 64x48 to 96x80 after frame 10."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=10, options={"bf": "0"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        larger = av.CodecContext.create("libx264", "w")
        larger.width, larger.height, larger.pix_fmt, larger.time_base = 96, 80, "yuv420p", Fraction(1, 10)
        larger.options = {"bf": "0"}
        for encoder, width, height, numbers in ((stream, WIDTH, HEIGHT, range(10)), (larger, 96, 80, range(10, NUM))):
            for n in [*numbers, None]:
                frame = None if n is None else av.VideoFrame.from_ndarray(stamped(n, width, height), format="rgb24")
                if frame is not None:
                    frame.pts, frame.time_base = n, Fraction(1, 10)
                for encoded in encoder.encode(frame):
                    encoded.stream = stream
                    output.mux(encoded)


def intact_files(folder: Path) -> dict[str, Expected]:
    """Write files without a fault."""
    write(folder / "plain.mp4")
    write(folder / "vp9.webm", "libvpx-vp9", **VP9_FAST)
    write(folder / "vp9.mp4", "libvpx-vp9", **VP9_FAST)
    write(folder / "vp8.webm", "libvpx")
    if "libx265" in av.codecs_available:  # below 64 pixels x265 writes outside its memory
        large = stamped_clip(range(NUM), 96, 80)
        write(folder / "hevc.mp4", "libx265", clip=large, **{"x265-params": "log-level=none"})
    if "libsvtav1" in av.codecs_available:
        write(folder / "av1.mp4", "libsvtav1", preset="12", **{"svtav1-params": "lp=1"})
    write(folder / "444.mp4", pix_fmt="yuv444p")
    write(folder / "prores.mov", "prores_ks", "yuv422p10le")
    write(folder / "10bit.mp4", pix_fmt="yuv420p10le")
    write(folder / "mjpeg.avi", "mjpeg", "yuvj420p")
    write(folder / "mpeg4.avi", "mpeg4")
    write(folder / "a.gif", "gif", "rgb8")
    write(folder / "vfr.mp4", times=[10 * n + 3 * (n % 3) for n in range(NUM)])
    write(folder / "vfr.webm", "libvpx-vp9", times=[n * n for n in range(NUM)], **VP9_FAST)
    (folder / "padded.gif").write_bytes((folder / "a.gif").read_bytes() + bytes(150_000))
    for num in (5, 7):  # at a key frame, and between two
        trim(write(folder / f"trimmed{num}.mp4", clip=hidden_start(num), bf="2"), num)
    write(folder / "one_frame.mp4", clip=CLIP[:1])
    write(folder / "1x1.mp4", pix_fmt="yuv444p", clip=stamped_clip(range(10), 1, 1))
    write(folder / "63x47.mp4", pix_fmt="yuv444p", clip=stamped_clip(range(NUM), 63, 47))
    write(folder / "63x47.webm", "libvpx-vp9", clip=stamped_clip(range(NUM), 63, 47), **VP9_FAST)
    for degrees in (90, 180, 270):  # a frame is turned back when it is shown
        coded = [np.rot90(frame, -degrees // 90) for frame in CLIP]
        write(folder / f"rotated{degrees}.mp4", clip=coded, rotation=degrees)
    for name, (codec, options) in LONG_FILES.items():
        write(folder / name, codec, clip=stamped_clip(range(LONG), WIDTH, HEIGHT), **options)
    two_sizes(folder / "sizes.ts")
    write_frames(folder / "frames", CLIP)
    write_frames(folder / "mixed", (stamped(n, WIDTH + n, HEIGHT + 2 * n) for n in range(NUM)))
    np.save(folder / "raw.npy", CLIP)
    data = (folder / "plain.mp4").read_bytes()
    names = ["name with spaces.mp4", "new\nline.mp4", "ünïcödé 動画.mp4", "100%d.mp4", "-flag.mp4", "a:b.mp4"]
    for name in [*names, os.fsdecode(b"\xff.mp4"), "locked.mp4"]:
        (folder / name).write_bytes(data)
    (folder / "link.mp4").symlink_to("plain.mp4")
    (folder / "locked.mp4").chmod(0)
    expected = {p.name: Expected("ok") for p in folder.iterdir()}
    if not os.access(folder / "locked.mp4", os.R_OK):
        expected["locked.mp4"] = Expected("excluded", "Permission denied")
    if "hevc.mp4" in expected:
        expected["hevc.mp4"] = Expected("ok", width=96, height=80)
    return expected | {
        **dict.fromkeys(LONG_FILES, Expected("ok", frames=(LONG, LONG))),
        "one_frame.mp4": Expected("ok", frames=(1, 1)),
        "1x1.mp4": Expected("ok", frames=(10, 10), width=1, height=1),
        "63x47.mp4": Expected("ok", width=63, height=47),
        "63x47.webm": Expected("ok", width=63, height=47),
    }


def damaged_files(folder: Path, scratch: Path) -> dict[str, Expected]:
    """Write files of which a part is lost; `scratch` is another folder, for the intact ones."""
    expected = {}
    sources: dict[str, tuple[str, dict[str, str]]] = {
        "h264.mp4": ("libx264", {"bf": "0"}),
        "h264_b.mp4": ("libx264", {"bf": "2"}),
        "vp9.mp4": ("libvpx-vp9", VP9),
        "vp9.webm": ("libvpx-vp9", VP9),
        "mpeg4.mp4": ("mpeg4", {}),
        "mpeg4.avi": ("mpeg4", {}),
        "h264.ts": ("libx264", {"bf": "2"}),
    }
    for name, (codec, options) in sources.items():
        source = write(scratch / name, codec, faststart=name.endswith("mp4"), **options)
        cut(source, folder / f"cut_{name}", 13)
        expected[f"cut_{name}"] = Expected("truncated", "ends|cut off|after frame", (8, 13))
        if name.endswith("mp4"):
            flip(source, folder / f"flipped_{name}", 13)
            expected[f"flipped_{name}"] = Expected("truncated", "after frame|cannot be decoded", (8, 13))
    expected["flipped_mpeg4.mp4"] = Expected("truncated", "frame 13 is damaged$", (12, 12))
    trim(source := write(scratch / "trimmed.mp4", clip=hidden_start(7), faststart=True, bf="2"), 7)
    cut(source, folder / "trimmed_cut.mp4", 17)
    expected["trimmed_cut.mp4"] = Expected("truncated", "ends|cut off|after frame", (7, 15))
    source = write(scratch / "h264.mkv", bf="2")
    for index in range(11, 16):  # one ends before a frame that is shown before those that are there
        cut(source, folder / f"cut{index}_h264.mkv", index)
        expected[f"cut{index}_h264.mkv"] = Expected("truncated", "s before the length that it declares$", (8, index))
    source = write(scratch / "between.mp4", faststart=True, bf="3", b_strategy="0", g="12")
    with av.open(str(source)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    # with the B-frames before it in time gone, the last frame would take the number of one of them
    last = next(k for k in range(11, NUM) if (packets[k + 1].pts or 0) < (packets[k].pts or 0))
    (folder / "between.mp4").write_bytes(source.read_bytes()[: (packets[last].pos or 0) + packets[last].size])
    expected["between.mp4"] = Expected("truncated", "ends|cut off|after frame", (8, 13))
    source = write(folder / "lost.mp4", "libvpx-vp9", **VP9)
    data = bytearray(source.read_bytes())
    data[packet(source, 15)[0]] &= ~2  # a key frame that is not to be shown: no error
    source.write_bytes(data)
    expected["lost.mp4"] = Expected("truncated", "^frame 15 cannot be decoded$", (14, 14))
    source = write(
        scratch / "one_byte.mp4", "libvpx-vp9", faststart=True, **{"lag-in-frames": "0", "auto-alt-ref": "0"}
    )
    place, size = packet(source, 13)  # the decoder does not miss the byte
    (folder / "one_byte.mp4").write_bytes(source.read_bytes()[: place + size - 1])
    expected["one_byte.mp4"] = Expected("truncated", "cut off or damaged there$", (12, 12))
    cut(write(scratch / "a.gif", "gif", "rgb8"), folder / "cut.gif", 13)
    np.save(scratch / "raw.npy", CLIP)
    (folder / "cut.npy").write_bytes((scratch / "raw.npy").read_bytes()[: -6 * CLIP[0].nbytes - 1])
    write_frames(folder / "hole", CLIP)
    (folder / "hole" / "9.png").write_bytes(b"\x89PNG")
    return expected | {
        "cut.gif": Expected("truncated", "cut off", (12, 13)),
        "cut.npy": Expected("truncated", f"^the file ends after {NUM - 7} of {NUM} frames$", (NUM - 7, NUM - 7)),
        "hole": Expected("truncated", r"^reading stops after frame 9: 9\.png: cannot be read", (9, 9)),
    }


def useless_files(folder: Path, scratch: Path) -> dict[str, Expected]:
    """Write files of which nothing can be used."""
    data = write(scratch / "plain.mp4").read_bytes()
    contents = {
        "codec.mp4": data.replace(b"avc1", b"zzzz"),
        "no_moov.mp4": data[: data.index(b"moov")],
        "zero.mp4": b"",
        "text.mp4": b"not a video\n" * 99,
        "README.txt": b"about these videos\n" * 99,
        "list.ffconcat": b"ffconcat version 1.0\nfile plain.mp4\n",
        "header.npy": b"\x93NUMPY\x01\x00\x10\x00{'descr': \x80 '\n",
        "v9.npy": b"\x93NUMPY\x09\x00" + bytes(120),
        "random.mp4": np.random.default_rng(0).bytes(5000),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    sound(folder / "sound.m4a", "aac")
    with_cover(folder / "cover.mp3")
    np.save(folder / "float.npy", np.zeros((9, 8, 8, 3), np.float32))
    np.save(folder / "grey.npy", np.zeros((9, 8, 8), np.uint8))
    np.save(folder / "objects.npy", np.array([{}], object))
    np.save(folder / "turned.npy", np.zeros((3, 4, 5, 9), np.uint8).T)
    with (folder / "several.npy").open("wb") as file:
        np.savez(file, np.zeros((9, 8, 8, 3), np.uint8))
    for name in ("empty", "folder.mp4", "pipes"):
        (folder / name).mkdir()
    links = {"loop": "loop.mp4", "there": "back.mp4", "back": "there.mp4", "dangling": "nowhere", "device": "/dev/zero"}
    for name, target in links.items():
        (folder / f"{name}.mp4").symlink_to(target)
    os.mkfifo(folder / "pipe.mp4")
    for name in ("0.png", "1.png"):
        os.mkfifo(folder / "pipes" / name)
    reasons = {
        "codec.mp4": "^PyAV does not know its codec",
        "no_moov.mp4": "cannot be opened as a video",
        "zero.mp4": "^the file is empty",
        "text.mp4": "cannot be opened as a video",
        "README.txt": "^a text file or a playlist",
        "list.ffconcat": "^a text file or a playlist",
        "random.mp4": "cannot be opened as a video",
        "sound.m4a": "no video stream",
        "cover.mp3": "cover picture",
        "float.npy": r"^expected uint8 \(T,H,W,3\), got float32",
        "grey.npy": r"^expected uint8 \(T,H,W,3\), got uint8 \(9, 8, 8\)",
        "objects.npy": r"^expected uint8 \(T,H,W,3\), got object",
        "turned.npy": r"got uint8 \(9, 5, 4, 3\) in Fortran order$",
        "several.npy": "^cannot be read as .npy",
        "header.npy": "^cannot be read as .npy",
        "v9.npy": "^cannot be read as .npy",
        "empty": "^a folder without images",
        "folder.mp4": "^a folder without images",
        "loop.mp4": "^Too many levels of symbolic links$",
        "there.mp4": "^Too many levels of symbolic links$",
        "back.mp4": "^Too many levels of symbolic links$",
        "dangling.mp4": "^No such file or directory$",
        "pipe.mp4": "^neither a file nor a folder$",
        "pipes": "^0.png: neither a file nor a folder$",
        "device.mp4": "^neither a file nor a folder$",
    }
    return {name: Expected("excluded", reason, (0, 0), 0, 0) for name, reason in reasons.items()}


def make_corpus(folder: Path, scratch: Path) -> dict[str, Expected]:
    """Fill an empty folder; return what the index shall say of each file, by name."""
    return intact_files(folder) | damaged_files(folder, scratch) | useless_files(folder, scratch)
