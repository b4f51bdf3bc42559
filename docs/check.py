"""Check README.md, CHANGELOG.md, CONTRIBUTING.md and docs/: links, anchors, paths and line lengths, without a network.

Exit code 1: a relative link or an anchor leads nowhere, a path in backticks does not exist, or a line has more than 100
characters. Links to other sites are not opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE_PATH = re.compile(r"`((?:rlv2v|kernels|csrc|bench|tests|docs)/[\w./-]*)[`:]")
MAX_LENGTH = 100


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as MkDocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def check(page: Path) -> Iterator[str]:
    """Yield the problems of a page."""
    is_dated = page.parent.name == "decisions" or page.name == "CHANGELOG.md"  # may name what is gone
    for number, line in enumerate(page.read_text().splitlines(), 1):
        place = f"{page.relative_to(ROOT)}:{number}"
        if len(line) > MAX_LENGTH:
            yield f"{place}: {len(line)} characters, at most {MAX_LENGTH}"
        for link in LINK.findall(line):
            target, _, anchor = link.partition("#")
            path = (page.parent / target).resolve() if target else page
            if re.match(r"[a-z]+:", link):
                continue
            if not path.exists():
                yield f"{place}: link to {target}, which does not exist"
            elif anchor and anchor not in anchors(path):
                yield f"{place}: link to {link}, which has no such heading"
        for path_text in () if is_dated else CODE_PATH.findall(line):
            if not (ROOT / path_text).exists():
                yield f"{place}: {path_text} does not exist"


def main() -> None:
    """Print all problems."""
    problems = [problem for page in PAGES for problem in check(page)]
    print("\n".join(problems) or f"{len(PAGES)} pages: links, paths and lines are right")
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()
