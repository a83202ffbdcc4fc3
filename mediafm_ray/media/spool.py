"""Bytes of a title laid one after another in a file without a name, mapped into memory: long titles cost disk, not memory."""

from __future__ import annotations

import mmap
import tempfile

import numpy as np

from mediafm_ray.spec import Packed


class Spool:
    """Takes byte strings, gives them back as one ``Packed``. The file is gone when nobody looks at it any more.

    It stands in the folder of temporary files (TMPDIR): about 120 MB an hour of sound, and what the stored frames take.
    """

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile(prefix="mediafm-")  # noqa: SIM115 (lives as long as the spool)
        self.size = 0  # bytes

    def append(self, content: bytes | memoryview) -> None:
        """Add to the end. Raises OSError when the disk is full."""
        self.file.write(content)
        self.size += len(content)

    def fill(self, size: int) -> None:
        """Zeros up to ``size`` bytes; what is beyond is cut off."""
        self.file.flush()
        self.file.truncate(size)
        self.file.seek(size)
        self.size = size

    def packed(self, offsets: list[int]) -> Packed:
        """What was added, in pieces: piece i is ``[offsets[i], offsets[i + 1])``. Nothing can be added afterwards."""
        self.file.flush()
        data = mmap.mmap(self.file.fileno(), self.size, prot=mmap.PROT_READ) if self.size else b""
        self.file.close()  # the map holds the file
        return Packed(memoryview(data), np.asarray(offsets, np.int64))
