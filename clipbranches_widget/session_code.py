"""A session's state as the code of one cell that makes it anew (layer 3). Pure: no I/O.

Everything a person typed or a catalog holds is written with `repr`, which leaves no line break
and no quote open: texts cannot become code.
"""

from __future__ import annotations

import base64
import re
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from clipbranches_widget.labels import LabelSet

if TYPE_CHECKING:
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.session_events import Query, Rule, Search
    from clipbranches_widget.session_state import SessionState

_ROW = re.compile(r"more like row (\d+)\b")
_WIDTH = 88


def session_code(catalog: Catalog, state: SessionState, *, can_encode: bool) -> str:
    """Return Python source that opens the catalog and leads a new session to `state`.

    Parameters
    ----------
    catalog
        What is searched; named by its path.
    state
        Where the session stands.
    can_encode
        Whether a session that opens the catalog by its path can encode a text; where it cannot,
        the recorded embedding is written out.
    """
    vectors = any(
        _by_vector(catalog, query, can_encode=can_encode)
        for query in (state.query, None if state.round is None else state.round.query)
        if query is not None
    )
    lines = ["import base64", "", "import numpy as np", ""] if vectors else []
    lines += [
        "import clipbranches_widget as cb",
        *(["from clipbranches_widget.session_events import Rule"] if state.rules else []),
        "",
        f"catalog = cb.open({str(catalog.path)!r})",
        "session = cb.Session(catalog)",
        *_actions(catalog, state, can_encode=can_encode),
    ]
    return "\n".join(lines) + "\n"


def _actions(catalog: Catalog, state: SessionState, *, can_encode: bool) -> Iterator[str]:
    """Yield the calls: first what the latest round was computed from, then what changed since."""
    done, labels = state.round, LabelSet()
    asked: Query | None = None
    if state.filters:
        conditions = {one.column: one.condition for one in state.filters}
        yield f"session.filter({conditions!r})"
    if done is not None:
        if done.query is not None:
            k = state.search.k if state.search is not None else None
            yield _search(catalog, done.query, k, can_encode=can_encode)
            asked = done.query
        yield from _labelling(labels, done.labels)
        labels = done.labels
        yield from map(_rule, state.rules)
        threshold = "" if done.threshold is None else f"threshold={done.threshold!r}, "
        yield f"session.refine({threshold}seed={done.seed})"
    latest: Search | None = state.search
    if latest is not None and latest.query != asked:
        yield _search(catalog, latest.query, latest.k, can_encode=can_encode)
    yield from _labelling(labels, state.labels)
    if done is None:
        yield from map(_rule, state.rules)
    if latest is not None:
        yield "hits = session.hits"
    if done is not None:
        yield "result = session.result"


def _search(catalog: Catalog, query: Query, k: int | None, *, can_encode: bool) -> str:
    number = "" if k is None else f", k={k}"
    if _by_vector(catalog, query, can_encode=can_encode):
        literal = base64.b64encode(query.data).decode("ascii")
        pieces = "\n".join(f'    "{piece}"' for piece in textwrap.wrap(literal, _WIDTH - 6))
        return (
            f"data = (  # the embedding of {query.text[:200]!r}\n{pieces}\n)\n"
            'vector = np.frombuffer(base64.b64decode(data), dtype="<f4")\n'
            f"session.search(vector=vector{number})"
        )
    if query.kind == "text":
        return f"session.search({query.text!r}{number})"
    return f"session.search(row={_row(catalog, query)}{number})"


def _by_vector(catalog: Catalog, query: Query, *, can_encode: bool) -> bool:
    """Return whether a query has to be written out as numbers."""
    if query.kind == "text":
        return not can_encode
    return query.kind != "row" or _row(catalog, query) is None


def _row(catalog: Catalog, query: Query) -> int | None:
    """Return the row of a query by row, where the catalog still has it; else None."""
    named = _ROW.match(query.text)
    if named is None or int(named[1]) >= len(catalog):
        return None
    row = int(named[1])
    own = catalog.embeddings_of(row)[0].astype(np.float64)
    near = float(own @ query.vector) > (1 - 1e-4) * float(np.linalg.norm(own))
    return row if near else None


def _labelling(before: LabelSet, after: LabelSet) -> Iterator[str]:
    """Yield the calls that lead from some labels to others."""
    gone = np.setdiff1d(before.rows, after.rows)
    if gone.size:
        yield _call("unlabel", [("", gone.tolist())])
    yes = np.setdiff1d(after.positive, before.positive).tolist()
    no = np.setdiff1d(after.negative, before.negative).tolist()
    if yes or no:
        given = [(name, rows) for name, rows in (("positive=", yes), ("negative=", no)) if rows]
        yield _call("label", given)


def _call(name: str, arguments: list[tuple[str, list[int]]]) -> str:
    """Return a call with lists of rows, wrapped where it is long."""
    line = f"session.{name}({', '.join(f'{key}{rows}' for key, rows in arguments)})"
    if len(line) <= _WIDTH:
        return line
    wrapped = [
        textwrap.fill(f"{key}{rows},", _WIDTH, initial_indent="    ", subsequent_indent="        ")
        for key, rows in arguments
    ]
    return "\n".join([f"session.{name}(", *wrapped, ")"])


def _rule(rule: Rule) -> str:
    action = {"off": "switch_off", "pinned": "pin"}[rule.state]
    return f"session.{action}(Rule.from_dict({rule.to_dict()!r}))"
