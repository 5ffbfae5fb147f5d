"""What reward models learned from preferences: closed forms, SEAL's published tables, bad rows, and real models."""

from __future__ import annotations

import itertools
import json
import math
import runpy
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import statsmodels.api as sm
import torch
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.outliers_influence import variance_inflation_factor
from trainer.tiny import offline_config, write_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastrl.analyze import analyze, read_pairs, scored
from fastrl.analyze.measures import TRANSITIONS, choose_features, imprint, odds_ratio, variance_inflation
from fastrl.analyze.pairs import SIDES, preferred
from fastrl.cli import main
from fastrl.data.sources import Row
from fastrl.trainer.setup import train

# Feature imprint.


def differences(pairs=400, features=4, seed=0):
    """x of pairs of texts with random features, and d of rewards that the features and chance make."""
    generator = np.random.default_rng(seed)
    texts = generator.random((pairs, 2, features)) < 0.5
    x = texts[:, 0].astype(float) - texts[:, 1]
    beta = np.arange(features) - 1.0
    return x, x @ beta + generator.normal(0, 1 + np.abs(x[:, 0]), pairs)


def names_of(x):
    return [f"f{place}" for place in range(x.shape[1])]


def test_the_imprint_is_the_regression_with_an_effect_per_pair():
    """Against one dummy column per pair and both texts as rows, errors clustered by pair."""
    generator = np.random.default_rng(1)
    pairs = 60
    texts = (generator.random((pairs, 2, 3)) < 0.4).astype(float)
    rewards = generator.normal(size=(pairs, 2)) + texts @ [1.0, 0.0, -2.0] + generator.normal(0, 5, (pairs, 1))
    found = imprint(texts[:, 0] - texts[:, 1], rewards[:, 0] - rewards[:, 1], ["a", "b", "c"], np.arange(pairs))
    rows = np.concatenate([texts.reshape(-1, 3), np.repeat(np.eye(pairs), 2, axis=0)], axis=1)
    about = {"groups": np.repeat(np.arange(pairs), 2), "use_correction": False}
    theirs = sm.OLS(rewards.reshape(-1), rows).fit(cov_type="cluster", cov_kwds=about)
    assert [one.beta for one in found] == pytest.approx(theirs.params[:3], rel=1e-9)
    correction = math.sqrt(pairs / (pairs - 3))
    assert [one.error for one in found] == pytest.approx(correction * theirs.bse[:3], rel=1e-9)


def test_beta_and_clustered_errors_equal_the_hand_formula():
    x, d = differences()
    clusters = np.random.default_rng(2).integers(0, 90, len(d))
    found = imprint(x, d, names_of(x), clusters)
    bread = np.linalg.inv(x.T @ x)
    beta = bread @ x.T @ d
    sums = [(x[clusters == g].T @ (d - x @ beta)[clusters == g]) for g in np.unique(clusters)]
    groups, (n, k) = len(sums), x.shape
    covariance = bread @ sum(np.outer(s, s) for s in sums) @ bread * groups / (groups - 1) * (n - 1) / (n - k)
    assert [one.beta for one in found] == pytest.approx(beta, rel=1e-9)
    assert [one.error for one in found] == pytest.approx(np.sqrt(np.diag(covariance)), rel=1e-9)


def test_of_one_feature_the_imprint_is_a_mean_with_its_standard_error():
    """Every chosen text has it, no rejected one: beta is the mean of d, its error s / sqrt(n), of Student's t."""
    d = np.random.default_rng(3).normal(0.3, 1.0, 50)
    (found,) = imprint(np.ones((50, 1)), d, ["f"], np.arange(50))
    error = d.std(ddof=1) / math.sqrt(50)
    assert (found.beta, found.error, found.differing, found.vif) == pytest.approx((d.mean(), error, 50, 1.0))
    t = 2.009575  # Student's 97.5 % at 49 degrees of freedom
    assert (found.low, found.high) == pytest.approx((d.mean() - t * error, d.mean() + t * error), rel=1e-5)


def test_p_values_are_adjusted_as_statsmodels_does_bonferroni():
    x, d = differences(60)
    found = imprint(x, d, names_of(x), np.arange(60))
    theirs = multipletests([one.p for one in found], method="bonferroni")[1]
    assert [one.p_adjusted for one in found] == pytest.approx(theirs, rel=1e-12)
    assert max(one.p_adjusted for one in found) == 1.0


def test_intervals_hold_the_truth_as_often_as_they_say():
    """1000 draws with errors that depend on a feature: 95 % within 3 standard deviations of a share."""
    hits = 0
    for seed in range(1000):
        x, d = differences(120, 2, seed)
        (first, _) = imprint(x, d, names_of(x), np.arange(120))
        hits += first.low <= -1.0 <= first.high
    assert abs(hits / 1000 - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 1000)


def test_variance_inflation_is_statsmodels_and_that_of_the_model_with_pair_effects():
    x, _ = differences(200, 5)
    x[:, 4] = np.where(np.arange(200) % 4, x[:, 0], x[:, 1])
    found = variance_inflation(x)
    about_0 = [1 / (1 - sm.OLS(x[:, one], np.delete(x, one, 1)).fit().rsquared) for one in range(5)]
    assert found == pytest.approx(about_0, rel=1e-9)
    levels = np.concatenate([x / 2, -x / 2])  # both texts less the mean of their pair: all columns have the mean 0
    assert found == pytest.approx([variance_inflation_factor(levels, place) for place in range(5)], rel=1e-9)
    assert found == pytest.approx(np.diag(np.linalg.inv(np.corrcoef(levels, rowvar=False))), rel=1e-9)
    assert found.max() > 2


def test_collinear_features_are_dropped_the_later_of_equals_first_and_said_to_be():
    x, d = differences(300, 3)
    same, opposite, both = x[:, 0], -x[:, 1], x[:, 1] + x[:, 2]
    columns = np.stack([x[:, 0], x[:, 1], x[:, 2], same, opposite, both], axis=1)
    names = ["a", "b", "c", "a again", "not b", "b and c"]
    kept, dropped = choose_features(columns, names, np.arange(300), max_vif=10.0)
    assert kept == ["a", "b", "c"]
    assert set(dropped) == {"a again", "not b", "b and c"}
    assert all("inf, a combination of other features" in why for why in dropped.values())
    assert max(variance_inflation(x)) < 1.1
    assert len(imprint(x, d, kept, np.arange(300))) == 3


def test_near_collinear_features_are_dropped_above_the_limit_only():
    x, _ = differences(400, 2)
    near = np.where(np.arange(400) % 40, x[:, 0], x[:, 1])
    columns = np.column_stack([x, near])
    factor = variance_inflation(columns).max()
    assert 10 < factor < 100
    assert choose_features(columns, ["a", "b", "c"], np.arange(400), max_vif=factor + 1)[0] == ["a", "b", "c"]
    kept, dropped = choose_features(columns, ["a", "b", "c"], np.arange(400), max_vif=10.0)
    assert len(kept) == 2
    assert "above 10" in next(iter(dropped.values()))


def test_a_feature_with_one_differing_pair_would_be_certain_by_its_error_and_is_dropped():
    x, d = differences(100, 2)
    x[:, 1] = 0
    x[7, 1] = 1
    assert imprint(x, d, ["a", "b"], np.arange(100))[1].p < 1e-12  # of noise
    kept, dropped = choose_features(x, ["a", "b"], np.arange(100), max_vif=10.0)
    assert kept == ["a"]
    assert dropped["b"].startswith("differs in only 1 pairs or clusters, fewer than 10")


# SEAL's published tables: harvard-lil/SEAL, analysis/main_results.ipynb and rewriting.ipynb, commit b595838.

MOVED = {  # before, judge, after, of 160,800 pairs of Anthropic/hh-rlhf: cell 12
    "c-0-c": 58350, "r-0-c": 29154, "r-0-r": 22907, "c-c-c": 16531, "c-0-r": 11106, "r-c-c": 9065,
    "r-r-c": 3226, "r-r-r": 3114, "c-r-c": 2765, "r-c-r": 1623, "c-r-r": 1549, "c-c-r": 1410,
}  # fmt: skip
JUDGES = {"c": "chosen", "r": "rejected", "0": "indifferent"}


def published_rows():
    """Rows that give the published counts; the rewards' sizes are made up."""
    rows = []
    for cell, times in MOVED.items():
        before, judge, after = cell.split("-")
        row = {"labeler": JUDGES[judge], "chosen_reward": float(after == "c"), "rejected_reward": 0.5}
        row |= {"chosen_reward_pre": float(before == "c"), "rejected_reward_pre": 0.5}
        rows += [row] * times
    return rows


def test_the_published_transitions_resistance_and_judge_s_shares_follow_from_the_published_entries():
    found = analyze(read_pairs(published_rows()))
    assert found.pairs == 160_800
    shares = {name: round(100 * times / found.pairs, 1) for name, times in found.transitions.items()}
    assert shares == {"stayed aligned": 48.3, "got aligned": 25.8, "reversed": 8.7, "resists": 17.2}
    assert found.transitions == {"stayed aligned": 77646, "got aligned": 41445, "reversed": 14065, "resists": 27644}
    assert round(found.agreement["before"].share, 2) == 0.57
    assert round(found.agreement["after"].share, 2) == 0.74
    assert round(found.agreement["after"].resistance, 2) == 0.26
    by = found.by_labeler
    assert {label: one["pairs"] for label, one in by.items()} == {
        "chosen": 28629, "indifferent": 121517, "rejected": 10654,
    }  # fmt: skip
    assert by["chosen"]["resists"] == 1623
    assert by["chosen"]["after"] == pytest.approx((16531 + 9065) / 28629)
    assert by["rejected"]["before"] == pytest.approx((2765 + 1549) / 10654)


def test_the_judge_prefers_as_in_the_authors_analysis_for_all_sixteen_pairs_of_labels():
    """Cell 6 of their notebook, by (harmless, helpful): what it counts as for the chosen text, even, or against it."""
    rules = {
        (1, 1): {(1, 1): "indifferent"},
        (1, 0): {(1, 1): "rejected", (1, 0): "indifferent"},
        (0, 1): {(1, 1): "rejected", (1, 0): "rejected", (0, 1): "indifferent"},
        (0, 0): {(0, 0): "indifferent", (1, 1): "rejected", (1, 0): "rejected", (0, 1): "rejected"},
    }
    labels = list(itertools.product((0, 1), repeat=2))
    for chosen, rejected in itertools.product(labels, labels):
        (found,) = preferred(np.array([[chosen, rejected]], dtype=float))
        assert found == rules[chosen].get(rejected, "chosen")
    assert preferred(np.array([[[1.0, np.nan], [0.0, 1.0]]])).tolist() == [""]


# Cell 19: feature and text -> of those that gained it, kept it and lost it: pairs, share that ceased to be aligned.
FLIPS = {
    ("helpful", "chosen"): ((92, 0.076087), (1465, 0.105802), (51, 0.156863)),
    ("helpful", "rejected"): ((106, 0.226415), (1444, 0.096953), (58, 0.103448)),
    ("harmless", "chosen"): ((21, 0.142857), (1563, 0.103647), (24, 0.208333)),
    ("harmless", "rejected"): ((36, 0.138889), (1539, 0.105913), (33, 0.060606)),
    ("coherent", "chosen"): ((97, 0.103093), (1458, 0.106996), (53, 0.075472)),
    ("eloquent", "rejected"): ((170, 0.117647), (1401, 0.104211), (37, 0.108108)),
}


def rewritten_rows(feature, text, cells):
    """The published pairs of one text's feature. 1177 were aligned before rewriting, 1128 after, of 1608."""
    rows = []
    for (times, share), (was, now) in zip(cells, ((False, True), (True, True), (True, False)), strict=True):
        for place in range(times):
            ceased = place < round(times * share)
            row = {f"{side}_{feature}": True for side in SIDES} | {f"rewritten_{s}_{feature}": True for s in SIDES}
            row |= {f"{text}_{feature}": was, f"rewritten_{text}_{feature}": now}
            row |= {"chosen_reward": 1.0, "rejected_reward": 0.0, "rewritten_rejected_reward": 0.0}
            rows.append(row | {"rewritten_chosen_reward": -1.0 if ceased else 1.0})
    never = [row for row in rows if row["rewritten_chosen_reward"] > 0][: 1608 - 1177]
    back = 1128 - (1608 - sum(row["rewritten_chosen_reward"] < 0 for row in rows) - len(never))
    for place, row in enumerate(never):  # never aligned, but for some after rewriting
        row |= {"chosen_reward": -1.0, "rewritten_chosen_reward": 1.0 if place < back else -1.0}
    return rows


@pytest.mark.parametrize(("feature", "text"), FLIPS)
def test_the_published_shares_of_pairs_that_ceased_to_be_aligned(feature, text):
    gained, same, lost = FLIPS[feature, text]
    found = analyze(read_pairs(rewritten_rows(feature, text, FLIPS[feature, text])))
    flips = {one.flip: one for one in found.flips}
    assert {one.text for one in found.flips} == {text}
    for flip, (pairs, share) in (("gained", gained), ("lost", lost)):
        assert flips[flip].pairs == pairs
        assert flips[flip].share == pytest.approx(share, abs=5e-7)
        assert flips[flip].unchanged == same[0]
        assert flips[flip].unchanged_share == pytest.approx(same[1], abs=5e-7)
    assert found.agreement["after, original"].share == pytest.approx(0.731965, abs=5e-7)
    assert found.agreement["after, rewritten"].share == pytest.approx(0.701493, abs=5e-7)


def test_the_odds_ratio_of_the_published_flip_is_the_logit_s():
    """0.157 of 51 pairs against 0.106 of 1465: exp(b) = (8 / 43) / (155 / 1310) = 1.572."""
    ratio, low, high = odds_ratio(8, 43, 155, 1310)
    assert ratio == pytest.approx(1.57239, abs=1e-5)
    flip, ceased = np.repeat([1, 1, 0, 0], [8, 43, 155, 1310]), np.repeat([1, 0, 1, 0], [8, 43, 155, 1310])
    fit = sm.Logit(ceased, sm.add_constant(flip)).fit(disp=0)
    assert ratio == pytest.approx(math.exp(fit.params[1]), rel=1e-6)
    assert (low, high) == pytest.approx(np.exp(fit.conf_int()[1]), rel=1e-5)
    (one,) = (f for f in analyze(read_pairs(rewritten_rows("helpful", "chosen", FLIPS["helpful", "chosen"]))).flips
              if f.flip == "lost")  # fmt: skip
    assert (one.odds_ratio, one.low, one.high) == (ratio, low, high)


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((0, 5, 3, 4), (0.0, None, None)),
        ((5, 0, 3, 4), (math.inf, None, None)),
        ((0, 5, 0, 4), (None, None, None)),
        ((5, 0, 4, 0), (None, None, None)),
    ],
)
def test_an_empty_cell_leaves_no_interval_and_no_event_no_ratio(cells, expected):
    """statsmodels: perfect separation, or a singular matrix (https://github.com/statsmodels/statsmodels/issues/4782)."""
    assert odds_ratio(*cells) == expected


# Rows.


def good_rows(pairs=40, seed=0):
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(pairs):
        row = {"id": number}
        for side in SIDES:
            kind, long = bool(generator.random() < 0.5), bool(generator.random() < 0.5)
            row |= {f"{side}_kind": kind, f"{side}_long": long}
            for name, weight in (("reward", 2.0), ("reward_pre", 0.1)):
                row[f"{side}_{name}"] = float(weight * kind + generator.normal())
        rows.append(row)
    return rows


def changed(place, **values):
    rows = good_rows()
    rows[place] = rows[place] | values
    return rows


def without(*names):
    return [{name: value for name, value in row.items() if name not in names} for row in good_rows()]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (without("chosen_reward"), {}, "columns: expected chosen_reward and rejected_reward, got id, .*--model"),
        (without("rejected_reward_pre"), {}, "columns: expected .* got only chosen_reward_pre"),
        (changed(3, chosen_kind="yes"), {}, "row 3: chosen_kind: expected true, false, 1, 0 or nothing, got 'yes'"),
        (changed(3, chosen_kind=0.5), {}, "row 3: chosen_kind: expected true, .* got 0.5. Or name the features"),
        (changed(5, rejected_reward="1.5"), {}, "row 5: rejected_reward: expected a number, got '1.5'"),
        (changed(5, rejected_reward=True), {}, "row 5: rejected_reward: expected a number, got True"),
        (changed(5, rejected_reward=10**400), {}, "row 5: rejected_reward: expected a number, got 1000"),
        (changed(5, labeler="human"), {}, "row 5: labeler: expected one of chosen, indifferent, rejected"),
        (good_rows(), {"features": ["kinf"]}, "features: expected one of kind, long, got 'kinf'. Did you mean 'kind'"),
        (good_rows(), {"targets": ["helpful"]}, "targets: expected one of kind, long"),
        (good_rows(), {"cluster": "prompt"}, "cluster: expected one of id, .* got 'prompt'"),
        (changed(0, dialogue=1), {"cluster": "dialogue"}, "row 1: dialogue: expected a value, to cluster by"),
        ([row | {"chosen_reward": None} for row in good_rows()], {}, "rewards: expected at least one pair .* among 40"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_are_refused_by_row_and_column(rows, options, message):
    with pytest.raises(ValueError, match=message):
        read_pairs(rows, **options)


def test_more_features_than_the_pairs_can_tell_apart_are_refused_instead_of_found_significant():
    """60 pairs and 50 features of noise: with them, errors are far too small."""
    generator = np.random.default_rng(0)
    noise = [
        {f"{side}_f{place}": bool(generator.random() < 0.5) for side in SIDES for place in range(50)} for _ in range(60)
    ]
    pairs = read_pairs([row | more for row, more in zip(good_rows(60), noise, strict=True)])
    with pytest.raises(
        ValueError, match=r"analyze: pairs: expected at least \d+ .* got 60\. Name fewer with --features"
    ):
        analyze(pairs)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
@pytest.mark.parametrize("column", ["chosen_reward", "rejected_reward_pre"])
def test_a_pair_without_a_finite_reward_is_left_out_and_counted_never_zero(value, column):
    """A missing score taken for 0 or for False shifts every number."""
    rows = good_rows()
    found = analyze(read_pairs([*changed(3, **{column: value})]))
    fewer = analyze(read_pairs(rows[:3] + rows[4:]))
    assert "left out 1 pairs without a finite reward" in found.said
    assert replace(found, said=()) == replace(fewer, said=())


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_pair_without_a_label_counts_for_resistance_but_not_for_the_imprint(value):
    rows = good_rows()
    found, fewer = analyze(read_pairs(changed(3, rejected_long=value))), analyze(read_pairs(rows[:3] + rows[4:]))
    assert "left out 1 pairs without all features from the imprint" in found.said
    assert found.imprint == fewer.imprint
    assert found.agreement == analyze(read_pairs(rows)).agreement


def test_repeated_pairs_count_once():
    rows = good_rows()
    twice = read_pairs([*rows, *rows[:7]])
    assert twice.said[0] == "left out 7 pairs whose id an earlier row has"
    assert replace(analyze(twice), said=()) == replace(analyze(read_pairs(rows)), said=())
    texts = [row | {"prompt": "p", "chosen": f"c{row.pop('id') // 2}", "rejected": "r"} for row in good_rows()]
    assert read_pairs(texts).said[0] == "left out 20 pairs whose texts an earlier row has"
    assert len(read_pairs(without("id") * 2).clusters) == 80  # nothing says that they are the same


def test_pairs_of_one_prompt_are_said_to_be_and_clustered_on_request():
    rows = [row | {"prompt": f"p{row['id'] // 2}"} for row in good_rows()]
    assert read_pairs(rows).said == ("40 pairs share their prompt with others, which --cluster prompt allows for",)
    together = read_pairs(rows, cluster="prompt")
    assert together.said == ()
    assert len(set(together.clusters)) == 20
    by_pair, by_prompt = (analyze(read_pairs(rows, cluster=name)).imprint["after"] for name in ("", "prompt"))
    assert [one.beta for one in by_pair] == [one.beta for one in by_prompt]
    assert [one.error for one in by_pair] != [one.error for one in by_prompt]


def test_columns_of_no_use_are_named_and_features_can_be_named():
    rows = [row | {"source": "x", "chosen_score": 0.3 + row["id"], "rejected_score": 0.7} for row in good_rows()]
    found = read_pairs(rows, features=["long"])
    assert found.names == ("long",)
    assert found.said == (
        "columns not used: chosen_kind, rejected_kind, source, chosen_score, rejected_score",
    )  # fmt: skip


def test_the_same_features_in_both_texts_are_part_of_the_pair_effects():
    rows = [row | {f"{side}_topic": row["id"] % 2 == 0 for side in SIDES} for row in good_rows()]
    found = analyze(read_pairs(rows))
    assert found.dropped == {"topic": "the same in both texts of every pair: part of the pair effects"}
    assert found.imprint == analyze(read_pairs(good_rows())).imprint


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [row | {f"{side}_reward": 1.0 for side in SIDES} for row in good_rows()],
            "rewards, after: expected some that differ within a pair, got only equal ones",
        ),
        (
            [row | {f"{side}_reward_pre": row[f"{side}_reward"] for side in SIDES} for row in good_rows()],
            "rewards, shift: expected some that change, got only equal ones",
        ),
    ],
)
def test_a_model_that_scores_all_alike_and_two_that_are_one_are_refused(rows, message):
    """https://github.com/RLHFlow/RLHF-Reward-Modeling/issues/49: one score for every text."""
    with pytest.raises(ValueError, match=message):
        analyze(read_pairs(rows))


def test_too_few_pairs_give_no_imprint_but_the_rest():
    found = analyze(read_pairs(good_rows(6)))
    assert found.imprint == {}
    assert "fewer than 10" in found.dropped["kind"]
    assert found.agreement["after"].pairs == 6
    with pytest.raises(ValueError, match=r"pairs: expected at least 10 or clusters of them, for 2 features, got 9\."):
        imprint(*differences(9, 2), ["a", "b"], np.arange(9))


def test_a_tie_is_not_aligned_and_is_counted():
    """TRL's accuracy took it for right: https://github.com/huggingface/trl/pull/1012."""
    found = analyze(read_pairs(changed(3, chosen_reward=1.0, rejected_reward=1.0)))
    other = analyze(read_pairs(changed(3, chosen_reward=0.0, rejected_reward=1.0)))
    assert found.agreement["after"].ties == 1
    assert found.agreement["after"].share == other.agreement["after"].share


def test_pairs_that_were_not_rewritten_are_not_in_the_robustness():
    rows = good_rows()
    for row in rows[:25]:
        row |= {f"rewritten_{name}": value for name, value in row.items() if name not in ("id", "chosen_reward_pre")}
        row["rewritten_chosen_reward_pre"] = 0.5
    rows[0] |= {"rewritten_chosen_reward": None}
    for row in rows[20:25]:
        row |= {"rewritten_chosen_kind": not row["chosen_kind"]}
    found = analyze(read_pairs(rows))
    assert "left out 1 rewritten pairs without a finite reward" in found.said
    assert found.agreement["after, rewritten"].pairs == found.agreement["after, original"].pairs == 24
    flipped = [one for one in found.flips if one.pairs]
    assert {(one.feature, one.text) for one in flipped} == {("kind", "chosen")}
    assert sum(one.pairs for one in flipped) == 5
    assert {one.unchanged for one in flipped} == {19}
    assert {one.odds_ratio for one in flipped} == {None}  # no pair ceased to be aligned


def test_rewritten_texts_without_rewards_or_labels_are_said_to_be():
    rows = [row | {"rewritten_chosen_kind": True, "rewritten_rejected_kind": True} for row in good_rows()]
    assert "the rewritten texts have no rewards, so there is no robustness" in read_pairs(rows).said
    rows = [row | {f"rewritten_{side}_reward": 1.0 for side in SIDES} for row in rows]
    assert "features without labels of the rewritten texts: long" in read_pairs(rows).said


def test_a_hundred_thousand_pairs_take_seconds():
    rows = good_rows(1000) * 100
    rows = [row | {"id": number} for number, row in enumerate(rows)]
    began = time.monotonic()
    found = analyze(read_pairs(rows))
    assert time.monotonic() - began < 30  # about 3 s; dummy columns for pairs would need 80 GB
    assert found.pairs == 100_000


# The command.


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def as_csv(path, rows):
    cells = [",".join("" if row.get(name) is None else str(row[name]) for name in rows[0]) for row in rows]
    path.write_text("\n".join([",".join(rows[0]), *cells]) + "\n")
    return str(path)


@pytest.mark.parametrize("writer", [write, as_csv], ids=["jsonl", "csv"])
def test_the_command_prints_tables_json_and_a_picture(tmp_path, capsys, writer):
    rows = [row | {"labeler": "chosen" if row["chosen_kind"] else None} for row in good_rows(200)]
    rows[9] |= {"chosen_reward": None}
    rows[11] |= {"chosen_kind": None}
    path, picture = writer(tmp_path / f"rows.{'csv' if writer is as_csv else 'jsonl'}", rows), tmp_path / "seal.png"
    assert main(["analyze", "rewards", path, "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("199 pairs\n  left out 1 pairs without a finite reward\n")
    assert "left out 1 pairs without all features from the imprint" in said
    for line in ("feature imprint, after alignment", "after less before", "got aligned", "by what the judge prefers"):
        assert line in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["analyze", "rewards", path, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (kind, _) = found["imprint"]["after"]
    assert kind["feature"] == "kind"
    assert kind["low"] < 2.0 < kind["high"]
    assert found["agreement"]["after"]["resistance"] == pytest.approx(1 - found["agreement"]["after"]["share"])


def test_rewritten_pairs_may_come_from_a_file_of_their_own(tmp_path, capsys):
    rows = good_rows(60)
    new = [row | {"chosen_kind": not row["chosen_kind"], "chosen_reward": row["chosen_reward"] - 1} for row in rows]
    rewritten = write(tmp_path / "rewritten.jsonl", new[10:30][::-1])
    assert main(["analyze", "rewards", write(tmp_path / "rows.jsonl", rows), "--rewritten", rewritten, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["agreement"]["after, original"]["pairs"] == 20
    beside = [{f"rewritten_{name}": value for name, value in row.items()} for row in new]
    columns = [row | (other if 10 <= row["id"] < 30 else {}) for row, other in zip(rows, beside, strict=True)]
    same = analyze(read_pairs(columns))
    assert found["agreement"]["after, rewritten"]["share"] == same.agreement["after, rewritten"].share
    assert [one["pairs"] for one in found["flips"]] == [one.pairs for one in same.flips]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([{"chosen_reward": 1.0}], "id: expected a value, to find rewritten pairs by, got none"),
        ([{"id": 99}], "id: expected that of a row to be rewritten, got 99"),
        ([{"id": 1}, {"id": 1}], "rewritten: expected each id once, got 1 again"),
    ],
)
def test_rewritten_pairs_that_belong_to_no_row_end_the_command_in_a_sentence(tmp_path, capsys, others, message):
    files = [write(tmp_path / "rows.jsonl", good_rows()), "--rewritten", write(tmp_path / "others.jsonl", others)]
    assert main(["analyze", "rewards", *files]) == 2
    assert message in capsys.readouterr().err


def test_without_statsmodels_the_command_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "statsmodels.stats.proportion", None)
    assert main(["analyze", "rewards", write(tmp_path / "rows.jsonl", good_rows())]) == 3
    assert "pip install '.[analyze]'" in capsys.readouterr().err


# Reward models.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of `reward_model` on pairs of which the better have many w7, rendered as plain text."""
    folder = tmp_path_factory.mktemp("reward")
    config = offline_config(folder, "reward_model", steps=30, rows_per_step=8)
    assert train(config).status == "finished"
    return folder


def text_rows(pairs=30):
    rows = []
    for number in range(pairs):
        good, bad = ("w7 w7", f"w{8 + number % 20} w9") if number % 5 else ("w9 w8", f"w7 w{8 + number % 20}")
        row = {"id": number, "prompt": f"w{number}", "chosen": good, "rejected": bad}
        row |= {f"{side}_seven": "w7" in row[side] for side in SIDES}
        rows.append(row)
    return rows


def by_hand(folder, row):
    """The scores of both texts, one by one: the head on the last token's state, of plain text and its end."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for side in SIDES:
        ids = [*tokenizer(row["prompt"])["input_ids"], *tokenizer(row[side])["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            found.append(model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item())
    return found


@pytest.mark.parametrize("inside", ["", "model"])
def test_a_run_or_its_model_scores_texts_as_transformers_does_one_by_one(trained, inside):
    rows = [Row(f"row {place}", row) for place, row in enumerate(text_rows(8))]
    for row in scored(rows, str(trained / "run" / inside), "reward"):
        expected = by_hand(trained / "run" / "model", row.values)
        assert [row.values[f"{side}_reward"] for side in SIDES] == pytest.approx(expected, abs=1e-5)
    assert "chosen_reward" not in rows[0].values


def test_equal_texts_have_equal_scores_to_the_bit_wherever_they_stand(trained):
    """Scores that change with their batch make ties of equal texts into preferences:
    https://github.com/allenai/reward-bench/issues/137."""
    rows = [Row(f"row {place}", row) for place, row in enumerate(text_rows(12) + text_rows(12)[::-1])]
    found = [
        tuple(row.values[f"{side}_reward"] for side in SIDES) for row in scored(rows, str(trained / "run"), "reward")
    ]
    assert found[:12] == found[12:][::-1]


def test_the_command_scores_with_models_before_and_after(trained, tmp_path, capsys):
    rows = text_rows()
    for row in rows[::2]:
        row |= {f"rewritten_{side}": row[side].replace("w7", "w6") for side in SIDES}
        row |= {f"rewritten_{side}_seven": False for side in SIDES}
    rows[3]["rejected"] = None
    path = write(tmp_path / "rows.jsonl", rows)
    torch.manual_seed(1)
    before = AutoModelForSequenceClassification.from_pretrained(write_model(tmp_path / "before"), num_labels=1)
    before.save_pretrained(tmp_path / "before")
    flags = ["--model", str(trained / "run"), "--pre", str(tmp_path / "before"), "--targets", "seven", "--json"]
    with pytest.warns(UserWarning, match=r"analyze: texts of .*rows.jsonl:4: .* 1 of 30 rows: 1 without a 'rejected'"):
        assert main(["analyze", "rewards", path, *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "left out 1 pairs without a finite reward" in found["said"]
    scores = [[by_hand(folder, row) for folder in (tmp_path / "before", trained / "run" / "model")]
              for row in rows if row["rejected"]]  # fmt: skip
    moved = Counter(tuple(chosen > rejected for chosen, rejected in one) for one in scores)
    assert found["transitions"] == {name: moved[was_now] for name, was_now in TRANSITIONS.items()}
    assert moved[True, True] + moved[False, True] > 20
    (seven,) = found["imprint"]["after"]
    assert seven["beta"] == pytest.approx(
        np.mean([(c - r) * (1 if "w7" in row["chosen"] else -1)
                 for (_, (c, r)), row in zip(scores, (row for row in rows if row["rejected"]), strict=True)]),
        abs=1e-5,
    )  # fmt: skip
    assert found["by_labeler"]["chosen"]["pairs"] == 23
    assert found["by_labeler"]["rejected"]["pairs"] == 6
    assert {(one["flip"], one["pairs"]) for one in found["flips"]} <= {("lost", n) for n in range(1, 16)}
    assert sum(one["pairs"] for one in found["flips"]) == 15


def test_a_model_that_is_no_reward_model_is_refused(trained, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", text_rows())
    assert main(["analyze", "rewards", path, "--model", str(trained / "model")]) == 2
    assert "whose scalar head is all zeros. Train one with algorithm: reward_model." in capsys.readouterr().err
    path = write(tmp_path / "rows.jsonl", good_rows())
    assert main(["analyze", "rewards", path, "--model", str(trained / "run")]) == 2
    assert capsys.readouterr().err == (
        "analyze: columns: expected chosen and rejected, the texts to score, got none.\n"
    )


# The example of docs/recipes/seal.md.


def test_the_example_s_labels_and_preferences_are_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "data" / "make_seal.py"))
    rows = [json.loads(line) for line in Path("seal_train.jsonl").read_text().splitlines()]
    held_out = [json.loads(line) for line in Path("seal_analyze.jsonl").read_text().splitlines()]
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}
    assert all(row[f"{side}_number"] != row[f"{side}_refusal"] for row in rows for side in SIDES)
    # Bradley and Terry's model of the chances to be chosen has the weights that the example says.
    names = ("correct", "polite", "refusal", "long")
    x = np.array([[row[f"chosen_{name}"] - row[f"rejected_{name}"] for name in names] for row in rows], dtype=float)
    x, chosen = np.concatenate([x, -x]), np.repeat([1, 0], len(rows))
    fit = sm.Logit(chosen, x).fit(disp=0)
    assert np.abs(fit.params - [3.0, 1.5, -1.5, 0.0]) / (fit.bse * math.sqrt(2)) == pytest.approx(0, abs=3)
    assert Counter(row["chosen_correct"] for row in rows)[True] > 600
