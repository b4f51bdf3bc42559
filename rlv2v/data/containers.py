"""Say what each kind of output file holds, and how pictures are encoded: a format or a codec is a row here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import av
from av.video.reformatter import Colorspace

from rlv2v.errors import UserError

VP9_OPTIONS = {"cpu-used": "8", "deadline": "realtime", "lag-in-frames": "0", "auto-alt-ref": "0"}


@dataclass(frozen=True)
class Container:
    """Hold what a kind of file takes; codecs by FFmpeg's canonical names."""

    codecs: tuple[str, ...]
    """Keys of `CODECS`, the default first."""
    audio: frozenset[str]
    """Sound that is copied as it is."""
    audio_encoder: str | None
    """What other sound is encoded with; None: it is left out."""
    subtitles: frozenset[str]
    """Subtitles that are copied."""
    subtitle_encoder: str | None
    """What other subtitles of text are encoded with; None: they are left out, as pictures are."""
    in_decoding_order: bool = False
    """Whether the picture decoded last ends the file, though another one may be shown last."""


@dataclass(frozen=True)
class Codec:
    """Hold how pictures are encoded."""

    encoder: str
    """FFmpeg's name."""
    options: Mapping[str, str] = field(default_factory=dict)
    form: str = "yuv420p"
    """FFmpeg's pixel format; one that ends in `420p` takes even sizes only."""
    matrix: Colorspace = Colorspace.ITU709
    """Of the colours, limited range and tagged so; RGB formats have none."""
    threads: int = 0
    """0: as many as FFmpeg likes."""
    lossless: str | None = None
    """The row of `CODECS` that gives every value back."""
    tick: Fraction | None = None
    """Seconds of which all times are multiples; None: any."""
    gop: int = 12
    """Frames from key frame to key frame, at most."""


PCM = frozenset({"pcm_s16le", "pcm_s16be", "pcm_s24le", "pcm_s24be", "pcm_s32le", "pcm_f32le", "pcm_u8"})
MPEG_AUDIO = frozenset({"aac", "mp3", "ac3", "eac3", "alac"})
CONTAINERS: Mapping[str, Container] = MappingProxyType(
    {
        ".mp4": Container(
            ("h264", "hevc", "vp9", "av1"),
            MPEG_AUDIO | {"flac", "opus"},
            "aac",
            frozenset({"mov_text"}),
            "mov_text",
            True,
        ),
        ".mov": Container(
            ("h264", "hevc"), MPEG_AUDIO | PCM - {"pcm_u8"}, "aac", frozenset({"mov_text"}), "mov_text", True
        ),
        ".mkv": Container(
            ("h264", "hevc", "vp9", "av1", "ffv1"),
            MPEG_AUDIO | PCM | {"flac", "opus", "vorbis", "dts", "truehd", "mp2"},
            "aac",
            frozenset({"subrip", "ass", "webvtt", "dvd_subtitle", "hdmv_pgs_subtitle", "dvb_subtitle"}),
            "subrip",
        ),
        ".gif": Container(("gif",), frozenset(), None, frozenset(), None),
        ".webm": Container(("vp9", "av1"), frozenset({"opus", "vorbis"}), "libopus", frozenset({"webvtt"}), "webvtt"),
    }
)
CODECS: Mapping[str, Codec] = MappingProxyType(
    {
        "h264": Codec("libx264", {"crf": "16", "preset": "fast"}, lossless="h264-lossless"),
        "h264-lossless": Codec("libx264rgb", {"qp": "0", "preset": "fast"}, "rgb24"),
        "hevc": Codec("libx265", {"crf": "18", "preset": "fast", "x265-params": "log-level=none"}),
        "vp9": Codec("libvpx-vp9", {"crf": "18", "b": "0", "cpu-used": "4", "row-mt": "1"}, lossless="vp9-lossless"),
        "av1": Codec("libsvtav1", {"crf": "20", "preset": "8", "svtav1-params": "lp=1"}),
        "ffv1": Codec("ffv1", {"level": "3"}, "bgr0", lossless="ffv1", gop=1),
        "gif": Codec("gif", form="pal8", tick=Fraction(1, 100)),
        # what `synth` and `prepare` write: the same bits on every machine, and for DALI BT.601
        "vp9-lossless": Codec("libvpx-vp9", VP9_OPTIONS | {"lossless": "1"}, "gbrp", threads=1),
        "vp9-601": Codec("libvpx-vp9", VP9_OPTIONS | {"crf": "16", "b": "0"}, matrix=Colorspace.ITU601, threads=1),
    }
)


def container_of(path: Path) -> Container:
    """Return what the file `path` will hold by its suffix. Raises `UserError` for a suffix that nobody writes."""
    container = CONTAINERS.get(path.suffix.lower())
    if container is None:
        raise UserError(f"{path}: expected the suffix {', '.join(CONTAINERS)}, got {path.suffix or 'none'}")
    return container


def choose_codec(path: Path, codec: str | None, *, lossless: bool = False) -> str:
    """Return the key of `CODECS` for an output: the container's default, or `codec`, which it must hold.

    Raises:
        UserError: the container does not hold the codec, this PyAV has no encoder for it, or it is never lossless.
    """
    known = container_of(path).codecs
    if codec is not None and codec not in known:
        raise UserError(f"--codec: expected one that {path.suffix} holds, {', '.join(known)}, got {codec}")
    name = codec or next((c for c in known if not lossless or CODECS[c].lossless), known[0])
    if lossless:
        exact = CODECS[name].lossless
        if exact is None:
            raise UserError(f"--lossless: {name} is written with losses only; expected h264, vp9 or ffv1 (.mkv)")
        name = exact
    if CODECS[name].encoder not in av.codecs_available:
        raise UserError(f"--codec: this PyAV has no encoder {CODECS[name].encoder}; choose another codec")
    return name
