"""What holds for all tests. vLLM's and the browser's are collected where vLLM or selenium is installed; .ci/run gives each of
them an environment of its own."""

import importlib.util
import os

import pytest

# Threads that wait sleep instead of spinning, here and in every process that a test starts: on a busy machine spinning
# makes small models tens of times slower. Read when torch is loaded, so set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KMP_BLOCKTIME", "0")
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")  # as gpu.init() has it for tiny models; some tests make these themselves

APART = {"vllm": "test_vllm.py", "selenium": "test_browser.py"}
collect_ignore = [file for package, file in APART.items() if not importlib.util.find_spec(package)]


@pytest.fixture
def gym_of(monkeypatch):
    """f(train, test) -> the world reasoning_gym with data sets of that size, which it forgets after the test."""
    from common.worlds import reasoning_gym as world

    def small(train, test):
        monkeypatch.setattr(world, "N_TRAIN", train)
        monkeypatch.setattr(world, "HELD_OUT", test)
        world._data.cache_clear()
        return world

    yield small
    world._data.cache_clear()
