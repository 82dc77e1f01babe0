"""Intervals of counts, checked against exact enumeration: no coverage here rests on chance."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from clipbranches_widget import intervals
from clipbranches_widget.intervals import (
    Draw,
    Estimate,
    count_interval,
    melded,
    ratio_interval,
    sum_interval,
)


@st.composite
def samples(draw):
    n_rows = draw(st.integers(1, 60))
    return n_rows, draw(st.integers(0, n_rows))


def clopper_pearson(n_rows, n_drawn, n_yes, level=0.95):
    counts = np.arange(n_yes, n_rows - (n_drawn - n_yes) + 1)
    chances = stats.hypergeom(n_rows, counts, n_drawn)
    kept = counts[
        (chances.sf(n_yes - 1) > (1 - level) / 2) & (chances.cdf(n_yes) > (1 - level) / 2)
    ]
    return kept[0], kept[-1]


@given(samples(), st.sampled_from([0.8, 0.95]))
def test_one_set_is_covered_as_often_as_promised(sample, level):
    n_rows, n_drawn = sample
    limits = [
        count_interval(Draw(n_rows, n_drawn, n_yes), level=level) for n_yes in range(n_drawn + 1)
    ]
    for n_matches in range(n_rows + 1):
        chances = stats.hypergeom(n_rows, n_matches, n_drawn).pmf(np.arange(n_drawn + 1))
        covered = [low <= n_matches <= high for low, high in limits]
        assert chances[covered].sum() >= level - 1e-9


@given(samples(), st.data())
def test_one_set_is_inside_clopper_and_pearson(sample, data):
    n_rows, n_drawn = sample
    n_yes = data.draw(st.integers(0, n_drawn))
    low, high = count_interval(Draw(n_rows, n_drawn, n_yes))
    widest = clopper_pearson(n_rows, n_drawn, n_yes)
    assert widest[0] <= low <= high <= widest[1]
    assert low - 1e-9 <= Draw(n_rows, n_drawn, n_yes).estimate <= high + 1e-9 or not n_drawn


@given(samples(), st.data())
def test_more_certainty_about_other_rows_only_narrows(sample, data):
    n_rows, n_drawn = sample
    n_yes = data.draw(st.integers(0, n_drawn))
    n_unsure = data.draw(st.integers(0, n_drawn - n_yes))
    n_more_yes = data.draw(st.integers(0, n_rows - n_drawn))
    n_more_no = data.draw(st.integers(0, n_rows - n_drawn - n_more_yes))
    draw = Draw(n_rows, n_drawn, n_yes, n_unsure, n_more_yes, n_more_no)
    low, high = count_interval(draw)
    assert draw.least <= low <= high <= draw.most
    as_no = count_interval(Draw(n_rows, n_drawn, n_yes))
    as_yes = count_interval(Draw(n_rows, n_drawn, n_yes + n_unsure))
    assert low == np.clip(as_no[0], draw.least, draw.most)
    assert high == np.clip(as_yes[1], draw.least, draw.most)
    assert np.isnan(draw.estimate) or draw.least <= draw.estimate <= draw.most


@pytest.mark.parametrize("n_yes", [0, 1, 3, 30, 59, 60])
def test_a_grid_of_counts_gives_a_little_more_than_all_counts(monkeypatch, n_yes):
    draw = Draw(20_000, 60, n_yes)
    coarse, coarse_melded = count_interval(draw), ratio_interval(*melded_pair(draw))
    monkeypatch.setattr(intervals, "_ALL_COUNTS_BELOW", 10**6)
    monkeypatch.setattr(intervals, "_N_TRIED", 10**6)
    fine, fine_melded = count_interval(draw), ratio_interval(*melded_pair(draw))
    assert coarse == pytest.approx(fine, abs=0.01 * (fine[1] - fine[0]))
    assert coarse_melded[0] <= fine_melded[0] <= fine_melded[1] <= coarse_melded[1]
    assert fine_melded == pytest.approx(coarse_melded, abs=0.01)


def melded_pair(draw):
    return melded([Draw(500, 20, 16)], [draw])


def test_a_large_set_is_as_the_binomial():
    low, high = count_interval(Draw(10**9, 50, 0))
    assert (low, high / 10**9) == (0, pytest.approx(stats.beta(1, 50).ppf(0.975), abs=0.01))


@pytest.mark.parametrize(
    ("inside", "outside"), [((30, 10), (60, 12)), ((8, 8), (100, 15)), ((50, 6), (20, 20))]
)
def test_melded_ratios_are_covered_as_often_as_promised(inside, outside):
    """Every truth of a lattice, every outcome with its exact chance."""
    outcomes = [(x, y) for x in range(inside[1] + 1) for y in range(outside[1] + 1)]
    limits = np.array([ratio_of((*inside, x), (*outside, y)) for x, y in outcomes])
    for n_hits in range(0, inside[0] + 1, max(inside[0] // 6, 1)):
        for n_missed in range(0, outside[0] + 1, max(outside[0] // 8, 1)):
            truth = n_hits / (n_hits + n_missed) if n_hits + n_missed else 1.0
            chances = np.outer(
                stats.hypergeom(inside[0], n_hits, inside[1]).pmf(np.arange(inside[1] + 1)),
                stats.hypergeom(outside[0], n_missed, outside[1]).pmf(np.arange(outside[1] + 1)),
            ).ravel()
            is_covered = (limits[:, 0] <= truth + 1e-12) & (limits[:, 1] >= truth - 1e-12)
            assert chances[is_covered].sum() >= 0.95


def ratio_of(inside, outside):
    return ratio_interval(*melded([Draw(*inside)], [Draw(*outside)]))


@pytest.mark.parametrize(
    "sets",
    [((100, 7), (100, 4), (2_000, 6)), ((30, 8), (50, 5), (60, 6)), ((300, 5), (900, 7), (900, 3))],
)
def test_melded_ratios_of_three_sets_are_covered_as_often_as_promised(rng, sets):
    """A thousand truths, every outcome with its exact chance."""
    outcomes = np.stack(np.meshgrid(*[np.arange(n + 1) for _, n in sets], indexing="ij"), -1)
    limits = np.apply_along_axis(lambda yes: three_sets(sets, yes), -1, outcomes)
    shares = np.concatenate([rng.random((400, 3)), rng.beta(0.3, 2, (600, 3))])
    shares[rng.random(shares.shape) < 0.2] = 0.0
    for matches in np.round(shares * [size for size, _ in sets]).astype(int):
        truth = matches[0] / matches.sum() if matches.sum() else 1.0
        one, two, three = (
            stats.hypergeom(size, n_yes, n).pmf(np.arange(n + 1))
            for (size, n), n_yes in zip(sets, matches, strict=True)
        )
        chances = one[:, None, None] * two[:, None] * three
        is_covered = (limits[..., 0] <= truth + 1e-12) & (limits[..., 1] >= truth - 1e-12)
        assert chances[is_covered].sum() >= 0.945


def three_sets(sets, yes):
    draws = [Draw(*each, int(n_yes)) for each, n_yes in zip(sets, yes, strict=True)]
    return ratio_interval(*melded(draws[:1], draws[1:]))


def test_melding_one_set_is_clopper_and_pearson():
    parts, _ = melded([Draw(300, 40, 7)], [])
    assert sum_interval(parts) == pytest.approx(clopper_pearson(300, 40, 7), abs=1)


def test_no_match_outside_leaves_complete_recall_possible():
    low, high = ratio_of((50, 20, 15), (100_000, 40, 0))
    assert high == 1.0
    assert 0 < low < 0.05


def test_what_is_known_needs_no_interval():
    assert ratio_of((50, 50, 30), (10, 10, 10)) == (0.75, 0.75)
    assert count_interval(Draw(10, n_more_yes=4, n_more_no=6)) == (4, 4)
    assert ratio_of((0, 0, 0), (10, 10, 0)) == (1.0, 1.0)


def test_nothing_known_is_everything_possible():
    assert count_interval(Draw(10)) == (0, 10)
    assert ratio_of((10, 0, 0), (10, 0, 0)) == (0.0, 1.0)
    assert np.isnan(Draw(10).estimate)


def test_same_samples_same_interval():
    assert ratio_of((900, 20, 15), (9_000, 30, 2)) == ratio_of((900, 20, 15), (9_000, 30, 2))


@pytest.mark.parametrize("numbers", [(5, 6, 0), (5, 3, 4), (5, 3, 1, 3), (5, 3, 1, 0, 2, 1)])
def test_impossible_samples_are_refused(numbers):
    with pytest.raises(ValueError, match="expected a sample that fits in its set"):
        Draw(*numbers)


def test_an_estimate_reads_as_a_share():
    assert str(Estimate(0.824, 0.61, 0.949)) == "82 % (61 % to 95 %)"
    assert str(Estimate(float("nan"), 0.0, 1.0)) == "not known yet (0 % to 100 %)"
    assert Estimate(0.5, 0.25, 0.75).width == 0.5
