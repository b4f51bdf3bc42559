"""A corpus of broken and odd files, made when asked for, each with what the index shall say of it.

Each frame carries its number as 4x2 black and white blocks, which any codec, rotation of the display and scaling
leaves readable; a picture too small for that carries it as a level of grey.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from priority import usual_priority

NUM, WIDTH, HEIGHT = 20, 64, 48


@dataclass(frozen=True)
class Expected:
    """What `index_folder` shall say of a file for clips of 1 frame."""

    status: str
    reason: str = ""
    """A regular expression that is found in the reason; empty: the reason is empty."""
    frames: tuple[int, int] = (NUM, NUM)
    """The fewest and the most that are usable; frame i carries the number i."""
    width: int = WIDTH
    height: int = HEIGHT


def stamped(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """RGB frame (H,W,3) that carries `number`, below 256, or below 10 if the frame is smaller than 32x16."""
    if width < 32 or height < 16:
        return np.full((height, width, 3), 25 * number, np.uint8)
    bits = (number >> np.arange(8)) & 1
    rows = np.arange(height) * 2 // height
    columns = np.arange(width) * 4 // width
    return np.repeat((bits.reshape(2, 4)[np.ix_(rows, columns)] * 255).astype(np.uint8)[..., None], 3, 2)


def number_of(frame: np.ndarray) -> int:
    """The number that a frame (H,W,3) carries: the middle half of each block decides."""
    height, width = frame.shape[:2]
    if width < 32 or height < 16:
        return round(float(frame.mean()) / 25)
    grey, number = frame.mean(2), 0
    for bit in range(8):
        (top, left), (h, w) = divmod(bit, 4), (height / 2, width / 4)
        block = grey[round((top + 0.25) * h) : round((top + 0.75) * h), round((left + 0.25) * w) :][:, : round(w / 2)]
        number += int(block.mean() > 127) << bit
    return number


@usual_priority()
def encode(
    path: Path,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    frames: Iterable[np.ndarray] | None = None,
    times: Sequence[int] | None = None,
    rotation: int = 0,
    faststart: bool = False,
    **options: str,
) -> None:
    """Write frames (the stamped ones if None) with a key frame every 5, shown at `times` in units of 1/100 s."""
    clip = [stamped(n) for n in range(NUM)] if frames is None else list(frames)
    with av.open(str(path), "w", options={"movflags": "+faststart"} if faststart else {}) as output:
        stream = output.add_stream(codec, rate=10, options={"g": "5", **options})
        stream.height, stream.width, stream.pix_fmt = clip[0].shape[0], clip[0].shape[1], pix_fmt
        stream.codec_context.time_base = Fraction(1, 100)
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        for n, image in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = times[n] if times else 10 * n, Fraction(1, 100)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def trim(path: Path, num: int) -> None:
    """Cut `num` frames off the start of an MP4 by its edit list alone, as phones and editors do."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        step = int(1 / container.streams.video[0].time_base) // 10
    at = data.index(b"elst") + 16  # after version, flags, number of entries and the length of the first
    data[at : at + 4] = (int.from_bytes(data[at : at + 4], "big") + num * step).to_bytes(4, "big")
    path.write_bytes(data)


def sound(path: Path, codec: str) -> None:
    """A second of silence."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream(codec, rate=16000)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 16000
        output.mux(stream.encode(samples) + stream.encode(None))


def with_cover(path: Path) -> None:
    """An MP3 with a picture of its cover: an ID3v2.3 tag with an APIC frame in front."""
    sound(path, "libmp3lame")
    picture = cv2.imencode(".jpg", stamped(0))[1].tobytes()
    apic = b"\0image/jpeg\0\3\0" + picture
    frame = b"APIC" + len(apic).to_bytes(4, "big") + b"\0\0" + apic
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\3\0\0" + size + frame + path.read_bytes())


def packets(path: Path) -> list[tuple[int, int]]:
    """(place in the file, size) of each packet."""
    with av.open(str(path)) as container:
        return [(p.pos, p.size) for p in container.demux(video=0) if p.size]


def cut(source: Path, path: Path, packet: int) -> None:
    """The file up to the middle of a packet."""
    place, size = packets(source)[packet]
    path.write_bytes(source.read_bytes()[: place + size // 2])


def flip(source: Path, path: Path, packet: int) -> None:
    """The file with bits of a whole packet flipped; only its first 4 bytes, where H.264 keeps the length, are left."""
    place, size = packets(source)[packet]
    data = bytearray(source.read_bytes())
    for at in range(place + 4, place + size):
        data[at] ^= 0xA5
    path.write_bytes(data)


def images(folder: Path, frames: Iterable[np.ndarray]) -> None:
    """A folder of numbered PNGs."""
    folder.mkdir()
    for n, frame in enumerate(frames):
        (folder / f"{n}.png").write_bytes(cv2.imencode(".png", frame)[1].tobytes())


def two_sizes(path: Path) -> None:
    """A stream whose pictures change from 64x48 to 96x80 after frame 10."""
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
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    output.mux(packet)


def whole_files(folder: Path) -> dict[str, Expected]:
    """Files without a fault."""
    vp9 = {"lag-in-frames": "0", "auto-alt-ref": "0", "deadline": "realtime", "cpu-used": "8"}
    encode(folder / "plain.mp4")
    encode(folder / "vp9.webm", "libvpx-vp9", **vp9)
    encode(folder / "vp9.mp4", "libvpx-vp9", **vp9)
    encode(folder / "vp8.webm", "libvpx")
    if "libx265" in av.codecs_available:
        # below 64 pixels x265 4.1 writes outside its memory
        large = [stamped(n, 96, 80) for n in range(NUM)]
        encode(folder / "hevc.mp4", "libx265", frames=large, **{"x265-params": "log-level=none"})
    if "libsvtav1" in av.codecs_available:
        encode(folder / "av1.mp4", "libsvtav1", preset="12", **{"svtav1-params": "lp=1"})
    encode(folder / "444.mp4", pix_fmt="yuv444p")
    encode(folder / "10bit.mp4", pix_fmt="yuv420p10le")
    encode(folder / "mjpeg.avi", "mjpeg", "yuvj420p")
    encode(folder / "mpeg4.avi", "mpeg4")
    encode(folder / "a.gif", "gif", "rgb8")
    encode(folder / "vfr.mp4", times=[10 * n + 3 * (n % 3) for n in range(NUM)])
    encode(folder / "vfr.webm", "libvpx-vp9", times=[n * n for n in range(NUM)], **vp9)
    for hidden in (5, 7):  # at a key frame, and between two
        numbers = [*[NUM - 1] * hidden, *range(NUM)]
        encode(folder / f"trimmed{hidden}.mp4", frames=[stamped(n) for n in numbers], bf="2")
        trim(folder / f"trimmed{hidden}.mp4", hidden)
    encode(folder / "one_frame.mp4", frames=[stamped(0)])
    encode(folder / "1x1.mp4", pix_fmt="yuv444p", frames=[stamped(n, 1, 1) for n in range(10)])
    encode(folder / "63x47.mp4", pix_fmt="yuv444p", frames=[stamped(n, 63, 47) for n in range(NUM)])
    encode(folder / "63x47.webm", "libvpx-vp9", frames=[stamped(n, 63, 47) for n in range(NUM)], **vp9)
    for degrees in (90, 180, 270):  # a frame is turned back when it is shown
        coded = [np.rot90(stamped(n), -degrees // 90) for n in range(NUM)]
        encode(folder / f"rotated{degrees}.mp4", frames=coded, rotation=degrees)
    two_sizes(folder / "sizes.ts")
    images(folder / "frames", (stamped(n) for n in range(NUM)))
    images(folder / "mixed", (stamped(n, WIDTH + n, HEIGHT + 2 * n) for n in range(NUM)))
    np.save(folder / "raw.npy", np.stack([stamped(n) for n in range(NUM)]))
    data = (folder / "plain.mp4").read_bytes()
    names = ["name with spaces.mp4", "new\nline.mp4", "ünïcödé 動画.mp4", "100%d.mp4", "-flag.mp4", "a:b.mp4"]
    for name in [*names, os.fsdecode(b"\xff.mp4")]:
        (folder / name).write_bytes(data)
    (folder / "link.mp4").symlink_to("plain.mp4")
    (folder / "locked.mp4").write_bytes(data)
    (folder / "locked.mp4").chmod(0)
    names = [p.name for p in folder.iterdir()]
    expected = {name: Expected("ok") for name in names}
    if not os.access(folder / "locked.mp4", os.R_OK):
        expected["locked.mp4"] = Expected("excluded", "Permission denied")
    return expected | {
        **({"hevc.mp4": Expected("ok", width=96, height=80)} if "hevc.mp4" in names else {}),
        "one_frame.mp4": Expected("ok", frames=(1, 1)),
        "1x1.mp4": Expected("ok", frames=(10, 10), width=1, height=1),
        "63x47.mp4": Expected("ok", width=63, height=47),
        "63x47.webm": Expected("ok", width=63, height=47),
    }


def damaged_files(folder: Path) -> dict[str, Expected]:
    """Files of which a part is lost."""
    expected = {}
    sources = {
        "h264.mp4": ("libx264", {"bf": "0"}),
        "h264_b.mp4": ("libx264", {"bf": "2"}),
        "vp9.mp4": ("libvpx-vp9", {"lag-in-frames": "0", "auto-alt-ref": "0", "deadline": "realtime"}),
        "vp9.webm": ("libvpx-vp9", {"lag-in-frames": "0", "auto-alt-ref": "0", "deadline": "realtime"}),
        "mpeg4.mp4": ("mpeg4", {}),
        "mpeg4.avi": ("mpeg4", {}),
        "h264.ts": ("libx264", {"bf": "2"}),
    }
    for name, (codec, options) in sources.items():
        source = folder / f"whole_{name}"
        encode(source, codec, faststart=name.endswith("mp4"), **options)
        cut(source, folder / f"cut_{name}", 13)
        expected[f"cut_{name}"] = Expected("truncated", "ends|cut off|after frame", (8, 13))
        if name.endswith("mp4"):
            flip(source, folder / f"flipped_{name}", 13)
            expected[f"flipped_{name}"] = Expected("truncated", "after frame|cannot be decoded", (8, 13))
        source.unlink()
    encode(folder / "whole.mp4", frames=[stamped(n) for n in [*[NUM - 1] * 7, *range(NUM)]], faststart=True, bf="2")
    trim(folder / "whole.mp4", 7)
    cut(folder / "whole.mp4", folder / "trimmed_cut.mp4", 17)
    (folder / "whole.mp4").unlink()
    expected["trimmed_cut.mp4"] = Expected("truncated", "ends|cut off|after frame", (7, 15))
    expected["flipped_mpeg4.mp4"] = Expected("truncated", "frame 13 is damaged$", (12, 12))
    encode(folder / "whole.mkv", bf="2")
    for packet in range(11, 16):  # one ends before a frame that is shown before those that are there
        cut(folder / "whole.mkv", folder / f"cut{packet}_h264.mkv", packet)
        expected[f"cut{packet}_h264.mkv"] = Expected("truncated", "s before the length that it declares$", (8, packet))
    (folder / "whole.mkv").unlink()
    encode(folder / "lost.mp4", "libvpx-vp9", **{"lag-in-frames": "0", "auto-alt-ref": "0", "deadline": "realtime"})
    data = bytearray((folder / "lost.mp4").read_bytes())
    data[packets(folder / "lost.mp4")[15][0]] &= ~2  # a key frame that is not to be shown: no error
    (folder / "lost.mp4").write_bytes(data)
    expected["lost.mp4"] = Expected("truncated", "^frame 15 cannot be decoded$", (14, 14))
    encode(folder / "whole.mp4", "libvpx-vp9", faststart=True, **{"lag-in-frames": "0", "auto-alt-ref": "0"})
    place, size = packets(folder / "whole.mp4")[13]
    (folder / "one_byte.mp4").write_bytes((folder / "whole.mp4").read_bytes()[: place + size - 1])
    (folder / "whole.mp4").unlink()  # the decoder does not miss the byte
    expected["one_byte.mp4"] = Expected("truncated", "cut off or damaged there$", (12, 12))
    encode(folder / "whole.gif", "gif", "rgb8")
    cut(folder / "whole.gif", folder / "cut.gif", 13)
    (folder / "whole.gif").unlink()
    np.save(folder / "whole.npy", np.stack([stamped(n) for n in range(NUM)]))
    (folder / "cut.npy").write_bytes((folder / "whole.npy").read_bytes()[: -6 * stamped(0).nbytes - 1])
    (folder / "whole.npy").unlink()
    images(folder / "hole", (stamped(n) for n in range(NUM)))
    (folder / "hole" / "9.png").write_bytes(b"\x89PNG")
    return expected | {
        "cut.gif": Expected("truncated", "cut off", (12, 13)),
        "cut.npy": Expected("truncated", f"^the file ends after {NUM - 7} of {NUM} frames$", (NUM - 7, NUM - 7)),
        "hole": Expected("truncated", r"^reading stops after frame 9: 9\.png: cannot be read", (9, 9)),
    }


def useless_files(folder: Path) -> dict[str, Expected]:
    """Files of which nothing can be used."""
    rng = np.random.default_rng(0)
    encode(folder / "whole.mp4")
    data = (folder / "whole.mp4").read_bytes()
    (folder / "whole.mp4").unlink()
    (folder / "codec.mp4").write_bytes(data.replace(b"avc1", b"zzzz"))
    (folder / "no_moov.mp4").write_bytes(data[: data.index(b"moov")])
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n" * 99)
    (folder / "README.txt").write_text("about these videos\n" * 99)
    (folder / "list.ffconcat").write_text("ffconcat version 1.0\nfile plain.mp4\n")
    (folder / "random.mp4").write_bytes(rng.bytes(5000))
    sound(folder / "sound.m4a", "aac")
    with_cover(folder / "cover.mp3")
    np.save(folder / "float.npy", np.zeros((9, 8, 8, 3), np.float32))
    np.save(folder / "grey.npy", np.zeros((9, 8, 8), np.uint8))
    np.save(folder / "objects.npy", np.array([{}], object))
    with (folder / "several.npy").open("wb") as file:
        np.savez(file, np.zeros((9, 8, 8, 3), np.uint8))
    (folder / "empty").mkdir()
    (folder / "folder.mp4").mkdir()
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "there.mp4").symlink_to("back.mp4")
    (folder / "back.mp4").symlink_to("there.mp4")
    (folder / "dangling.mp4").symlink_to("nowhere.mp4")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "pipes").mkdir()
    os.mkfifo(folder / "pipes" / "0.png")
    (folder / "device.mp4").symlink_to("/dev/zero")
    no_video, no_file = "cannot be opened as a video", "^neither a file nor a folder$"
    reasons = {
        "codec.mp4": "^PyAV does not know its codec",
        "no_moov.mp4": no_video,
        "zero.mp4": "^the file is empty",
        "text.mp4": no_video,
        "README.txt": "^a text file or a playlist",
        "list.ffconcat": "^a text file or a playlist",
        "random.mp4": no_video,
        "sound.m4a": "no video stream",
        "cover.mp3": "cover picture",
        "float.npy": r"^expected uint8 \(T,H,W,3\), got float32",
        "grey.npy": r"^expected uint8 \(T,H,W,3\), got uint8 \(9, 8, 8\)",
        "objects.npy": r"^expected uint8 \(T,H,W,3\), got object",
        "several.npy": "^cannot be read as .npy",
        "empty": "^a folder without images",
        "folder.mp4": "^a folder without images",
        "loop.mp4": "^Too many levels of symbolic links$",
        "there.mp4": "^Too many levels of symbolic links$",
        "back.mp4": "^Too many levels of symbolic links$",
        "dangling.mp4": "^No such file or directory$",
        "pipe.mp4": no_file,
        "pipes": "^0.png: neither a file nor a folder$",
        "device.mp4": no_file,
    }
    return {name: Expected("excluded", reason, (0, 0), 0, 0) for name, reason in reasons.items()}


def make_corpus(folder: Path) -> dict[str, Expected]:
    """Fill an empty folder; what the index shall say of each entry, by name."""
    return whole_files(folder) | damaged_files(folder) | useless_files(folder)
