"""The entry of a method in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A method: the settings that it changes in a preset, by their flags' names, and how it sees a clip."""

    name: str
    meaning: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_frame: bool = False
    """Every frame is a video of its own: the state is forgotten between frames."""
