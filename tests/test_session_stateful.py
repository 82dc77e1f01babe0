"""A session against plain lists, under any order of actions, reopenings and torn lines."""

import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.session import Session

N_ROWS, DIM = 40, 6
ROW = st.integers(0, N_ROWS - 1)
ROWS = st.frozensets(ROW, max_size=6)


@functools.cache
def folder():
    return Path(tempfile.mkdtemp(prefix="session-stateful-"))


@functools.cache
def catalog():
    embeddings = np.random.default_rng(3).normal(size=(N_ROWS, DIM))
    return from_embeddings(embeddings, folder() / "forty.cbcat")


@pytest.fixture(scope="module", autouse=True)
def _clean_up():
    yield
    shutil.rmtree(folder())


@functools.cache
def nearest(row, k, filtered=None):
    """Return the k nearest rows, of those whose id is in a closed range, by brute force."""
    vectors = np.asarray(catalog().embeddings, np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return among(np.argsort(-(vectors @ vectors[row]), kind="stable").tolist(), filtered)[:k]


def among(rows, filtered):
    """Return the rows whose id is in a closed range."""
    low, high = filtered or (0, N_ROWS)
    return [row for row in rows if low <= row <= high]


def whole(result):
    """Return the rows of an answer before the filter."""
    return (result if result.unfiltered is None else result.unfiltered).rows.tolist()


class SessionMachine(RuleBasedStateMachine):
    """The model: a list of (labels, search, round, rules, filter), our place, and the actions.

    A round is (labels, row searched for, rows found, its number).
    """

    @initialize()
    def start(self):
        self.path = folder() / f"{id(self)}.jsonl"
        self.path.unlink(missing_ok=True)
        self.sessions = [Session(catalog(), self.path) for _ in range(2)]
        self.states = [({}, None, None, {}, None)]
        self.rounds = []
        self.place = 0
        self.actions = []
        self.n_rounds = 0
        self.n_switched = 0
        self.turn = 0

    @property
    def now(self):
        return self.states[self.place]

    @property
    def query(self):
        search = self.now[1]
        return None if search is None else search[0]

    @property
    def session(self):
        return self.sessions[self.turn]

    def move_on(self, action, **changes):
        parts = zip(("labels", "search", "round", "rules", "filtered"), self.now, strict=True)
        state = tuple(changes.get(name, part) for name, part in parts)
        self.states = [*self.states[: self.place + 1], state]
        self.place += 1
        self.actions.append(action)

    @rule(row=ROW, k=st.integers(1, N_ROWS + 5))
    def search(self, row, k):
        found = self.session.search(row=row, k=k).rows.tolist()
        assert found == nearest(row, k, self.now[4])
        self.move_on("search", search=(row, k))

    @rule(positive=ROWS, negative=ROWS)
    def label(self, positive, negative):
        negative = negative - positive
        labels = self.now[0] | dict.fromkeys(positive, 1) | dict.fromkeys(negative, -1)
        self.session.label(positive=positive, negative=negative)
        if labels != self.now[0]:
            self.move_on("label", labels=labels)

    @rule(rows=ROWS)
    def unlabel(self, rows):
        labels = {row: sign for row, sign in self.now[0].items() if row not in rows}
        self.session.unlabel(rows)
        if labels != self.now[0]:
            self.move_on("unlabel", labels=labels)

    @precondition(lambda self: self.n_rounds < 2 and (1 in self.now[0].values() or self.now[1]))
    @rule(seed=st.integers(0, 3))
    def refine(self, seed):
        result = self.session.refine(seed=seed)
        labels, row = self.now[0], self.query
        parent = None if self.now[2] is None else self.now[2][3]
        self.n_rounds += 1
        self.move_on("refine", round=(labels, row, whole(result), self.n_rounds))
        self.rounds.append((self.now, parent))

    @precondition(lambda self: self.n_switched < 2 and self.now[2])
    @rule(action=st.sampled_from(["switch_off", "switch_on", "pin", "unpin"]), data=st.data())
    def change_rule(self, action, data):
        branches = [branch for branch in self.session.result.branches if branch.box is not None]
        if not branches:
            return
        branch = data.draw(st.sampled_from(branches))
        result = getattr(self.session, action)(branch.id)
        possible = {"switch_on": ["off"], "unpin": ["pinned"], "switch_off": ["on", "pinned"]}
        if branch.state in possible.get(action, ["on", "off"]):
            state = {"switch_off": "off", "pin": "pinned"}.get(action, "on")
            rules = {box: old for box, old in self.now[3].items() if box != branch.box.ranges}
            rules |= {} if state == "on" else {branch.box.ranges: state}
            latest = (*self.now[2][:2], whole(result), self.now[2][3])
            self.move_on(action, round=latest, rules=rules)
            self.n_switched += 1

    @rule(filtered=st.none() | st.tuples(ROW, ROW).map(lambda ends: tuple(sorted(ends))))
    def filter(self, filtered):
        n_passing = self.session.filter(None if filtered is None else {"row": filtered})
        assert n_passing == len(among(range(N_ROWS), filtered))
        if filtered != self.now[4]:
            self.move_on("filter", filtered=filtered)

    @precondition(lambda self: self.rounds)
    @rule(data=st.data())
    def go_back(self, data):
        number = data.draw(st.integers(1, len(self.rounds)))
        then, _ = self.rounds[number - 1]
        found = self.session.go_back(number).rows.tolist()
        assert found == among(then[2][2], self.now[4])
        if then[:1] + then[2:4] != self.now[:1] + self.now[2:4] or self.query != then[2][1]:
            labels, search, latest, rules, _ = then
            self.move_on("go_back", labels=labels, search=search, round=latest, rules=rules)

    @precondition(lambda self: len(self.rounds) > 1)
    @rule(data=st.data())
    def compare(self, data):
        numbers = [data.draw(st.integers(1, len(self.rounds))) for _ in range(2)]
        found = self.session.compare(*numbers)
        before, after = (self.rounds[number - 1][0][2][2] for number in numbers)
        assert found.gained.tolist() == [row for row in after if row not in before]
        assert found.lost.tolist() == [row for row in before if row not in after]
        assert found.kept.tolist() == [row for row in after if row in before]

    @rule()
    def undo(self):
        said = self.session.undo()
        assert (said is None) == (self.place == 0)
        if self.place:
            self.place -= 1
            self.actions.append("undo")

    @rule()
    def redo(self):
        said = self.session.redo()
        assert (said is None) == (self.place + 1 == len(self.states))
        if said is not None:
            self.place += 1
            self.actions.append("redo")

    @rule()
    def take_turns(self):
        self.turn = 1 - self.turn

    @rule()
    def reopen(self):
        self.sessions[self.turn] = Session.open(self.path, catalog())

    @rule(torn=st.sampled_from([b"{", b'{"id": 7, "at"', b"\0\0\0", b'{"id": 1}']))
    def kill_while_writing(self, torn):
        with self.path.open("ab") as file:
            file.write(torn)

    @invariant()
    def session_equals_model(self):
        session = self.session
        labels, search, latest, rules, filtered = self.now
        assert session.filters == ({} if filtered is None else {"row": filtered})
        assert {each.box.ranges: each.state for each in session.rules} == rules
        assert {row: session.labels.get(row) for row in session.labels.rows.tolist()} == labels
        assert session.query_text == ("" if search is None else f"more like row {search[0]}")
        if search is None:
            assert session.hits is None
        else:
            assert session.hits.rows.tolist() == nearest(*search, filtered)
        assert session.is_stale == (latest is not None and latest[:2] != (labels, self.query))
        if latest is None:
            assert session.result is None
        else:
            assert session.result.rows.tolist() == among(latest[2], filtered)
            listed = {b.box.ranges: b.state for b in session.result.branches if b.box is not None}
            assert {box: listed[box] for box in rules} == rules
        assert session.can_undo == (self.place > 0)
        assert session.can_redo == (self.place + 1 < len(self.states))
        rounds = [(each.number, each.parent, each.n_rows) for each in session.rounds]
        assert rounds == [
            (number, parent, len(then[2][2]))
            for number, (then, parent) in enumerate(self.rounds, start=1)
        ]
        assert [each.number for each in session.rounds if each.is_current] == (
            [] if latest is None else [latest[3]]
        )
        history = session.history
        assert [event.action for event in history] == self.actions
        n_applied = sum(not e.undone for e in history if e.action not in {"undo", "redo"})
        assert n_applied == self.place

    def teardown(self):
        self.path.unlink(missing_ok=True)


TestSession = SessionMachine.TestCase
TestSession.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
