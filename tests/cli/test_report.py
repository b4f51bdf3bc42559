"""The report page: what it shows, that its videos play in a browser, and that it stands alone."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import av
import numpy as np
import pytest

from rlv2v.config import Config
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.data.video import read_frames
from rlv2v.data.writer import write_image
from rlv2v.errors import UserError
from rlv2v.metrics import METRICS
from rlv2v.report import Args, main
from rlv2v.report_page import curves, running_mean, side_by_side

VOID = {"meta", "link", "img", "br", "hr", "input"}


@pytest.fixture(scope="module")
def page(tiny_run, tmp_path_factory) -> tuple[str, Path]:
    """The page of a run with a log, a sample grid and a synthetic test set; and the set's folder."""
    root = tmp_path_factory.mktemp("report")
    data = root / "data"
    write_dataset(data, size=16, frames=4, counts=Counts(x=4, y=4, z=0, s=0, val=0, test=2))
    run = shutil.copytree(tiny_run, root / "a <run>")
    (run / "config.json").write_text(Config.of("tiny", data=data).to_json())
    lines = [{"step": step, "seconds": step / 2, "loss": 1 / step, "odd": None} for step in range(1, 31)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "lo')
    (run / "samples").mkdir()
    write_image(run / "samples" / "00000030.png", np.zeros((16, 64, 3), np.uint8))
    main(Args(run))
    return (run / "report" / "index.html").read_text(), data


class Check(HTMLParser):
    """Every tag is closed in order, every id is unique, labels point to one, and nothing is fetched from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.referred: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name == "aria-labelledby":
                self.referred.add(value or "")
            if name in ("src", "href"):
                assert value is not None and value.startswith(("data:", "#")), value

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_stands_alone(page):
    check = Check()
    check.feed(page[0])
    check.close()
    assert check.open == [] and len(check.ids) == len(set(check.ids))
    assert {"videos", "metrics", "sample", "curves", "config"} == check.referred <= set(check.ids)
    assert "a &lt;run&gt;" in page[0] and "<run>" not in page[0]


def test_videos_play_in_a_browser_and_show_source_translation_and_truth(page, tmp_path):
    text, data = page
    clips = re.findall(r"data:video/mp4;base64,([^\"]+)", text)
    assert len(clips) == 2
    path = tmp_path / "clip.mp4"
    path.write_bytes(base64.b64decode(clips[0]))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
    frames = np.stack(list(read_frames(path)))
    assert frames.shape == (4, 192, 3 * 192 + 2 * 8, 3)
    for folder, left in (("testX", 0), ("testTruth", 400)):
        clip = np.stack(list(read_frames(data / folder / "00000.mp4")))
        shown = frames[:, 6::12, left + 6 : left + 192 : 12]  # the middle of each enlarged pixel
        assert np.abs(shown.astype(int) - clip).mean() < 4


def test_table_curves_sample_and_config_are_there(page):
    text = page[0]
    assert text.count('<th scope="row">') == 3 and "100.00" in text
    assert all(f"<dd>{metric.meaning}</dd>".replace("'", "&#39;") in text for metric in METRICS.values())
    assert text.count("<td>") == 3 * len(METRICS)
    assert text.count("<svg role=") == 1 and "loss over steps 1 to 30" in text
    assert "data:image/png" in text and "<dt>disc_widths</dt><dd>4 8 8</dd>" in text


def test_run_without_data_or_log_still_has_a_page(tiny_run, tmp_path):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    main(Args(run))
    text = (run / "report" / "index.html").read_text()
    assert "--data" in text and "fewer than two steps" in text and "<video" not in text
    assert [p.name for p in (run / "report").iterdir()] == ["index.html"]


def test_curve_is_drawn_only_from_numbers():
    entries = [{"step": s, "loss": float(s), "bad": float("nan"), "name": "a", "flag": True, "once": 1} for s in (1, 2)]
    entries[1].pop("once")
    assert list(curves(entries)) == ["loss"]
    assert len(curves([{"step": s, "loss": 1.0} for s in range(20000)])["loss"]) < 60_000


def test_running_mean_keeps_a_constant_and_smooths():
    np.testing.assert_allclose(running_mean(np.full(100, 3.0)), 3)
    values = np.random.default_rng(0).normal(size=400)
    assert running_mean(values).std() < values.std() / 2
    assert len(running_mean(values[:1])) == 1


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (300, 201)])
def test_panels_are_enlarged_by_whole_pixels_to_even_sizes(size):
    clip = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    row = side_by_side([clip, clip])
    scale = -(-192 // min(size))
    assert row.shape[1] % 2 == row.shape[2] % 2 == 0 and row.shape[1] >= 192
    np.testing.assert_array_equal(row[:, : size[0] * scale : scale, : size[1] * scale : scale], clip)


def test_mistakes_are_refused_by_name(tiny_run, tmp_path):
    (tmp_path / "config.json").write_text("[]")
    for args, words in [
        (Args(tmp_path / "absent"), "expected a run folder with config.json"),
        (Args(tmp_path), "config.json: expected a config of this version of rlv2v"),
        (Args(tiny_run, clips=-1), "--clips"),
        (Args(tiny_run, data=tmp_path / "absent"), "expected a folder testX"),
    ]:
        with pytest.raises(UserError, match=words):
            main(args)
