"""Probes: planted labels are found, absent ones are at chance, and metrics equal those of other libraries."""

import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.metrics import average_precision_score

from mediafm_ray.downstream.options import ProbesConfig
from mediafm_ray.downstream.probes import (
    MACRO,
    MICRO,
    TAU,
    Labels,
    as_json,
    average_precisions,
    chance,
    describe,
    describe_labels,
    evaluate,
    held_out_scores,
    labels_of,
    learnable,
    title_folds,
)

QUICK = ProbesConfig(folds=4, repeats=2, strengths=[1.0, 100.0], bootstrap=200)
CLIPS, TITLES, DIM = 240, 24, 16


def planted(seed=0, noise=0.5):
    """Features in whose first two dimensions two labels stand, features of pure noise, and the titles; titles shift all their clips."""
    random = np.random.default_rng(seed)
    groups = random.permutation(np.arange(CLIPS) % TITLES)
    truth = random.random((CLIPS, 2)) < (0.5, 0.2)
    signal = noise * random.normal(size=(CLIPS, DIM)) + 0.3 * random.normal(size=(TITLES, DIM))[groups]
    signal[:, :2] += 2 * truth
    features = {"signal": signal.astype(np.float32), "noise": random.normal(size=(CLIPS, DIM)).astype(np.float32)}
    return features, Labels(("a", "b"), truth), groups


def test_planted_labels_are_found_and_noise_is_chance():
    features, labels, groups = planted()
    results = evaluate(features, labels, groups, "noise", QUICK)
    for metric in (MICRO, MACRO):
        found = results["signal"].metrics[metric]
        assert found.value > 0.95
        assert found.low <= found.value <= found.high
        assert results["noise"].metrics[metric].value < 0.6
        difference = results["signal"].against[metric]
        assert difference.value == pytest.approx(found.value - results["noise"].metrics[metric].value)
        assert difference.low > 0.2
    assert results["noise"].against == {}
    assert all(one.value > 0.9 for one in results["signal"].by_label.values())


def test_each_label_has_its_own_verdict():
    """A feature that knows label a, where its rivals know nothing, and nothing of label b, which one rival knows."""
    features, labels, groups = planted()
    signal = features["signal"]
    found = {"new": signal[:, [0, *range(2, DIM)]], "old": features["noise"], "other": signal[:, 1:]}
    results = evaluate(found, labels, groups, "old", QUICK)
    against = results["new"].by_label_against
    assert against["old"]["a"].low > 0
    assert against["other"]["b"].high < 0
    head, of_a, of_b = describe_labels(results, "new", ["old", "other"]).splitlines()
    assert head.endswith("verdict")
    assert of_a.endswith("  worth it")
    assert of_b.endswith("  worse than other")
    assert describe_labels(results, "old", ["new"]).splitlines()[2].endswith("no difference seen")
    assert against["old"]["a"].value == pytest.approx(-results["old"].by_label_against["new"]["a"].value)


def test_random_labels_give_chance_within_the_interval():
    inside = 0
    for seed in range(10):
        random = np.random.default_rng(seed)
        labels = Labels(("a", "b"), random.random((CLIPS, 2)) < 0.4)
        features, _, groups = planted(seed)
        estimate = evaluate({"x": features["signal"]}, labels, groups, "x", QUICK)["x"].metrics[MACRO]
        inside += estimate.low <= chance(labels)[MACRO] <= estimate.high
    assert inside >= 8


def test_what_tells_titles_apart_is_not_taken_for_knowledge():
    """A label that is one of each title's own, at random, cannot be learned on other titles, however well titles can be told apart."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(TITLES), 10)
    labels = Labels(("of the title",), (np.arange(TITLES) % 2 == 0)[groups][:, None])
    identity = np.eye(TITLES, dtype=np.float32)[groups] + 0.01 * random.normal(size=(CLIPS, TITLES)).astype(np.float32)
    scores = held_out_scores(identity, labels, groups, QUICK)
    assert average_precision_score(labels.values_NL[:, 0], scores[0, :, 0]) < 0.65


@pytest.mark.parametrize("ranking", [False, True])
def test_what_is_held_out_does_not_count_against_itself(ranking):
    """Features that say nothing, labels that whole titles have: what is left for training is no hint at what is held out."""
    groups = np.repeat(np.arange(6), 40)
    values = np.isin(groups, (0, 1)) if not ranking else groups * 1.0
    labels = Labels(("of titles",), values[:, None])
    nothing = np.zeros((240, 4), np.float32)
    nothing[:, 0] = np.random.default_rng(0).normal(size=240)
    scores = held_out_scores(nothing, labels, groups, dataclasses.replace(QUICK, strengths=[0.01], folds=6))
    if ranking:
        assert abs(kendalltau(scores[0, :, 0], values).statistic) < 0.15
    else:
        assert abs(average_precision_score(values, scores[0, :, 0]) - 1 / 3) < 0.1


def test_a_planted_ranking_is_found():
    random = np.random.default_rng(1)
    groups = np.arange(CLIPS) % TITLES
    vectors = random.normal(size=(CLIPS, DIM)).astype(np.float32)
    labels = Labels(("score",), (vectors[:, 0] + 0.2 * random.normal(size=CLIPS))[:, None].astype(np.float64))
    noise = random.normal(size=(CLIPS, DIM)).astype(np.float32)
    results = evaluate({"signal": vectors, "noise": noise}, labels, groups, "noise", QUICK)
    assert results["signal"].metrics[TAU].low > 0.7
    assert results["noise"].metrics[TAU].low < 0 < results["noise"].metrics[TAU].high
    scores = held_out_scores(vectors, labels, groups, QUICK)
    expected = np.mean([kendalltau(one[:, 0], labels.values_NL[:, 0]).statistic for one in scores])
    assert results["signal"].metrics[TAU].value == pytest.approx(expected)


def test_average_precision_is_that_of_scikit_learn_with_weights_and_ties():
    random = np.random.default_rng(2)
    for levels in (3, 50, 10**6):
        scores = random.integers(0, levels, 200) / levels
        truth = random.random(200) < 0.3
        weights = random.integers(0, 4, (5, 200)).astype(float)
        expected = [average_precision_score(truth, scores, sample_weight=weight) for weight in weights]
        np.testing.assert_allclose(average_precisions(scores, truth, weights), expected, rtol=1e-12)
    assert np.isnan(average_precisions(scores, np.zeros(200, bool), weights)).all()


def test_metrics_are_those_of_the_held_out_scores():
    features, labels, groups = planted(3)
    scores = held_out_scores(features["signal"], labels, groups, QUICK)
    found = evaluate(features, labels, groups, "signal", QUICK)["signal"]
    micro = np.mean([average_precision_score(labels.values_NL, one, average="micro") for one in scores])
    macro = np.mean([average_precision_score(labels.values_NL, one, average="macro") for one in scores])
    assert found.metrics[MICRO].value == pytest.approx(micro)
    assert found.metrics[MACRO].value == pytest.approx(macro)


def test_a_title_is_in_one_fold_and_folds_are_even():
    groups = np.random.default_rng(4).integers(0, 30, 1000)
    folds = title_folds(groups, 5, seed=1)
    for title in range(30):
        assert len(set(folds[groups == title].tolist())) == 1
    sizes = np.bincount(folds)
    assert len(sizes) == 5
    assert sizes.max() < 1.3 * sizes.min()
    assert (title_folds(groups, 5, seed=1) == folds).all()
    assert (title_folds(groups, 5, seed=2) != folds).any()
    assert np.bincount(title_folds(np.array([7, 7, 9]), 5, seed=0)).tolist() in ([2, 1], [1, 2])


def test_numbers_depend_on_the_seed_alone_and_not_on_the_features_rotation():
    features, labels, groups = planted(5)
    first = evaluate(features, labels, groups, "noise", QUICK)
    assert evaluate(features, labels, groups, "noise", QUICK) == first
    assert evaluate(features, labels, groups, "noise", dataclasses.replace(QUICK, seed=9)) != first
    rotation, _ = np.linalg.qr(np.random.default_rng(6).normal(size=(DIM, DIM)))
    wide = np.pad(features["signal"] @ rotation * 7, ((0, 0), (0, 500)))  # more dimensions than clips
    again = evaluate({"signal": wide.astype(np.float32), "noise": features["noise"]}, labels, groups, "noise", QUICK)
    assert again["signal"].metrics[MACRO].value == pytest.approx(first["signal"].metrics[MACRO].value, abs=1e-3)


def test_labels_come_as_columns_names_or_scores():
    flags = labels_of({"a": [1, 0, 1], "b": [True, False, False]})
    assert flags.names == ("a", "b")
    assert flags.values_NL.tolist() == [[True, True], [False, False], [True, False]]
    names = labels_of({"genre": ["drama; comedy", "drama", ""]})
    assert names.names == ("comedy", "drama")
    assert names.values_NL.tolist() == [[True, True], [False, True], [False, False]]
    assert labels_of({"genre": [["x"], ["x", "y"], []]}).values_NL.tolist() == [[True, False], [True, True], [False, False]]
    score = labels_of({"views": [3, 1, 2]})
    assert score.is_ranking
    assert score.values_NL.tolist() == [[3.0], [1.0], [2.0]]
    for columns, reason in (
        ({}, "these are: none"),
        ({"a": ["x", "y"], "b": [1, 0]}, r"these are: a \(str\), b \(int\)"),
        ({"a": [0.5, 0.1], "b": [1, 0]}, "these are"),
        ({"a": [1, None]}, "a is empty in row 2"),
        ({"a": [1.5, float("nan")]}, "a is empty in row 2"),
        ({"a": [1.5, float("inf")]}, "a is not finite in row 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            labels_of(columns)


def test_labels_that_cannot_be_learned_are_said():
    groups = np.array([0, 0, 1, 1, 2, 2])
    columns = {"good": [1, 0, 1, 0, 0, 1], "all": [1] * 6, "none": [0] * 6, "local": [1, 1, 0, 0, 0, 0]}
    labels, left_out = learnable(labels_of(columns), groups)
    assert labels.names == ("good",)
    assert [line.split(":")[0] for line in left_out] == ["all", "none", "local"]
    assert "every clip has it" in left_out[0]
    assert "one title" in left_out[2]
    with pytest.raises(ValueError, match="one class only, every clip has it"):
        learnable(labels_of({"all": [1] * 6}), groups)
    with pytest.raises(ValueError, match="every clip has the score 3"):
        learnable(labels_of({"score": [3.0] * 6}), groups)
    with pytest.raises(ValueError, match="all 6 clips are of one title"):
        learnable(labels_of({"good": columns["good"]}), np.zeros(6, np.int64))


def test_the_table_and_the_json_say_the_same():
    features, labels, groups = planted(7)
    results = evaluate(features, labels, groups, "noise", QUICK)
    table = describe(results, labels, "noise")
    content = json.loads(json.dumps(as_json(results), allow_nan=False))
    for name in features:
        value = content[name]["metrics"][MACRO]
        assert f"{value['value']:.3f} [{value['interval'][0]:.3f}, {value['interval'][1]:.3f}]" in table
    assert f"{chance(labels)[MICRO]:.3f}" in table.splitlines()[-1]


def test_chance_is_what_features_without_information_reach():
    labels = planted(8)[1]
    nothing = {"nothing": np.ones((CLIPS, 3), np.float32)}
    reached = evaluate(nothing, labels, np.arange(CLIPS) % TITLES, "nothing", QUICK)["nothing"].metrics
    for metric, value in chance(labels).items():
        assert reached[metric].value == pytest.approx(value, abs=0.06)  # intercepts are fitted to a tolerance: folds differ a little


def test_options_without_sense_are_refused():
    for wrong in ({"folds": 1}, {"repeats": 0}, {"bootstrap": 0}, {"strengths": []}, {"strengths": [0.0]}):
        with pytest.raises(ValueError, match="must "):
            ProbesConfig(**wrong)
