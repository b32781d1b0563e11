"""Each test has its own catalog, and no settings of the environment or of an earlier test."""

import os

# Before torch and faiss are imported: small tests are three times slower when threads wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from dinov2_toolkit import console  # noqa: E402
from dinov2_toolkit.features.image_server import server  # noqa: E402
from dinov2_toolkit.tests import bad_decoders  # noqa: E402
from dinov2_toolkit.tests.browser import chromium, open_page  # noqa: E402, F401


@pytest.fixture(autouse=True)
def _own_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DINOV2_") and name != "DINOV2_GOLDEN":
            monkeypatch.delenv(name)
    console.set_verbosity(quiet=False, verbose=0)
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / ".dinov2" / "catalog.duckdb"))


@pytest.fixture
def odd_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the processes that decode know a format whose decoder crashes or hangs: files that begin with ODD."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(Path(bad_decoders.__file__).read_text() + "\nregister()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{os.environ.get('PYTHONPATH', '')}")
    server.stop()
    yield
    server.stop()
