import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipbranches_widget.boxes import CodeRange, LeafBox, in_range, union_mask

N_COLUMNS = 4


@st.composite
def bounds(draw):
    columns = draw(st.sets(st.integers(0, N_COLUMNS - 1)))
    out = {}
    for column in columns:
        low = draw(st.integers(0, 255))
        out[column] = (low, draw(st.integers(low + 1, 256)))
    return out


def all_codes(rng, n=500):
    codes = rng.integers(0, 256, (N_COLUMNS, n), dtype=np.uint8)
    codes[:, :2] = np.array([[0, 255]] * N_COLUMNS)
    return codes


@given(bounds(), st.integers(0, 2**32 - 1))
def test_contains_is_the_conjunction_of_half_open_ranges(box_bounds, seed):
    codes = all_codes(np.random.default_rng(seed))
    expected = np.ones(codes.shape[1], dtype=bool)
    for column, (low, high) in box_bounds.items():
        wide = codes[column].astype(int)
        expected &= (low <= wide) & (wide < high)
    assert np.array_equal(LeafBox.from_bounds(box_bounds).contains(codes), expected)


@given(bounds(), bounds(), st.integers(0, 2**32 - 1))
def test_intersection_holds_the_rows_in_both(first, second, seed):
    codes = all_codes(np.random.default_rng(seed))
    one, two = LeafBox.from_bounds(first, value=2.0, tree=3), LeafBox.from_bounds(second)
    both = one.intersect(two)
    expected = one.contains(codes) & two.contains(codes)
    if both is None:
        assert not expected.any()
    else:
        assert np.array_equal(both.contains(codes), expected)
        assert (both.value, both.tree) == (2.0, 3)


@given(st.lists(bounds(), max_size=4), st.integers(0, 2**32 - 1))
def test_union_mask_is_any_of_the_boxes(many, seed):
    codes = all_codes(np.random.default_rng(seed))
    boxes = [LeafBox.from_bounds(each) for each in many]
    expected = [any(box.contains(codes[:, [i]])[0] for box in boxes) for i in range(50)]
    assert union_mask(boxes, codes)[:50].tolist() == expected


@given(st.integers(0, 255), st.data())
def test_in_range_on_every_code(low, data):
    high = data.draw(st.integers(low + 1, 256))
    codes = np.arange(256, dtype=np.uint8)
    assert np.flatnonzero(in_range(codes, low, high)).tolist() == list(range(low, high))


def test_full_ranges_are_dropped_and_ranges_are_in_column_order():
    box = LeafBox.from_bounds({3: (1, 2), 1: (0, 256), 0: (5, 256)})
    assert box.ranges == (CodeRange(0, 5, 256), CodeRange(3, 1, 2))


@pytest.mark.parametrize("bad", [(5, 5), (-1, 3), (0, 257), (9, 4)])
def test_empty_or_impossible_ranges_are_refused(bad):
    with pytest.raises(ValueError, match=r"expected 0 <= low < high <= 256 for column 1"):
        LeafBox.from_bounds({1: bad})


def test_text_names_both_sides_of_a_range():
    edges = np.stack([np.linspace(-1, 1, 255, dtype=np.float32)] * 2)
    box = LeafBox.from_bounds({0: (128, 256), 1: (64, 192)})
    assert box.to_text(["bird", "red"], edges) == "bird >= 0.000 and red >= -0.504 and red < 0.504"
