"""`prepared.json`: what became of every source that the prepare command was given, and what it knows of each."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlv2v.data import prepare as work
from rlv2v.data.index import Source, file_key
from rlv2v.data.prepare import Store, Survey
from rlv2v.errors import UserError

REPORT = "prepared.json"


@dataclass(frozen=True)
class Entry:
    """One source, the set that it goes into, and what is known and planned of it."""

    set: str
    path: Path
    survey: Survey
    output: str = ""
    """Relative to OUT; empty if excluded."""

    @property
    def usable(self) -> bool:
        return self.survey.source.status != "excluded"

    def without(self, reason: str) -> Entry:
        """The entry as excluded."""
        source = replace(self.survey.source, status="excluded", reason=reason)
        return replace(self, survey=replace(self.survey, source=source), output="")


class Report:
    """`prepared.json`: the settings, what became of every source, and the surveys, so that no file is read again."""

    def __init__(self, out: Path, *, size: int, fps: float | None, store: Literal["auto", "raw", "video"]) -> None:
        """Take up the report in `out`. Raises `UserError` if its outputs were made with other settings."""
        self.path, self._next_save = out / REPORT, time.monotonic() + 2
        asked: dict[str, Any] = {"size": size, "fps": fps}
        self.settings: dict[str, Any] = {**asked, "store": None, "why": ""}
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}
        self.surveys: dict[str, Any] = {}
        if not self.path.exists():
            return
        try:
            old = json.loads(self.path.read_text())
            settings, rows, surveys = old["settings"], old["sources"], dict(old["surveys"])
            keyed = {(row["set"], row["source"]): row for row in rows}
            made = any(row["status"] == "made" for row in rows)
            same = {name: settings[name] for name in asked} == asked and store in ("auto", settings["store"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}: cannot be read as this command's report ({error}); "
                "choose another folder, or remove the file: outputs that are whole are kept"
            ) from None
        if same:
            self.settings, self.rows, self.surveys = settings, keyed, surveys
        elif made:
            was = " ".join(f"--{name} {settings[name]}" for name in ("size", "fps", "store") if settings[name])
            raise UserError(f"{out}: was prepared with {was}; give the same, or choose another folder")

    def survey(self, path: Path) -> Survey | None:
        """What an earlier run found of a source that has not changed since; None: read it."""
        kept = self.surveys.get(str(path.absolute()))
        if kept is None or kept["key"] != file_key(path):
            return None
        return Survey(**{**kept["survey"], "source": Source(path=path, **kept["survey"]["source"])})

    def keep(self, path: Path, key: list[int], survey: Survey) -> None:
        """Keep a survey for the next run; what could not be used is tried again then."""
        if survey.source.status != "excluded":
            found = asdict(survey)
            del found["source"]["path"]
            self.surveys[str(path.absolute())] = {"key": key, "survey": found}
        self.save(now=False)

    def start(self, src: Path, found: list[Entry], store: Store, why: str) -> None:
        """The plan: a row for every entry of `src`, in place of the rows of earlier runs over it."""
        self.settings["store"], self.settings["why"] = store, why
        root = src.absolute()
        self.rows = {
            key: row for key, row in self.rows.items() if root not in (p := Path(key[1])).parents and p != root
        }
        for entry in found:
            source, survey = entry.survey.source, entry.survey
            width, height = work.target_size(source, self.settings["size"], store) if entry.usable else (0, 0)
            self.rows[entry.set, str(entry.path.absolute())] = {
                "set": entry.set,
                "source": str(entry.path.absolute()),
                "sha256": source.hash,
                "status": "planned" if entry.usable else "excluded",
                "reason": source.reason,
                "output": entry.output,
                "frames": survey.frames if entry.usable else 0,
                "fps": survey.fps if entry.usable else 0.0,
                "width": width,
                "height": height,
                "bytes": 0,
                "source_frames": source.num_frames,
                "source_codec": source.codec,
            }
        self.save()

    def done(self, entry: Entry, status: Literal["made", "failed"], reason: str, num_bytes: int) -> None:
        row = self.rows[entry.set, str(entry.path.absolute())]
        row.update(status=status, reason=reason, bytes=num_bytes)
        self.save(now=False)

    def save(self, *, now: bool = True) -> None:
        """Write the report beside and rename it; without `now` only every two seconds, or less often if it is long."""
        started = time.monotonic()
        if not now and started < self._next_save:
            return
        whole = {"settings": self.settings, "sources": list(self.rows.values()), "surveys": self.surveys}
        beside = self.path.with_name(f".{REPORT}.partial")
        beside.write_text(json.dumps(whole, indent=1) + "\n")
        beside.replace(self.path)
        ended = time.monotonic()
        self._next_save = ended + max(2, 20 * (ended - started))
