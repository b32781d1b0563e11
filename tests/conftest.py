"""Every test has a catalog of its own, and no settings from outside."""

import os

# Before torch and faiss are imported: the tests are small, and threads that wait for each other slow them threefold.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def _own_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DINOV2_") and name != "DINOV2_GOLDEN":
            monkeypatch.delenv(name)
    monkeypatch.setenv("DINOV2_CATALOG", str(tmp_path / ".dinov2" / "catalog.duckdb"))
