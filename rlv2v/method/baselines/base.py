"""The entry of a method in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Method(NamedTuple):
    """A method: the settings that it changes in a preset, by their flags' names, and how it sees a clip."""

    name: str
    meaning: str
    settings: Mapping[str, Any] = {}
    per_frame: bool = False  # every frame is a video of its own: the state is forgotten between frames
