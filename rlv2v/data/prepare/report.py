"""Write `prepared.json`: what became of every source, and its survey, so that an unchanged file is not read again."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rlv2v.data.index import file_key
from rlv2v.data.inspect import Source
from rlv2v.data.prepare.convert import Format, Survey
from rlv2v.data.prepare.plan import Item
from rlv2v.errors import UserError, one_line
from rlv2v.files import write_atomically

REPORT = "prepared.json"


class Report:
    """Hold and save the settings, a row for every source, and the surveys by the source's absolute path."""

    def __init__(self, out: Path, *, size: int, fps: float | None, store: Literal["auto", "raw", "video"]) -> None:
        """Load the report in `out`, if any. Raises `UserError` if its outputs were made with other settings."""
        self.path, self._next_save = out / REPORT, time.monotonic() + 2
        asked: dict[str, Any] = {"size": size, "fps": fps}
        self.settings: dict[str, Any] = {**asked, "store": None, "why": ""}
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.surveys: dict[str, Any] = {}
        if not self.path.exists():
            return
        try:
            old = json.loads(self.path.read_text())
            settings, surveys = old["settings"], dict(old["surveys"])
            rows = {(row["set"], row["source"]): row for row in old["sources"]}
            made = any(row["status"] == "made" for row in rows.values())
            same = {name: settings[name] for name in asked} == asked and store in ("auto", settings["store"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: cannot be read as this command's report ({error}); "
                "choose another folder, or remove the file: complete outputs stay"
            ) from None
        if same:
            self.settings, self.rows, self.surveys = settings, rows, surveys
        elif made:
            flags = " ".join(f"--{name} {settings[name]}" for name in ("size", "fps", "store") if settings[name])
            raise UserError(f"{out}: was prepared with {flags}; give the same, or choose another folder")

    def known_survey(self, path: Path) -> Survey | None:
        """Return an earlier run's survey of a source that has not changed since; None: read the source."""
        known = self.surveys.get(str(path.absolute()))
        if known is None or known["key"] != file_key(path):
            return None
        return Survey(**{**known["survey"], "source": Source(path=path, **known["survey"]["source"])})

    def add_survey(self, path: Path, key: list[int], survey: Survey) -> None:
        """Store a survey for the next run; a source that could not be used is tried again then."""
        if survey.source.status != "excluded":
            values = asdict(survey)
            del values["source"]["path"]
            self.surveys[str(path.absolute())] = {"key": key, "survey": values}
        self.save(now=False)

    def start(self, src: Path, items: list[Item], output_format: Format, why: str) -> None:
        """Enter the plan: a row for every item of `src`, in place of the rows of earlier runs over it."""
        self.settings["store"], self.settings["why"] = output_format.store, why
        root = src.absolute()
        self.rows = {key: row for key, row in self.rows.items() if not Path(key[1]).is_relative_to(root)}
        for item in items:
            source, survey = item.survey.source, item.survey
            width, height = output_format.target_size(source) if item.usable else (0, 0)
            self.rows[item.set, str(item.path.absolute())] = {
                "set": item.set,
                "source": str(item.path.absolute()),
                "sha256": source.hash,
                "status": "planned" if item.usable else "excluded",
                "reason": source.reason,
                "output": item.output,
                "frames": survey.frames if item.usable else 0,
                "fps": survey.fps if item.usable else 0.0,
                "width": width,
                "height": height,
                "bytes": 0,
                "source_frames": source.num_frames,
                "source_codec": source.codec,
            }
        self.save()

    def row(self, item: Item) -> dict[str, Any]:
        """Return the row of an item."""
        return self.rows[item.set, str(item.path.absolute())]

    def finish(self, item: Item, status: Literal["made", "failed"], reason: str, num_bytes: int) -> None:
        """Enter what became of an item."""
        self.row(item).update(status=status, reason=one_line(reason), bytes=num_bytes)
        self.save(now=False)

    def save(self, *, now: bool = True) -> None:
        """Write the file; without `now` only every two seconds, or less often if that takes long."""
        started = time.monotonic()
        if not now and started < self._next_save:
            return
        content = {"settings": self.settings, "sources": list(self.rows.values()), "surveys": self.surveys}
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())
        ended = time.monotonic()
        self._next_save = ended + max(2, 20 * (ended - started))

    def print_summary(self, src: Path, items: list[Item], new_outputs: set[str]) -> None:
        """Print what was done, and every source that is left out or used in part, with its reason.

        Raises:
            UserError: nothing was prepared.
        """
        out, rows = self.path.parent, [self.row(item) for item in items]
        made = [row for row in rows if row["status"] == "made"]
        left_out = [row for row in rows if row["status"] != "made"]
        num_new = sum(row["output"] in new_outputs for row in made)
        lines = [f"{out}: {num_new} made, {len(made) - num_new} already there, {len(left_out)} left out"]
        lines += [f"left out: {row['source']}: {row['reason']}" for row in left_out]
        for row in made:
            if row["reason"]:
                lines.append(
                    f"in part: {row['source']}: {row['reason']}; its first {row['source_frames']} frames are used"
                )
        outputs = {row["output"] for row in self.rows.values()}
        for name in sorted({item.set for item in items}):
            for path in sorted((out / name).glob("[!.]*")):
                if f"{name}/{path.name}" not in outputs:
                    lines.append(f"not from these sources: {path}; training would use it: remove it if it is old")
        print("\n".join(map(one_line, lines)))
        if not made:
            reasons = "; ".join(f"{Path(row['source']).name}: {row['reason']}" for row in left_out)
            raise UserError(f"{src}: nothing was prepared: {reasons}")
