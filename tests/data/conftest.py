"""The corpus of odd files, made once for all test modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from odd_files import Expected, make_corpus


@pytest.fixture(scope="session")
def odd_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Expected]]]:
    """A dataset folder with an empty trainY, and what is expected of each file of its trainX."""
    root = tmp_path_factory.mktemp("odd")
    for name in ("trainX", "trainY", "elsewhere"):
        (root / name).mkdir()
    yield root, make_corpus(root / "trainX", tmp_path_factory.mktemp("scratch"))
    (root / "trainX" / "locked.mp4").chmod(0o600)
