"""Session on real catalogs: actions, undo, two objects on one file, threads, kills, restoring."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from clipbranches_widget.concept import Concept
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import (
    Cancelled,
    EncoderError,
    LabelError,
    QueryError,
    RefineError,
    SessionFileError,
)
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.session import Session

N_ROWS, DIM = 200, 12
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColourEncoder:
    """A real, tiny model: an image is its four corners' colours, a word the colour it names."""

    info = EncoderInfo("open_clip", "corners", "", DIM, "0")
    dim = DIM
    has_text = True
    image_size = 2

    def preprocess(self, image):
        return np.asarray(image.convert("RGB").resize((2, 2)), np.float32).ravel()

    def encode_tensors(self, tensors):
        vectors = np.stack(tensors) + 1.0
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_images(self, images):
        return self.encode_tensors([self.preprocess(image) for image in images])

    def encode_text(self, texts):
        return self.encode_images([Image.new("RGB", (2, 2), COLOURS[text]) for text in texts])


@pytest.fixture(scope="module")
def embeddings():
    return np.random.default_rng(5).normal(size=(N_ROWS + 50, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory, embeddings):
    return from_embeddings(embeddings[:N_ROWS], tmp_path_factory.mktemp("c") / "small.cbcat")


@pytest.fixture(scope="module")
def grown_catalog(tmp_path_factory, embeddings):
    """The same catalog after an append: its first shard is unchanged."""
    path = tmp_path_factory.mktemp("g") / "grown.cbcat"
    return from_embeddings(embeddings, path, rows_per_shard=N_ROWS)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sessions" / "one.jsonl"


@pytest.fixture
def session(catalog, path):
    return Session(catalog, path)


def n_events(path):
    return path.read_bytes().count(b"\n") - 1


def told(session):
    """Everything a session says about itself, for comparing two of them."""
    return {
        "labels": session.labels,
        "query": session.query_text,
        "hits": None if session.hits is None else session.hits.rows.tolist(),
        "result": None if session.result is None else session.result.rows.tolist(),
        "scores": None if session.result is None else session.result.scores.tolist(),
        "undo": (session.can_undo, session.can_redo, session.is_stale),
        "history": session.history,
    }


# -- one session -------------------------------------------------------------------------------


def test_the_main_job_and_reopening_it(catalog, session, path, tmp_path):
    hits = session.search(row=3, k=20)
    assert session.hits is hits
    assert session.label(positive=hits[:4], negative=[150, 151]) == session.labels
    result = session.refine(threshold=0.4, seed=11)
    assert session.result is result
    assert (result.threshold, result.seed) == (0.4, 11)
    assert set(hits.rows[:4]) <= set(result.rows)
    again = Session.open(path, catalog)
    assert told(again) == told(session)
    assert again.result.notes == result.notes
    assert (again.result.threshold, again.result.seed) == (0.4, 11)
    assert again.result.query_text == again.hits.query_text == session.query_text
    assert again.result is again.result


def test_a_new_session_is_empty(session):
    assert told(session) == {
        "labels": LabelSet(),
        "query": "",
        "hits": None,
        "result": None,
        "scores": None,
        "undo": (False, False, False),
        "history": [],
    }
    assert session.undo() is None
    assert session.redo() is None
    assert n_events(session.path) == 0


def test_labels_move_and_go(session):
    session.label(positive=[1, 2, 3], negative=np.array([4]))
    session.label(negative=[2])
    assert session.labels == LabelSet([1, 3], [2, 4])
    assert session.unlabel([3, 4, 5]) == LabelSet([1], [2])
    assert session.unlabel(session.labels.rows) == LabelSet()
    assert [event.description for event in session.history] == [
        "label 3 yes, 1 no",
        "label 0 yes, 1 no",
        "unlabel 2",
        "unlabel 2",
    ]


def test_what_changes_nothing_is_no_event(session):
    session.label(positive=[1], negative=[2])
    session.label()
    session.label(positive=[1])
    session.label(positive=[], negative=[2])
    session.unlabel([5])
    session.unlabel([])
    assert n_events(session.path) == 1


def test_only_what_changes_is_recorded(session):
    session.label(positive=[1, 2])
    session.label(positive=[1, 2, 3])
    assert session.history[-1].parameters == {"positive": [3], "negative": []}


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ({"positive": [1, 2], "negative": [2]}, LabelError, "got both for [2]"),
        ({"positive": [1, 200]}, QueryError, "expected row ids from 0 to 199, got 200"),
        ({"negative": [-1]}, QueryError, "expected row ids from 0 to 199, got -1"),
        ({"positive": np.zeros(200, bool)}, LabelError, "numpy.flatnonzero(mask)"),
        ({"positive": [0.5]}, LabelError, "expected integer row ids"),
    ],
)
def test_labels_that_cannot_be_are_refused_and_not_recorded(session, labels, error, message):
    with pytest.raises(error, match=re.escape(message)):
        session.label(**labels)
    assert n_events(session.path) == 0
    assert session.labels == LabelSet()


def test_unlabel_refuses_unknown_rows(session):
    with pytest.raises(QueryError, match="expected row ids from 0 to 199, got 500"):
        session.unlabel([500])


def test_undo_and_redo_go_through_searches_labels_and_rounds(session):
    states = [told(session)]
    for act in (
        lambda: session.search(row=1, k=5),
        lambda: session.label(positive=[1, 7], negative=[9]),
        session.refine,
        lambda: session.search(row=2, k=6),
        lambda: session.unlabel([7]),
        lambda: session.refine(seed=1),
    ):
        act()
        states.append(told(session))
    whole = states[-1]["history"]
    said = [event.description for event in whole]
    for n_undone, state in enumerate(reversed(states[:-1]), start=1):
        assert session.undo() == said[-n_undone]
        now = told(session)
        assert now["undo"][0] == (n_undone < 6)
        assert {k: now[k] for k in ("labels", "query", "hits", "result", "scores")} == {
            k: state[k] for k in ("labels", "query", "hits", "result", "scores")
        }
        assert [event.undone for event in session.history[:6]] == (
            [False] * (6 - n_undone) + [True] * n_undone
        )
    for n_done in range(1, 7):
        assert session.redo() == said[n_done - 1]
    end = told(session)
    assert {k: end[k] for k in end if k != "history"} == {
        k: states[-1][k] for k in end if k != "history"
    }
    assert end["history"][:6] == whole


def test_a_new_action_after_undo_drops_what_could_be_redone_but_keeps_it_on_file(session):
    session.label(positive=[1])
    session.label(positive=[2])
    session.undo()
    session.label(positive=[3])
    assert session.redo() is None
    assert session.labels == LabelSet([1, 3])
    assert [(e.action, e.undone) for e in session.history] == [
        ("label", False),
        ("label", True),
        ("undo", False),
        ("label", False),
    ]
    assert n_events(session.path) == 4


def test_history_has_times_and_parameters(session):
    session.search(row=4, k=3)
    session.label(positive=[1])
    search, label = session.history
    assert search.id < label.id
    assert search.at.utcoffset().total_seconds() == 0
    assert search.at <= label.at
    assert search.parameters["k"] == 3
    assert repr(label).endswith("label 1 yes, 0 no>")


def test_repr_is_one_line(session):
    assert repr(session) == (
        f"<Session on small.cbcat: no query, 0 yes / 0 no, no round, {session.path}>"
    )
    session.search(row=4)
    session.label(positive=[1, 2], negative=[3])
    result = session.refine()
    assert repr(session) == (
        f"<Session on small.cbcat: 'more like row 4', 2 yes / 1 no, round: {len(result)} found, "
        f"{session.path}>"
    )


def test_a_session_needs_a_catalog(tmp_path):
    with pytest.raises(TypeError, match="expected a Catalog, got str: open one with"):
        Session(str(tmp_path))


# -- queries -----------------------------------------------------------------------------------


def test_vector_queries_are_restored_bit_for_bit(catalog, session, path, rng):
    vector = rng.normal(size=DIM) * 1e-3
    hits = session.search(vector=vector, k=200)
    again = Session.open(path, catalog).hits
    assert again.rows.tolist() == hits.rows.tolist()
    assert again.scores.tobytes() == hits.scores.tobytes()


def test_text_and_image_queries_need_no_model_or_image_on_reopening(catalog, path, tmp_path):
    image = tmp_path / "sky.png"
    Image.new("RGB", (8, 8), (10, 20, 250)).save(image)
    session = Session(catalog, path, encoder=ColourEncoder())
    by_text = session.search("red", k=9).rows.tolist()
    by_file = session.search(image=image, k=9).rows.tolist()
    by_image = session.search(image=Image.open(image), k=8).rows.tolist()
    image.unlink()
    again = Session(catalog, path)
    assert (again.query_text, again.hits.rows.tolist()) == ("image sky.png", by_image)
    again.undo()
    assert (again.query_text, again.hits.rows.tolist()) == ("image sky.png", by_file)
    again.undo()
    assert (again.query_text, again.hits.rows.tolist()) == ("red", by_text)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "exactly one of text, image, vector and row, got none"),
        ({"image": "a.png", "row": 1}, "got image and row"),
        ({"row": 200}, "expected row ids from 0 to 199"),
        ({"row": 1, "k": 0}, "expected k >= 1"),
        ({"row": 1, "k": 1.5}, "expected k as a whole number"),
        ({"vector": [1.0, 2.0]}, "12"),
        ({"text": "red"}, "expected an encoder for a query by text"),
    ],
)
def test_queries_that_cannot_be_are_refused_and_not_recorded(session, query, message):
    with pytest.raises(QueryError, match=re.escape(message)):
        session.search(**query)
    assert n_events(session.path) == 0


def test_a_catalog_without_a_model_says_so(session):
    with pytest.raises(EncoderError, match="expected a catalog with an encoder"):
        _ = session.encoder


def test_another_model_is_refused(catalog):
    class Wide(ColourEncoder):
        info = EncoderInfo("open_clip", "wide", "", 99, "0")

    with pytest.raises(EncoderError, match="expected the encoder of this catalog"):
        Session(catalog, encoder=Wide())


NO_TORCH = """
import sys
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.session import Session
session = Session.open(sys.argv[2], Catalog.open(sys.argv[1]))
print(session.result, session.hits)
print({"torch", "open_clip"} & set(sys.modules))
"""


def test_reopening_loads_no_torch(catalog, path):
    session = Session(catalog, path, encoder=ColourEncoder())
    session.search("red")
    session.label(positive=[1, 2], negative=[3])
    session.refine()
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, catalog.path, path],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "set()"


# -- rounds ------------------------------------------------------------------------------------


def test_a_round_needs_something_to_learn_from(session):
    with pytest.raises(
        RefineError, match="expected at least one yes label or a query, got neither"
    ):
        session.refine()
    assert n_events(session.path) == 0


@pytest.mark.parametrize("seed", [-1, 0.5, "1"])
def test_seeds_are_whole_numbers(session, seed):
    with pytest.raises(RefineError, match="expected a seed that is a whole number"):
        session.refine(seed=seed)


def test_labels_may_change_while_a_round_runs(catalog, session, path):
    session.label(positive=[1, 2], negative=[3])
    stages = []

    def progress(stage, fraction):
        stages.append((stage, fraction))
        if len(stages) == 1:
            session.label(positive=[50])

    result = session.refine(progress=progress)
    assert len(stages) > 2
    assert session.labels == LabelSet([1, 2, 50], [3])
    assert session.is_stale
    recorded = session.history[-1].parameters["labels"]
    assert recorded == {"positive": [1, 2], "negative": [3]}
    again = Session.open(path, catalog)
    assert again.result.rows.tolist() == result.rows.tolist()
    assert again.is_stale
    session.undo()
    session.undo()
    assert (session.labels, session.is_stale) == (LabelSet([1, 2], [3]), False)


@pytest.mark.parametrize("last_stage", [False, True])
def test_a_cancelled_round_leaves_the_session_as_before(session, last_stage):
    session.label(positive=[1, 2], negative=[3])
    before = told(session)
    cancel = threading.Event()

    def progress(stage, fraction):
        if not last_stage or fraction >= 0.9:
            cancel.set()

    with pytest.raises(Cancelled, match="the round was cancelled"):
        session.refine(progress=progress, cancel=cancel)
    assert told(session) == before


def test_a_round_shows_its_answer_as_it_grows_and_explains_its_plan(session):
    session.label(positive=[1, 2], negative=[3])
    seen = []
    result = session.refine(partial=seen.append, strategy="scan")
    assert seen
    assert not any(each.is_complete for each in seen)
    assert set(seen[0].rows.tolist()) <= set(result.rows.tolist())
    assert result.plan.strategy == "scan"
    assert session.result is result


def test_a_session_loads_the_compiled_loops_without_being_asked(session, catalog):
    index = catalog.opened("index", lambda: pytest.fail("the session opened no index"))
    assert index.columns.loader.wait().NAME == "numba"


def test_a_second_round_waits_for_the_first(session):
    session.label(positive=[1, 2], negative=[3])
    stages, started = [], threading.Event()

    def progress(stage, fraction):
        stages.append(threading.current_thread().name)
        started.set()
        time.sleep(0.02)

    threads = [
        threading.Thread(
            target=session.refine, kwargs={"progress": progress, "seed": i}, name=str(i)
        )
        for i in range(2)
    ]
    threads[0].start()
    started.wait(20)
    threads[1].start()
    for thread in threads:
        thread.join(60)
    assert stages == sorted(stages)
    assert sorted(event.parameters["seed"] for event in session.history[1:]) == [0, 1]


def test_an_answer_that_cannot_be_reproduced_says_so(catalog, session, path):
    session.label(positive=[1, 2], negative=[3])
    result = session.refine()
    text = path.read_text()
    path.write_text(text.replace(session.history[-1].parameters["digest"], "0" * 32))
    again = Session.open(path, catalog).result
    assert again.rows.tolist() == result.rows.tolist()
    assert again.notes[:-1] == result.notes
    assert re.fullmatch(
        rf"The recorded answer of {len(result)} images could not be reproduced: it was computed "
        rf"by another release .* These {len(result)} were computed anew from the same labels\.",
        again.notes[-1],
    )


def test_a_catalog_that_grew_keeps_its_sessions(catalog, grown_catalog, session, path):
    session.search(row=1, k=200)
    session.label(positive=[1, 2], negative=[3])
    session.refine(threshold=0.2)
    grown = Session.open(path, grown_catalog)
    assert grown.labels == session.labels
    assert len(grown.hits) == 200
    assert "50 images were added to the catalog since this round" in grown.result.notes[-1]
    grown.label(positive=[249])
    with pytest.raises(
        SessionFileError, match=r"expected rows below 200.*got 249: open the session"
    ):
        _ = session.labels


# -- the file ----------------------------------------------------------------------------------


def test_without_a_path_the_file_appears_with_the_first_action(catalog, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    session, other = Session(catalog), Session(catalog)
    assert session.path != other.path
    assert session.path.parent.name == "sessions"
    assert re.fullmatch(r"small-\d{8}T\d{6}Z-[0-9a-f]{4}\.jsonl", session.path.name)
    assert session.labels == LabelSet()
    assert not session.path.exists()
    session.label(positive=[1])
    assert n_events(session.path) == 1
    assert Session.open(session.path, catalog).labels == LabelSet([1])


def test_a_path_is_made_at_once_with_its_folders(catalog, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    session = Session(catalog, "~/a/b/c.jsonl")
    assert session.path == tmp_path / "a" / "b" / "c.jsonl"
    assert session.path.exists()


def test_open_wants_a_file_that_is_there(catalog, path):
    with pytest.raises(SessionFileError, match="found none: Session"):
        Session.open(path, catalog)
    assert not path.exists()


def test_another_catalog_is_refused(tmp_path, session, path, rng):
    other = from_embeddings(rng.normal(size=(N_ROWS, DIM)), tmp_path / "other.cbcat")
    with pytest.raises(SessionFileError, match=r"belongs to the catalog .*small\.cbcat"):
        Session(other, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": [200]}, "line 2: expected rows below 200, the length of .*, got 200"),
        ({"action": "dance"}, "line 2: expected one of the actions .* got 'dance'"),
        ({"positive": "x"}, "line 2: event 1 has no valid parameters for 'label'"),
        ({"action": "undo", "of": 1}, "line 2: event 1 undoes event 1, but nothing"),
    ],
)
def test_an_impossible_line_is_named(catalog, session, path, change, message):
    session.label(positive=[1])
    header, line = path.read_text().splitlines()
    path.write_text(f"{header}\n{json.dumps(json.loads(line) | change)}\n")
    with pytest.raises(SessionFileError, match=rf"one\.jsonl, {message}.*delete this line"):
        Session(catalog, path)


def test_a_query_of_another_dimension_is_named(catalog, session, path):
    session.search(row=1)
    header, line = path.read_text().splitlines()
    event = json.loads(line)
    event["query"]["vector"] = "AAAAAA=="
    path.write_text(f"{header}\n{json.dumps(event)}\n")
    with pytest.raises(
        SessionFileError, match="line 2: expected a query embedding of dim 12, got 1"
    ):
        Session(catalog, path)


def test_when_the_file_is_gone_memory_is_still_there(session, path):
    session.label(positive=[1])
    path.unlink()
    assert session.labels == LabelSet([1])
    with pytest.raises(SessionFileError, match="it is gone"):
        session.label(positive=[2])
    assert session.labels == LabelSet([1])


def test_a_damaged_line_from_elsewhere_does_not_spoil_memory(session, path):
    session.label(positive=[1])
    good = path.read_bytes()
    path.write_bytes(good + b"garbage\n")
    for act in (lambda: session.labels, lambda: session.label(positive=[2])):
        with pytest.raises(SessionFileError, match="line 3 is damaged"):
            act()
    path.write_bytes(good)
    assert session.label(positive=[2]) == LabelSet([1, 2])


def test_every_prefix_of_the_file_is_the_state_at_that_time(catalog, session, path):
    states = [session.labels]
    for act in (
        lambda: session.label(positive=[1, 2]),
        lambda: session.search(row=5, k=4),
        lambda: session.label(negative=[2]),
        session.undo,
        lambda: session.unlabel([1]),
    ):
        act()
        states.append(session.labels)
    whole = path.read_bytes()
    header_bytes = whole.index(b"\n") + 1
    for n_bytes in range(header_bytes, len(whole) + 1, 3):
        path.write_bytes(whole[:n_bytes])
        resumed = Session(catalog, path)
        n_complete = whole[:n_bytes].count(b"\n") - 1
        assert resumed.labels == states[n_complete]
        assert len(resumed.history) == n_complete
        resumed.label(positive=[100])
        assert Session(catalog, path).labels == states[n_complete].with_labels(positive=[100])


# -- kills -------------------------------------------------------------------------------------

ENDLESS = """
import sys
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.session import Session
session = Session(Catalog.open(sys.argv[1]), sys.argv[2])
n_done = len(session.history)
while True:
    if n_done % 5 == 4:
        session.undo()
    else:
        row = n_done * 7 % 50
        yes = session.labels.get(row) != 1
        session.label(**{"positive" if yes else "negative": [row]})
    n_done += 1
    print(n_done, flush=True)
"""


def expected_after(n_events):
    """Return the labels after `n_events` of ENDLESS, from plain dicts."""
    stack = [{}]
    for number in range(n_events):
        if number % 5 == 4:
            stack.pop()
        else:
            row = number * 7 % 50
            stack.append(stack[-1] | {row: -1 if stack[-1].get(row) == 1 else 1})
    return stack[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_kill_at_any_moment_loses_at_most_the_action_in_flight(catalog, path, rng):
    n_before = 0
    for _ in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", ENDLESS, catalog.path, path], stdout=subprocess.PIPE, text=True
        )
        n_acknowledged = int(child.stdout.readline())
        assert n_acknowledged == n_before + 1
        time.sleep(float(rng.uniform(0, 0.05)))
        os.kill(child.pid, signal.SIGKILL)
        rest = child.stdout.read().split("\n")
        child.stdout.close()
        child.wait(20)
        n_acknowledged = max([n_acknowledged, *(int(word) for word in rest[:-1])])
        resumed = Session(catalog, path)
        n_before = len(resumed.history)
        assert n_acknowledged <= n_before <= n_acknowledged + 1
        wanted = expected_after(n_before)
        assert {int(row): resumed.labels.get(row) for row in resumed.labels.rows} == wanted
    assert n_before > 20


# -- observers ---------------------------------------------------------------------------------


def test_observers_hear_every_kind_of_change_until_they_stop(session):
    heard = []
    unobserve = session.observe(heard.append)
    session.search(row=1)
    session.label(positive=[1, 2], negative=[3])
    session.label(positive=[1])
    session.unlabel([2])
    session.refine()
    session.undo()
    session.redo()
    session.redo()
    assert heard == ["search", "label", "label", "refine", "undo", "redo"]
    unobserve()
    unobserve()
    session.undo()
    assert len(heard) == 6


def test_an_observer_sees_the_new_state_and_may_act(session):
    seen = []

    def callback(change):
        seen.append((change, session.query_text, len(session.labels)))
        if change == "search":
            session.label(positive=session.hits[:1])

    session.observe(callback)
    hits = session.search(row=8)
    assert hits is session.hits
    assert seen == [("search", "more like row 8", 0), ("label", "more like row 8", 1)]


def test_a_failing_observer_stops_nothing(session, caplog):
    heard = []

    def broken(change):
        raise RuntimeError("no luck")

    session.observe(broken)
    session.observe(heard.append)
    session.label(positive=[1])
    assert heard == ["label"]
    assert session.labels == LabelSet([1])
    assert "an observer of the session failed" in caplog.text
    assert "no luck" in caplog.text


def test_an_observer_is_called_with_no_lock_held(session):
    seen = []

    def callback(change):
        other = threading.Thread(target=lambda: seen.append(session.labels))
        other.start()
        other.join(10)

    session.observe(callback)
    session.label(positive=[1])
    assert seen == [LabelSet([1])]


# -- several at once ---------------------------------------------------------------------------


def test_two_sessions_on_one_file_are_one(catalog, session, path):
    other, heard = Session(catalog, path), []
    other.observe(heard.append)
    session.label(positive=[1])
    assert other.catch_up() == 1
    assert other.catch_up() == 0
    other.label(positive=[2])
    session.search(row=7, k=3)
    assert other.undo() == "search 'more like row 7'"
    assert heard == ["label", "label", "search", "undo"]
    session.refine()
    assert told(other) == told(session)
    found = len(other.result)
    assert other.undo() == f"refine, {found} found"
    assert told(other) == told(session)
    assert session.redo() is not None
    assert told(other) == told(session) == told(Session(catalog, path))


def test_an_action_sees_what_another_session_did_first(catalog, session, path):
    other = Session(catalog, path)
    session.label(positive=[1])
    other.label(positive=[1])
    assert n_events(path) == 1
    other.unlabel([1])
    session.label(positive=[1])
    assert n_events(path) == 3


def test_an_action_that_fails_still_tells_what_others_did(catalog, session, path):
    other, heard, cancel = Session(catalog, path), [], threading.Event()
    session.label(positive=[1])
    session.observe(heard.append)

    def progress(stage, fraction):
        if fraction >= 0.9:
            other.label(positive=[2])
            cancel.set()

    with pytest.raises(Cancelled, match="labels and results are as before"):
        session.refine(progress=progress, cancel=cancel)
    assert heard == ["label"]


def hammer(session, seed, failures):
    rng = np.random.default_rng(seed)
    try:
        for _ in range(30):
            rows = rng.choice(N_ROWS, size=4, replace=False)
            match rng.integers(8):
                case 0:
                    session.undo()
                case 1:
                    session.redo()
                case 2:
                    session.search(row=int(rows[0]), k=5)
                case 3:
                    session.unlabel(rows)
                case 4:
                    hits = session.hits  # read once: another thread may undo the search
                    assert hits is None or len(hits) == 5
                    assert all(event.id > 0 for event in session.history)
                case _:
                    session.label(positive=rows[:2], negative=rows[2:])
    except BaseException as error:
        failures.append(error)
        raise


@pytest.mark.parametrize("n_sessions", [1, 2])
def test_eight_threads_at_once_end_in_one_state_that_reopens(catalog, path, n_sessions):
    sessions = [Session(catalog, path) for _ in range(n_sessions)]
    heard, failures = [], []
    sessions[0].observe(heard.append)
    threads = [
        threading.Thread(target=hammer, args=(sessions[i % n_sessions], i, failures))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failures == []
    again = Session.open(path, catalog)
    for session in sessions:
        assert told(session) == told(again)
    assert [event.id for event in again.history] == list(range(1, len(again.history) + 1))
    assert len(heard) == len(again.history) > 100


PROCESS = """
import sys
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.session import Session
session = Session(Catalog.open(sys.argv[1]), sys.argv[2])
for row in range(int(sys.argv[3]), 100, 3):
    session.label(positive=[row])
"""


def test_three_kernels_at_once_lose_nothing(catalog, session, path):
    children = [
        subprocess.Popen([sys.executable, "-c", PROCESS, catalog.path, path, str(first)])
        for first in range(3)
    ]
    assert [child.wait(120) for child in children] == [0, 0, 0]
    assert session.labels == LabelSet(range(100))
    assert len(session.history) == 100


@pytest.mark.skipif(sys.platform == "win32", reason="raises a signal in its own process")
def test_an_interrupt_while_writing_leaves_memory_and_file_agreeing(
    catalog, session, path, monkeypatch
):
    fsync = os.fsync

    def interrupted(descriptor):
        fsync(descriptor)
        raise KeyboardInterrupt("stop")

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stop"):
        session.label(positive=[1])
    monkeypatch.undo()
    assert session.labels == LabelSet([1])
    session.label(positive=[2])
    assert told(session) == told(Session(catalog, path))


def test_warm_up_loads_what_rounds_need_without_an_event(session):
    before = session.history
    session.warm_up()
    assert {"sklearn", "xgboost"} <= set(sys.modules)
    assert session.history == before


def test_a_round_is_audited_improved_and_kept(session, catalog, tmp_path):
    with pytest.raises(RefineError, match=r"got one without: refine\(\) first"):
        session.audit()
    with pytest.raises(RefineError, match=r"got one without: refine\(\) first"):
        session.save_concept("wings")
    assert len(session.suggest(5)) == 5
    session.search(row=4, k=10)
    session.label(positive=[1, 2], negative=[3])
    result = session.refine()
    suggested = session.suggest(5)
    assert not set(suggested) & {1, 2, 3}
    assert len(suggested.to_pandas()) == 5
    audit = session.audit(8)
    session.label(positive=audit)
    report = audit.report(session.labels)
    assert report.precision.low <= 1 <= report.precision.high
    path = tmp_path / "wings.concept.json"
    session.save_concept("wings", path)
    again = Concept.load(path).apply(catalog)
    assert np.array_equal(again.rows, result.rows)
    assert np.array_equal(again.scores, result.scores)
