"""The corpus of broken and odd files: each is what it shall be, and what is usable of it gives exactly its frames."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from odd_files import NUM, Expected, make_corpus, number_of, stamped

from rlv2v.data import index
from rlv2v.data.index import Source, index_folder, open_dataset
from rlv2v.data.loader import Loader
from rlv2v.data.readers import FrameReader

INDEX = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from rlv2v.data.index import index_folder
found = index_folder(Path(sys.argv[1]), frames=1)
print(json.dumps([asdict(s) | {"path": s.path.name} for s in found]))
"""


def tree(root: Path) -> list[str]:
    return sorted(os.path.join(folder, name) for folder, dirs, names in os.walk(root) for name in [*dirs, *names])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Expected], list[dict]]]:
    """The dataset folder, what is expected of `trainX` in it, and what the index says, in a process of its own."""
    root = tmp_path_factory.mktemp("odd")
    for name in ("trainX", "trainY", "elsewhere"):
        (root / name).mkdir()
    expected = make_corpus(root / "trainX")
    before = tree(root)
    done = subprocess.run(
        [sys.executable, "-c", INDEX, str(root / "trainX")],
        cwd=root / "elsewhere",
        env=os.environ | {"TMPDIR": str(root / "elsewhere"), "HOME": str(root / "elsewhere")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    new = set(tree(root)) - set(before)
    assert new == {str(root / "trainX" / index.MANIFEST)}, "nothing but the manifest is written"
    yield root, expected, json.loads(done.stdout)
    (root / "trainX" / "locked.mp4").chmod(0o600)


def usable(corpus: tuple[Path, dict[str, Expected], list[dict]]) -> list[Source]:
    return [s for s in index_folder(corpus[0] / "trainX", frames=1) if s.status != "excluded"]


def test_numbers_survive_where_a_frame_can_carry_them() -> None:
    for width, height, most in ((64, 48, 256), (63, 47, 256), (96, 80, 256), (1, 1, 10)):
        for number in range(most):
            assert number_of(stamped(number, width, height)) == number
    assert number_of(np.rot90(stamped(3))) != 3 and number_of(stamped(3)[::-1]) != 3


def test_every_file_has_its_status_and_reason(corpus: tuple[Path, dict[str, Expected], list[dict]]) -> None:
    _, expected, rows = corpus
    assert len(expected) >= 30 and {e.status for e in expected.values()} == {"ok", "truncated", "excluded"}
    assert sorted(row["path"] for row in rows) == sorted(expected)
    wrong = []
    for row in rows:
        want = expected[row["path"]]
        same = row["status"] == want.status and (row["width"], row["height"]) == (want.width, want.height)
        same &= want.frames[0] <= row["num_frames"] <= want.frames[1]
        said = re.search(want.reason, row["reason"]) is not None if want.reason else row["reason"] == ""
        if not (same and said and "\n" not in row["reason"]):
            wrong.append((row, want))
    assert not wrong


def test_only_what_varies_is_said_to_vary(corpus: tuple[Path, dict[str, Expected], list[dict]]) -> None:
    assert {row["path"] for row in corpus[2] if row["variable"]} == {"vfr.mp4", "vfr.webm"}


def test_the_second_index_says_the_same_and_opens_nothing(
    corpus: tuple[Path, dict[str, Expected], list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    for module, name in ((av, "open"), (index, "inspect"), (index, "content_hash")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, **k: (opened.append(str(a[0])), real(*a, **k))[1])
    written = (corpus[0] / "trainX" / index.MANIFEST).read_bytes()
    found = index_folder(corpus[0] / "trainX", frames=1)
    assert [s.path.name for s in found] == [row["path"] for row in corpus[2]]
    for source, row in zip(found, corpus[2], strict=True):
        assert {**vars(source), "path": source.path.name} == row
    # only what could not be read is tried again: its status, never PyAV
    assert {Path(p).name for p in opened} <= {"zero.mp4", "locked.mp4"}, opened
    assert (corpus[0] / "trainX" / index.MANIFEST).read_bytes() == written
    (corpus[0] / "trainX" / index.MANIFEST).unlink()
    opened.clear()
    assert index_folder(corpus[0] / "trainX", frames=1) == found, "decoded anew, it says the same"
    assert len(opened) > len(found)


def test_what_is_usable_gives_exactly_its_frames(corpus: tuple[Path, dict[str, Expected], list[dict]]) -> None:
    read = FrameReader().read
    rng = np.random.default_rng(0)
    wrong = []
    for source in usable(corpus):
        num = source.num_frames
        parts = [(0, num)] + [sorted(rng.integers(0, num + 1, 2)) for _ in range(4)] + [(num - 1, num), (num // 2, num)]
        for start, end in parts:
            if start == end:
                continue
            frames = read(source, int(start), int(end - start))
            assert frames.shape == (end - start, source.height, source.width, 3) and frames.dtype == np.uint8
            numbers = [number_of(f) for f in frames]
            if numbers != list(range(start, end)):
                wrong.append((source.path.name, int(start), int(end), numbers))
    assert not wrong


def test_training_runs_on_what_is_usable(corpus: tuple[Path, dict[str, Expected], list[dict]]) -> None:
    root, expected, _ = corpus
    np.save(root / "trainY" / "raw.npy", np.stack([stamped(n) for n in range(NUM)]))
    dataset = open_dataset(root, frames=4)
    left_out = {n for n, e in expected.items() if e.status == "excluded" or e.frames[1] < 4}
    assert {s.path.name for s in dataset.excluded} == left_out
    loader = Loader(dataset, batch={"x": 4, "y": 1}, frames=4, size=32, seed=0, threads=2, cache_mib=0)
    try:
        drawn = {draw.source.path.name for step in range(50) for draw in loader.draws("x", step)}
        assert drawn == set(expected) - left_out, "50 steps see every file"
        for _ in range(50):
            batch = next(loader)
            assert batch.x is not None and batch.x.shape == (4, 4, 32, 32, 3)
    finally:
        loader.close()
