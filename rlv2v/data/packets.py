"""Keep encoded pictures in a file that only grows, from which they can be read again after any stop."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from rlv2v.errors import UserError

RECORD = struct.Struct("<qqqI?")
"""Of a packet, before its bytes: when it is shown and decoded, how long, in ticks; its length; whether it is a key."""
BLOCK = 2**20
"""Bytes that are read at a time where the whole file is checked."""


class PacketLog:
    """Keep the packets of one encoded stream, with times in `tick` seconds.

    position: what `flush` returned: the file goes on from there, and what follows is cut off. None: it begins empty.

    Raises:
        UserError: the file does not hold what it held then.
    """

    def __init__(self, path: Path, tick: Fraction, position: Mapping[str, Any] | None = None) -> None:
        self._path, self._tick = path, tick
        self._hash = hashlib.sha256()
        self._num_bytes = 0
        if position is None:
            self._file = path.open("w+b")
            return
        try:
            self._file = path.open("r+b")
            self._take(position["bytes"])
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}; --overwrite starts over") from None
        if (self._num_bytes, self._hash.hexdigest()) != (position["bytes"], position["sha256"]):
            self._file.close()
            raise UserError(f"{path}: is not what was written to it, but damaged; --overwrite starts over")
        self._file.truncate()

    def _take(self, num_bytes: int) -> None:
        """Read the bytes that count, as far as they are there, and come to stand behind them."""
        while block := self._file.read(min(BLOCK, num_bytes - self._num_bytes)):
            self._hash.update(block)
            self._num_bytes += len(block)

    def packets(self) -> Iterator[av.Packet[Any]]:
        """Yield all packets that were kept; call it before the first `add`."""
        self._file.seek(0)
        while head := self._file.read(RECORD.size):
            pts, dts, duration, size, is_key = RECORD.unpack(head)
            yield self._packet(self._file.read(size), pts, dts, duration, is_key)

    def add(self, packet: av.Packet[Any]) -> av.Packet[Any]:
        """Keep a packet, and return it as it will be read: without FFmpeg's notes for itself."""
        data, times = bytes(packet), (packet.pts, packet.dts, packet.duration)
        for part in (RECORD.pack(*times, len(data), packet.is_keyframe), data):
            self._file.write(part)
            self._hash.update(part)
            self._num_bytes += len(part)
        return self._packet(data, *times, packet.is_keyframe)

    def _packet(self, data: bytes, pts: Any, dts: Any, duration: Any, is_key: bool) -> av.Packet[Any]:
        packet: av.Packet[Any] = av.Packet(data)
        packet.pts, packet.dts, packet.duration, packet.is_keyframe = pts, dts, duration, is_key
        packet.time_base = self._tick
        return packet

    def flush(self) -> dict[str, Any]:
        """Bring all packets to the disk, and return the place behind them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._num_bytes, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        """Close the file, which stays up to the last `flush`, even if the disk is too full for the rest."""
        with suppress(OSError):
            self._file.close()
