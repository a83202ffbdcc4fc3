"""Evaluate the vectors of each step of the recipe with linear probes on labels of clips.

    mediafm probes output.uri=embeddings/ labels.uri=labels.csv contextualiser.checkpoint=checkpoint/ report.uri=probes.json
    mediafm probes output.uri=embeddings/ labels.uri=labels.csv labels.inputs=[video,audio,text,fused]

The table has title_id, start_s, end_s of each clip, and columns of true and false (a label each), one column of names (a;b for several), or
one column of scores that rank the clips. The inputs are video, audio and text alone, fused, the fused vectors' mean over five shots
(neighbours: context without training), contextual in isolation (contextual_alone: only a clip's shots, which needs the checkpoint) and
contextual in context. For each the job prints macro and micro average precision, or Kendall's tau, for held-out titles, with 95 %
confidence intervals, and the difference from the fused vectors; then, for each label, the gain of the contextual vectors over the fused
ones and their mean. mediafm_ray/downstream/probes.py explains the protocol.
Exit code 0: success; 2: a bad configuration, dataset or table (all its problems are printed), nothing was measured.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pyarrow as pa

from mediafm_ray.config.jobs import EvaluateProbesConfig
from mediafm_ray.config.loader import ConfigError
from mediafm_ray.derive.clip_tables import CLIP_COLUMNS, CONTEXTUAL, FUSED, NEIGHBOURS, ClipSource, check_kinds, clip_vectors, read_clips
from mediafm_ray.downstream.probes import Labels, as_json, chance, describe, describe_labels, evaluate, labels_of, learnable
from mediafm_ray.extras import need
from mediafm_ray.runs.command import EXIT_OK, run_job
from mediafm_ray.runs.report import Console
from mediafm_ray.runs.stored import open_dataset
from mediafm_ray.storage.tables import TableError, write_object
from mediafm_ray.text import counted, public_line

NO_LABELS = (*CLIP_COLUMNS, "clip_id")  # columns that identify the clip


def main(config: EvaluateProbesConfig) -> int:
    """Read the labels, pool the clips, train the probes, report."""
    need("probes", "probing")
    console = Console()
    dataset = open_dataset(config.output.uri, config.dataset.version, config.storage)
    stored = ("labels.contextual", config.labels.contextual)
    source = ClipSource(config.output.uri, dataset, stored, config.contextualiser, config.storage, config.labels.threads)
    check_kinds(source, config.labels.inputs)
    clips = read_clips(config.labels.uri, config.storage)
    groups_N = group_clips(clips, config)
    labels = read_labels(clips, groups_N, config, console)
    kind = "score" if labels.is_ranking else f"{len(labels.names)} labels"
    groups = f"{groups_N.max() + 1} {'titles' if not config.labels.group else f'groups by {config.labels.group}'}"
    console.say(f"dataset version {dataset.version}: {counted(len(clips), 'clip')} of {groups}, {kind}")
    features = clip_vectors(source, clips, config.labels.uri, config.labels.inputs)
    baseline = config.labels.baseline if config.labels.baseline in features else config.labels.inputs[0]
    results = evaluate(features, labels, groups_N, baseline, config.probes)
    console.say()
    console.say(describe(results, labels, baseline))
    rivals = [kind for kind in (FUSED, NEIGHBOURS) if kind in results]
    if CONTEXTUAL in results and rivals:
        console.say()
        console.say(describe_labels(results, CONTEXTUAL, rivals))
    if config.report.uri:
        content = {
            "dataset_version": dataset.version,
            "labels": {"uri": config.labels.uri, "names": list(labels.names), "clips": len(clips), "groups": int(groups_N.max()) + 1},
            "checkpoint": config.contextualiser.checkpoint or config.labels.contextual,
            "probes": dataclasses.asdict(config.probes),
            "baseline": baseline,
            "chance": chance(labels),
            "inputs": as_json(results),
        }
        write_object(config.report.uri, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(), config.storage)
        console.say(f"\n  report  {config.report.uri}")
    return EXIT_OK


def group_clips(clips: pa.Table, config: EvaluateProbesConfig) -> np.ndarray:
    """Return the (N,) int64 group of each clip, its title or group of titles, which is held out together. Raises ConfigError."""
    name = config.labels.group or "title_id"
    if name not in clips.column_names:
        raise ConfigError(f"labels.group: {config.labels.uri} has no {name}; there are: {', '.join(clips.column_names)}")
    groups_N = np.unique([str(value) for value in clips[name].to_pylist()], return_inverse=True)[1]
    titles_N = np.unique([str(value) for value in clips["title_id"].to_pylist()], return_inverse=True)[1]
    if len(np.unique(np.stack([titles_N, groups_N]), axis=1).T) > len(np.unique(titles_N)):
        raise ConfigError(f"labels.group={name}: clips of one title are in several groups; a title belongs to one")
    return groups_N


def read_labels(clips: pa.Table, groups_N: np.ndarray, config: EvaluateProbesConfig, console: Console) -> Labels:
    """Return the labels of the table that can be learned and tested; print the others. Raises ConfigError, TableError."""
    columns = list(config.labels.columns) or [name for name in clips.column_names if name not in (*NO_LABELS, config.labels.group)]
    unknown = [name for name in columns if name not in clips.column_names]
    if unknown:
        raise ConfigError(f"labels.columns: {config.labels.uri} has no {', '.join(unknown)}; there are: {', '.join(clips.column_names)}")
    try:
        labels, left_out = learnable(labels_of({name: clips[name].to_pylist() for name in columns}), groups_N)
    except ValueError as error:
        raise TableError(config.labels.uri, [str(error)]) from error
    for line in left_out:
        console.say(public_line(f"left out: {line}"))
    return labels


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", EvaluateProbesConfig, main))
