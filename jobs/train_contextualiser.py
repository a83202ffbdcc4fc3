"""Train a contextualiser, neighbour attention or the recipe's encoder, on an embedded catalog by masked shot modelling.

    mediafm train --config training/small dataset.uri=embeddings/ checkpoint.uri=contextualiser/

checkpoint.uri then has the model that did best on held-out titles: give it to the other jobs as contextualiser.checkpoint=.
To finish a killed training, run the same command again: the numbers are those of an undisturbed one. A finished training is not repeated.
Exit code 0: training is finished; 2: a bad configuration, dataset or state, nothing was started; 3: it ended early.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mediafm_ray.config.jobs import TrainContextualiserConfig
from mediafm_ray.extras import need
from mediafm_ray.runs.command import EXIT_ABORTED, EXIT_OK, run_job, working
from mediafm_ray.runs.report import Console

if TYPE_CHECKING:
    from mediafm_ray.pipeline.training.train import TrainingPlan


def main(config: TrainContextualiserConfig) -> int:
    """Plan, train, report."""
    from mediafm_ray.pipeline.training.train import Watch, plan_training, run_workers  # Torch would slow down --help.

    need("train", "training")
    console = Console()
    plan = plan_training(config)
    log_plan(plan, config, console)
    if plan.finished is None:
        with working():
            aborted = run_workers(plan, config, Watch(config.training, console))
        if aborted:
            console.say(f"error: training ended early: {aborted}; run the same command again to continue from the last saved state")
            return EXIT_ABORTED
    return report(config, console)


def log_plan(plan: TrainingPlan, config: TrainContextualiserConfig, console: Console) -> None:
    """Log the plan of a training."""
    titles = plan.titles
    console.say(
        f"dataset version {titles.dataset_version}: {len(titles.objects)} titles, {plan.train} to train on, {plan.held_out} held out"
    )
    for note in plan.notes:
        console.say(note)
    if not plan.held_out:
        console.say("no title is held out: the last model is kept, and training does not stop early")
    if plan.finished is not None:
        console.say("training is finished: there is nothing to do")
    elif plan.resume_step:
        console.say(f"continuing from step {plan.resume_step} of {config.training.steps}")
    else:
        console.say(f"training {config.training.steps} steps of {config.training.windows_per_step} windows")


def report(config: TrainContextualiserConfig, console: Console) -> int:
    """Log how training ended and how to use the model; return the exit code."""
    from mediafm_ray.pipeline.training.folder import FINISHED, TrainingFolder
    from mediafm_ray.pipeline.training.train import advise, describe_cosines

    ending = TrainingFolder(config.checkpoint.uri, config.storage).read_json(FINISHED)
    assert ending is not None, "a finished training has written it"
    console.say(f"ended at step {ending['step']}: {ending['reason']}")
    console.say(f"the model of step {ending['best_step']} is kept: {describe_cosines(ending)}")
    for line in advise(ending, config.checkpoint.uri):
        console.say(line)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(run_job(__doc__ or "", TrainContextualiserConfig, main))
