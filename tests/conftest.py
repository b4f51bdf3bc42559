"""What several test modules share."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from priority import policy

# Read once, when Triton and the kernels are first imported: without a GPU they run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# torch's cache of compiled code does not know the instruction set: code of a run held to AVX2 breaks the next run.
if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="inductor-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = COMPILED.name

# A shell that starts the tests in the background has them ignore Ctrl-C, and nohup the end of the terminal, which the
# commands under test would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

from rlv2v.checkpoint.export import pack_translators
from rlv2v.config import Config
from rlv2v.data.synth import Counts, write_dataset
from rlv2v.model.build import build_nets

USUAL = policy()


@pytest.fixture(autouse=True)
def no_real_time() -> Iterator[None]:
    """A test that leaves the process real-time would starve ranks in a later one."""
    yield
    assert policy() == USUAL, "the scheduling policy was changed: see tests/priority.py"


@pytest.fixture(scope="module")
def bench_folder() -> Iterator[None]:
    """bench/ on the path: its modules import each other by name."""
    folder = str(Path(__file__).parents[1] / "bench")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Of torch's, for small arithmetic: more would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic set of the tiny preset's size and clip length."""
    out = tmp_path_factory.mktemp("data") / "synth"
    write_dataset(out, size=16, frames=4, counts=Counts(x=24, y=12, z=12, s=6, val=2, test=3))
    return out


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model of the tiny preset, untrained, as training writes it: config and weights."""
    run = tmp_path_factory.mktemp("run")
    config = Config.of("tiny", out=run)
    torch.manual_seed(0)
    nets = build_nets(config, discriminators=False)
    (run / "config.json").write_text(config.to_json())
    (run / "model.safetensors").write_bytes(pack_translators(nets.g_x, nets.g_y, config))
    return run
