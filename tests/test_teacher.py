"""The teacher on its own: what it learns, how it calibrates, when the query counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipbranches_widget.teacher import (
    QUERY_FEATURE_SCALES,
    Teacher,
    _query_feature_scale,
    calibrate,
    fit_teacher,
)

LOGITS = hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-60, 60, width=32))


def rows(rng, n, towards=None, dim=16):
    found = rng.normal(size=(n, dim)) + (0 if towards is None else towards)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(LOGITS, LOGITS)
def test_calibration_keeps_the_order_and_stays_finite(yes, no):
    slope, shift = calibrate(yes, no)
    assert slope > 0
    assert np.isfinite([slope, shift]).all()
    teacher = Teacher(np.ones(2, np.float32), 0.0, slope, shift)
    scores = teacher.score_of(np.sort(np.concatenate([yes, no])))
    assert np.all(np.diff(scores) >= 0)
    assert np.all((scores >= 0) & (scores <= 1))


def test_calibrated_scores_read_as_how_likely_a_yes(rng):
    logits = rng.normal(size=4_000).astype(np.float32) * 3
    is_yes = rng.random(4_000) < 1 / (1 + np.exp(-(0.5 * logits - 1)))
    slope, shift = calibrate(logits[is_yes], logits[~is_yes])
    scores = Teacher(np.ones(2, np.float32), 0.0, slope, shift).score_of(logits)
    for low in np.arange(0.1, 0.9, 0.2):
        inside = (scores >= low) & (scores < low + 0.2)
        assert is_yes[inside].mean() == pytest.approx(scores[inside].mean(), abs=0.1)


def test_the_query_counts_as_far_as_it_tells_yes_from_no():
    least, most = QUERY_FEATURE_SCALES
    good, bad = np.float32([0.9, 0.8, 0.7]), np.float32([0.3, 0.2, 0.1])
    assert _query_feature_scale(good, bad) == most
    assert _query_feature_scale(bad, good) == least
    assert least < _query_feature_scale(good[:1], bad[:0]) < most


def test_a_query_that_beats_the_labels_is_told(rng):
    query = rows(rng, 1)[0]
    background = rows(rng, 500)
    labels = {"background": background, "query": query}
    informative = fit_teacher(
        positives=rows(rng, 12, 3 * query), negatives=rows(rng, 12, -3 * query), **labels
    )
    assert informative.over_query is not None
    assert informative.over_query <= 0
    cluster = rows(rng, 1)[0]
    cluster -= (cluster @ query) * query
    learned = fit_teacher(
        positives=rows(rng, 12, 3 * cluster), negatives=rows(rng, 12, -3 * cluster), **labels
    )
    assert learned.over_query > 0.2
    few = fit_teacher(positives=background[:2], negatives=background[2:9], **labels)
    assert few.over_query is None


def test_a_teacher_survives_json_and_refuses_nonsense():
    teacher = Teacher(np.float32([0.1, -2.5]), 0.25, 1.5, -0.75, 0.125)
    again = Teacher.from_dict(teacher.to_dict())
    assert np.array_equal(again.direction, teacher.direction)
    assert again.to_dict() == teacher.to_dict()
    for name, value, match in [
        ("direction", [float("nan"), 1.0], "direction of finite numbers"),
        ("score_slope", -1.0, "slope above 0"),
        ("over_query", 3.0, "over_query between -1 and 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            Teacher.from_dict({**teacher.to_dict(), name: value})
