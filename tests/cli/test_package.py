"""The package as it is installed: importable from any folder, and layered as DESIGN says where linters do not look."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import rlv2v.kernels
from rlv2v import _native

ROOT = Path(__file__).parents[2]


def test_imports_from_another_folder(tmp_path: Path) -> None:
    code = "import rlv2v, rlv2v.kernels, rlv2v._native, rlv2v.replay; print(rlv2v.kernels.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).exists()


def test_the_kernels_folder_is_the_kernels_package() -> None:
    assert Path(rlv2v.kernels.__file__).resolve() == (ROOT / "kernels" / "__init__.py").resolve()
    assert rlv2v.kernels.__name__ == "rlv2v.kernels"


def test_the_native_module_needs_no_torch(tmp_path: Path) -> None:
    code = "import importlib.util as u, sys; s = u.spec_from_file_location('_native', sys.argv[1])\n"
    code += "u.module_from_spec(s); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(_native.__file__)], cwd=tmp_path, check=True)


def test_only_the_bindings_know_python() -> None:
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert len(sources) > 5
    knows = {path.name for path in sources if re.search(r"pybind11|Python\.h|torch/", path.read_text())}
    assert knows == {
        "arrays.h",
        "batch_ring.h",
        "bind_gates.cpp",
        "bind_norm.cpp",
        "bind_persistent.cpp",
        "bind_slice.cpp",
        "bindings.cpp",
    }
