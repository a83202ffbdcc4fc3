"""The repeats of a title on its page, with links to both places, and tables that cannot be shown."""

import html

import pyarrow as pa
import pytest

from mediafm_ray.derive.repeats import repeats_table
from mediafm_ray.downstream.repeats import Levels, Run
from mediafm_ray.explore.queries import link
from mediafm_ray.storage.dataset import DatasetError
from mediafm_ray.storage.index import open_index
from mediafm_ray.storage.store import StorageConfig
from mediafm_ray.storage.tables import write_table
from tests.explore.made import FILM, GONE, SEQUEL, client_of, config_of
from tests.hostile_text import HOSTILE

RUN = Run(2, 4, 5, 7, 4.0, 10.0, 11.0, 17.0, 7.0, 3, 0.9876, 0.95, False, 1.0)


@pytest.fixture(scope="module")
def table(root):
    index = open_index(f"{root}/index", StorageConfig())
    return repeats_table(index, Levels(0.5, 0.7, 0.9), [(FILM, SEQUEL, RUN), *((FILM, title_id, RUN) for title_id in HOSTILE[:4])])


def test_a_title_lists_its_repeats_with_links_to_both_places(root, table, tmp_path):
    write_table(table, f"{tmp_path}/repeats.parquet")
    client = client_of(config_of(root, f"repeats.uri={tmp_path}/repeats.parquet"))
    here, there = client.get(link("/title", id=FILM)), client.get(link("/title", id=SEQUEL))
    for page, own, other in ((here, (FILM, 2), (SEQUEL, 5)), (there, (SEQUEL, 5), (FILM, 2))):
        assert page.status_code == 200
        for title_id, shot in (own, other):
            assert f'href="{html.escape(link("/title", id=title_id, shot=shot))}"' in page.text
        assert "3 shots, near, cosine 0.988" in page.text
    assert here.text.count("is also in") == 5
    assert all(text not in here.text for text in HOSTILE[:4] if "<" in text)
    assert "is also in" not in client.get(link("/title", id=GONE)).text


@pytest.mark.parametrize("change", ["gone", "of another version", "no table of repeats", "no table at all"])
def test_a_table_that_cannot_be_shown_ends_the_start_with_the_command_to_run(root, table, tmp_path, change):
    path = tmp_path / "repeats.parquet"
    if change == "of another version":
        write_table(table.replace_schema_metadata({"mediafm_ray": '{"dataset_version": "ba9876543210"}'}), str(path))
    elif change == "no table of repeats":
        write_table(pa.table({"a": [1]}), str(path))
    elif change == "no table at all":
        path.write_bytes(b"a,b\n1,2\n")
    with pytest.raises(DatasetError, match="run mediafm repeats repeats"):
        client_of(config_of(root, f"repeats.uri={path}"))
