"""Fixtures every test file shares."""

import gc

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture
def rng():
    """Return a generator seeded anew for each test."""
    return np.random.default_rng(20240613)


@pytest.fixture(scope="session")
def three_shards(tmp_path_factory):
    """Return the path of a catalog of three shards with removed rows, large enough for graphs."""
    from cluster_rig import build, remove_some

    path = tmp_path_factory.mktemp("catalogs") / "three.cbcat"
    build(path, 28_000, 12_000)
    return remove_some(path)


@pytest.fixture
def nothing_left():
    """Collect what a test left, as long as its filters of warnings hold."""
    yield
    gc.collect()


@pytest.fixture
def comm_class():
    """Return what stands for the channel to the browser: one to nowhere."""
    from explorer_rig import SilentComm

    return SilentComm


@pytest.fixture
def explore(monkeypatch, comm_class):
    """Return a function that makes an Explorer without a browser; all closed at the end."""
    import comm
    from explorer_rig import settle

    from clipbranches_widget.explorer import Explorer

    monkeypatch.setattr(comm, "create_comm", comm_class)
    made = []

    def make(source):
        made.append(Explorer(source))
        settle(made[-1])
        return made[-1]

    yield make
    for explorer in made:
        explorer.close()
