"""The report page in headless Chromium, from a file URL: what its script does. Skipped where there is no Chromium."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from rlv2v.config import Config
from rlv2v.data.video import read_frames
from rlv2v.data.writer import write_clip
from rlv2v.report import Args, main

PATHS = [shutil.which("chromium"), shutil.which("chromedriver")]
if not all(PATHS):
    pytest.skip(
        "no chromium and chromedriver here; Debian: apt-get install chromium chromium-driver", allow_module_level=True
    )
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install '.[test]'")
FRAMES = 12


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small clips with truth, of which no two frames are alike: a bar moves; one name is hostile."""
    folder = tmp_path_factory.mktemp("data")
    frames = np.full((FRAMES, 16, 16, 3), (40, 90, 140), np.uint8)
    for number, frame in enumerate(frames):
        frame[:, number : number + 3] = (250, 200, 20)
    for part, clip in (("testX", frames), ("testTruth", 255 - frames), ("trainY", 255 - frames)):
        (folder / part).mkdir()
        write_clip(folder / part / "<img src=x>.mp4", clip, 25)
        write_clip(folder / part / "turned.mp4", clip.transpose(0, 2, 1, 3), 25)
    return folder


@pytest.fixture(scope="module")
def page(tiny_run: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two runs on two clips; the first run's folder has a hostile name too."""
    root = tmp_path_factory.mktemp("browser")
    runs = tuple(shutil.copytree(tiny_run, root / name) for name in ("ours <b>&", "other"))
    for run in runs:
        (run / "config.json").write_text(Config.of("tiny", data=data).to_json())
        lines = [f'{{"step": {step}, "seconds": {step}, "loss": {1 / step}}}\n' for step in range(1, 9)]
        (run / "metrics.jsonl").write_text("".join(lines))
    main(Args(runs))
    return runs[0] / "report" / "index.html"


class Browser:
    """A window of Chromium; `js` runs the body of a function and returns its value."""

    def __init__(self, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = PATHS[0]
        flags = ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={profile}")
        for flag in flags:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=PATHS[1])
        self.driver = webdriver.Chrome(options=options, service=service)

    def js(self, body: str, *values: Any) -> Any:
        return self.driver.execute_script(body, *values)

    def wait(self, body: str, *values: Any, seconds: float = 20) -> Any:
        """Wait until the function's value is true; return it."""
        end = time.monotonic() + seconds
        while not (value := self.js(body, *values)):
            assert time.monotonic() < end, f"never became true: {body}"
            time.sleep(0.02)
        return value

    def press(self, key: str) -> None:
        """Press a key where the focus is."""
        webdriver.ActionChains(self.driver).send_keys(key).perform()

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(chromium: Browser, page: Path) -> Iterator[Browser]:
    """The page, opened anew with all its videos loaded; afterwards no error or warning is in the console."""
    chromium.resize(1280, 1600)
    chromium.driver.get(page.as_uri())
    chromium.wait("return player.clips.length === 2 && player.clips.every((clip) => clip.video)")
    yield chromium
    assert chromium.driver.get_log("browser") == []


AT = "return player.clips.every((c) => !c.seeking && c.shown === arguments[0])"


def keys() -> Any:
    from selenium.webdriver.common.keys import Keys

    return Keys


def test_the_page_opens_and_fetches_nothing(browser: Browser, record_property: Callable[[str, object], None]) -> None:
    opened = browser.js("return performance.getEntriesByType('navigation')[0].loadEventEnd")
    record_property("opened_after_ms", opened)
    print(f"the page was loaded after {opened:.0f} ms")
    names = browser.js("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith(("data:", "blob:")) for name in names)
    assert browser.js("return document.querySelector('h1').textContent") == "ours <b>& · other"
    assert browser.js("return document.querySelector('h3').textContent") == "<img src=x>.mp4"
    assert browser.js("return document.querySelectorAll('h1 b, img:not(.samples)').length") == 0
    assert browser.js("return document.querySelectorAll('video[controls]').length") == 0


def test_every_video_plays_and_space_toggles(browser: Browser) -> None:
    browser.js("document.querySelector('.panel').focus()")  # a panel's button leaves the space bar to the player
    browser.press(" ")
    browser.wait("return player.playing && player.clips.every((c) => !c.video.paused && c.shown > 1)")
    assert browser.js("return document.getElementById('view').open") is False
    apart = [browser.js("return Math.abs(player.clips[0].shown - player.clips[1].shown)") for _ in range(20)]
    assert sorted(apart)[len(apart) // 2] <= 2
    browser.press(" ")
    browser.wait("return !player.playing && player.clips.every((c) => c.video.paused)")
    frame = browser.js("return Number(document.getElementById('scrubber').value)")
    browser.wait(AT, frame)


def test_playing_goes_round_at_any_speed(browser: Browser) -> None:
    browser.js("player.speed = 2; player.seek(9); player.play()")
    browser.wait("return player.clips.every((c) => c.shown >= 10)")
    browser.wait("return player.clips.every((c) => c.shown < 8)")
    browser.js("player.pause()")


def test_all_canvases_show_the_frame_that_is_asked_for(browser: Browser) -> None:
    """Exactly: the same pixels whichever way a frame is reached, and the cursors and the scrubber say its number."""
    picture = """return [...document.querySelectorAll('.clip canvas')].map((c) => c.toDataURL()).join()"""
    pictures = {}
    for frame in (0, 7, 8, 3, FRAMES - 1):
        browser.js("player.seek(arguments[0])", frame)
        browser.wait(AT, frame)
        pictures[frame] = browser.js(picture)
    assert len(set(pictures.values())) == len(pictures)
    browser.press(keys().HOME)
    browser.wait(AT, 0)
    assert browser.js(picture) == pictures[0]
    for frame in range(1, 8):
        browser.press(keys().ARROW_RIGHT)
        browser.wait(AT, frame)
    assert browser.js(picture) == pictures[7]
    browser.press(keys().ARROW_RIGHT)
    browser.wait(AT, 8)
    assert browser.js(picture) == pictures[8]
    browser.press(keys().END)
    browser.wait(AT, FRAMES - 1)
    browser.press(keys().ARROW_RIGHT)
    assert browser.js(picture) == pictures[FRAMES - 1]
    assert browser.js("return document.getElementById('frame').textContent") == f"{FRAMES} / {FRAMES}"
    cursors = browser.js(
        "return [...document.querySelectorAll('.charts line')].map((l) => Number(l.getAttribute('x1')))"
    )
    assert len(cursors) == 2 * 5 and set(cursors) == {FRAMES}


def test_a_frame_on_a_canvas_is_that_frame_of_the_file(browser: Browser, data: Path) -> None:
    """The nearest of all frames of the source and of the truth, and no farther than H.264 makes it."""
    for panel, folder in ((0, "testX"), (3, "testTruth")):
        frames = np.stack(list(read_frames(data / folder / "turned.mp4"))).astype(int)
        for frame in (0, 5, 8, FRAMES - 1):
            browser.js("player.seek(arguments[0])", frame)
            browser.wait(AT, frame)
            canvas = f"document.querySelectorAll('.clip')[1].querySelectorAll('canvas')[{panel}]"
            content = base64.b64decode(browser.js(f"return {canvas}.toDataURL().split(',')[1]"))
            shown = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            assert shown.shape == frames.shape[1:], "small clips are enlarged on the page only"
            errors = np.abs(frames - shown).mean(axis=(1, 2, 3))
            assert errors[frame] == errors.min() and errors[frame] < 6


def test_a_scrubber_that_moves_fast_ends_where_it_was_let_go(browser: Browser) -> None:
    move = "scrubber.value = arguments[0]; scrubber.dispatchEvent(new Event('input'))"
    for frame in (3, 9, 1, 6, 5, 7, 2) * 3:
        browser.js(f"const scrubber = document.getElementById('scrubber'); {move}", frame)
    browser.wait(AT, 2)
    left, top, width, _ = box_of(browser, ".charts svg")
    click_at(browser, left + width - 1, top + 9)
    browser.wait(AT, FRAMES - 1)


def box_of(browser: Browser, selector: str) -> list[float]:
    """Return left, top, width and height of an element in the window."""
    return browser.js(
        "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [box.left, box.top, box.width, box.height]",
        selector,
    )


def click_at(browser: Browser, x: float, y: float, to: tuple[float, float] | None = None) -> None:
    """Press the pointer at a place of the window, and let it go there or at another place."""
    chain = webdriver.ActionChains(browser.driver, duration=10)
    pointer = chain.w3c_actions.pointer_action
    pointer.move_to_location(int(x), int(y))
    pointer.pointer_down()
    if to:
        pointer.move_to_location(int(to[0]), int(to[1]))
    pointer.pointer_up()
    chain.perform()


def test_the_full_size_view_has_a_divider_for_pointer_and_keys(browser: Browser) -> None:
    browser.js("document.querySelectorAll('.clip')[1].querySelectorAll('.panel')[2].click()")
    assert browser.js("return [view.left, view.right, view.clip.number, document.getElementById('view').open]") == [
        "source", "1", 1, True,
    ]  # fmt: skip
    left, top, width, height = box_of(browser, ".picture")
    assert width == height and width >= 500 and width % 16 == 0, "whole pixels"
    click_at(browser, left + width / 2, top + height / 2, (left + width / 4, top + height / 2))
    line = "return document.getElementById('divider').getBoundingClientRect().left"
    assert abs(browser.js(line) - (left + width / 4)) <= 2
    now = "return Number(document.getElementById('divider').getAttribute('aria-valuenow'))"
    assert abs(browser.js(now) - 25) <= 1
    before = browser.js(now)
    browser.press(keys().ARROW_RIGHT)
    assert browser.js(now) == before + 2 and browser.js("return player.position") == 0
    browser.press(keys().END)
    assert browser.js(now) == 100
    browser.press(" ")
    browser.wait("return player.playing && view.clip.shown > 1")
    assert browser.js("return player.clips[0].video.paused"), "only what can be seen plays"
    browser.press(" ")
    same = """const [a, b] = ['left', 'right'].map((side) => document.getElementById(side + '-canvas'));
      const panels = document.querySelectorAll('.clip')[1].querySelectorAll('.panel canvas');
      return [a.toDataURL() === panels[0].toDataURL(), b.toDataURL() === panels[arguments[0]].toDataURL(),
              a.toDataURL() === b.toDataURL()]"""
    browser.wait("return !player.playing && !view.clip.seeking")
    assert browser.js(same, 2) == [True, True, False]
    browser.js("const s = document.getElementById('right'); s.value = 'truth'; s.dispatchEvent(new Event('change'))")
    assert browser.js(same, 3) == [True, True, False]
    browser.js("document.getElementById('next').click()")
    assert browser.js("return [view.clip.number, view.right, player.clips[1].views.length]") == [0, "truth", 4]
    browser.press(keys().ESCAPE)
    browser.wait("return view.clip === null")  # the dialog closes a moment after the key
    assert browser.js("return document.getElementById('bar').parentElement.tagName") == "BODY"


def test_nothing_is_covered_or_cut_from_phone_to_wide_in_light_and_dark(browser: Browser) -> None:
    """The bar ends where the page begins, nothing sticks out, and small clips have whole pixels."""
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    sizes = """const main = document.querySelector('main');
      const bar = document.getElementById('bar').getBoundingClientRect();
      return [main.scrollWidth - main.clientWidth, document.documentElement.scrollWidth - innerWidth,
              main.getBoundingClientRect().bottom - bar.top, bar.bottom - innerHeight]"""
    canvases = "[...document.querySelectorAll('.clip canvas')]"
    wide = f"return {canvases}.map((canvas) => [canvas.getBoundingClientRect().width, canvas.width])"
    for width in (320, 390, 1280, 1920):
        for dark in (False, True):
            browser.resize(width, 800, dark=dark)
            browser.wait("return innerWidth === arguments[0]", width)
            browser.wait(f"{sizes}.every((value) => value === 0)")
            browser.wait(f"{wide}.every(([shown, own]) => shown >= own && shown % own === 0)")
            colours = browser.js("const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]")
            luma = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in colours]
            assert (luma[0] < luma[1]) is dark and abs(luma[0] - luma[1]) > 150


def test_loss_curves_follow_the_chosen_axis_and_the_pointer(browser: Browser) -> None:
    chart = "document.querySelector('#losses figure')"
    assert browser.js(f"return {chart}.querySelectorAll('path:not(.faint)').length") == 2
    browser.js("const a = document.getElementById('axis'); a.value = 'seconds'; a.dispatchEvent(new Event('change'))")
    assert browser.js(f"return {chart}.querySelector('.ends').lastChild.textContent") == "8 s"
    values = f"return {chart}.querySelector('.values').textContent"
    browser.js(f"{chart}.scrollIntoView()")
    left, top, *_ = box_of(browser, "#losses svg")
    chain = webdriver.ActionChains(browser.driver, duration=10)
    chain.w3c_actions.pointer_action.move_to_location(int(left + 2), int(top + 5))
    chain.perform()
    assert browser.js(values).startswith("1"), "the value of the first step is 1"
