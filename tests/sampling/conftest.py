"""Small random models of every role."""

import pytest

from tiny import loud


@pytest.fixture(scope="session")
def tiny():
    """Build a model: ``tiny("prior", classes=4)``."""
    return loud
