"""The teacher on its own: what it learns, how it calibrates, when the query counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipbranches_widget import teacher as teacher_module
from clipbranches_widget.teacher import (
    QUERY_APART,
    QUERY_FEATURE_SCALES,
    Teacher,
    _apart,
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


def unit(vector):
    return (vector / np.linalg.norm(vector)).astype(np.float32)


def lean(teacher, query):
    """Return how far a teacher turns to the query: their cosine."""
    return float(unit(teacher.direction) @ query)


def test_how_far_apart_the_query_lies(rng):
    images = rows(rng, 10, towards=4 * np.eye(16)[0])
    among, beyond = unit(images.mean(axis=0)), np.eye(16, dtype=np.float32)[1]
    pairs = [images[i] @ images[j] for i in range(10) for j in range(10) if i != j]
    assert _apart(beyond, images) == pytest.approx(
        np.mean(pairs) - (images @ beyond).mean(), abs=1e-5
    )
    assert _apart(among, images) < QUERY_APART[0]
    assert _apart(beyond, images) > QUERY_APART[1]


def test_the_query_counts_most_where_it_lies_apart(rng):
    least, most = QUERY_FEATURE_SCALES
    images = rows(rng, 10, towards=4 * np.eye(16)[0])
    among, beyond = unit(images.mean(axis=0)), np.eye(16, dtype=np.float32)[1]
    assert _query_feature_scale(among, images) == pytest.approx(least)
    assert _query_feature_scale(beyond, images) == pytest.approx(most)
    assert _query_feature_scale(among, None) == pytest.approx(most)
    assert _query_feature_scale(among, images[:1]) == pytest.approx(most)


def test_behind_a_modality_gap_the_ranking_turns_more_to_the_query(rng):
    labels = {
        "positives": rows(rng, 6, towards=np.eye(16)[0]),
        "negatives": rows(rng, 6),
        "background": rows(rng, 500),
    }
    query = np.eye(16, dtype=np.float32)[1]
    among = rows(rng, 10, towards=4 * query)
    apart = rows(rng, 10, towards=6 * np.eye(16)[2])
    leans = [
        lean(fit_teacher(**labels, query=query, query_images=images), query)
        for images in (among, apart)
    ]
    assert leans[1] > leans[0] + 0.1


def test_the_same_labels_again_and_again_are_regularised_less(rng):
    """Nothing is learned from repeats but how sure to be."""
    positives, negatives = rows(rng, 15, 2 * np.eye(16)[0]), rows(rng, 15)
    background = rows(rng, 500)
    once, thrice = (
        fit_teacher(
            positives=np.tile(positives, (n, 1)),
            negatives=np.tile(negatives, (n, 1)),
            background=background,
        )
        for n in (1, 3)
    )
    assert np.linalg.norm(thrice.direction) > 1.25 * np.linalg.norm(once.direction)
    assert unit(thrice.direction) @ unit(once.direction) > 0.9


def test_the_first_no_count_less_than_later_ones(rng):
    """As many yes as no on the same image: the logit is that of the masses."""
    image, background = rows(rng, 1, 4 * np.eye(16)[0]), rows(rng, 500, -2 * np.eye(16)[0])
    few, many = (
        fit_teacher(
            positives=np.tile(image, (n, 1)),
            negatives=np.tile(image, (n, 1)),
            background=background,
        ).logits(image)[0]
        for n in (3, 40)
    )
    assert few > many + 0.3
    assert many == pytest.approx(0, abs=0.2)


def test_without_a_yes_the_images_of_the_query_stand_in(rng):
    images, background = rows(rng, 10, 4 * np.eye(16)[0]), rows(rng, 500)
    query = np.eye(16, dtype=np.float32)[1]
    teacher = fit_teacher(
        positives=images[:0],
        negatives=rows(rng, 4),
        background=background,
        query=query,
        query_images=images,
    )
    logits = teacher.logits(background)
    assert teacher.logits(images).mean() > np.quantile(logits, 0.99)


def test_likely_positives_of_the_background_are_never_negatives(rng, monkeypatch):
    cluster = rows(rng, 60, 6 * np.eye(16)[0])
    given = {
        "positives": cluster[:10],
        "negatives": rows(rng, 5),
        "background": np.concatenate([rows(rng, 500), cluster[10:]]),
    }
    without_them = fit_teacher(**{**given, "background": given["background"][:500]})
    teacher = fit_teacher(**given)
    assert np.allclose(teacher.logits(cluster), without_them.logits(cluster), atol=0.3)
    monkeypatch.setattr(teacher_module, "MAX_REFITS", 0)
    assert teacher.logits(cluster).mean() > fit_teacher(**given).logits(cluster).mean() + 1


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


@pytest.mark.parametrize("dim", [1, 16, 100, 513])
def test_logits_are_exact_so_that_no_machine_sums_them_differently(rng, dim):
    embeddings = rng.normal(size=(200, dim))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    stored = embeddings.astype(np.float16).astype(np.float32)
    direction = (8 * rng.normal(size=dim)).astype(np.float32)
    order = rng.permutation(dim)
    one, other = Teacher(direction, 0.5), Teacher(direction[order], 0.5)
    assert np.array_equal(one.logits(stored), other.logits(stored[:, order]))
    exact = stored.astype(np.float64) @ direction.astype(np.float64) + 0.5
    atol = 3e-8 * np.linalg.norm(direction)
    assert np.allclose(one.logits(stored), exact, rtol=2e-7, atol=atol)
