"""What the writer writes plays: in ffprobe's eyes, and in headless Chromium. Skipped where a player is missing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from data_clips import smooth

from rlv2v.data.writer import VideoWriter

EVEN = [Fraction(k, 25) for k in range(15)]
VARIABLE = [Fraction(0), Fraction(1, 25), Fraction(1, 10), Fraction(3, 10), Fraction(31, 100), Fraction(1, 2)]
FFPROBE = ["ffprobe", "-v", "error", "-threads", "1", "-show_streams", "-show_format", "-show_frames", "-of", "json"]
LAST = Fraction(1, 10)
"""Seconds that the last frame is shown."""
CASES: dict[str, tuple[str, int, int, list[Fraction], tuple[int, int]]] = {
    "even.mp4": ("h264", 64, 48, EVEN, (64, 48)),
    "odd.mp4": ("h264", 63, 47, EVEN, (64, 48)),
    "variable.mp4": ("h264", 64, 48, VARIABLE, (64, 48)),
    "vp9.mp4": ("vp9", 64, 48, EVEN, (64, 48)),
    "vp9.webm": ("vp9", 64, 48, EVEN, (64, 48)),
    "odd.webm": ("vp9", 63, 47, EVEN, (64, 48)),
    "variable.webm": ("vp9", 64, 48, VARIABLE, (64, 48)),
    "av1.webm": ("av1", 64, 64, EVEN, (64, 64)),
    "prepared.mp4": ("vp9-601", 128, 128, EVEN, (128, 128)),
}
"""By file: codec, width and height of the frames, their times, the size that a player shows."""
PLAY = """
const [path, done] = arguments, video = document.createElement("video")
const say = () => done({
  error: video.error && video.error.message, width: video.videoWidth, height: video.videoHeight,
  time: video.currentTime, duration: video.duration, ended: video.ended,
  frames: video.getVideoPlaybackQuality().totalVideoFrames,
})
video.muted = true
video.onended = video.onerror = say
setTimeout(say, 30000)
document.body.replaceChildren(video)
video.src = path
video.play().catch(() => {})
"""


def available(name: str) -> bool:
    """Return whether this PyAV can encode a case."""
    return name != "av1.webm" or "libsvtav1" in av.codecs_available


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the file of each case."""
    folder = tmp_path_factory.mktemp("players")
    for name, (codec, width, height, times, _) in CASES.items():
        if not available(name):
            continue
        with VideoWriter(folder / name, 25, codec, even=True, tick=Fraction(1, 1000)) as writer:
            for frame, at in zip(smooth(len(times), height, width), times, strict=True):
                writer.write(frame, at, LAST)
    return folder


@pytest.mark.skipif(shutil.which("ffprobe") is None, reason="no ffprobe here; Debian: apt-get install ffmpeg")
@pytest.mark.parametrize("name", CASES)
def test_ffprobe_finds_every_frame_at_its_time(files: Path, name: str) -> None:
    if not available(name):
        pytest.skip("no encoder")
    _, _, _, times, size = CASES[name]
    done = subprocess.run(
        [*FFPROBE, str(files / name)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)
    (stream,) = found["streams"]
    assert (stream["width"], stream["height"], stream["pix_fmt"]) == (*size, "yuv420p")
    shown = np.array([float(frame["pts_time"]) for frame in found["frames"]])
    np.testing.assert_allclose(shown, [float(t) for t in times], atol=0.0011)
    assert float(found["format"]["duration"]) == pytest.approx(float(times[-1] + LAST), abs=0.011)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    paths = [shutil.which("chromium"), shutil.which("chromedriver")]
    if not all(paths):
        pytest.skip("no chromium and chromedriver here; Debian: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[test]'")
    options = webdriver.ChromeOptions()
    options.binary_location = paths[0]
    profile = tmp_path_factory.mktemp("profile")
    flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={profile}")
    for flag in (*flags, "autoplay-policy=no-user-gesture-required"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=paths[1]))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


@pytest.mark.parametrize("name", CASES)
def test_chromium_plays_it_to_its_end(chromium: Any, files: Path, name: str) -> None:
    if not available(name):
        pytest.skip("no encoder")
    (files / "page.html").write_text("<!doctype html><body></body>")
    chromium.get((files / "page.html").as_uri())
    _, _, _, times, size = CASES[name]
    said = chromium.execute_async_script(PLAY, name)
    assert said["error"] is None and said["ended"], said
    assert (said["width"], said["height"]) == size
    assert said["duration"] == pytest.approx(float(times[-1] + LAST), abs=0.05)
    assert said["time"] > 0.9 * said["duration"] and said["frames"] > 0
