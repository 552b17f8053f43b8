"""The corpus and the tiny runs of tests/training."""

from tests.training.conftest import corpus, settings  # noqa: F401
