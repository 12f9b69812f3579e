"""What every test gets: no GPU tests without a GPU, and property tests that repeat exactly where CI is set."""

import gc
import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

# The first call of a torch operation may take seconds, which no deadline for one example can know.
hypothesis.settings.register_profile("local", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bits are compared at one intra-op thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_configure() -> None:
    """Ctrl-C works in tests also where the shell that started them ignores it, as it does for background jobs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported stays, so the garbage collector need not walk its half a million objects again and again.

    Compiling a model makes so many objects that collections, at Python's thresholds, were a tenth of a test's time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if "gpu" in item.keywords]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
