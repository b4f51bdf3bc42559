"""Find the videos that one command names, a folder or a list of them, and the file that each result goes to."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlv2v.data.containers import CONTAINERS
from rlv2v.data.index import source_paths
from rlv2v.data.sequence import is_sequence
from rlv2v.data.video import files_of, kind_of
from rlv2v.data.y4m import is_stdout
from rlv2v.errors import UserError, get_logger, several

LIST = "@"
"""How the name of a list begins: `@list.txt` is a text file with a source a line."""
NO_VIDEO = re.compile(
    r".*\.(txt|md|log|csv|tsv|json|xml|ya?ml|toml|ini|nfo|html|pdf|db|zip|sha256|md5|part|py|sh"
    r"|srt|vtt|ass|ssa|sub|idx|sup|lrc|wav|mp3|m4a|aac|flac|ogg|opus|ac3)",
    re.IGNORECASE,
)
"""Names of what lies beside videos in people's folders: notes, subtitles and sound."""
log = get_logger(__name__)


class Pair(NamedTuple):
    """Hold a source and the output that it is translated to."""

    source: Path
    out: Path


def is_list(source: Path) -> bool:
    """Return whether `source` names a list, `@list.txt`, and no file that is called so."""
    return str(source).startswith(LIST) and not source.exists()


def find_pairs(source: Path, out: Path, suffix: str) -> list[Pair] | None:
    """Return what is translated to what: the videos of a folder or a list, and files in the folder `out`.

    A result has the place and the name of its source, below `source` or below the deepest folder that holds the whole
    list, and `suffix`. Where only the suffixes of sources differ, their results keep them: `a.mov.mp4`. A folder's
    photos and what lies in `out` are left out, and so is what cannot be a video by its name, which one line says.

    Returns None where `source` is one video: a file, or a folder whose images are its frames.

    Raises:
        UserError: there is no video, the list cannot be read, or `out` is no folder of its own.
    """
    if is_list(source):
        sources = read_list(Path(str(source).removeprefix(LIST)))
        root = os.path.commonpath([absolute(path).parent for path in sources])
    elif source.is_dir():
        found = source_paths(source)
        if files_of(source) and not any(may_be_video(path) for path in found if path != source):
            return None
        if out.is_dir() and out.samefile(source):
            raise UserError(f"{out}: output and input are the same folder; choose another one")
        sources, root = list(usable(found, source, out)), str(absolute(source))
        if not sources:
            raise UserError(f"{source}: a folder without videos")
    else:
        return None
    check_out(source, out)
    places = [Path(absolute(path).name) if path == source else absolute(path).relative_to(root) for path in sources]
    stems = [place.with_suffix("") if not path.is_dir() else place for place, path in zip(places, sources, strict=True)]
    count = Counter(stems)
    names = [place if count[stem] > 1 else stem for place, stem in zip(places, stems, strict=True)]
    if len(set(names)) < len(names):
        raise UserError(
            f"{source}: two videos would have one result; give them names that differ in more than a suffix"
        )
    return [Pair(path, out / f"{name}{suffix}") for path, name in zip(sources, names, strict=True)]


def absolute(path: Path) -> Path:
    """Return a path from the root on, without `..`; links stay."""
    return Path(os.path.abspath(path))


def read_list(path: Path) -> list[Path]:
    """Return the sources of a list, one a line and seen from the current folder; empty and repeated lines do not count.

    Raises:
        UserError: the list cannot be read, or names nothing.
    """
    try:
        lines = os.fsdecode(path.read_bytes()).splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a list of videos: {error.strerror}") from error
    sources: dict[Path, Path] = {}
    for line in lines:
        if line.strip():
            sources.setdefault(absolute(Path(line)), Path(line))
    if not sources:
        raise UserError(f"{path}: an empty list; expected the path of a video on each line")
    return list(sources.values())


def may_be_video(path: Path) -> bool:
    """Return whether a source of a folder may be a video, by its name; a folder is one if it holds images."""
    if path.is_dir():
        return bool(files_of(path))
    return kind_of(path) != "image" and not NO_VIDEO.fullmatch(path.name)


def usable(found: list[Path], source: Path, out: Path) -> Iterator[Path]:
    """Yield what may be videos and does not lie in `out`; say once what is left out by its name."""
    left_out = []
    for path in found:
        if absolute(path).is_relative_to(absolute(out)):
            continue
        if may_be_video(path):
            yield path
        else:
            left_out.append(path.relative_to(source).as_posix())
    if left_out:
        log.warning("%s: left out, no videos by their names: %s", source, several(left_out))


def check_out(source: Path, out: Path) -> None:
    """Raise UserError where `out` cannot be the folder of the results of `source`."""
    is_video = out.suffix.lower() in CONTAINERS and not out.is_dir()
    if out.is_file() or is_video or is_sequence(out) or is_stdout(out):
        raise UserError(f"{out}: expected a folder for the results, since {source} holds several videos")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: folder {out.parent} does not exist; create it first")
