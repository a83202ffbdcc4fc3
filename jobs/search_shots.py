"""Find shots that are like a shot, like a clip, or that words describe. No video is opened; a model is loaded for words only.

    mediafm search index.uri=index/ shot=film:12
    mediafm search index.uri=index/ clip=film:61.5-70 by=video filter.other_titles=true count=20
    mediafm search index.uri=index/ query="people on bikes" filter.languages=[en] format=json
    mediafm search --config mediafm index.uri=index/ query="a red car" by=video

Prints a table, or one JSON object. The index is what jobs.build_index wrote. by=all compares whole vectors (contextual or fused, as the
index has them), by=video, audio or text those of one encoder. Words are compared with what is said in a shot (by=text) or, where the
video encoder is CLIP or SigLIP, with its pictures (by=video), through the encoder of the profile that the catalog was embedded with.
The shot or clip that is asked for is no result.
Exit code 0: all is well, even if nothing was found; 2: a bad configuration or index, an unknown title.
"""

from __future__ import annotations

import sys

from mediafm_ray.config.jobs import SearchShotsConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.search import as_json, as_table, check_index, find_shots, make_query
from mediafm_ray.extras import need
from mediafm_ray.runs.command import EXIT_OK, run_job
from mediafm_ray.storage.index import open_index


def main(config: SearchShotsConfig) -> int:
    """Open the index, make the query's vector, search, print."""
    need("search", "searching")
    if not config.index.uri:
        raise ConfigError("index.uri is required: what jobs.build_index wrote")
    index = open_index(config.index.uri, config.storage)
    check_index(index, config.index)
    query = make_query(index, config)
    found = find_shots(index, query, config)
    print((as_json if config.format == "json" else as_table)(index, query, found))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", SearchShotsConfig, main))
