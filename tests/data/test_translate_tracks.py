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
    said = [r.message for r in caplog.records if "does not fit into the output; encoded as" in r.message]
    assert len(said) == (kept is None)
    np.testing.assert_allclose(flashes(tmp_path / out), AT, atol=0.05)
    late = 0.023 if (source, encoder) == ("in.avi", "libmp3lame") else 0  # AVI cannot say that MP3 starts with silence
    np.testing.assert_allclose(beeps(tmp_path / out), [at + late for at in AT], atol=SOUND)


def full_source(path: Path) -> Path:
    """Write a Matroska file with two languages, of which the second is the default, chapters and tags."""

    def setup(output: Any) -> None:
        first, second = output.streams.audio
        first.metadata["language"], second.metadata["language"] = "ita", "fra"
        second.metadata["title"] = "commentaire"
        first.disposition, second.disposition = 0, int(av.stream.Disposition.default)
        output.metadata.update({"title": "Holiday", "date": "2019", "rotate": "90"})
        output.set_chapters(
            [
                {"id": k, "start": start, "end": end, "time_base": Fraction(1, 1000), "metadata": {"title": name}}
                for k, (start, end, name) in enumerate([(0, 2000, "sea"), (2000, 4000, "land")])
            ]
        )

    return write_flashes(path, sounds=["aac", "libmp3lame"], setup=setup)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov"])
def test_every_track_chapter_and_tag_is_kept(tiny_run: Path, tmp_path: Path, suffix: str) -> None:
    source, out = full_source(tmp_path / "in.mkv"), tmp_path / f"out.{suffix}"
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
    return f"1\n00:00:01,000 --> 00:00:01,200\n{text} one\n\n2\n00:00:03,000 --> 00:00:03,200\n{text} two\n".encode()


@pytest.mark.parametrize("start", [0, 2])
def test_subtitles_are_kept_where_they_fit(
    tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, start: int
) -> None:
    files = {name: tmp_path / f"{name}.srt" for name in ("ger", "eng")}
    for name, file in files.items():
        file.write_bytes(srt(name))
    source = write_flashes(tmp_path / "in.mkv", start=Fraction(start), subtitles=files)
    main(Args(tiny_run, source, tmp_path / "out.mkv"))
    with av.open(str(tmp_path / "out.mkv")) as container:
        first = float(next(container.decode(video=0)).time)
    with av.open(str(tmp_path / "out.mkv")) as container:
        tracks = container.streams.subtitles
        assert [track.language for track in tracks] == ["ger", "eng"]
        shown = [
            (p.stream.language, bytes(p), p.pts * float(p.time_base) - first)
            for p in container.demux(*tracks)
            if p.size
        ]
    for language in ("ger", "eng"):
        texts = [(text, time) for name, text, time in shown if name == language]
        assert [text for text, _ in texts] == [f"{language} one".encode(), f"{language} two".encode()]
        np.testing.assert_allclose([time for _, time in texts], AT, atol=SOUND)
    with caplog.at_level(logging.WARNING):
        main(Args(tiny_run, source, tmp_path / "out.mp4"))
    assert "left out, since the output cannot hold it: subtitles (subrip), subtitles (subrip)" in caplog.text
