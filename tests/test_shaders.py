"""The minimal shader without its lookup table differs from SAPIEN's own in nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from robot_forgetting.machine import shaders

sapien = pytest.importorskip("sapien")
SHADERS = Path(sapien.__file__).parent / "vulkan_shader"


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_only_the_table_is_taken_out(cache):
    folder = shaders.without_table(SHADERS, "1")
    assert folder == cache / "robot_forgetting" / "shaders-1" / "minimal"
    for path in (SHADERS / "minimal").iterdir():
        ours = (folder / path.name).read_text()
        assert "samplerBRDFLUT" not in ours
        changed = set(path.read_text().splitlines()) ^ set(ours.splitlines())
        assert all("BRDFLUT" in line or "vec2(0.0)" in line for line in changed)
    assert shaders.without_table(SHADERS, "1") == folder  # from the cache
    assert os.listdir(cache / "robot_forgetting") == ["shaders-1"]


def test_an_unknown_shader_is_left_alone(cache, tmp_path):
    (tmp_path / "minimal").mkdir()
    (tmp_path / "minimal" / "gbuffer.frag").write_text("void main() {}")
    assert shaders.without_table(tmp_path, "2") is None


def test_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(shaders.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert (shaders.without_table(SHADERS, "3") / "gbuffer.frag").is_file()
