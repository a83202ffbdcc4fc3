"""Linear probes on frozen features: the labels of a clip predicted from its vector by a linear model. numpy, scipy and scikit-learn.

Each label has a logistic regression, a score that ranks clips a ridge regression; both are L2-regularised, on unchanged unit vectors, with
the strength chosen on held-out titles of the training part (the protocol of Radford et al. 2021, arXiv:2103.00020, A.3). Clips of one
title are similar, so folds contain whole titles: every title is held out once in each of several random partitions, and the metrics
are computed over the predictions for held-out titles and averaged over the partitions. Confidence intervals are percentiles of a
bootstrap over titles (Efron and Tibshirani 1993, chapter 13), in which the clips of a title stay together; all features see the same
partitions and the same resampled titles, so their differences are paired.

Shapes
    N  clips
    L  labels
    D  dimension of a feature
    R  partitions
    B  bootstrap samples
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from mediafm_ray.downstream.options import ProbesConfig

MICRO, MACRO, TAU = "micro_average_precision", "macro_average_precision", "kendall_tau"
CONFIDENCE = 0.95  # level of the intervals
INNER_SHARE = 0.25  # Share of the training titles that is held out to choose the strength of the regularisation.
MAX_ITERATIONS = 200  # Iterations of the logistic regression.
BLOCK_VALUES = 4_000_000  # Weights of bootstrap samples in memory at once.


@dataclass(frozen=True, eq=False)
class Labels:
    """The targets of N clips: L boolean labels, or one score that ranks the clips."""

    names: tuple[str, ...]
    values_NL: np.ndarray  # bool; float64 with L = 1 for a score

    @property
    def is_ranking(self) -> bool:
        """Return True if the target is a score."""
        return self.values_NL.dtype != np.bool_


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class ProbeResult:
    """The metrics of the probes on one kind of feature."""

    metrics: Mapping[str, Estimate]  # micro and macro average precision, or Kendall's tau-b
    against: Mapping[str, Estimate]  # paired differences from the baseline; empty for the baseline
    by_label: Mapping[str, Estimate]  # average precision of each label, or Kendall's tau-b of a score
    by_label_against: Mapping[str, Mapping[str, Estimate]]  # other feature -> label -> paired difference


def learnable(labels: Labels, groups_N: np.ndarray) -> tuple[Labels, list[str]]:
    """Return the labels that can be learned on some titles and tested on others, and a line for each that cannot.

    ``groups_N`` is int64, the title of each clip. Raises ValueError if no label is left: one class only, or one title only.
    """
    titles = len(np.unique(groups_N))
    if titles < 2:
        raise ValueError(f"probes are trained on some titles and tested on others; all {len(groups_N)} clips are of one title")
    kept, left_out = [], []
    for column, name in enumerate(labels.names):
        values_N = labels.values_NL[:, column]
        if len(np.unique(values_N)) < 2:
            which = f"every clip has the score {values_N[0]:g}" if labels.is_ranking else f"{'every' if values_N[0] else 'no'} clip has it"
            left_out.append(f"{name}: one class only, {which}")
        elif not labels.is_ranking and min(len(np.unique(groups_N[values_N == value])) for value in (False, True)) < 2:
            left_out.append(f"{name}: the clips {'that have it' if _in_one(groups_N[values_N]) else 'without it'} are all of one title")
        else:
            kept.append(column)
    if not kept:
        raise ValueError("no label can be learned and tested: " + "; ".join(left_out))
    return Labels(tuple(labels.names[column] for column in kept), labels.values_NL[:, kept]), left_out


def _in_one(groups: np.ndarray) -> bool:
    return len(np.unique(groups)) < 2


def evaluate(
    features: Mapping[str, np.ndarray], labels: Labels, groups_N: np.ndarray, baseline: str, config: ProbesConfig
) -> dict[str, ProbeResult]:
    """Probe every kind of feature, (N, D) float32 each, on the same partitions and resampled titles; ``baseline`` is one of them.

    ``labels`` are from ``learnable``, ``groups_N`` as there. The same seed gives the same numbers.
    """
    weight_BN = _resampled_titles(groups_N, config)
    values: dict[str, dict[str, np.ndarray]] = {}
    of_label: dict[str, dict[str, np.ndarray]] = {}
    for name, vectors_ND in features.items():
        scores_RNL = held_out_scores(vectors_ND, labels, groups_N, config)
        values[name], by_label_BL = _metrics(scores_RNL, labels, weight_BN)
        of_label[name] = dict(zip(labels.names, by_label_BL.T, strict=True))

    def differences(found: Mapping[str, np.ndarray], base: Mapping[str, np.ndarray]) -> dict[str, Estimate]:
        return {key: _estimate(found_B - base[key]) for key, found_B in found.items()}

    return {
        name: ProbeResult(
            {metric: _estimate(found_B) for metric, found_B in values[name].items()},
            {} if name == baseline else differences(values[name], values[baseline]),
            {label: _estimate(found_B) for label, found_B in of_label[name].items()},
            {other: differences(of_label[name], of_label[other]) for other in features if other != name},
        )
        for name in features
    }


def chance(labels: Labels) -> dict[str, float]:
    """Return the metrics of a probe that knows only the share of clips with each label: macro is the mean share, tau is 0."""
    if labels.is_ranking:
        return {TAU: 0.0}
    share_L = labels.values_NL.mean(axis=0)
    truth = labels.values_NL.T.reshape(-1)
    micro = average_precisions(np.repeat(share_L, len(labels.values_NL)), truth, np.ones((1, len(truth))))
    return {MICRO: float(micro[0]), MACRO: float(share_L.mean())}


# ------------------------------------------------------------------------------------------------------------ training


def held_out_scores(vectors_ND: np.ndarray, labels: Labels, groups_N: np.ndarray, config: ProbesConfig) -> np.ndarray:
    """Return (R, N, L) float64 predictions of probes that were trained on other titles: log-odds, or a score."""
    rotated_ND = _rotated(vectors_ND)
    scores_RNL = np.empty((config.repeats, *labels.values_NL.shape))
    fold_RN = [title_folds(groups_N, config.folds, config.seed + repeat) for repeat in range(config.repeats)]

    def probe(task: tuple[int, int, int]) -> None:
        repeat, fold, column = task
        train, test = np.flatnonzero(fold_RN[repeat] != fold), np.flatnonzero(fold_RN[repeat] == fold)
        inner = title_folds(groups_N[train], round(1 / INNER_SHARE), config.seed + repeat) == 0
        values_N = labels.values_NL[:, column]
        strength = _choose_strength(rotated_ND, values_N, train[~inner], train[inner], config)
        scores_RNL[repeat, test, column] = _predict(rotated_ND, values_N, train, test, strength)

    from sklearn.exceptions import ConvergenceWarning

    tasks = itertools.product(range(config.repeats), range(int(fold_RN[0].max()) + 1), range(labels.values_NL.shape[1]))
    with warnings.catch_warnings():  # Weakly regularised, separable labels never converge; their ranking is final long before.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # One core per probe: matrices of this size gain nothing from several, and lose on a busy machine.
        with threadpool_limits(limits=1), ThreadPoolExecutor(config.threads or os.cpu_count()) as pool:
            list(pool.map(probe, tasks))
    return scores_RNL


def title_folds(groups_N: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Return (N,) int64, the fold of each clip. Shuffled titles go to the fold with the fewest clips, so folds are nearly even."""
    titles, group_N, clips = np.unique(groups_N, return_inverse=True, return_counts=True)
    fold_of = np.empty(len(titles), np.int64)
    filled = np.zeros(min(folds, len(titles)))
    for title in np.random.default_rng(seed).permutation(len(titles)):
        fold_of[title] = np.argmin(filled)
        filled[fold_of[title]] += clips[title]
    return fold_of[group_N]


def _rotated(vectors_ND: np.ndarray) -> np.ndarray:
    """Return centred features of total variance 1 in at most N dimensions, by a rotation, which L2-regularised models do not see."""
    centred_ND = vectors_ND.astype(np.float64) - vectors_ND.mean(axis=0, dtype=np.float64)
    variance = float(np.einsum("nd,nd->", centred_ND, centred_ND)) / len(centred_ND)
    if centred_ND.shape[1] > len(centred_ND):
        left_NK, singular_K, _ = np.linalg.svd(centred_ND, full_matrices=False)
        centred_ND = left_NK * singular_K
    return centred_ND / np.sqrt(variance) if variance > 0 else centred_ND


def _choose_strength(rotated_ND: np.ndarray, values_N: np.ndarray, train: np.ndarray, test: np.ndarray, config: ProbesConfig) -> float:
    """Return the best strength on the held-out part, or the strongest regularisation if there is no difference."""
    strengths = sorted(config.strengths)
    if len(strengths) == 1 or not len(train) or len(np.unique(values_N[test])) < 2:
        return strengths[0]
    whole = np.ones((1, len(test)))
    reached = []
    for strength in strengths:
        scores = _predict(rotated_ND, values_N, train, test, strength)
        ranking = values_N.dtype != np.bool_
        reached.append(_tau(scores, values_N[test]) if ranking else float(average_precisions(scores, values_N[test], whole)[0]))
    return strengths[int(np.argmax(np.nan_to_num(reached, nan=-np.inf)))]  # tau is undefined if all scores are equal.


def _predict(rotated_ND: np.ndarray, values_N: np.ndarray, train: np.ndarray, test: np.ndarray, strength: float) -> np.ndarray:
    """Train a probe on some clips and predict others, with its intercept corrected to the share of all clips that have the label.

    If few titles have a label, a fold with more of it leaves less for training, and the intercepts rank the folds in the wrong order: the
    stratification bias of pooled cross-validation (Parker, Guenter and Bedo 2007, BMC Bioinformatics 8:326). The correction is from King
    and Zeng 2001, "Logistic regression in rare events data".
    """
    from sklearn.linear_model import LogisticRegression, Ridge

    seen_N = values_N[train]
    if values_N.dtype != np.bool_:
        offset = float(values_N.mean() - seen_N.mean())
        return Ridge(alpha=1 / strength).fit(rotated_ND[train], seen_N).predict(rotated_ND[test]) + offset
    if len(np.unique(seen_N)) < 2:  # These titles cannot train the label.
        return np.full(len(test), _log_odds(values_N))
    probe = LogisticRegression(C=strength, max_iter=MAX_ITERATIONS).fit(rotated_ND[train], seen_N)
    return probe.decision_function(rotated_ND[test]) + _log_odds(values_N) - _log_odds(seen_N)


def _log_odds(values_N: np.ndarray) -> float:
    share = float(values_N.mean())
    return float(np.log(share / (1 - share)))


# ------------------------------------------------------------------------------------------------------------- metrics


def average_precisions(scores_N: np.ndarray, truth_N: np.ndarray, weight_BN: np.ndarray) -> np.ndarray:
    """Return (B,) float64 average precision, the sum of precision times the step in recall, with clips weighted by rows of ``weight_BN``.

    Clips of equal score are taken together, as in scikit-learn's average_precision_score. NaN if no clip with weight has the label.
    """
    order = np.argsort(-scores_N, kind="stable")
    scores_N, truth_N = scores_N[order], truth_N[order]
    last_of_score = np.append(np.flatnonzero(np.diff(scores_N)), len(scores_N) - 1)
    found_B = np.empty(len(weight_BN))
    rows = max(1, BLOCK_VALUES // len(scores_N))
    for begin in range(0, len(weight_BN), rows):
        weight = weight_BN[begin : begin + rows, order]
        hits = np.cumsum(weight * truth_N, axis=1)[:, last_of_score]
        taken = np.cumsum(weight, axis=1)[:, last_of_score]
        precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
        found = np.sum(np.diff(hits, axis=1, prepend=0) * precision, axis=1)
        there = hits[:, -1]
        found_B[begin : begin + rows] = np.divide(found, there, out=np.full_like(found, np.nan), where=there > 0)
    return found_B


def _by_label(scores_RNL: np.ndarray, labels: Labels, weight_BN: np.ndarray) -> np.ndarray:
    """Return the (B, L) average precision of each label, averaged over the partitions."""
    found_RLB = [
        [average_precisions(scores_NL[:, column], labels.values_NL[:, column], weight_BN) for column in range(scores_NL.shape[1])]
        for scores_NL in scores_RNL
    ]
    return np.mean(found_RLB, axis=0).T


def _metrics(scores_RNL: np.ndarray, labels: Labels, weight_BN: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return (1 + B,) values of each metric, over all clips and over each bootstrap sample, and (1 + B, L) values of each label."""
    weight_BN = np.concatenate([np.ones((1, weight_BN.shape[1])), weight_BN])
    if labels.is_ranking:
        values_N = labels.values_NL[:, 0]
        picks = [np.repeat(np.arange(len(values_N)), weight_N.astype(np.int64)) for weight_N in weight_BN]
        tau_B = np.array([np.mean([_tau(scores_NL[pick, 0], values_N[pick]) for scores_NL in scores_RNL]) for pick in picks])
        return {TAU: tau_B}, tau_B[:, None]
    micro = [
        average_precisions(scores_NL.T.reshape(-1), labels.values_NL.T.reshape(-1), np.tile(weight_BN, scores_NL.shape[1]))
        for scores_NL in scores_RNL
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice")  # A sample without any label is ignored.
        by_label_BL = _by_label(scores_RNL, labels, weight_BN)
        return {MICRO: np.mean(micro, axis=0), MACRO: np.nanmean(by_label_BL, axis=1)}, by_label_BL


def _tau(scores: np.ndarray, values: np.ndarray) -> float:
    """Return Kendall's tau-b; NaN if one side is constant."""
    from scipy.stats import kendalltau

    return float(kendalltau(scores, values).statistic)


def _resampled_titles(groups_N: np.ndarray, config: ProbesConfig) -> np.ndarray:
    """Return (B, N) float64, the number of times each clip is in a bootstrap sample of titles."""
    titles, group_N = np.unique(groups_N, return_inverse=True)
    random = np.random.default_rng(config.seed)
    drawn_BT = random.multinomial(len(titles), np.full(len(titles), 1 / len(titles)), size=config.bootstrap)
    return drawn_BT[:, group_N].astype(np.float64)


def _estimate(values: np.ndarray) -> Estimate:
    """Make an estimate from the value over all clips and the values of the bootstrap samples."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.nanpercentile(values[1:], [tail, 100 - tail]) if np.isfinite(values[1:]).any() else (np.nan, np.nan)
    return Estimate(float(values[0]), float(low), float(high))


def describe(results: Mapping[str, ProbeResult], labels: Labels, baseline: str) -> str:
    """Return the results as one table for people."""
    metrics = [TAU] if labels.is_ranking else [MACRO, MICRO]
    titles = {TAU: "Kendall's tau", MACRO: "macro AP (mAP)", MICRO: "micro AP"}
    head = f"  {'features':<18}" + "".join(f"{titles[metric]:>24}  {'against ' + baseline:>25}" for metric in metrics)
    lines = [head]
    for name, result in results.items():
        cells = [f"{_cell(result.metrics[metric]):>24}  {_cell(result.against.get(metric), signed=True):>25}" for metric in metrics]
        lines.append(f"  {name:<18}" + "".join(cells))
    known = chance(labels)
    lines.append(f"  {'(chance)':<18}" + "".join(f"{known[metric]:>7.3f}{'':<17}  {'':>25}" for metric in metrics).rstrip())
    return "\n".join(lines)


def describe_labels(results: Mapping[str, ProbeResult], feature: str, rivals: Sequence[str]) -> str:
    """Return a table that says for each label if ``feature`` is better than all ``rivals``, worse than one, or not different.

    A difference counts if its interval does not contain 0. With many labels, one in twenty may differ by chance.
    """
    lines = [f"  {'label':<24}{feature:>24}" + "".join(f"{'against ' + rival:>28}" for rival in rivals) + "  verdict"]
    result = results[feature]
    for label, value in result.by_label.items():
        found = [result.by_label_against[rival][label] for rival in rivals]
        if any(one.high < 0 for one in found):
            verdict = "worse than " + " and ".join(rival for rival, one in zip(rivals, found, strict=True) if one.high < 0)
        else:
            verdict = "worth it" if all(one.low > 0 for one in found) else "no difference seen"
        cells = "".join(f"{_cell(one, signed=True):>28}" for one in found)
        lines.append(f"  {label:<24}{_cell(value):>24}{cells}  {verdict}")
    return "\n".join(lines)


def _cell(estimate: Estimate | None, signed: bool = False) -> str:
    if estimate is None:
        return ""
    form = "+.3f" if signed else ".3f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def as_json(results: Mapping[str, ProbeResult]) -> dict[str, Any]:
    """Return the results as a value for JSON; intervals are [low, high]; undefined numbers are null."""

    def plain(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
        return {name: {"value": number(one.value), "interval": [number(one.low), number(one.high)]} for name, one in estimates.items()}

    def number(value: float) -> float | None:
        return value if np.isfinite(value) else None

    return {
        name: {
            "metrics": plain(one.metrics),
            "against_baseline": plain(one.against),
            "by_label": plain(one.by_label),
            "by_label_against": {other: plain(differences) for other, differences in one.by_label_against.items()},
        }
        for name, one in results.items()
    }


# -------------------------------------------------------------------------------------------------------------- labels


def labels_of(columns: Mapping[str, Sequence[Any]]) -> Labels:
    """Return the labels in the columns of a table.

    Columns of true and false (or 1 and 0) are one label each. One column of strings, or of lists of strings, names the labels of each clip
    (several in one string are separated by ';'). One column of other numbers is a score that ranks the clips.
    Raises ValueError for anything else, empty cells among them.
    """
    for name, values in columns.items():
        empty = [row for row, value in enumerate(values, start=1) if value is None or value != value]
        if empty:
            raise ValueError(f"the column {name} is empty in row {empty[0]}" + (f" and {len(empty) - 1} more" if len(empty) > 1 else ""))
    if (
        columns
        and all(set(values) <= {0, 1} for values in columns.values() if _is_numbers(values))
        and all(map(_is_numbers, columns.values()))
    ):
        return Labels(tuple(columns), np.array(list(columns.values()), bool).T)
    if len(columns) == 1:
        ((name, values),) = columns.items()
        if _is_numbers(values):
            scores_N1 = np.array(values, np.float64)[:, None]
            if not np.isfinite(scores_N1).all():
                raise ValueError(f"the column {name} is not finite in row {int(np.argmin(np.isfinite(scores_N1[:, 0]))) + 1}")
            return Labels((name,), scores_N1)
        named = [[part.strip() for part in (value.split(";") if isinstance(value, str) else value)] for value in values]
        names = sorted({part for parts in named for part in parts if part})
        if names:
            return Labels(tuple(names), np.array([[name in parts for name in names] for parts in named], bool))
    kinds = ", ".join(f"{name} ({type(values[0]).__name__ if len(values) else 'empty'})" for name, values in columns.items())
    raise ValueError(
        f"labels are columns of true and false (or 1 and 0), one column of names, or one column of scores; these are: {kinds or 'none'}"
    )


def _is_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (bool, int, float)) for value in values)
