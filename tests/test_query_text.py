"""Phrases, weights and a minus in one line of text."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipbranches_widget.errors import QueryError
from clipbranches_widget.query_text import MAX_PHRASES, MINUS, Phrase, phrases_of, weighted_sum


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beach + sunset^2 -people", [("beach", 1), ("sunset", 2), ("people", -MINUS)]),
        ("dog -black cat^0.25 +grass", [("dog", 1), ("black cat", -0.25), ("grass", 1)]),
        ("+a +b", [("a", 1), ("b", 1)]),
        ("black cat^1.5", [("black cat", 1.5)]),
        ('"c+ -b"^2 + "x^2 y" -"a -b"', [("c+ -b", 2), ("x^2 y", 1), ("a -b", -MINUS)]),
        ('a sign "no -entry here" red', [('a sign "no -entry here" red', 1)]),
        ('a 12" ruler -wood', [('a 12" ruler', 1), ("wood", -MINUS)]),
        ("beach +", [("beach", 1)]),
        ("beach + + sea", [("beach", 1), ("sea", 1)]),
        ("animal -\U0001f426 -\u732b", [("animal", 1), ("\U0001f426", -MINUS), ("\u732b", -MINUS)]),
        ("one\n-two\t+three", [("one", 1), ("two", -MINUS), ("three", 1)]),
    ],
)
def test_phrases(text, expected):
    assert phrases_of(text) == tuple(Phrase(words, weight) for words, weight in expected)


@pytest.mark.parametrize(
    "text",
    [
        "t-shirt",
        "a black-and-white photo of a 5-year-old",
        "portrait of a lady - oil on canvas",
        "c++ code, 1+1=2",
        "--verbose ->",
        "e^x and ^_^",
        "5^",
        '"',
        '""',
        " spaces stay ",
        'a sign that says "stop"',
    ],
)
def test_a_plain_sentence_is_one_phrase_as_it_was_typed(text):
    assert phrases_of(text) == (Phrase(text, 1.0),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected some words to search for, got ''"),
        (" \n", "expected some words to search for"),
        (7, "expected some words to search for, got 7"),
        ("+", "expected some words to search for, got '+': phrases are joined as in"),
        ("-people", "got only what to leave out, '-people': write what the images show before"),
        ("-a -b^2", "got only what to leave out"),
        ("a^0", "expected a weight that is a finite number above 0, got ^0"),
        ("a -b^-1", "got ^-1"),
        ("a^inf + b", "got ^inf"),
        ("a^nan", "got ^nan"),
        ("a^1e999", "got ^1e999"),
        ("a^2 b", "expected a weight at the end of a phrase, got 'a^2 b': write + before"),
        ('"a b"^2 c', "expected a weight at the end of a phrase"),
        (" + ".join("a" * (MAX_PHRASES + 1)), f"at most {MAX_PHRASES} phrases, got 33"),
    ],
)
def test_what_cannot_be_read_is_told(text, message):
    with pytest.raises(QueryError, match=re.escape(message)):
        phrases_of(text)


WORDS = st.text("ab-c", min_size=1, max_size=6).filter(lambda word: word[0] != "-")
PHRASES = st.lists(
    st.tuples(WORDS, st.sampled_from([0.25, 1.0, 3.0]), st.booleans()), min_size=1, max_size=6
)


@given(PHRASES)
def test_what_is_written_is_read_back(phrases):
    phrases[0] = (*phrases[0][:2], False)
    text = " ".join(f"{'-' if minus else '+'}{words}^{weight}" for words, weight, minus in phrases)
    assert phrases_of(text) == tuple(
        Phrase(words, -weight if minus else weight) for words, weight, minus in phrases
    )


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        phrases = phrases_of(text)
    except QueryError:
        return
    assert any(phrase.weight > 0 for phrase in phrases)
    assert all(phrase.text.strip() for phrase in phrases)


@given(
    st.lists(
        st.floats(-1e300, 1e300).filter(lambda weight: abs(weight) > 1e-3), min_size=3, max_size=3
    )
)
def test_the_weighted_sum_of_unit_vectors(weights):
    vectors = np.array([[3, 0, 0], [0, 0.5, 0], [0, 0, 7]], np.float32)
    found = weighted_sum(vectors, weights, what="a")
    expected = np.array(weights) / np.abs(weights).max()
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), atol=1e-12)


def test_phrases_that_cancel_out_are_refused():
    vectors = np.array([[1, 0], [2, 0]], np.float32)
    with pytest.raises(QueryError, match="got 'a -a', which cancel each other out"):
        weighted_sum(vectors, [1, -1], what="a -a")
