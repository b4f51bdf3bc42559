"""What a translated video carries along: sound, subtitles, chapters and tags, copied or encoded anew, and said."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import flash_clips
import numpy as np
import pytest
from flash_clips import AT, TV, beep, beeps, flashes, write_flashes
from processes import finish, start

from rlv2v.translate import Args, main

SOUND = 0.02


def sounds(path: Path) -> list[str]:
    with av.open(str(path)) as container:
        return [track.codec_context.codec.canonical_name for track in container.streams.audio]


@pytest.mark.parametrize(
    ("source", "encoder", "out", "kept"),
    [
        ("in.mp4", "libmp3lame", "out.mp4", "mp3"),
        ("in.avi", "libmp3lame", "out.mp4", "mp3"),
        ("in.flv", "libmp3lame", "out.mkv", "mp3"),
        ("in.mkv", "libopus", "out.mp4", "opus"),
        ("in.mkv", "flac", "out.mkv", "flac"),
        ("in.mov", "pcm_s16le", "out.mov", "pcm_s16le"),
        ("in.mkv", "libopus", "out.webm", "opus"),
        ("in.mkv", "libopus", "out.mov", None),
        ("in.avi", "pcm_s16le", "out.mp4", None),
        ("in.mp4", "aac", "out.webm", None),
        ("in.vob", "mp2", "out.mov", None),
    ],
)
def test_sound_is_copied_where_it_fits_else_encoded_and_said(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, source: str, encoder: str, out: str, kept: str
) -> None:
    pictures = {".vob": "mpeg2video", ".flv": "flv"}.get(Path(source).suffix, "libx264")
    options: dict[str, Any] = {
        ".vob": {"times": TV, "rate": 25, "tick": Fraction(1, 25)},
        ".avi": {"bf": "0", "tick": Fraction(1, 10)},
    }.get(Path(source).suffix, {"tick": Fraction(1, 1000)})
    write_flashes(tmp_path / source, codec=pictures, sounds=[encoder], **options)
    with caplog.at_level(logging.WARNING):
        main(Args(tiny_run, tmp_path / source, tmp_path / out))
    assert sounds(tmp_path / out) == [kept or ("opus" if out.endswith("webm") else "aac")]
    said = [r.message for r in caplog.records if "the output cannot hold sound" in r.message]
    assert len(said) == (kept is None)
    np.testing.assert_allclose(flashes(tmp_path / out), AT, atol=0.05)
    late = 0.023 if (source, encoder) == ("in.avi", "libmp3lame") else 0  # AVI cannot say that MP3 starts with silence
    np.testing.assert_allclose(beeps(tmp_path / out), [at + late for at in AT], atol=SOUND)


def full_source(path: Path, start: int) -> Path:
    """Write a Matroska file with two languages, of which the second is the default, chapters and tags.

    start: seconds, of the first frame on the file's clock.
    """

    def setup(output: Any) -> None:
        first, second = output.streams.audio
        first.metadata["language"], second.metadata["language"] = "ita", "fra"
        second.metadata["title"] = "commentaire"
        first.disposition, second.disposition = 0, int(av.stream.Disposition.default)
        output.metadata.update({"title": "Holiday", "date": "2019", "rotate": "90"})
        output.set_chapters(
            [
                {"id": k, "start": begin, "end": end, "time_base": Fraction(1), "metadata": {"title": name}}
                for k, (begin, end, name) in enumerate([(start, start + 2, "sea"), (start + 2, start + 4, "land")])
            ]
        )

    return write_flashes(path, sounds=["aac", "libmp3lame"], setup=setup, start=Fraction(start))


@pytest.mark.parametrize(("suffix", "start"), [("mkv", 0), ("mp4", 0), ("mov", 0), ("mp4", 7)])
def test_every_track_chapter_and_tag_is_kept(tiny_run: Path, tmp_path: Path, suffix: str, start: int) -> None:
    source, out = full_source(tmp_path / "in.mkv", start), tmp_path / f"out.{suffix}"
    main(Args(tiny_run, source, out))
    assert sounds(out) == ["aac", "mp3"]
    with av.open(str(out)) as container:
        first, second = container.streams.audio
        assert (first.language, second.language) == ("ita", "fra")
        default = av.stream.Disposition.default
        assert (bool(first.disposition & default), bool(second.disposition & default)) == (False, True)
        tags = {name.lower(): value for name, value in container.metadata.items()}
        assert (tags["title"], tags["date"]) == ("Holiday", "2019") and "rotate" not in tags
        chapters = [
            (float(c["start"] * c["time_base"]), float(c["end"] * c["time_base"]), c["metadata"]["title"])
            for c in container.chapters()
        ]
    assert [name for *_, name in chapters] == ["sea", "land"]
    np.testing.assert_allclose([c[:2] for c in chapters], [(0, 2), (2, 4)], atol=0.03)
    for track in (0, 1):
        np.testing.assert_allclose(beeps(out, track), AT, atol=SOUND)


def test_sound_can_be_left_out(tiny_run: Path, tmp_path: Path) -> None:
    main(Args(tiny_run, write_flashes(tmp_path / "in.mp4"), tmp_path / "out.mp4", audio=False))
    assert sounds(tmp_path / "out.mp4") == []


COPY = """
import sys
from pathlib import Path
from rlv2v.data.tracks import Tracks
from rlv2v.data.video import probe, timed_frames
from rlv2v.data.writer import VideoWriter
source, out = map(Path, sys.argv[1:])
with VideoWriter(out, probe(source).fps, tracks=Tracks(source, probe(source).start)) as writer:
    for frame in timed_frames(source):
        writer.write(frame.rgb, frame.time, frame.duration)
"""


@pytest.mark.parametrize("value", [1e7, np.nan])
def test_sound_beyond_all_bounds_is_clipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """Damaged sound decodes to such numbers; FFmpeg's encoder of AAC works at 1e7 for ever."""

    def shout(start: float, *arguments: Any) -> np.ndarray:
        sound = beep(start, *arguments)
        if start == 0:
            sound[:, ::2], sound[:, 1::2] = value, -value
        return sound

    source, out = tmp_path / "in.mkv", tmp_path / "out.mp4"
    monkeypatch.setattr(flash_clips, "beep", shout)
    write_flashes(source, sounds=["pcm_f32le"])
    process = start("-c", COPY, source, out)
    try:
        process.wait(60)
    finally:
        process.kill()
    assert finish(process)[0] == [0]
    np.testing.assert_allclose(beeps(out)[-2:], AT, atol=SOUND)


def srt(text: str) -> bytes:
    """Return two subtitles in the format SubRip, at 1 s and at 3 s."""
    return (
        f"1\n00:00:01,000 --> 00:00:01,200\n<i>{text}</i> one\nand more\n\n"
        f"2\n00:00:03,000 --> 00:00:03,500\n{text} two & \u20ac\n"
    ).encode()


def subtitles(path: Path) -> list[tuple[str, str, float, float, str]]:
    """Return (language, codec, seconds from the first frame, seconds shown, words) of each subtitle of a file."""
    with av.open(str(path)) as container:
        first = float(next(container.decode(video=0)).time)
    shown = []
    with av.open(str(path)) as container:
        tracks: Any = container.streams.subtitles
        for packet in container.demux(*tracks):
            texts = packet.stream.decode(packet) if packet.size else []
            words = " / ".join(text.ass.decode().split(",", 8)[8] for text in texts)
            start, length = packet.pts or 0, packet.duration or 0
            times = float(start * packet.time_base) - first, float(length * packet.time_base)
            if words:
                shown.append((packet.stream.language, packet.stream.codec_context.codec.canonical_name, *times, words))
    return sorted(shown)


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize(
    ("suffixes", "codec"),
    [
        ("mkv", "subrip"),
        ("mp4", "mov_text"),
        ("mov", "mov_text"),
        ("webm", "webvtt"),
        ("mp4 mkv", "subrip"),
        ("mp4 webm", "webvtt"),
        ("webm mp4", "mov_text"),
    ],
)
def test_subtitles_are_copied_where_they_fit_else_encoded_and_said(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, start: int, suffixes: str, codec: str
) -> None:
    files = {name: tmp_path / f"{name}.srt" for name in ("ger", "eng")}
    for name, file in files.items():
        file.write_bytes(srt(name))
    last = write_flashes(tmp_path / "in.mkv", start=Fraction(start), subtitles=files)
    for suffix in suffixes.split():
        source, last = last, tmp_path / f"out.{suffix}"
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            main(Args(tiny_run, source, last))
    name = "" if source.suffix == ".mkv" else {".mp4": "mov_text", ".webm": "webvtt"}[source.suffix]
    said = f"{source}: the output cannot hold subtitles ({name or 'subrip'}); encoded as {codec}"
    assert caplog.messages.count(said) == (0 if suffixes == "mkv" else 2)
    got = subtitles(last)
    assert [(language, name) for language, name, *_ in got] == [("eng", codec)] * 2 + [("ger", codec)] * 2
    np.testing.assert_allclose([row[2:4] for row in got], [(1, 0.2), (3, 0.5)] * 2, atol=SOUND)
    for words, language in ((got[:2], "eng"), (got[2:], "ger")):
        assert words[0][4].replace("{\\r}", "{\\i0}") == f"{{\\i1}}{language}{{\\i0}} one\\Nand more"
        assert words[1][4] == f"{language} two & \u20ac"


def test_two_subtitles_at_once_are_both_kept(tiny_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.srt"
    file.write_bytes(srt("a") + b"\n3\n00:00:03,000 --> 00:00:03,500\nb two\n")
    source = write_flashes(tmp_path / "in.mkv", subtitles={"eng": file})
    for suffix in ("mkv", "webm"):
        main(Args(tiny_run, source, tmp_path / f"out.{suffix}"))
        got = subtitles(tmp_path / f"out.{suffix}")
        assert [words for *_, words in got][1:] == ["a two & \u20ac", "b two"]
        np.testing.assert_allclose([row[2:4] for row in got[1:]], [(3, 0.5)] * 2, atol=SOUND)


def test_what_an_output_cannot_hold_in_any_form_is_left_out_and_said(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.srt").write_bytes(srt("a"))
    source = write_flashes(tmp_path / "in.mkv", subtitles={"eng": tmp_path / "a.srt"})
    main(Args(tiny_run, source, tmp_path / "out.gif"))
    assert f"{source}: left out, since the output cannot hold it: sound (aac), subtitles (subrip)" in caplog.messages
