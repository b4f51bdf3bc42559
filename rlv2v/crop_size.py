"""The size of training crops, as `--size` takes it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlv2v.errors import UserError

TYPED = re.compile(r"([0-9]{1,5})(?:x([0-9]{1,5}))?")


@dataclass(frozen=True, repr=False)
class CropSize:
    """The height and width of training crops, in pixels."""

    height: int
    width: int

    @classmethod
    def of(cls, value: CropSize | int | str) -> CropSize:
        """Return what `--size` takes, the side of a square or "HEIGHTxWIDTH", as a crop size; one is returned as it is.

        Raises:
            UserError: it is neither.
        """
        if isinstance(value, CropSize):
            return value
        if isinstance(value, int):
            return cls(value, value)
        if not isinstance(value, str) or not (typed := TYPED.fullmatch(value)):
            raise UserError(f"--size: expected a side as 64, or height x width as 96x160, got {value!r}")
        return cls(int(typed[1]), int(typed[2] or typed[1]))

    @property
    def is_square(self) -> bool:
        """Whether height and width are equal."""
        return self.height == self.width

    @property
    def short_side(self) -> int:
        """The lesser of height and width, at which a model that is trained on such crops sees a whole frame."""
        return min(self.height, self.width)

    @property
    def plain(self) -> int | str:
        """The same as JSON and checkpoints hold it, and as `of` takes it: 64, or "96x160" where the sides differ."""
        return self.height if self.is_square else f"{self.height}x{self.width}"

    def __repr__(self) -> str:
        """Return the same as it is typed, for messages."""
        return str(self.plain)

    def multiples_near(self, multiple: int) -> str:
        """Return the multiples nearest to each side: "16 or 24", or "96 high and 160 or 168 wide"."""

        def near(side: int) -> str:
            low, high = side // multiple * multiple, -(-side // multiple) * multiple
            return " or ".join(str(number) for number in dict.fromkeys((low, high)) if number)

        return near(self.height) if self.is_square else f"{near(self.height)} high and {near(self.width)} wide"
