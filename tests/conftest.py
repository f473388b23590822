"""What all tests share: one thread, since two threads on tiny tensors only wait for each other, and the same examples.

A property is tried on the same examples every time, so that a run is red only for a change; `pytest -m slow` and
`--hypothesis-profile=default` look for new ones.
"""

import pytest
import torch
from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)


def pytest_configure(config):
    named = config.getoption("--hypothesis-profile")
    settings.load_profile(named or ("default" if config.getoption("-m") == "slow" else "same"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
