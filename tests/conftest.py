"""Tests marked `gpu` need CUDA; property tests have no deadline, since other processes share the machine."""

import signal

import hypothesis
import pytest

# A shell's & has what it starts ignore Ctrl-C, and so would the commands that tests start and then interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile("megalm", deadline=None)
hypothesis.settings.load_profile("megalm")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only where a collected test needs it: it takes seconds

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
