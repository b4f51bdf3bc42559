"""Exported graphs: they translate as `Stream` does, in standard operators, at every size, with the state as tensors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlv2v.checkpoint.export import load_translator, pack_translators
from rlv2v.config import Config
from rlv2v.data import to_model, to_uint8
from rlv2v.data.video import read_frames
from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.export import Args, main
from rlv2v.kernels.bilateral import slice_apply
from rlv2v.method.translation import Stream
from rlv2v.model import Generator, GridTranslator
from rlv2v.model.build import build_nets
from rlv2v.model.graphs import StartGraph, StepGraph, slice_by_bins, state_names, write_graphs
from rlv2v.translate import Args as TranslateArgs
from rlv2v.translate import main as translate

ROOT = Path(__file__).parents[2]
HEADS = ["grid", "mask"]
HORIZON = 4
FRAMES = 50


def config_of(head: str) -> Config:
    return Config.of("tiny", head=head, frames=HORIZON)


def generators(head: str) -> Any:
    """Both generators of a run, with weights at which nothing is the identity."""
    torch.manual_seed(0)
    nets = build_nets(config_of(head), discriminators=False)
    for weight in nets.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    return nets.eval()


@pytest.mark.parametrize("bins", [1, 2, 6])
@pytest.mark.parametrize(("cells", "size"), [((3, 5), (13, 22)), ((1, 1), (4, 7)), ((4, 2), (2, 3))])
def test_slicing_by_bins_is_slicing(bins: int, cells: tuple[int, int], size: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    grid = torch.randn(1, 12, bins, *cells, generator=rng, dtype=torch.float64)
    guide = 2 * torch.rand(1, *size, generator=rng, dtype=torch.float64) - 0.5  # beyond both ends
    frames = torch.randn(1, 3, *size, generator=rng, dtype=torch.float64)
    expected = slice_apply(grid, guide, frames, backend="reference")
    torch.testing.assert_close(slice_by_bins(grid, guide, frames), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_a_graph_does_what_a_stream_does_from_the_first_frame_to_beyond_the_horizon(head: str) -> None:
    g, config = generators(head).g_y, config_of(head)
    clip = np.random.default_rng(0).integers(0, 256, (3 * HORIZON, 16, 24, 3), dtype=np.uint8)
    stream, start, state = Stream(g, config), StartGraph(g, HORIZON), None
    tensors: list[Tensor] = []
    for number, frame in enumerate(clip):
        frames = [to_model(torch.from_numpy(frame))[None]] * (2 if head == "grid" else 1)
        translated, *tensors = (StepGraph(g, HORIZON, state) if number else start)(*frames, *tensors)
        state = start.run(tuple(frames), state)[1]
        assert np.abs(to_uint8(translated[0]).numpy().astype(int) - stream(frame)).max() <= 1
    names = state_names(state)
    assert len(names) == len(tensors) and names[:5] == [f"state_0_{k}" for k in ("h", "c", "frames", "mean", "square")]
    assert max(
        float(t) for name, t in zip(names, tensors, strict=True) if name.endswith("frames")
    ) <= HORIZON + getattr(g, "burn_in", 0)


def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Generator):
        def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
            return x, state

    g = generators("grid").g_y
    with pytest.raises(UserError, match="expected a generator of --method rlv2v, got Other"):
        write_graphs(Other(), HORIZON, 16, tmp_path)
    with pytest.raises(UserError, match="expected a run of --size 32 or more, got 16"):
        write_graphs(g, HORIZON, 16, tmp_path)
    (tmp_path / "step.pt2").write_bytes(b"")
    with pytest.raises(UserError, match=r"step\.pt2: is there already; choose another folder"):
        write_graphs(g, HORIZON, 32, tmp_path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"^export: onnxscript not installed; pip install 'rlv2v\[export\]'$"):
        write_graphs(g, HORIZON, 32, tmp_path / "other")
    assert [path.name for path in tmp_path.iterdir()] == ["step.pt2"]


@pytest.fixture(scope="module", params=HEADS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run and its export, the direction y2x of a painting one."""
    head, folder = request.param, tmp_path_factory.mktemp("export")
    config, nets = config_of(head).replace(size=32), generators(head)
    (folder / "model.safetensors").write_bytes(pack_translators(nets.g_x, nets.g_y, config))
    main(Args(folder, folder / "out", "x2y" if head == "grid" else "y2x"))
    return folder, folder / "out"


@pytest.mark.thorough
@pytest.mark.parametrize(("cells", "size"), [((2, 3), (37, 50)), ((5, 2), (90, 31))])
@torch.no_grad()
def test_both_formats_translate_as_the_model(
    exported: tuple[Path, Path], cells: tuple[int, int], size: tuple[int, int]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run, out = exported
    sessions = [onnxruntime.InferenceSession(out / f"{name}.onnx") for name in ("start", "step")]
    programs = [torch.export.load(out / f"{name}.pt2").module() for name in ("start", "step")]
    about = sessions[0].get_modelmeta().custom_metadata_map
    g, _ = load_translator(run, about["direction"])
    multiple = 16 if isinstance(g, GridTranslator) else 8
    assert about["size"] == "32" and about["multiple"] == str(multiple)
    rng = torch.Generator().manual_seed(0)
    state: Any = None
    of_onnx: list[np.ndarray] = []
    of_torch: list[Tensor] = []
    for number in range(FRAMES):
        small, frame = (
            2 * torch.rand(1, 3, *sides, generator=rng) - 1 for sides in ([multiple * cell for cell in cells], size)
        )
        if isinstance(g, GridTranslator):
            grids, state = g.decide(small[:, None], state)
            expected = g.transform(grids, frame[:, None])[:, 0].clamp(-1, 1)
        else:
            video, state = g(small[:, None], state)
            expected = video[:, 0]
        state = g.limit_state(state, HORIZON)
        frames = [small, frame][: 2 if isinstance(g, GridTranslator) else 1]
        session, program = sessions[number > 0], programs[number > 0]
        names = [i.name for i in session.get_inputs()]
        values = [*(tensor.numpy() for tensor in frames), *of_onnx]
        translated, *of_onnx = session.run(None, dict(zip(names, values, strict=True)))
        np.testing.assert_allclose(translated, expected.numpy(), atol=1e-4, rtol=0)
        result, *of_torch = program(*frames, *of_torch)
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.mark.thorough
def test_a_graph_holds_standard_operators_and_names_its_state(exported: tuple[Path, Path]) -> None:
    onnx = pytest.importorskip("onnx")
    for name in ("start", "step"):
        model = onnx.load(exported[1] / f"{name}.onnx")
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} == {""} and not model.functions
        program = torch.export.load(exported[1] / f"{name}.pt2")
        assert not [node for node in program.graph.nodes if "rlv2v" in str(node.target)]
    inputs, outputs = ([value.name for value in values] for values in (model.graph.input, model.graph.output))
    states = [name for name in inputs if name.startswith("state_")]
    assert outputs == ["translated", *(f"next_{name}" for name in states)]
    assert inputs[: -len(states)] in (["small", "frame"], ["small"])


@pytest.mark.thorough
def test_the_example_plays_it_without_rlv2v_or_torch(exported: tuple[Path, Path], tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    run, out = exported
    t, y, x = np.mgrid[:12, :48, :64].astype(float)
    waves = [128 + 100 * np.sin(x / 20 + t), 128 + 80 * np.cos(y / 10 + t / 2), 60 + 2 * x]
    write_clip(tmp_path / "in.mp4", np.stack(waves, -1).astype(np.uint8), 10)
    example = (ROOT / "examples" / "play_onnx.py").read_text()
    assert "rlv2v." not in example and "import torch" not in example and len(example.splitlines()) <= 40
    line = [sys.executable, ROOT / "examples" / "play_onnx.py", out, tmp_path / "in.mp4", tmp_path / "out.mp4"]
    subprocess.run(line, check=True)
    about = onnxruntime.InferenceSession(out / "start.onnx").get_modelmeta().custom_metadata_map
    translate(TranslateArgs(run, tmp_path / "in.mp4", tmp_path / "ours.mp4", about["direction"], device="cpu"))
    source, ours, theirs = (
        np.stack(list(read_frames(tmp_path / name))).astype(int) for name in ("in.mp4", "ours.mp4", "out.mp4")
    )
    assert ours.shape == theirs.shape == (12, 48, 64, 3)
    difference = np.abs(ours - theirs).mean()  # of two encodings, and of two ways to scale
    assert difference < 6 and difference < 0.5 * np.abs(ours - source).mean()
