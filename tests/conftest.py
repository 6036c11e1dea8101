"""What all tests share: pairs are thinned out, and the memory of kernels is poisoned on demand.

Tests marked ``pairs`` are thinned out before options such as ``-m "not slow"`` choose among them.
"""

import warnings

import pytest
import torch
from covering import mark_slow_beyond_pairs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    mark_slow_beyond_pairs(items)


@pytest.fixture
def poisoned():
    """Memory that nobody has written to is full of NaN, so that what is read of it shows."""
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        yield
    torch.use_deterministic_algorithms(enabled, warn_only=warns)
