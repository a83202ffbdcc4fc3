"""The command ``mediafm``, with a subcommand for each job: ``mediafm embed`` is ``python -m jobs.embed_catalog``."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import sys
import typing
from collections.abc import Sequence

EXIT_BAD_INPUT = 2  # the value in runs.command, whose import would slow --help down
COMMANDS = {  # name -> module of the job, help
    "demo": ("examples.demo", "embed, train, contextualise and report a small catalog of real footage"),
    "embed": ("jobs.embed_catalog", "embed the new and changed titles of a catalog"),
    "backfill": ("jobs.backfill_catalog", "keep an output up to date with its catalog, within limits, as a nightly job"),
    "verify": ("jobs.verify_dataset", "check every object of an output, and remove broken ones"),
    "compact": ("jobs.compact_dataset", "merge the objects of an output, one a title, into few large files"),
    "train": ("jobs.train_contextualiser", "train a contextualiser on an embedded catalog"),
    "contextualise": ("jobs.contextualise_catalog", "add contextual embeddings to an embedded catalog"),
    "scenes": ("jobs.segment_scenes", "group the shots of titles into scenes"),
    "titles": ("jobs.describe_titles", "describe titles by one row each: vectors, length, pace, nearest titles"),
    "clips": ("jobs.embed_clips", "compute vectors for a table of clips"),
    "probes": ("jobs.evaluate_probes", "evaluate the vectors with linear probes on labelled clips"),
    "index": ("jobs.build_index", "build the search index, or bring it up to date"),
    "search": ("jobs.search_shots", "find shots by a shot, a clip or words"),
    "repeats": ("jobs.find_repeats", "find the shots that several titles share: recaps, openings, adverts, trailers"),
    "explore": ("jobs.explore_catalog", "browse the catalog: search, play, compare and select shots"),
    "report": ("jobs.report_catalog", "write the HTML page of a catalog, and those of its titles"),
    "page": ("jobs.report_title", "write the HTML page of one title"),
    "submit": ("jobs.submit", "run a job on a Ray cluster and follow its log"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the subcommand that the command line names; return its exit code. Only the module of that subcommand is imported."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        print(describe(), file=sys.stderr)
        return EXIT_BAD_INPUT
    name, *rest = given
    if name in ("-h", "--help"):
        print(describe())
        return 0
    if name == "--version":
        print(f"mediafm_ray {importlib.metadata.version('mediafm_ray')}")
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}{suggest(name)}; the commands are: {', '.join(COMMANDS)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    sys.argv = [f"mediafm {name}", *rest]  # argparse prints it as the program's name.
    return run(COMMANDS[name][0], rest)


def run(module_name: str, arguments: Sequence[str]) -> int:
    """Run a job like ``python -m``."""
    from mediafm_ray.runs.command import run_job

    job = importlib.import_module(module_name)
    if hasattr(job, "command"):  # It parses its own command line.
        return job.command(arguments)
    return run_job(job.__doc__ or "", typing.get_type_hints(job.main)["config"], job.main, arguments)


def suggest(name: str) -> str:
    """Return a question with the command most similar to ``name``, which may be a job's module; empty without one."""
    spellings = {module.rpartition(".")[2]: command for command, (module, _) in COMMANDS.items()} | {name: name for name in COMMANDS}
    likely = difflib.get_close_matches(name, spellings, n=1)
    return f" (did you mean {spellings[likely[0]]}?)" if likely else ""


def describe() -> str:
    """Return the help text."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {help}" for name, (_, help) in COMMANDS.items())
    return (
        "usage: mediafm [--help] [--version] COMMAND [--config PROFILE_OR_FILE ...] [key=value ...]\n\n"
        "Shot-level multimodal embeddings of a video catalog, on Ray.\n\n"
        f"{commands}\n\nmediafm COMMAND --help describes a command and lists its keys."
    )


if __name__ == "__main__":
    sys.exit(main())
