"""Fixtures every test file shares."""

import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture
def rng():
    """Return a generator seeded anew for each test."""
    return np.random.default_rng(20240613)
