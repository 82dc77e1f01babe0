"""Workers are killed in the middle of rounds: the work moves, and the answer is the same."""

import contextlib
import itertools
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cluster_rig import assert_same, kills_workers, labels_near
from distributed import Client, LocalCluster

import clipbranches_widget as cb
from clipbranches_widget.open_index import index_of
from clipbranches_widget.refine import refine
from clipbranches_widget.search import search

N_KILLS = 4


@pytest.fixture(scope="module")
def workers():
    """Two processes with nannies, which start a killed one anew."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as workers:
        yield workers


def kill(workers, client, rng):
    """Kill a worker's process as the kernel would, as soon as all are there."""
    while True:
        client.wait_for_workers(len(workers.workers), timeout=60)
        there = client.nthreads()
        nannies = [each for each in workers.workers.values() if each.worker_address in there]
        if len(nannies) == len(workers.workers) and (process := rng.choice(nannies).pid):
            with contextlib.suppress(ProcessLookupError):  # one that was killed just now
                return os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


@kills_workers
def test_a_worker_killed_at_any_stage_changes_nothing(workers, three_shards, rng):
    local = index_of(cb.open(three_shards))
    local.columns.loader.wait()
    labels = labels_near(local, 4)
    expected = refine(local, labels=labels)
    with Client(workers) as client:
        far = index_of(cb.open(three_shards, client=client))
        for stage in ("teacher", "sample", "index", "rank"):
            killed = []

            def progress(name, _fraction, stage=stage, killed=killed):
                if name == stage:
                    kill(workers, client, rng)
                    killed.append(name)

            assert_same(refine(far, labels=labels, progress=progress), expected)
            assert killed == [stage]


@kills_workers
def test_workers_killed_at_random_moments_change_nothing(workers, three_shards, rng):
    local = index_of(cb.open(three_shards))
    local.columns.loader.wait()
    every = [labels_near(local, int(row)) for row in rng.integers(0, 28_000, 4)]
    vectors = rng.normal(size=(4, 16))
    expected = [
        (vector, search(local.catalog, vector, 60), labels, refine(local, labels=labels))
        for vector, labels in zip(vectors, every, strict=True)
    ]
    with Client(workers) as client, ThreadPoolExecutor(1) as pool:
        far = index_of(cb.open(three_shards, client=client))

        def kill_some():
            for _ in range(N_KILLS):
                time.sleep(rng.uniform(0, 0.5))  # any moment of a round
                kill(workers, client, rng)

        killer = pool.submit(kill_some)
        for n, (vector, hits, labels, answer) in enumerate(itertools.cycle(expected), start=1):
            assert_same(search(far.catalog, vector, 60), hits)
            assert_same(refine(far, labels=labels), answer)
            assert len(np.unique(answer.rows)) == len(answer) > 0
            if killer.done() and n >= len(expected):
                break
        killer.result()
