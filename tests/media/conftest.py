"""What the tests of the media layer share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mediafm_ray.media.isolation import IsolatedReader
from mediafm_ray.media.options import FramesConfig, MediaConfig, TimedTextConfig
from mediafm_ray.spec import TimedTextSource, Title, TitleMedia
from tests.videos import KnownCuts


@pytest.fixture(scope="module")
def reader() -> Iterator[IsolatedReader]:
    """One child process for the tests of a module."""
    reader = IsolatedReader(FramesConfig(), TimedTextConfig(), MediaConfig())
    yield reader
    reader.close()


@pytest.fixture
def read(reader: IsolatedReader) -> Callable[..., TitleMedia]:
    """Read a file with known cuts: ``read(path, cuts, sidecars=[...])``."""

    def read(path: Path | str, cuts: Sequence[int] = (), sidecars: Sequence[TimedTextSource] = ()) -> TitleMedia:
        return reader.read(Title("a title", str(path), tuple(sidecars)), KnownCuts(cuts))

    return read
