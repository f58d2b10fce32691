"""SimplerEnv's WidowX tasks and assets, for tests."""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from pathlib import Path

import pytest

RUNNABLE = ("widowx_carrot_on_plate", "widowx_spoon_on_towel", "widowx_stack_cube")  # the eggplant's mesh is missing


def unpacked(shared: Path) -> Path:
    """The bundle's folder, unpacked once per machine; a half-unpacked one is never seen."""
    archive = shared / "assets" / "simpler_assets.tar.gz"
    if not archive.is_file():
        pytest.skip(f"no {archive}: SimplerEnv's tasks need its meshes")
    name = hashlib.sha256(f"{archive.stat().st_size}".encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"robot_forgetting_assets_{name}_{os.getuid()}"
    if not folder.is_dir():
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        with tarfile.open(archive) as opened:
            opened.extractall(scratch, filter="data")
        try:
            scratch.rename(folder)
        except OSError:  # another test process was faster
            pass
    return folder
