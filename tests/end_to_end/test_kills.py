"""Processes killed by SIGKILL at seeded moments; a rerun, where one is needed, gives the bytes of a run that nothing disturbed."""

import random

import pytest

from benchmarks import kills
from benchmarks.kills import Disturbed, Outcome, compare, make_catalog, objects

TITLES = 6
SEED = 7


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return make_catalog(tmp_path_factory.mktemp("kills") / "videos", TITLES)


@pytest.fixture(scope="module")
def expected(catalog, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    Disturbed(catalog, output, nodes=0).run(0, random.Random(SEED), Outcome())
    found = objects(output)
    assert sum("/shots/" in name for name in found) == TITLES
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "nodes"), [("child", 0), ("actor", 0), ("driver", 0), ("node", 2), ("driver", 2), ("actor", 2)])
def test_after_kills_every_title_is_there_once_and_nothing_is_left(catalog, expected, tmp_path, monkeypatch, kind, nodes):
    monkeypatch.setattr(kills, "KINDS", (kind,))
    outcome = Outcome()
    disturbed = Disturbed(catalog, tmp_path / "out", nodes)
    try:
        disturbed.run(2, random.Random(SEED), outcome)
    finally:
        outcome.orphans += disturbed.close()
    compare(tmp_path / "out", expected, outcome)
    assert outcome.kills == {kind: 2}
    assert (outcome.lost, outcome.doubled, outcome.different, outcome.orphans) == (0, 0, 0, [])
    if kind in ("actor", "node"):
        assert outcome.runs == 1  # the job survives by itself
