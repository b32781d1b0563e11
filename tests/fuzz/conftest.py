"""One folder of real files serves all tests of damaged files."""

from pathlib import Path

import pytest

from dinov2_toolkit.tests.fuzz.workspace import build


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the working folder that `trials` fills anew for each."""
    return build(tmp_path_factory.mktemp("fuzz"))
