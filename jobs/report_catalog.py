"""Write the HTML page of a catalog: length, shots and warnings of every title, failures with their reasons, the last run.

    mediafm report output.uri=embeddings/
    mediafm report output.uri=embeddings/ report.title_pages=true

The HTML is self-contained and links to the existing pages of titles. No video is opened and no model is loaded.
Exit code 0: the pages are written; 1: the pages of some titles failed; 2: a bad configuration or dataset; 3: not all pages could be
stored.
"""

from __future__ import annotations

import sys

from mediafm_ray.config.jobs import ReportCatalogConfig
from mediafm_ray.derive.pages import INDEX, catalog_content, pages_folder, titles_to_write, write_title_page
from mediafm_ray.downstream.catalog_pages import catalog_page
from mediafm_ray.runs.command import EXIT_FAILED_TITLES, EXIT_OK, run_job, working
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.storage.dataset import EmbeddingDataset
from mediafm_ray.storage.store import StorageError, Store
from mediafm_ray.text import public_line


def main(config: ReportCatalogConfig) -> int:
    """Write the titles' pages if configured, then the catalog's page that links to them; print their URIs."""
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    pages = Store(config.report.folder or pages_folder(dataset), config.storage)
    with working():
        failed = write_title_pages(dataset, pages) if config.report.title_pages else 0
        pages.write(INDEX, catalog_page(catalog_content(dataset, config.output.uri, pages)).encode())
    print(public_line(f"{pages.uri}/{INDEX}"))
    return EXIT_FAILED_TITLES if failed else EXIT_OK


def write_title_pages(dataset: EmbeddingDataset, pages: Store) -> int:
    """Write the pages of committed titles that have changed since and print their URIs; return the number of failures."""
    failed = 0
    for title_id in titles_to_write(dataset, pages):
        try:
            print(public_line(write_title_page(dataset, title_id, pages, index=f"../{INDEX}")))
        except StorageError:
            raise
        except Exception as error:  # The pages of the other titles are still written.
            failed += 1
            print(public_line(f"FAILED {title_id}: {type(error).__name__}: {error}"))
    return failed


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", ReportCatalogConfig, main))
