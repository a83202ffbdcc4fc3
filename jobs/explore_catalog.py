"""Browse an embedded catalog in a web browser: search, play, compare and select shots. Nothing is written.

    mediafm explore output.uri=embeddings/ index.uri=index/
    mediafm explore --config mediafm output.uri=s3://bucket/embeddings index.uri=s3://bucket/index
    mediafm explore output.uri=embeddings/ index.uri=index/ explore.host=0.0.0.0

Serves pages at http://127.0.0.1:8642/ until Ctrl-C, to this machine only. At another explore.host visitors need a token, which is in the
printed address. mediafm index writes the index; without one, titles can be seen and played but not searched. Words need the profile
that the catalog was embedded with. Videos are read from wherever they were when they were embedded, by ranges, and are never copied.
Exit code 0: ended by Ctrl-C or SIGTERM; 2: a bad configuration or output, or the port is taken.
"""

from __future__ import annotations

import signal
import socket
import sys

from mediafm_ray.config.jobs import ExploreCatalogConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.config.sections import ExploreConfig
from mediafm_ray.extras import need
from mediafm_ray.runs.command import EXIT_OK, run_job
from mediafm_ray.text import counted, public_line

KEEP_ALIVE_S = 75  # A client that pauses between two requests shall not meet a connection that is just being closed.


def main(config: ExploreCatalogConfig) -> int:
    """Open the catalog, print the address, serve."""
    need("explore", "mediafm explore")
    import uvicorn

    from mediafm_ray.explore.access import token_of
    from mediafm_ray.explore.app import make_app
    from mediafm_ray.explore.catalog import Catalog

    listening = listen(config.explore)
    print("opening the dataset, the index and the encoders ...", flush=True)
    catalog = Catalog(config)
    if catalog.problem:
        print(public_line(f"nothing can be searched: {catalog.problem}; run: {catalog.to_run}"))
    for by, reason in catalog.words.reasons.items():
        if not catalog.problem:
            print(public_line(f"no search by words in {by}: {reason}"))
    host, token = config.explore.host, token_of(config.explore.host, config.explore.token)
    app = make_app(catalog, host, tuple(config.explore.hosts), token)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listening.getsockname()[1]}/{f'?token={token}' if token else ''}"
    listening.listen()  # Before the address is printed: whoever opens it at once waits instead of being refused.
    print(
        f"{counted(len(catalog.objects), 'title')}, {counted(catalog.shots, 'shot')} to search: open {address} (Ctrl-C ends it)", flush=True
    )
    options = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=3,
    )
    with listening:
        try:
            uvicorn.Server(options).run(sockets=[listening])
        except KeyboardInterrupt:  # uvicorn raises it again after it has ended the connections.
            pass
        except SystemExit as ending:  # As it does with SIGTERM: a server that is told to end has no work left.
            if ending.code != signal.SIGTERM:
                raise
    return EXIT_OK


def listen(config: ExploreConfig) -> socket.socket:
    """Return a socket that listens at the configured address. Raises ConfigError where it cannot."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at explore.host={config.host}, explore.port={config.port} ({error.strerror}): choose another port, or 0"
        ) from error
    return listening


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", ExploreCatalogConfig, main))
