"""The ahead-of-time check: what it lets pass, and what it must not."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlv2v.kernels.aot import ctas_per_multiprocessor

pytest.importorskip("triton")


def check(*arguments: str, interpret: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process: an interpreted Triton, as the other tests need it, compiles nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "rlv2v.kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.thorough
def test_kernels_of_the_table_neither_spill_nor_take_too_much_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    shapes = ("--arch", "86", "90", "--channels", "32", "--kernel-size", "3", "--dtype", "fp16", "fp32")
    done = check(*shapes, "--only", "(forward|backward)_step .* s[0-9]( recomputed)?$", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {(row["arch"], row["kernel"], row["dtype"]) for row in rows} == set(
        itertools.product((86, 90), ("forward_step", "backward_step"), ("fp16", "fp32"))
    )
    for row in rows:
        assert row["local_bytes"] == 0
        assert row["ctas"] >= 2
        assert (row["tensor_core_products"] > 0) == (row["dtype"] == "fp16"), row


@pytest.mark.thorough
def test_tf32_is_for_tensor_cores_of_every_architecture(tmp_path: Path) -> None:
    file, archs = tmp_path / "rows.json", (80, 86, 89, 90, 100, 120)
    shapes = ("--arch", *map(str, archs), "--channels", "24", "--dtype", "fp32")
    done = check(*shapes, "--only", "forward_step C24 k3 64.* s[0-9] tf32$", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert {row["arch"] for row in rows} == set(archs)
    assert all(row["tensor_core_products"] > 0 and row["local_bytes"] == 0 for row in rows)


@pytest.mark.thorough
def test_kernels_of_the_end_of_a_block_do_not_spill() -> None:
    kernels = "activate|normalise|sums|spread|add_clips"
    done = check("--arch", "86", "90", "--channels", "16", "--dtype", "fp32", "bf16", "--only", f"^({kernels}) ")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f" {name} " in done.stdout for name in kernels.split("|"))


@pytest.mark.parametrize(
    ("tile", "fault", "only"),
    [
        ("64 32 128 5", "more than 101376 B of shared memory", "forward_step .* s[0-9]$"),
        pytest.param("128 64 32 3", "spills", "backward_step .*recomputed$", marks=pytest.mark.thorough),
    ],
)
def test_a_fault_exits_with_1_and_is_named(tile: str, fault: str, only: str) -> None:
    shape = ("--arch", "86", "--channels", "128", "--dtype", "fp16")
    done = check(*shape, "--tile", *tile.split(), "--only", only)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"<- {fault}" in done.stdout


def test_an_interpreted_triton_is_refused() -> None:
    done = check(interpret=True)
    assert done.returncode == 2
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "ctas"),
    [(86, 128, 0, 4), (86, 168, 24576, 3), (86, 32, 50176, 2), (86, 16, 0, 12), (90, 129, 0, 3), (90, 16, 0, 16)],
)
def test_programs_a_multiprocessor_follow_from_registers_memory_and_threads(
    arch: int, registers: int, shared: int, ctas: int
) -> None:
    assert ctas_per_multiprocessor(arch, registers, shared, warps=4) == ctas
