"""The corpus of broken and odd files: each gets its status, and what is usable of it gives exactly its frames."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import pytest
from data_clips import numbers_of, open_loader
from odd_files import CLIP, Expected

from rlv2v.data import index, video
from rlv2v.data.index import index_folder, open_dataset
from rlv2v.data.readers import FrameReader
from rlv2v.errors import UserError, one_line

INDEX = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from rlv2v.data.index import index_folder
sources = index_folder(Path(sys.argv[1]), frames=1)
print(json.dumps([asdict(s) | {"path": s.path.name} for s in sources]))
"""
Corpus = tuple[Path, dict[str, Expected], list[dict]]


def tree(root: Path) -> set[str]:
    return {os.path.join(folder, name) for folder, folders, files in os.walk(root) for name in [*folders, *files]}


@pytest.fixture(scope="module")
def corpus(odd_files: tuple[Path, dict[str, Expected]]) -> Corpus:
    """The dataset folder, what is expected of `trainX` in it, and what the index says, in a process of its own."""
    root, expected = odd_files
    (root / "trainX" / index.MANIFEST).unlink(missing_ok=True)
    present = tree(root)
    elsewhere = str(root / "elsewhere")
    done = subprocess.run(
        [sys.executable, "-c", INDEX, str(root / "trainX")],
        cwd=elsewhere,
        env=os.environ | {"TMPDIR": elsewhere, "HOME": elsewhere},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert tree(root) - present == {str(root / "trainX" / index.MANIFEST)}, "nothing but the manifest is written"
    return root, expected, json.loads(done.stdout)


def test_every_file_has_its_status_and_reason(corpus: Corpus) -> None:
    _, expected, rows = corpus
    assert len(expected) >= 30 and {e.status for e in expected.values()} == {"ok", "truncated", "excluded"}
    assert sorted(row["path"] for row in rows) == sorted(expected)
    wrong = []
    for row in rows:
        want = expected[row["path"]]
        same = row["status"] == want.status and (row["width"], row["height"]) == (want.width, want.height)
        same &= want.frames[0] <= row["num_frames"] <= want.frames[1] and "\n" not in row["reason"]
        same &= re.search(want.reason, row["reason"]) is not None if want.reason else row["reason"] == ""
        if not same:
            wrong.append((row, want))
    assert not wrong


def test_the_second_index_says_the_same_and_opens_nothing(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = corpus[0] / "trainX", corpus[2]
    opened: list[str] = []
    for module, name in ((av, "open"), (index, "inspect"), (index, "content_hash")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: (opened.append(str(a[0])), real(*a, **k))[1])
    written = (folder / index.MANIFEST).read_bytes()
    sources = index_folder(folder, frames=1)
    assert [{**asdict(s), "path": s.path.name} for s in sources] == rows
    # only what could not be read is tried again: its status, never PyAV
    assert {Path(p).name for p in opened} <= {"zero.mp4", "locked.mp4"}, opened
    assert (folder / index.MANIFEST).read_bytes() == written
    (folder / index.MANIFEST).unlink()
    opened.clear()
    assert index_folder(folder, frames=1) == sources, "decoded anew, it says the same"
    assert len(opened) > len(sources)


def test_what_is_usable_gives_exactly_its_frames(corpus: Corpus) -> None:
    reader, rng, wrong = FrameReader(), np.random.default_rng(0), []
    for source in index_folder(corpus[0] / "trainX", frames=1):
        num = source.num_frames
        ranges = [(0, num), *(sorted(rng.integers(0, num + 1, 2)) for _ in range(4)), (num - 1, num), (num // 2, num)]
        for start, end in ranges if source.status != "excluded" else ():
            if start < end:
                frames = reader.read(source, int(start), int(end - start))
                assert frames.shape == (end - start, source.height, source.width, 3) and frames.dtype == np.uint8
                if numbers_of(frames) != list(range(start, end)):
                    wrong.append((source.path.name, start, end, numbers_of(frames)))
    assert not wrong


def test_what_is_excluded_cannot_be_read_either(corpus: Corpus) -> None:
    """A command that reads one file has no index; pipes and devices are kept from training alone."""
    root, expected, _ = corpus
    (broken := root / "elsewhere" / "broken\n.png").write_bytes(b"\x89PNG")
    excluded = [name for name, e in expected.items() if e.status == "excluded" and "neither" not in e.reason]
    for path in (broken, root / "nowhere.mp4", *(root / "trainX" / name for name in excluded)):
        with pytest.raises(UserError, match=f"^{re.escape(one_line(path))}: ") as caught:
            list(video.read_frames(path))
        assert "\n" not in str(caught.value)


def test_training_runs_on_what_is_usable(corpus: Corpus) -> None:
    root, expected, _ = corpus
    np.save(root / "trainY" / "raw.npy", CLIP)
    dataset = open_dataset(root, frames=4)
    left_out = {n for n, e in expected.items() if e.status == "excluded" or e.frames[1] < 4}
    assert {s.path.name for s in dataset.excluded} == left_out
    loader = open_loader(dataset, batch={"x": 4, "y": 1}, size=32, threads=2, cache_mib=0)
    drawn = {sample.source.path.name for step in range(150) for sample in loader.sampler.samples("x", step)}
    assert drawn == set(expected) - left_out, "an epoch sees every file"
    for _ in range(50):
        batch = next(loader)
        assert batch.x is not None and batch.x.shape == (4, 4, 32, 32, 3)
    loader.close()
