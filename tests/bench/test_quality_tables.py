"""The tables of docs/results.md and README.md, from a JSON as bench/quality.py writes it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from rlv2v.metrics import METRICS

sys.path.append(str(Path(__file__).parents[2] / "docs"))
import figures
from quality_tables import results, summary, without_ages

METHODS = ["default", "rl", "recycle-gan", "cyclegan", "colour-map-transport", "colour-map", "own-idea"]
FLAGS = {"split": "test", "few": None, "lr": None, "budget_s": 300.0, "ours": True, "cpu": "Some CPU"}


def row(method: str, seed: int | None, psnr: float | None, **changes: Any) -> dict[str, Any]:
    """A run, or a reference row where the seed is None, with every metric that there is."""
    metrics = {name: 0.5 for name in METRICS} | {"psnr": psnr}
    trained = FLAGS if seed is not None else {"split": "test", "budget_s": 0.0}
    head = {"case": "region64", "method": method, "seed": seed, "steps": 100 + (seed or 0), "seconds": 301.2}
    return head | trained | metrics | {"spread": dict.fromkeys(METRICS, 0.125)} | changes


def content_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    machine = {"cpu": "Some CPU", "gpu": None, "threads": 1, "torch": "2.0", "triton": None}
    return {"bench": "quality", "commit": "0" * 12, "machine": machine, "split": "test", "select": "psnr", "rows": rows}


@pytest.fixture
def content() -> dict[str, Any]:
    """Three seeds of ours, one failed of CycleGAN, a search, a curve, another task, and the reference rows."""
    rows = [row(method, 0, 20.0 + n) for n, method in enumerate(METHODS)]
    rows += [row("default", seed, 30.0 + seed) for seed in (1, 2)]
    rows += [{k: v for k, v in row("cyclegan", 1, None).items() if k not in METRICS} | {"valid": False, "steps": None}]
    rows += [row("cyclegan", 0, 15.0, split="val", search=True, lr=lr) for lr in (2e-4, 2e-3)]
    rows += [row(method, 0, 10.0 + few, few=few) for method in ("default", "cyclegan") for few in (1, 5, 20)]
    rows += [row("default", 0, 12.0, case="synth32", reading="paper")]
    return content_of(rows + [row(name, None, 9.0) for name in ("target", "truth", "constant", "identity")])


def section(page: str, title: str) -> str:
    return re.split(rf"^## {title}$", page, flags=re.MULTILINE)[1].split("\n## ")[0]


def titles(table: str) -> list[str]:
    return [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]


def page_of(*contents: dict[str, Any]) -> str:
    files = {f"quality-{number}": content for number, content in enumerate(contents)}
    return results(files, dict.fromkeys(files, "7"), figures.STYLE)


def test_the_order_of_the_rows_is_fixed_and_nothing_is_left_out(content: dict[str, Any]) -> None:
    page = section(page_of(content), "Regions 64")
    clips = [f"{name}, {n} clip{'s' * (n > 1)}" for name in ("CycleGAN", "rlv2v") for n in (1, 5, 20)]
    assert titles(page.split("Against the truth:\n\n")[1].split("\n\n")[0]) == [
        *("source copied", "mean target frame", "colour map", "colour map by transport"),
        *(*clips[:3], "CycleGAN", "Recycle-GAN", "rlv2v with P and RL", *clips[3:], "rlv2v"),
        *("own-idea", "*target set, halves*", "*truth*"),
    ]
    assert [name for name in METRICS if f"`{name}` " not in page] == []
    assert max(map(len, page_of(content).splitlines())) <= 100


def test_a_cell_has_its_mean_spread_and_mark(content: dict[str, Any]) -> None:
    page = section(page_of(content), "Regions 64")
    column = page[page.index("`psnr` ↑") :]
    assert "| rlv2v | " in page and "27.67 ± 6.66" in column, "mean and deviation of 20, 31, 32"
    assert "23.00 ~ 0.12" in column, "of CycleGAN's one run that did not fail, over clips"
    assert "**30.00 ~ 0.12**" in column, "the best: ours on 20 clips; the truth is no method"
    assert re.search(r"\| rlv2v \| 0 1 2 \| 300 \| 100 101 102 \| 301 301 301 \|", page)
    assert re.search(r"\| CycleGAN \| 0 1 failed \| 300 \| 100 \| 301 \|", page)


def test_curves_searches_and_readings(content: dict[str, Any]) -> None:
    page = page_of(content)
    curve = section(page, "Regions 64").split("By the number of target clips:\n\n")[1]
    assert "| `psnr` ↑ | 1 | 5 | 20 | all |" in curve and titles(curve.split("\n\n")[0]) == ["CycleGAN", "rlv2v"]
    assert "| rlv2v | 11.00 ~ 0.12 | 15.00 ~ 0.12 | 30.00 ~ 0.12 | 27.67 ± 6.66 |" in curve
    found = section(page, "Regions 64, val")
    assert "chosen by `psnr`" in found and titles(found)[-2:] == ["CycleGAN, lr 0.0002", "CycleGAN, lr 0.002"]
    assert "12.00 ~ 0.12" in section(page, "Synthetic 32, paper's words")
    assert "`quality-0.json`: Some CPU, 1 thread, torch 2.0; 7 commits old" in page


def test_the_same_seed_of_another_file_is_a_line_of_its_own(content: dict[str, Any]) -> None:
    longer = row("default", 0, 40.0, budget_s=600.0)
    page = section(
        page_of(content, content_of([row("default", 1, 35.0), longer, row("identity", None, 9.0)])), "Regions 64"
    )
    runs = titles(page.split("\n\n")[1])
    assert [title for title in runs if title.startswith("rlv2v, ") and "clip" not in title] == [
        *("rlv2v, 300 s", "rlv2v, 300 s, 1", "rlv2v, 600 s")
    ]
    assert titles(page.split("Against the truth:\n\n")[1].split("\n\n")[0]).count("source copied") == 1


def test_the_readme_has_a_digest(content: dict[str, Any]) -> None:
    table = summary({"quality-0": content}, figures.STYLE)
    assert "| regions 64 | rlv2v | 0 1 2 | 300 | **27.67 ± 6.66** | " in table
    assert "clips" not in table and "lr " not in table and max(map(len, table.splitlines())) <= 100


def test_a_figure_that_differs_from_its_json_is_an_error(
    tmp_path: Path, content: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    page, result = tmp_path / "page.md", tmp_path / "quality-0.json"

    def problems(*, write: bool = False) -> list[str]:
        figures.load.cache_clear()
        figures.age.cache_clear()
        return list(figures.check(page, write=write))

    result.write_text(json.dumps(content))
    page.write_text("<!-- table results -->\n<!-- end -->\n\n<!-- table quality -->\n<!-- end -->\n")
    stale = ["page.md: a table differs from its JSON; run make results"]
    assert problems() == stale
    assert problems(write=True) == [] and problems() == []
    page.write_text(re.sub(r"\? commits old", "12 commits old", page.read_text()))
    assert problems() == [], "every commit makes the files older"
    page.write_text(page.read_text().replace("31.00", "32.00").replace("27.67 ±", "27.77 ±"))
    assert problems() == stale
    assert problems(write=True) == []
    content["rows"][0]["psnr"] = 20.5
    result.write_text(json.dumps(content))
    assert problems() == stale
    figures.load.cache_clear()


def test_ages_do_not_count() -> None:
    assert without_ages("a; 12 commits old\nb; ?\n  commits old") == "a; commits old\nb; commits old"
