from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("ROBOT_FORGETTING_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip("no reference data: set ROBOT_FORGETTING_SHARED to its folder")
    return folder
