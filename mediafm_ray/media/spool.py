"""Byte strings of a title in an unnamed temporary file that is mapped into memory: long titles cost disk, not memory."""

from __future__ import annotations

import mmap
import tempfile

import numpy as np

from mediafm_ray.spec import Packed


class Spool:
    """Collects byte strings and returns them as one ``Packed``. The file is removed with its last reference.

    It lies in the folder of temporary files (TMPDIR): about 120 MB an hour of sound at 16 kHz, and what the stored frames take.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="mediafm-")  # noqa: SIM115 (lives as long as the spool)
        self.size = 0  # bytes

    def append(self, content: bytes | memoryview) -> None:
        """Add to the end. Raises OSError when the disk is full."""
        self.file.write(content)
        self.size += len(content)

    def fill(self, size: int) -> None:
        """Pad with zeros or truncate to ``size`` bytes."""
        self.file.flush()
        self.file.truncate(size)
        self.file.seek(size)
        self.size = size

    def packed(self, offsets: list[int]) -> Packed:
        """Return the content in pieces: piece i is ``[offsets[i], offsets[i + 1])``. Nothing can be added afterwards."""
        self.file.flush()
        data = mmap.mmap(self.file.fileno(), self.size, prot=mmap.PROT_READ) if self.size else b""
        self.file.close()  # the map holds the file
        return Packed(memoryview(data), np.asarray(offsets, np.int64))
