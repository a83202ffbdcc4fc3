"""Write the HTML page of one title: a timeline of its shots and scenes, their modalities, their similarity and nearest shots.

    mediafm page output.uri=embeddings/ title_id=NAME
    mediafm page output.uri=s3://bucket/embeddings title_id=NAME report.path=page.html

The HTML file is self-contained and works offline. No video is opened and no model is loaded.
Exit code 0: the page is written; 2: a bad configuration, or the title is not committed.
"""

from __future__ import annotations

import os
import sys

from mediafm_ray.config.jobs import ReportTitleConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.pages import INDEX, pages_folder, write_title_page
from mediafm_ray.runs.command import EXIT_OK, run_job
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.storage.store import Store
from mediafm_ray.text import public_line


def main(config: ReportTitleConfig) -> int:
    """Read the title, write its page, print its URI."""
    if not config.title_id:
        raise ConfigError("title_id is required: the title to show")
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    folder, name = os.path.split(config.report.path)
    pages = Store((folder or ".") if config.report.path else pages_folder(dataset), config.storage)
    index = f"../{INDEX}" if not config.report.path and pages.info(INDEX) else ""
    print(public_line(write_title_page(dataset, config.title_id, pages, name, index)))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", ReportTitleConfig, main))
