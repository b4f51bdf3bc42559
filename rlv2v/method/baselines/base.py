"""What a method of the registry says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Method:
    """A method: the settings that differ from the preset, by their flag's name, and how it sees a clip."""

    name: str
    meaning: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_frame: bool = False
    """Every frame is a video of its own: the state is forgotten between frames."""
