"""Find shots that are similar to a shot or a clip, or that match words. No video is opened; a model is loaded only for words.

    mediafm search index.uri=index/ shot=film:12
    mediafm search index.uri=index/ clip=film:61.5-70 by=video filter.other_titles=true count=20
    mediafm search index.uri=index/ query="people on bikes" filter.languages=[en] format=json
    mediafm search --config mediafm index.uri=index/ query="a red car" by=video

Prints a table, or one JSON object. mediafm index writes the index. by=all compares the contextual or fused vectors of the index,
by=video, audio or text those of one encoder. Words are compared with the text of a shot (by=text), where the video encoder is CLIP
or SigLIP with its pictures (by=video), and where the audio encoder is CLAP with its sound (by=audio); they need the profile that the
catalog was embedded with.
The shot or clip of the query is not among the results.
Exit code 0: success, even if nothing was found; 2: a bad configuration or index, or an unknown title.
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
    """Open the index, compute the query's vector, search, print."""
    need("search", "searching")
    if not config.index.uri:
        raise ConfigError("index.uri is required: the location of an index that mediafm index wrote")
    index = open_index(config.index.uri, config.storage)
    check_index(index, config.index)
    query = make_query(index, config)
    found = find_shots(index, query, config)
    print((as_json if config.format == "json" else as_table)(index, query, found))
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", SearchShotsConfig, main))
