from __future__ import annotations

import os
from pathlib import Path

import pytest

# As the command line sets it: some tests fork, and a forked child hangs where its parent's OpenMP has threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from robot_forgetting.api.composing import register_resolvers  # noqa: E402

register_resolvers()  # for tests that compose a configuration without the command line


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference data beside the repository; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("ROBOT_FORGETTING_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip("no reference data: set ROBOT_FORGETTING_SHARED to its folder")
    return folder


@pytest.fixture
def nothing_built(monkeypatch):
    """A command that would build a part of an experiment fails."""

    def build(*_):
        raise AssertionError("something was built")

    monkeypatch.setattr("robot_forgetting.api.arguments.Arguments._build", build)


@pytest.fixture
def no_renderer(monkeypatch):
    """Looking for a Vulkan device takes seconds and the toy draws its own pictures."""
    monkeypatch.setattr("robot_forgetting.machine.doctor.render_backend", dict)


@pytest.fixture(scope="session")
def renderer():
    from robot_forgetting.machine import doctor

    if (check := doctor.vulkan_device()).state == "FAIL":
        pytest.skip(str(check))


@pytest.fixture(scope="module")
def bundle(shared):
    """SimplerEnv's assets, where the package looks for them."""
    from bridge_tasks import unpacked

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MS_ASSET_DIR", str(unpacked(shared)))
        yield Path(os.environ["MS_ASSET_DIR"])


@pytest.fixture(scope="module")
def players(renderer, bundle):
    """One simulation per SimplerEnv task, built when first needed."""
    from robot_tasks import configured

    from robot_forgetting.conformance.recordings import Player

    made = {}

    def get(name: str) -> Player:
        if name not in made:
            made[name] = Player(configured(name))
        return made[name]

    yield get
    for player in made.values():
        player.close()


@pytest.fixture
def blind(monkeypatch):
    """Without pictures, where only the physics matters."""
    from robot_forgetting.tasks.simulator.simulation import Simulation

    monkeypatch.setattr(Simulation, "observe", lambda self: {})
