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
def nearest(row, k):
    """Return the k nearest rows, by brute force."""
    vectors = np.asarray(catalog().embeddings, np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.argsort(-(vectors @ vectors[row]), kind="stable")[:k].tolist()


class SessionMachine(RuleBasedStateMachine):
    """The model: a list of (labels, search, round, rules), our place in it, and the actions."""

    @initialize()
    def start(self):
        self.path = folder() / f"{id(self)}.jsonl"
        self.path.unlink(missing_ok=True)
        self.sessions = [Session(catalog(), self.path) for _ in range(2)]
        self.states = [({}, None, None, {})]
        self.place = 0
        self.actions = []
        self.n_rounds = 0
        self.n_switched = 0
        self.turn = 0

    @property
    def now(self):
        return self.states[self.place]

    @property
    def session(self):
        return self.sessions[self.turn]

    def move_on(self, action, **changes):
        parts = zip(("labels", "search", "round", "rules"), self.now, strict=True)
        state = tuple(changes.get(name, part) for name, part in parts)
        self.states = [*self.states[: self.place + 1], state]
        self.place += 1
        self.actions.append(action)

    @rule(row=ROW, k=st.integers(1, N_ROWS + 5))
    def search(self, row, k):
        assert self.session.search(row=row, k=k).rows.tolist() == nearest(row, k)
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
        labels, search, *_ = self.now
        row = None if search is None else search[0]
        self.move_on("refine", round=(labels, row, result.rows.tolist()))
        self.n_rounds += 1

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
            latest = (*self.now[2][:2], result.rows.tolist())
            self.move_on(action, round=latest, rules=rules)
            self.n_switched += 1

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
        labels, search, latest, rules = self.now
        assert {each.box.ranges: each.state for each in session.rules} == rules
        assert {row: session.labels.get(row) for row in session.labels.rows.tolist()} == labels
        assert session.query_text == ("" if search is None else f"more like row {search[0]}")
        if search is None:
            assert session.hits is None
        else:
            assert session.hits.rows.tolist() == nearest(*search)
        row = None if search is None else search[0]
        assert session.is_stale == (latest is not None and latest[:2] != (labels, row))
        if latest is None:
            assert session.result is None
        else:
            assert session.result.rows.tolist() == latest[2]
            listed = {b.box.ranges: b.state for b in session.result.branches if b.box is not None}
            assert {box: listed[box] for box in rules} == rules
        assert session.can_undo == (self.place > 0)
        assert session.can_redo == (self.place + 1 < len(self.states))
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
