"""Check the measured figures of README.md and docs/ against the JSON files in bench/results/.

    python docs/figures.py             list each figure with its JSON and that JSON's age in commits
    python docs/figures.py --write     bring figures and generated tables up to date first (`make results`)

docs/figures.toml lists the figures. Exit code 1: a figure or table differs from its JSON, a text or a JSON is missing,
or a page holds a number with a unit of measurement that the list does not know.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from quality_tables import Style, results, summary, table, without_ages

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
FIGURE = re.compile(r"\{(\S+)@(.*?)\}")
NUMBER = r"([\d.,]*\d(?:\s+to\s+[\d.,]*\d)?)"
TABLE = re.compile(r"(<!-- table (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
UNITS = "times as|times the|[mun]?s|seconds|[KMG]i?B|dB|GB/s|clips a second"
MEASUREMENT = re.compile(rf"(?<![\w.])\d[\d.,]*(?:x\b| ?%| (?:{UNITS})\b)")


def read_list() -> dict[str, Any]:
    """Return figures.toml with its aliases filled in."""
    text = (ROOT / "docs" / "figures.toml").read_text()
    for name, meaning in reversed(tomllib.loads(text)["alias"].items()):
        text = text.replace(f"<{name}>", meaning)
    return tomllib.loads(text)


LIST = read_list()
STYLE = Style(LIST["methods"], LIST["order"], LIST["tasks"], LIST["summary"], LIST["detail"], LIST["shown"])


@cache
def load(name: str) -> dict[str, Any]:
    """Return the parsed JSON of a bench."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return content


@cache
def age(name: str) -> str:
    """Return how many commits HEAD is ahead of the commit that made a JSON; "?" if git does not know it."""
    span = str(load(name)["commit"]).removesuffix("-dirty") + "..HEAD"
    command = ["git", "-C", str(ROOT), "rev-list", "--count", span]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "?"


def files(names: str) -> list[str]:
    """Return the names of the JSON files that match a glob; ValueError if there are none."""
    if found := sorted(path.stem for path in RESULTS.glob(f"{names}.json")):
        return found
    raise ValueError(f"bench/results/{names}.json does not exist")


def rows(names: str, filters: str) -> list[dict[str, Any]]:
    """Return the rows, and a summary if any, where each of the filters `key=glob|glob; key=...` holds."""
    wanted = [part.strip().split("=", 1) for part in filters.split(";") if part.strip()]
    return [
        {"file": name, **row}
        for name in files(names)
        for row in [*load(name)["rows"], *([load(name)["summary"]] if "summary" in load(name) else [])]
        if all(any(fnmatch.fnmatchcase(str(row.get(key)), glob) for glob in globs.split("|")) for key, globs in wanted)
    ]


def numbers(selector: str) -> list[float]:
    """Return the numbers that a selector `json: filters: field` finds, or the one that it is."""
    if re.fullmatch(r"[\d.]+", selector):
        return [float(selector)]
    name, filters, field = (part.strip() for part in selector.split(":"))
    found: list[Any] = list(rows(name, filters))
    for key in field.split("."):
        found = [value[key] for value in found if value.get(key) is not None]
    if not found:
        raise ValueError(f"{selector}: no such row or field")
    return [float(value) for value in found]


def evaluate(source: str) -> float:
    """Return the number of `[min|max] selector [/ selector]`; a ratio is taken row by row."""
    word, _, rest = source.partition(" ")
    values, *divisors = (numbers(part) for part in (rest if word in ("min", "max") else source).split(" / "))
    for divisor in divisors:
        values = [a / b for a, b in zip(values, divisor * (len(values) // len(divisor)), strict=True)]
    if word not in ("min", "max") and len(set(values)) > 1:
        raise ValueError(f"{source}: {len(values)} rows match; narrow it, or say range, min or max")
    return max(values) if word == "max" else min(values)


def fill(text: str) -> str:
    """Return a text with its figures in place."""

    def figure(match: re.Match[str]) -> str:
        spec, source = match.groups()
        if source.startswith("range "):
            return " to ".join(fill(f"{{{spec}@{word} {source[6:]}}}") for word in ("min", "max"))
        value = evaluate(source)
        return f"{float(format(value, '.' + spec[1:] + 'g')):,g}" if spec[0] == "g" else f"{value:{spec}}"

    return FIGURE.sub(figure, text)


def make_table(name: str) -> str:
    """Return a table that README.md or docs/ show between `<!-- table NAME -->` and `<!-- end -->`."""
    if name in ("quality", "results"):
        contents = {file: load(file) for file in files("quality-*")}
        if name == "quality":
            return summary(contents, STYLE)
        return results(contents, {file: age(file) for file in contents}, STYLE)
    if name == "decisions":
        found = [
            (date, f"- {date} [{path.stem}]({path.name}): {title}\n")
            for path in sorted((ROOT / "docs" / "decisions").glob("*.md"))
            for date, title in re.findall(r"^## (\d{4}-\d\d-\d\d) (.*)$", path.read_text(), re.MULTILINE)
        ]
        return "".join(entry for _, entry in sorted(found, key=lambda pair: pair[0], reverse=True))
    spec = LIST["table"][name]
    cells = [[(cell, spec["columns"] if "$" in cell else [""]) for cell in row] for row in spec["rows"]]
    lines = [[fill(cell.replace("$", column)) for cell, columns in row for column in columns] for row in cells]
    return table(spec["header"], lines)


def tables_of(text: str) -> list[str]:
    """Return the generated tables of a page."""
    return [table for _, _, table, _ in TABLE.findall(text)]


def blank(match: re.Match[str]) -> str:
    """Return the line breaks of a match, so that what follows keeps its line number."""
    return "\n" * match[0].count("\n")


def check(path: Path, *, write: bool) -> Iterable[str]:
    """Print the figures of a page, bring it up to date if asked to, and yield what is wrong with it."""
    name, original = str(path.relative_to(ROOT)), path.read_text()
    content = TABLE.sub(lambda block: block[1] + make_table(block[2]) + block[4], original)
    rest = re.sub(r"^```.*?^```|<!-- table .*?<!-- end -->", blank, content, flags=re.MULTILINE | re.DOTALL)
    for text in (" ".join(text.split()) for text in LIST["figures"].get(name, [])):
        literals = (r"\s+".join(map(re.escape, part.split(" "))) for part in FIGURE.sub("\0", text).split("\0"))
        pattern = re.compile(NUMBER.join(literals))
        if not (found := pattern.search(content)):
            raise ValueError(f"{name}: no text like {text!r}")
        values = [fill(figure[0]) for figure in FIGURE.finditer(text)]
        names = {file for _, source in FIGURE.findall(text) for file in files(re.findall(r"(\S+?):", source)[0])}
        ages = ", ".join(f"{file}.json is {age(file)} commits old" for file in sorted(names))
        print(f"{name}: {' '.join(found[0].split())!r}: {ages}")
        for number, value in reversed(list(enumerate(values, 1))):
            if " ".join(found[number].split()) != value:
                yield f"{name}: {' '.join(found[0].split())!r}: the JSON says {value}, not {found[number]}"
                content = content[: found.start(number)] + value + content[found.end(number) :]
        rest = pattern.sub(blank, rest)
    for number, line in enumerate(re.sub("|".join(LIST["settings"]), blank, rest).splitlines(), 1):
        for measured in MEASUREMENT.findall(line):
            yield f"{name}:{number}: {measured!r} has no entry in docs/figures.toml"
    if content != original and write:
        path.write_text(content)
    elif any(
        without_ages(new) != without_ages(old) for new, old in zip(*map(tables_of, (content, original)), strict=True)
    ):
        yield f"{name}: a table differs from its JSON; run make results"


def main() -> None:
    """Check all pages but the decisions, which are dated records."""
    parser = argparse.ArgumentParser(description="Check the figures of README.md and docs/ against bench/results/.")
    parser.add_argument("--write", action="store_true", help="bring figures and generated tables up to date first")
    pages = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "docs" / "decisions" / "index.md")
    try:
        problems = [problem for page in pages for problem in check(page, write=parser.parse_args().write)]
    except ValueError as error:
        problems = [str(error)]
    print("\n".join(problems) or "all figures are those of their JSON")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
