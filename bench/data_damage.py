"""Make damaged video files: small originals of every common kind, and damage that a number decides."""

from __future__ import annotations

import io
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from rlv2v.data.images import write_image
from rlv2v.data.writer import write_clip

NUM, WIDTH, HEIGHT, RATE = 12, 80, 64, 10
"""Of an original: frames, pixels, frames a second."""
HUGE = 60_000
"""Side of a picture in a header that lies, pixels."""


@dataclass(frozen=True)
class Kind:
    """Hold how an original is encoded, by FFmpeg's names."""

    codec: str
    sound: str = ""
    """Encoder of its sound; empty: none."""
    form: str = "yuv420p"
    """Pixel format."""
    muxer: str = ""
    """Empty: by the suffix."""
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "h264.mp4": Kind("libx264", "aac", options={"bf": "2"}, container={"movflags": "+faststart"}),
    "pieces.mp4": Kind("libx264", "aac", container={"movflags": "frag_keyframe+empty_moov"}),
    "hevc.mp4": Kind("libx265", options={"x265-params": "log-level=none"}),
    "mpeg4.mov": Kind("mpeg4", "pcm_s16le"),
    "prores.mov": Kind("prores_ks", form="yuv422p10le"),
    "h264.mkv": Kind("libx264", "libmp3lame", options={"bf": "2"}),
    "vp9.webm": Kind("libvpx-vp9", "libopus", options={"deadline": "realtime", "cpu-used": "8"}),
    "vp8.webm": Kind("libvpx", options={"deadline": "realtime", "cpu-used": "8"}),
    "mjpeg.avi": Kind("mjpeg", "libmp3lame", "yuvj420p"),
    "h264.avi": Kind("libx264"),
    "sorenson.flv": Kind("flv", "libmp3lame", container={"flvflags": "add_keyframe_index"}),
    "wmv2.wmv": Kind("wmv2", muxer="asf"),
    "h264.ts": Kind("libx264", "mp2", options={"bf": "2"}),
    "mpeg2.mpg": Kind("mpeg2video", "mp2", options={"bf": "2"}),
    "ffv1.mkv": Kind("ffv1", form="bgr0"),
    "palette.gif": Kind("gif", form="rgb8"),
    "png.apng": Kind("apng", form="rgb24", muxer="apng"),
    "raw.y4m": Kind("wrapped_avframe", muxer="yuv4mpegpipe"),
}
STILLS = ("still.png", "still.jpg", "still.webp", "array.npy")
NAMES = (*KINDS, "av1.mp4", *STILLS)


def frame(number: int) -> np.ndarray:
    """Return a picture with edges and noise that moves, uint8 RGB (H,W,3)."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    noise = np.random.default_rng(number).integers(0, 40, (HEIGHT, WIDTH, 3))
    wave = 100 + 60 * np.sin((x + 3 * number) / 7) + 40 * ((y // 8 + number) % 2)
    return (wave[..., None] + noise).clip(0, 255).astype(np.uint8)


def make_original(path: Path) -> None:
    """Write the original with one of `NAMES`."""
    if path.name == "av1.mp4":  # the writer undoes what this encoder does to the priority of its caller
        write_clip(path, np.stack([frame(n) for n in range(NUM)]), RATE, "av1")
    elif path.name == "array.npy":
        np.save(path, np.stack([frame(n) for n in range(NUM)]))
    elif path.name in STILLS:
        write_image(path, frame(0))
    else:
        encode(path, KINDS[path.name])


def encode(path: Path, kind: Kind) -> None:
    """Write a video of `NUM` frames with a key frame every five, and sound of the same length."""
    target: Any = io.BytesIO() if kind.muxer == "apng" else str(path)
    with av.open(target, "w", format=kind.muxer or None, options=kind.container) as output:
        stream: Any = output.add_stream(kind.codec, rate=RATE, options={"g": "5", **kind.options})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, kind.form
        stream.codec_context.thread_count = 1
        sound: Any = output.add_stream(kind.sound, rate=48000) if kind.sound else None
        for number in range(NUM):
            picture = av.VideoFrame.from_ndarray(frame(number), format="rgb24").reformat(format=kind.form)
            picture.pts, picture.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(picture))
            if sound is not None:
                output.mux(sound.encode(noise_of(number, sound)))
        output.mux(stream.encode(None))
        if sound is not None:
            output.mux(sound.encode(None))
    if isinstance(target, io.BytesIO):
        path.write_bytes(target.getvalue())


def noise_of(number: int, sound: Any) -> av.AudioFrame:
    """Return the sound during a frame, mono or as the encoder wants it."""
    context, length = sound.codec_context, 48000 // RATE
    channels = len(context.layout.channels)
    samples = np.random.default_rng(number).integers(-3000, 3000, (1, length * channels)).astype(np.int16)
    result = av.AudioFrame.from_ndarray(samples, format="s16", layout=context.layout.name)
    result.sample_rate, result.pts, result.time_base = 48000, number * length, Fraction(1, 48000)
    return result


Damage = Callable[[bytearray, random.Random], None]
EXTREME = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, HUGE, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
BOXES = (
    b"ftyp moov mvhd trak tkhd edts elst mdia mdhd hdlr minf stbl stsd stts ctts stss stsc stsz stco co64 avc1 avcC"
    b" hvc1 hvcC av01 av1C mp4a esds moof mfhd traf tfhd tfdt trun mvex trex sidx mdat udta meta colr pasp"
    b" RIFF LIST avih strl strh strf JUNK movi idx1 00dc 01wb IHDR acTL fcTL fdAT IDAT PLTE VP8X VP8L FLV"
)
TAGS = [
    *BOXES.split(),
    *(b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x15\x49\xa9\x66", b"\x16\x54\xae\x6b", b"\x1f\x43\xb6\x75"),
    *(b"\x1c\x53\xbb\x6b", b"\x44\x89", b"\x2a\xd7\xb1", b"\xb0", b"\xba", b"\xe7", b"\xa3", b"\x63\xa2"),
    *(b"\x00\x00\x01\xb3", b"\x00\x00\x01\xba", b"\x00\x00\x01\xe0", b"\x00\x00\x01", b"\x21\xf9\x04", b"GIF89a"),
    *(b"onMetaData", b"YUV4MPEG2", b"\xff\xc0", b"\xff\xda", b"\x9d\x01\x2a", b"\x49\x83\x42", b"NUMPY"),
]
"""What marks a place of meaning: boxes of MP4, ids of Matroska, chunks of RIFF and PNG, start codes of MPEG."""


def place(data: bytearray, rng: random.Random) -> int:
    """Return a place in the file: in its first kilobyte as often as anywhere."""
    return rng.randrange(max(1, min(len(data), 1024) if rng.random() < 0.5 else len(data)))


def tag_place(data: bytearray, rng: random.Random) -> tuple[int, int]:
    """Return (place, length) of a tag that occurs in the file; somewhere, four bytes, if there is none."""
    tag = rng.choice([tag for tag in TAGS if tag in data] or [bytes(data[: min(4, len(data))])])
    start = rng.randrange(max(1, len(data)))
    found = data.find(tag, start)
    return max(0, data.find(tag) if found < 0 else found), len(tag)


def flip_bits(data: bytearray, rng: random.Random) -> None:
    """Flip 1 to 60 bits."""
    for _ in range(rng.choice((1, 2, 5, 20, 60))):
        data[place(data, rng)] ^= 1 << rng.randrange(8)


def cut_off(data: bytearray, rng: random.Random) -> None:
    """End the file early."""
    del data[place(data, rng) :]


def cut_out(data: bytearray, rng: random.Random) -> None:
    """Take some bytes out."""
    start = place(data, rng)
    del data[start : start + rng.choice((1, 4, 100, 1000))]


def put_in(data: bytearray, rng: random.Random) -> None:
    """Put random bytes in, or repeat a part of the file."""
    start, num = place(data, rng), rng.choice((1, 4, 100, 1000))
    data[start:start] = rng.randbytes(num) if rng.random() < 0.5 else data[start : start + num]


def blank(data: bytearray, rng: random.Random) -> None:
    """Set a range to 0 or 255."""
    start = place(data, rng)
    end = min(len(data), start + rng.choice((4, 50, 500, 5000)))
    data[start:end] = bytes([rng.choice((0, 255))]) * (end - start)


def swap(data: bytearray, rng: random.Random) -> None:
    """Exchange two ranges of one length."""
    num = rng.choice((4, 32, 188, 700))
    a, b = sorted((place(data, rng), place(data, rng)))
    first, second = bytes(data[a : a + num]), bytes(data[b : b + num])
    data[b : b + len(second)] = first[: len(second)].ljust(len(second), b"\0")
    data[a : a + len(first)] = second[: len(first)].ljust(len(first), b"\0")


def rename(data: bytearray, rng: random.Random) -> None:
    """Write another tag of the same length over one."""
    start, length = tag_place(data, rng)
    data[start : start + length] = rng.choice([tag for tag in TAGS if len(tag) == length] or [b"\0" * length])


def resize(data: bytearray, rng: random.Random) -> None:
    """Write an extreme number where the size of a box stands: before its tag or after it."""
    start, length = tag_place(data, rng)
    write_number(data, rng, start - 4 if rng.random() < 0.5 else start + length)


def lie(data: bytearray, rng: random.Random) -> None:
    """Write an extreme number, as a time, a length or a count, somewhere after a tag."""
    start, length = tag_place(data, rng)
    write_number(data, rng, start + length + rng.randrange(64))


def write_number(data: bytearray, rng: random.Random, start: int) -> None:
    """Write an extreme number of 1 to 8 bytes, in either order of bytes."""
    size = rng.choice((1, 2, 4, 4, 8, 8))
    number = (rng.choice(EXTREME) & (256**size - 1)).to_bytes(size, rng.choice(("big", "little")))
    if 0 <= start <= len(data) - size:
        data[start : start + size] = number


def inflate(data: bytearray, rng: random.Random) -> None:
    """Let every header that names the size of the picture say 60000x60000 or 40000x40000."""
    side = rng.choice((HUGE, 40_000, 16_383))
    for form in (">HH", "<HH", ">II", "<II"):
        for sizes in ((WIDTH, HEIGHT), (HEIGHT, WIDTH), (WIDTH << 16, HEIGHT << 16)):
            if max(sizes) < 2**16 or form[1] == "I":
                large = side << 16 if max(sizes) >= 2**16 else side
                new = struct.pack(form, large & 0xFFFFFFFF, large & 0xFFFFFFFF)
                data[:] = data.replace(struct.pack(form, *sizes), new)
    data[:] = data.replace(b"W%d H%d" % (WIDTH, HEIGHT), b"W%d H%d" % (side, side))
    data[:] = data.replace(b"\xb0\x81%c\xba\x81%c" % (WIDTH, HEIGHT), b"\xb0\x82%s\xba" % struct.pack(">H", side))
    data[:] = data.replace(b"(%d, %d, %d, 3)" % (NUM, HEIGHT, WIDTH), b"(%d, %d, %d, 3)" % (NUM, side, side))
    sync = data.find(b"\x49\x83\x42")  # of VP9: four bits later the width less one, then the height, 16 bits each
    while sync >= 0 and sync + 8 <= len(data):
        value = int.from_bytes(data[sync + 3 : sync + 8], "big")
        value = value & ~(0xFFFFFFFF << 4) | ((side - 1) << 16 | (side - 1)) << 4
        data[sync + 3 : sync + 8] = value.to_bytes(5, "big")
        sync = data.find(b"\x49\x83\x42", sync + 8)


DAMAGES: tuple[Damage, ...] = (
    *(flip_bits, flip_bits, cut_off, cut_out, put_in, blank, swap, rename, resize, resize, lie, lie, lie, inflate),
)


def name_of(seed: int) -> str:
    """Return the name of the original that a number damages."""
    return random.Random(seed).choice(NAMES)


def damaged(seed: int, originals: Path, folder: Path) -> tuple[Path, str]:
    """Write the damaged file of a number; return it and a word on what was done. Equal numbers give equal files."""
    rng = random.Random(seed)
    name = rng.choice(NAMES)  # as `name_of`
    data, done = bytearray((originals / name).read_bytes()), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        damage = rng.choice(DAMAGES)
        done.append(damage.__name__)
        if data:
            damage(data, rng)
    path = folder / name
    path.write_bytes(data)
    os.utime(path, ns=(0, seed))
    return path, f"{name}: {', '.join(done)}"
