"""Settings for all tests: no network, few threads, the same numbers every time, GPU tests skipped in sight.

Environment: ``HYPOTHESIS_PROFILE``: "ci" (25 examples of each drawn test, the default), "thorough" (500,
other ones each time), "short" (10, in `make test`) or "few" (5).
"""

from __future__ import annotations

import os
import signal

# In the background, tests inherit that Ctrl-C is ignored, and so would the commands that they interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Before any test imports torch or tokenizers. The workers of pytest-xdist share the cores out.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch
from hypothesis import HealthCheck, settings
from strategies import OWN, SLOW

if not torch.cuda.is_available():  # before anything imports triton: its kernels run as NumPy
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Time limits for single examples say more about the machine's other work than about the code.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("ci", max_examples=25, derandomize=True, **_common)
settings.register_profile("short", max_examples=10, derandomize=True, **_common)
settings.register_profile("few", max_examples=5, derandomize=True, **_common)
settings.register_profile("thorough", max_examples=500, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)  # a test draws the same numbers whatever ran before it in this process


@pytest.hookimpl(tryfirst=True)  # before -m chooses by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if getattr(getattr(item, "obj", None), "is_hypothesis_test", False):
            item.add_marker(pytest.mark.drawn)
        family = getattr(getattr(item, "callspec", None), "params", {}).get("family")
        if family in SLOW and item.path.stem not in OWN:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and this machine has none")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
