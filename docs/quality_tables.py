"""The tables of docs/results.md and README.md that are made of the JSON files of bench/quality.py.

A row of such a file is one run: `case, method, seed, budget_s, steps, seconds`, perhaps `split, reading, few, lr,
search, valid`, every metric by its name, and `spread`, by metric its standard deviation over clips. Rows of one method
in one setting are a line of a table; each of its cells has the mean over the seeds. Nothing is left out: what is no
method of the list stands at the end under its own name, and a run that failed is counted.
"""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from rlv2v.metrics import METRICS

WIDTH = 100  # characters of a line
ARROWS = {"higher": "↑", "lower": "↓", "one": "→1"}
REFERENCES = ("truth", "target")  # rows that no method can beat
GROUPS: dict[str, Callable[[set[str]], bool]] = {
    "Against the truth": lambda needs: bool(needs & {"truth", "synthetic", "lpips"}),
    "Beside the source": lambda needs: needs <= {"cycle"},
    "Beside the target set": lambda needs: bool(needs & {"target", "training", "fid", "fvd"}),
}
CURVES = ("psnr", "ssim", "patch_distance", "region_colour_distance")
Row = dict[str, Any]


@dataclass(frozen=True)
class Style:
    """Say what things are called, and in which order methods stand (globs)."""

    methods: Mapping[str, str]
    order: Sequence[str]
    tasks: Mapping[str, str]
    summary: Sequence[str]
    """The metrics of the README."""
    detail: Sequence[str] = ()
    """The methods that only docs/results.md shows (globs)."""
    shown: Sequence[str] = ()
    """The tasks of the README; empty: all."""

    def place(self, method: str) -> tuple[int, str]:
        """Return where a method stands: the place of the first glob that it matches, then by name."""
        places = (n for n, glob in enumerate(self.order) if fnmatchcase(method, glob))
        return next(places, len(self.order)), method

    def task(self, case: str, split: str) -> str:
        """Return the title of a task."""
        return self.tasks.get(case, case) + ("" if split == "test" else f", {split}")


@dataclass(frozen=True)
class Line:
    """Hold the runs of one method in one setting, a row each."""

    method: str
    few: int | None
    lr: float | None
    budget: float
    rows: list[Row]
    file: str = ""
    """The file, where another one has runs of the same setting and seed."""
    has_other_budgets: bool = False

    def title(self, style: Style) -> str:
        """Return the method's name with its setting."""
        notes = [f"{self.few} clip{'s' * (self.few > 1)}"] if self.few else []
        notes += [f"lr {self.lr:g}"] if self.lr else []
        notes += [f"{self.budget:g} s"] if self.has_other_budgets else []
        notes += [self.file] if self.file else []
        return ", ".join([style.methods.get(self.method, self.method), *notes])

    @property
    def finished(self) -> list[Row]:
        """The rows of the runs that did not fail."""
        return [row for row in self.rows if row.get("valid", True)]

    def values(self, metric: str) -> list[float]:
        """Return a metric's values, one a seed; empty where it is not known."""
        return [row[metric] for row in self.finished if row.get(metric) is not None]

    def mean(self, metric: str) -> float | None:
        """Return the mean over seeds."""
        return statistics.fmean(values) if (values := self.values(metric)) else None

    def cell(self, metric: str) -> str:
        """Return the mean over seeds, with the spread over seeds (±), or over the clips of the one run (~)."""
        values, digits = self.values(metric), METRICS[metric].digits
        if not values:
            return ""
        text = f"{statistics.fmean(values):.{digits}f}"
        if len(values) > 1:
            return f"{text} ± {statistics.stdev(values):.{digits}f}"
        spread = (self.finished[0].get("spread") or {}).get(metric)
        return text if spread is None else f"{text} ~ {spread:.{digits}f}"

    def setting(self) -> list[str]:
        """Return seeds, budget, steps and seconds as texts."""
        seeds = [str(row["seed"]) + " failed" * (not row.get("valid", True)) for row in self.rows]
        known = [row for row in self.finished if row["seed"] is not None]
        steps = " ".join(str(row["steps"]) for row in known)
        seconds = " ".join(f"{row['seconds']:.0f}" for row in known)
        return ["" if seeds == ["None"] else " ".join(seeds), f"{self.budget:g}" if self.budget else "", steps, seconds]


def rows_of(files: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return the rows of all files with the file's name and split."""
    rows = [
        {"file": name, "split": content.get("split", "test"), "select": content.get("select"), **row}
        for name, content in files.items()
        for row in content["rows"]
    ]
    for row in rows:
        row["reading"] = row.get("reading") or "ours"
        if row["reading"] != "ours" and not row["case"].endswith(f"-{row['reading']}"):
            row["case"] += f"-{row['reading']}"
    return rows


def lines_of(rows: Iterable[Row], style: Style) -> list[Line]:
    """Return the lines of a task's rows in the fixed order. Copies of one reference row count once, the first one."""
    groups: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = (row["method"], row.get("few"), row.get("lr"), row["budget_s"])
        groups.setdefault(key, {}).setdefault(row["file"], []).append(row)
    lines = []
    for key, by_file in groups.items():
        every = [row for own in by_file.values() for row in own]
        seeds = [row["seed"] for row in every]
        if seeds == [None] * len(seeds):
            lines.append(Line(*key, rows=every[:1]))
        elif len(set(seeds)) == len(seeds):
            lines.append(Line(*key, rows=sorted(every, key=lambda row: row["seed"])))
        else:
            for number, (name, own) in enumerate(by_file.items()):
                file = name.removeprefix("quality-") if number else ""
                lines.append(Line(*key, rows=sorted(own, key=lambda row: row["seed"]), file=file))
    budgets = {(line.method, line.budget) for line in lines}
    several = {method for method, _ in budgets if sum(method == other for other, _ in budgets) > 1}
    lines = [replace(line, has_other_budgets=line.method in several) for line in lines]
    return sorted(lines, key=lambda li: (style.place(li.method), li.few or 1e9, li.budget, li.lr or 0.0, li.file))


def by_task(rows: Iterable[Row], style: Style) -> dict[tuple[str, str], list[Row]]:
    """Return the rows by (case, split): the named tasks in their order, then the others by name."""
    names = list(style.tasks)
    keys = {(row["case"], row["split"]) for row in rows}
    place = {name: number for number, name in enumerate(names)}
    ordered = sorted(keys, key=lambda key: (place.get(key[0], len(names)), key))
    return {key: [row for row in rows if (row["case"], row["split"]) == key] for key in ordered}


def best_cells(lines: Sequence[Line], metric: str) -> list[str]:
    """Return the cells of a metric's column, the best of the methods in bold."""
    cells = [line.cell(metric) for line in lines]
    means = [None if line.method in REFERENCES else line.mean(metric) for line in lines]
    known = [METRICS[metric].badness(mean) for mean in means if mean is not None]
    if len(known) < 2:
        return cells
    best = f"{min(known):.{METRICS[metric].digits}f}"
    is_best = [m is not None and f"{METRICS[metric].badness(m):.{METRICS[metric].digits}f}" == best for m in means]
    return [f"**{cell}**" if bold else cell for cell, bold in zip(cells, is_best, strict=True)]


def table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, without blanks around the cells if it would be wider than 100 characters."""
    lines = ["| " + " | ".join(line) + " |\n" for line in (header, ["---"] * len(header), *body)]
    return "".join(lines) if max(map(len, lines)) <= WIDTH + 1 else "".join(x.replace(" | ", "|") for x in lines)


def metric_tables(lines: Sequence[Line], metrics: Sequence[str], style: Style) -> str:
    """Return the columns of the metrics that some line has, in as many tables as the width needs."""
    titles = [line.title(style) for line in lines]
    columns = [
        [f"`{metric}` {ARROWS[METRICS[metric].better]}", *best_cells(lines, metric)]
        for metric in metrics
        if any(line.values(metric) for line in lines)
    ]
    tables, chosen = [], [["", *titles]]
    room = WIDTH - max(map(len, titles), default=0) - 4

    def flush() -> None:
        if len(chosen) > 1:
            header, *body = zip(*chosen, strict=True)
            tables.append(table(header, body))

    for column in columns:
        width = sum(max(map(len, other)) + 3 for other in (*chosen[1:], column))
        if width > room and len(chosen) > 1:
            flush()
            chosen = chosen[:1]
        chosen = [*chosen, column]
    flush()
    return "\n".join(tables)


def curve_tables(lines: Sequence[Line], style: Style) -> str:
    """Return a table of each of a few metrics by the number of target clips, "" where there is no such row."""
    counts = sorted({line.few for line in lines if line.few is not None})
    curves: dict[tuple[Any, ...], list[Line]] = {}
    for line in lines:
        curves.setdefault((line.method, line.budget, line.file), []).append(line)
    tables = []
    for metric in CURVES if counts else ():
        body = []
        for own in curves.values():
            found = {line.few: line.cell(metric) for line in own}
            if any(found.get(count) for count in counts):
                title = replace(own[0], few=None, lr=None).title(style)
                body.append([title, *(found.get(count, "") for count in (*counts, None))])
        if body:
            header = [f"`{metric}` {ARROWS[METRICS[metric].better]}", *map(str, counts), "all"]
            tables.append(table(header, body))
    return "By the number of target clips:\n\n" + "\n".join(tables) if tables else ""


def search_table(rows: Sequence[Row], style: Style) -> str:
    """Return what a search of the learning rate found, "" where there was none."""
    if not rows:
        return ""
    body = []
    for line in lines_of(rows, style):
        metric = str(rows[0]["select"] or "psnr")
        body.append([line.title(style), *line.setting()[:3], line.cell(metric)])
    return f"Learning rates, chosen by `{metric}`:\n\n" + table(["", "seed", "s", "steps", f"`{metric}`"], body)


def results(files: Mapping[str, Mapping[str, Any]], ages: Mapping[str, str], style: Style) -> str:
    """Return the tables of docs/results.md: of each task its runs, metrics, curves and searches; then the files."""
    sections = []
    for (case, split), rows in by_task(rows_of(files), style).items():
        lines = lines_of([row for row in rows if not row.get("search")], style)
        body = [[line.title(style), *line.setting()] for line in lines if line.setting()[0]]
        parts = [table(["", "seeds", "s", "steps", "seconds"], body)]
        for title, belongs in GROUPS.items():
            metrics = [name for name, metric in METRICS.items() if belongs({*metric.needs})]
            if text := metric_tables(lines, metrics, style):
                parts.append(f"{title}:\n\n{text}")
        parts += [curve_tables(lines, style), search_table([row for row in rows if row.get("search")], style)]
        sections.append(f"\n## {style.task(case, split).capitalize()}\n\n" + "\n".join(filter(None, parts)))
    return "".join(sections) + "\n## Files\n\n" + "".join(described(n, c, ages[n]) for n, c in files.items()) + "\n"


def described(name: str, content: Mapping[str, Any], age: str) -> str:
    """Return the line of a file: where it was measured and when, in commits before this page."""
    about = content["machine"]
    cpus = sorted({row["cpu"] for row in content["rows"] if row.get("cpu")}) or [about["cpu"]]
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    text = f"- `{name}.json`: {', '.join(cpus)}, {threads}, torch {about['torch']}; {age} commits old"
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_on_hyphens=False) + "\n"


def without_ages(text: str) -> str:
    """Return a text that is the same however old its files are: every commit makes them older."""
    return re.sub(r"(\d+|\?)\s+commits\s+old", "commits old", text)


def summary(files: Mapping[str, Mapping[str, Any]], style: Style) -> str:
    """Return the table of README.md: a few metrics of the methods that were trained on all clips, without `detail`.

    The first metric has its spread over seeds; docs/results.md has those of the others.
    """
    rows = [row for row in rows_of(files) if not row.get("search") and row.get("few") is None]
    rows = [row for row in rows if not any(fnmatchcase(row["method"], glob) for glob in style.detail)]
    metrics = [metric for metric in style.summary if any(row.get(metric) is not None for row in rows)]
    body = []
    for (case, split), own in by_task(rows, style).items():
        if style.shown and case not in style.shown:
            continue
        lines = [line for line in lines_of(own, style) if not line.file]
        columns = [best_cells(lines, metric) for metric in metrics]
        for number, line in enumerate(lines):
            seeds, seconds, *_ = line.setting()
            first, *others = (re.sub(r" ~ [\d.]+", "", column[number]) for column in columns)
            cells = [first, *(re.sub(r" ± [\d.]+", "", cell) for cell in others)]
            body.append([style.task(case, split), line.title(style), seeds, seconds, *cells])
    return table(["task", "method", "seeds", "s", *(f"`{m}` {ARROWS[METRICS[m].better]}" for m in metrics)], body)
