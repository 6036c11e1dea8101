"""Tests marked ``pairs`` are thinned out before options such as ``-m "not slow"`` choose among them."""

import pytest
from covering import mark_slow_beyond_pairs


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    mark_slow_beyond_pairs(items)
