"""The metrics whose network the user names: what they make of one that is easy to follow, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from metric_cases import night, scene
from scipy import linalg
from torch import Tensor, nn

from rlv2v.data.writer import write_clip
from rlv2v.errors import UserError
from rlv2v.evaluate import Args, main
from rlv2v.metrics.evaluation import evaluate_run
from rlv2v.metrics.learned import Name, frechet, load_networks


class Moments(nn.Module):
    """Mean and deviation by channel, of images (N,3,H,W) or videos (N,3,16,H,W)."""

    def forward(self, pixels: Tensor) -> Tensor:
        values = pixels.float().flatten(2)
        return torch.cat((values.mean(dim=2), values.std(dim=2)), dim=1)


class Difference(nn.Module):
    """Mean absolute difference of two images (N,3,H,W)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean(dim=[1, 2, 3])


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[Name, Path]:
    folder = tmp_path_factory.mktemp("networks")
    names: dict[Name, nn.Module] = {"fid": Moments(), "fvd": Moments(), "lpips": Difference()}
    for name, network in names.items():
        torch.jit.script(network).save(str(folder / f"{name}.pt"))
    return {name: folder / f"{name}.pt" for name in names}


def test_the_rows_are_ranked(tiny_run: Path, paths: dict[Name, Path], tmp_path: Path) -> None:
    for folder, number, clip in [
        *((f, n, c) for n in (1, 2) for f, c in (("testX", scene(n)), ("testTruth", night(scene(n))))),
        *(("trainY", n, night(scene(n))) for n in (3, 4)),
    ]:
        (tmp_path / folder).mkdir(exist_ok=True)
        write_clip(tmp_path / folder / f"{number}.mp4", clip, 25, "vp9-lossless")
    rows = evaluate_run(tiny_run, tmp_path, networks=load_networks(paths)).rows
    for name in ("fid", "fvd"):
        values = {row: rows[row][name] for row in ("truth", "target", "identity", "model")}
        assert max(values["truth"], values["target"]) < min(values["identity"], values["model"]) / 5
    assert rows["truth"]["lpips"] == 0 < rows["identity"]["lpips"]


def test_frechet_distance_is_that_of_gaussians() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((500, 4)) @ rng.standard_normal((4, 4)), rng.standard_normal((400, 4)) + 1
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s_a + s_b - 2 * linalg.sqrtm(s_a @ s_b).real)
    assert frechet(a, b) == pytest.approx(expected)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9) and frechet(a[:1], b) is None


def test_wrong_networks_are_refused_by_name(tiny_run: Path, paths: dict[Name, Path], tmp_path: Path) -> None:
    (tmp_path / "testX").mkdir()
    (tmp_path / "trainY").mkdir()
    for folder in ("testX", "trainY"):
        write_clip(tmp_path / folder / "a.mp4", scene(), 25)
    (tmp_path / "text.pt").write_text("no network")
    for network, words in [
        (
            tmp_path / "absent.pt",
            "--fid .*absent.pt: expected a TorchScript file with the network's weights, found none",
        ),
        (tmp_path / "text.pt", "--fid .*text.pt: expected a TorchScript file, got"),
        (paths["lpips"], r"--fid: the network does not take \[\(1, 3, 72, 96\)\]"),
    ]:
        with pytest.raises(UserError, match=words):
            main(Args(tiny_run, tmp_path, fid=network))
