"""The report page: what it holds, that its videos are what they claim to be, and that it stands alone."""

from __future__ import annotations

import base64
import json
import re
import shutil
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest

from rlv2v import report_page, report_video
from rlv2v.config import Config
from rlv2v.data.images import write_image
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.data.video import read_frames
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.metrics import METRICS
from rlv2v.metrics.base import Scene
from rlv2v.metrics.evaluation import Evaluation, evaluate_run
from rlv2v.report import Args, main
from rlv2v.report_page import as_script, best_of, curve, open_runs, running_mean
from rlv2v.report_video import MAX_FRAMES, SHEET, Recorder, at_shown_size, common_fps, make_sheet, pack, padded

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(NamedTuple):
    """A page of two runs with the same weights: its text, the dataset, and what was measured of each run."""

    text: str
    data: Path
    results: list[Evaluation]


@pytest.fixture(scope="module")
def page(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page on a synthetic test set of three clips, of which two are shown; one run has a log and a sample grid."""
    root = tmp_path_factory.mktemp("report")
    data = root / "data"
    write_dataset(data, size=16, frames=4, counts=Counts(x=4, y=4, z=0, s=0, val=0, test=3))
    runs = tuple(shutil.copytree(tiny_run, root / name) for name in ("a <run>", "other"))
    (runs[0] / "config.json").write_text(Config.of("tiny", data=data).to_json())
    (runs[1] / "config.json").write_text(Config.of("tiny", data=data, seed=7).to_json())
    lines = [{"step": step, "seconds": step / 2, "loss": 1 / step, "odd": None} for step in range(1, 31)]
    (runs[0] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "lo')
    (runs[0] / "samples").mkdir()
    write_image(runs[0] / "samples" / "00000030.png", np.zeros((16, 64, 3), np.uint8))
    results = []

    def evaluate(*args: Any, **options: Any) -> Evaluation:
        results.append(evaluate_run(*args, **options))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_page, "evaluate_run", evaluate)
        main(Args(runs, clips=2))
    return Page((runs[0] / "report" / "index.html").read_text(), data, results)


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
            if name in ("aria-labelledby", "for"):
                self.referred.add(value or "")
            if name in ("src", "href"):
                assert value is not None and value.startswith(("data:", "#")), value

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def script_data(text: str) -> Any:
    """Return what the page's script reads."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return json.loads(found[1])


def test_page_is_well_formed_and_stands_alone(page: Page) -> None:
    check = Check()
    check.feed(page.text)
    check.close()
    assert check.open == [] and len(check.ids) == len(set(check.ids))
    assert {"videos", "first", "metrics", "sample", "curves", "config"} <= check.referred <= set(check.ids)
    assert "a &lt;run&gt;" in page.text and "<run>" not in page.text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.text), "only the name of SVG's elements"


def test_each_run_translates_once(page: Page) -> None:
    assert [result.run.name for result in page.results] == ["a <run>", "other"]


def test_a_clip_is_one_video_of_tiles_that_browsers_seek_in_exactly(page: Page, tmp_path: Path) -> None:
    text, data, _ = page
    videos = re.findall(r'<script type="text/plain" id="video-\d">([^<]+)</script>', text)
    clips = script_data(text)["clips"]
    assert len(videos) == len(clips) == 2 and clips[0]["panels"] == ["source", "0", "1", "truth"]
    path = tmp_path / "clip.mp4"
    path.write_bytes(base64.b64decode(videos[0]))
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt, context.has_b_frames) == ("h264", "yuv420p", False)
        packets = [packet for packet in container.demux() if packet.pts is not None]
        assert [packet.pts for packet in packets] == [packet.dts for packet in packets]
        assert packets[0].is_keyframe and packets[0].pts == 0
    sheet = np.stack(list(read_frames(path)))
    for folder, panel in (("testX", 0), ("testTruth", 3)):
        frames = np.stack(list(read_frames(data / folder / "00000.mp4")))
        y, x = panel // clips[0]["columns"] * clips[0]["stride"][1], panel % clips[0]["columns"] * clips[0]["stride"][0]
        tile = sheet[:, y + 4 :, x + 4 :][:, 2:64:4, 2:64:4]  # the middle of each enlarged pixel
        errors = np.abs(tile.astype(int) - frames)
        assert errors.mean() < 4 and np.percentile(errors, 75) <= 2, "but for the colour of edges"


def test_curves_are_those_of_the_evaluation(page: Page) -> None:
    for clip, other, shown in zip(
        *(result.clips for result in page.results), script_data(page.text)["clips"], strict=False
    ):
        assert list(shown["curves"]) == list(report_page.CURVES.values())
        for name, heading in report_page.CURVES.items():
            lines = shown["curves"][heading]
            for key, values in (
                ("0", clip.curves["model"]),
                ("1", other.curves["model"]),
                ("source", clip.curves["identity"]),
            ):
                expected = np.array(values[name], float)
                np.testing.assert_allclose(np.array(lines[key], float), expected, rtol=1e-3)


def test_table_has_runs_references_and_which_run_is_best(page: Page) -> None:
    table = page.text[page.text.index('<table class="metrics">') :]
    table = table[: table.index("</table>")]
    result = page.results[0]
    shown = [name for name in METRICS if any(row[name] is not None for row in result.rows.values())]
    assert len(shown) > 15 and table.count('<th scope="row"') == len(shown)
    heads = re.findall(r"</i>([^<]+)<small>|reference\">([^<]+)<small>", table)
    assert ["".join(h) for h in heads] == ["a &lt;run&gt;", "other", "identity", "constant", "truth", "target"]
    assert f"{result.rows['model']['l1']:.4f}" in table and f"{result.rows['identity']['l1']:.4f}" in table
    (l1,) = [line for line in table.splitlines() if ">l1<" in line]
    assert "★" not in l1, "the runs have the same weights"
    assert "lower is better" in table and "higher is better" in table and "nearer to 1 is better" in table


def test_best_is_by_direction_and_as_shown() -> None:
    assert best_of(METRICS["psnr"], [20.0, 21.0, None]) == {1}
    assert best_of(METRICS["l1"], [0.2, 0.1, 0.10001]) == {1, 2}
    assert best_of(METRICS["sharpness"], [0.5, 1.6, 3.0]) == {1}
    assert (
        best_of(METRICS["l1"], [0.1]) == best_of(METRICS["l1"], [0.1, 0.1]) == best_of(METRICS["l1"], [None]) == set()
    )


def test_log_sample_and_settings_are_there(page: Page) -> None:
    losses = script_data(page.text)["losses"]
    assert list(losses) == ["loss"] and list(losses["loss"]) == ["0"]
    assert losses["loss"]["0"]["step"] == list(range(1, 31)) and losses["loss"]["0"]["raw"][3] == 0.25
    assert page.text.count('class="samples"') == 1
    assert re.findall(r'<tr class="differs"><th scope="row">(\w+)</th>(.*)</tr>', page.text) == [
        ("seed", "<td>0</td><td>7</td>")
    ]
    assert page.text.index('<th scope="row">seed</th>') < page.text.index('<th scope="row">preset</th>')
    assert '<th scope="row">disc_widths</th><td>4 8 8</td><td>4 8 8</td>' in page.text


def test_run_without_data_or_log_still_has_a_page(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    main(Args((run,)))
    text = (run / "report" / "index.html").read_text()
    assert "--data" in text and "fewer than two steps" in text and "video-0" not in text and 'id="bar"' not in text
    assert [p.name for p in (run / "report").iterdir()] == ["index.html"]
    main(Args((run,), out=tmp_path / "page.html"))
    assert (tmp_path / "page.html").is_file()


def test_folder_of_images_in_cyclegan_layout_without_truth(tiny_run: Path, tmp_path: Path) -> None:
    """Sizes are odd, and there is no target set, so that rows and curves are fewer."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    folder = tmp_path / "data" / "testA" / "walk"
    folder.mkdir(parents=True)
    for number in range(3):
        write_image(folder / f"{number}.png", np.random.default_rng(number).integers(0, 256, (17, 23, 3), np.uint8))
    main(Args((run,), data=tmp_path / "data"))
    (clip,) = script_data((run / "report" / "index.html").read_text())["clips"]
    assert (clip["width"], clip["height"], clip["frames"], clip["panels"]) == (23, 17, 3, ["source", "0"])
    assert "L1 to the truth" not in clip["curves"] and "sharpness" in clip["curves"]


def test_runs_have_names_of_their_own(tiny_run: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a/x/run", "b/x/run", "b/solo")]
    for folder in folders:
        shutil.copytree(tiny_run, folder)
    assert [run.label for run in open_runs(folders)] == ["a/x/run", "b/x/run", "solo"]
    assert [run.label for run in open_runs(folders[:1])] == ["run"]


def test_script_data_cannot_end_its_element() -> None:
    value = {"</script><script>": ["<!--", "&amp;", "\u2028"]}
    text = str(as_script(value))
    assert "<" not in text and ">" not in text and json.loads(text) == value


def test_curves_are_thinned_and_smooth() -> None:
    points = np.stack([np.arange(20000.0)] * 3, axis=1)
    thin = curve(points)
    assert len(thin["raw"]) == 400 and thin["raw"] == thin["step"] == thin["seconds"]
    np.testing.assert_allclose(running_mean(np.full(100, 3.0)), 3)
    values = np.random.default_rng(0).normal(size=400)
    assert running_mean(values).std() < values.std() / 2
    assert len(running_mean(values[:1])) == 1


def test_values_that_are_no_numbers_are_not_drawn(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    entry = {"loss": 1.0, "bad": float("nan"), "name": "a", "flag": True}
    lines = [{"step": step, "seconds": 1.0, **entry} for step in (1, 2)] + [{"step": 3, "seconds": 2.0, "once": 1}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(report_page.losses(open_runs([run]))) == ["loss"]


@pytest.mark.parametrize("size", [(64, 64), (17, 23), (720, 1280), (1280, 720), (300, 300)])
@pytest.mark.parametrize("num", range(1, 10))
def test_sheets_fit_decoders_and_shrink_only_if_they_must(size: tuple[int, int], num: int) -> None:
    height, width = size
    columns, scale = pack(num, width, height)
    rows = -(-num // columns)
    shrunk = [padded(int(side * scale)) if scale < 1 else padded(side) for side in (width, height)]
    assert columns * shrunk[0] <= SHEET[0] + 16 * columns and rows * shrunk[1] <= SHEET[1] + 16 * rows
    assert scale == 1 or num > (SHEET[0] // padded(width)) * (SHEET[1] // padded(height))


def test_sizes_on_the_page() -> None:
    frame = np.zeros((1080, 1440, 3), np.uint8)
    assert at_shown_size(frame).shape == (720, 960, 3) and at_shown_size(frame.swapaxes(0, 1)).shape == (960, 720, 3)
    assert at_shown_size(frame[:300, :301]).shape == (300, 301, 3)
    small = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    assert np.array_equal(at_shown_size(small)[2::4, 1::4], small)


def test_panels_shrink_where_decoders_would_not_take_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_video, "SHEET", (512, 400))
    recorder = Recorder(tmp_path, 1)
    colours = [np.full((300, 400, 3), value, np.uint8) for value in (0, 60, 120, 180, 240)]
    for number in range(3):
        with recorder.record(number) as record:
            for _ in range(3):
                record("a", Scene(colours[3], colours[4]), colours[number])
            record("b", Scene(colours[3]), colours[0])
    (clip,) = recorder.clips.values()
    assert (clip.height, clip.width, clip.small) == (300, 400, False)
    assert clip.panels == ["source", "0", "1", "2", "truth"]
    sheet = make_sheet(clip, Fraction(30))
    path = tmp_path / "clip.mp4"
    path.write_bytes(base64.b64decode(sheet.video))
    frames = list(read_frames(path))
    assert len(frames) == 3 and frames[0].shape[1] <= 512 and frames[0].shape[0] <= 400
    assert abs(sheet.tile_width / sheet.tile_height - 4 / 3) < 0.1
    for panel, value in enumerate((180, 0, 60, 120, 240)):
        y, x = panel // sheet.columns * sheet.stride[1], panel % sheet.columns * sheet.stride[0]
        y, x = y + report_video.MARGIN, x + report_video.MARGIN
        tile = frames[0][y : y + sheet.tile_height, x : x + sheet.tile_width]
        assert np.abs(tile.astype(int) - value).max() <= 6


def test_a_long_clip_is_cut(tmp_path: Path) -> None:
    recorder, frame = Recorder(tmp_path, 1), np.zeros((16, 16, 3), np.uint8)
    with recorder.record(0) as record:
        for _ in range(MAX_FRAMES + 2):
            record("long", Scene(frame), frame)
    assert len(list(read_frames(recorder.clips["long"].files["source"]))) == MAX_FRAMES


def test_clips_step_at_the_rate_of_most() -> None:
    assert common_fps([Fraction(25), Fraction(30), Fraction(30)]) == 30
    assert common_fps([Fraction(240)]) == 60


def test_mistakes_are_refused_by_name(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    write_clip(tmp_path / "clip.mp4", np.zeros((2, 16, 16, 3), np.uint8), 25)
    for args, words in [
        (Args(()), "missing RUN"),
        (Args((tmp_path / "absent",)), "expected a run folder with config.json"),
        (Args((tmp_path,)), "config.json: expected a config of this version of rlv2v"),
        (Args((tiny_run,), clips=-1), "--clips"),
        (Args((tiny_run,), threads=-1), "--threads: expected 0 or more, got -1"),
        (Args((tiny_run, tiny_run)), "expected each run once"),
        (Args((tiny_run,), out=tmp_path), "--out"),
        (Args((tiny_run,), out=tmp_path / "absent" / "page.html"), "--out"),
        (Args((tiny_run,), data=tmp_path / "absent"), "expected a folder testX"),
    ]:
        with pytest.raises(UserError, match=words):
            main(args)
