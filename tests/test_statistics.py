"""Aggregates against closed forms and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from omrl.evaluation.statistics import bootstrap_means, compare, improvement, intervals, iqm, profile, summarize


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
def test_iqm_is_the_mean_without_the_lowest_and_the_highest_quarter(values):
    cut = len(values) // 4
    kept = sorted(values)[cut : len(values) - cut]
    assert iqm(np.array(values)) == pytest.approx(sum(kept) / len(kept), abs=1e-9)


def test_iqm_ignores_outliers_of_a_quarter_on_each_side():
    assert iqm(np.array([-1e9, 1.0, 2.0, 1e9])) == 1.5


@pytest.mark.parametrize("luck", [0.0, 3.0])
def test_bootstrap_has_the_standard_error_of_whole_seeds_and_tasks(luck):
    """Closed form: with effects of s seeds and n tasks and a rest, v_seeds / s + v_tasks / n + v_rest / (s n)."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(3, 20)) + 2 * rng.normal(size=20) + luck * rng.normal(size=(3, 1))
    found = bootstrap_means(scores, 20_000, np.random.default_rng(1)).std()
    seeds, tasks = (scores.mean(axis, keepdims=True) - scores.mean() for axis in (1, 0))
    rest = scores - scores.mean() - seeds - tasks
    expected = np.sqrt(seeds.var() / 3 + tasks.var() / 20 + rest.var() / 60)
    assert found == pytest.approx(expected, rel=0.02)


def test_one_lucky_model_does_not_support_a_difference():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(3, 20)), rng.normal(size=(3, 20))
    first[0] += 6.0  # one of three models is better on every task
    assert not compare(first, second, 2000, 0.95, np.random.default_rng(1)).supported


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(300):
        summary = summarize(rng.normal(size=(1, 30)), 400, 0.9, rng)
        hits += summary.low <= 0 <= summary.high
    assert 0.84 <= hits / 300 <= 0.94


def test_a_curve_has_the_interval_of_a_table_at_each_of_its_points():
    curve = np.random.default_rng(0).normal(size=(4, 3, 5))
    low, high = intervals(curve, 200, 0.9, np.random.default_rng(1))
    for place, scores in enumerate(curve):
        alone = summarize(scores, 200, 0.9, np.random.default_rng(1))
        assert (low[place], high[place]) == (pytest.approx(alone.low), pytest.approx(alone.high))


def test_summary_of_equal_scores_is_exact():
    summary = summarize(np.full((2, 5), 3.0), 50, 0.95, np.random.default_rng(0))
    assert (summary.mean, summary.iqm, summary.low, summary.high, summary.n) == (3.0, 3.0, 3.0, 3.0, 10)


def test_scores_need_seeds_and_tasks():
    with pytest.raises(ValueError, match=r"expected \[seeds, tasks\]"):
        summarize(np.zeros(3), 10, 0.95, np.random.default_rng(0))


def test_a_paired_comparison_ignores_what_tasks_share():
    rng = np.random.default_rng(0)
    hard = rng.normal(scale=100.0, size=20)
    first, second = (hard + shift + rng.normal(scale=0.1, size=(3, 20)) for shift in (1.0, 0.0))
    found = compare(first, second, 500, 0.95, np.random.default_rng(1))
    assert found.mean == pytest.approx(1.0, abs=0.1)
    assert found.supported
    assert found.high - found.low < 0.2
    assert not compare(first, first, 500, 0.95, np.random.default_rng(1)).supported
    with pytest.raises(ValueError, match="20 and 19 tasks"):
        compare(first, second[:, :19], 500, 0.95, rng)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=30))
def test_the_area_under_a_profile_is_the_mean(values):
    scores = np.array([values])
    levels = np.linspace(0, 2, 20_001)
    found = profile(scores, levels)
    assert (np.diff(found) <= 0).all()
    assert found.mean() * 2 == pytest.approx(scores.mean(), abs=1e-3)


def test_improvement_is_the_mann_whitney_statistic_of_each_task():
    rng = np.random.default_rng(3)
    first, second = rng.integers(0, 4, (5, 3)).astype(float), rng.integers(0, 4, (4, 3)).astype(float)
    expected = np.mean([stats.mannwhitneyu(first[:, t], second[:, t]).statistic / 20 for t in range(3)])
    found = improvement(first, second, 500, 0.9, rng)
    assert found.mean == pytest.approx(expected)
    assert found.low <= found.mean <= found.high
    assert improvement(second, first, 10, 0.9, rng).mean == pytest.approx(1 - expected)


def test_the_interval_of_an_improvement_draws_seeds_of_both_and_tasks():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(4, 15)) + 0.3, rng.normal(size=(3, 15))
    ahead = (first[:, None] > second[None]).astype(float)
    draw = np.random.default_rng(5)
    drawn = (np.ix_(*(draw.integers(n, size=n) for n in ahead.shape)) for _ in range(20_000))
    expected = np.quantile([ahead[index].mean() for index in drawn], [0.05, 0.95])
    found = improvement(first, second, 20_000, 0.9, np.random.default_rng(1))
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=0.02)


def test_a_comparison_draws_the_seeds_of_both():
    still = np.zeros((3, 20))
    loud = still + np.array([[-3.0], [0.0], [3.0]])
    for one, two in ((loud, still), (still, loud)):
        found = compare(one, two, 2000, 0.95, np.random.default_rng(1))
        assert found.high - found.low > 2


def test_a_run_that_is_always_ahead_improves_for_certain_and_other_tasks_are_refused():
    low = np.zeros((2, 4))
    found = improvement(low + 1, low, 50, 0.9, np.random.default_rng(0))
    assert (found.mean, found.low, found.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="expected the same tasks"):
        improvement(low, low[:, :3], 50, 0.9, np.random.default_rng(0))
