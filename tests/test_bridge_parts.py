"""Parts of SimplerEnv's WidowX tasks that need no simulator: states, commands, assets, the spoon's shape."""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import io
import zipfile

import numpy as np
import pytest

from robot_forgetting.errors import UserError
from robot_forgetting.machine import assets
from robot_forgetting.tasks.simulator.conventions import Boundary, euler_angles, rotation_vector
from robot_forgetting.tasks.simulator.grid import Grid
from robot_forgetting.tasks.simulator.pictures import Overlay
from robot_forgetting.tasks.simulator.robots import ROBOTS, find_robot
from robot_forgetting.tasks.widowx import spoon

SQUARE = np.array([[[-0.235, -0.075], [-0.235, 0.075]], [[-0.085, 0.075], [-0.235, 0.075]]])
TURNS = np.array([[[0, 0, 0, 1], [1, 0, 0, 0]], [[np.sqrt(0.5), 0, 0, -np.sqrt(0.5)], [1, 0, 0, 0]]])
BOX = ((-0.26, -0.06), (-0.11, 0.11))


@pytest.fixture
def grid():
    return Grid(SQUARE, TURNS, source=BOX, target=BOX, apart=0.1, turn=0.4, held_out=(0.02, 0.02))


# ---- initial states


@pytest.mark.parametrize(
    "seed, given, expected",
    [(1_000_000, None, 0), (1_000_003, None, 3), (1_000_006, None, 2), (5, 3, 3), (1_000_000, 7, 3)],
)
def test_configurations(grid, seed, given, expected):
    """Places change slower than turns, as in the original."""
    configuration, places, turns = grid.state(seed, given)
    assert configuration == expected and len(grid) == 4
    assert np.array_equal(places, SQUARE[expected // 2]) and np.array_equal(turns, TURNS[expected % 2])


def test_training_states_keep_away_from_the_grid(grid):
    states = [grid.state(seed) for seed in range(400)]
    assert {configuration for configuration, _, _ in states} == {-1}
    places = np.stack([places for _, places, _ in states])
    away = np.linalg.norm(places[:, None] - SQUARE[None], axis=-1)
    assert away.min() >= 0.02 and np.linalg.norm(places[:, 0] - places[:, 1], axis=1).min() >= 0.1
    assert np.ptp(places[..., 0]) > 0.19 and np.ptp(places[..., 1]) > 0.21  # wider than the grid's 0.15
    turned = np.stack([turns[0] for _, _, turns in states])
    assert np.allclose(np.linalg.norm(turned, axis=1), 1)
    degrees = np.degrees(2 * np.arctan2(turned[:, 3], turned[:, 0])) % 360
    assert np.minimum(np.abs(degrees - 180), np.abs(degrees - 270)).max() <= np.degrees(0.4) + 1e-6
    again = grid.state(11)
    assert np.array_equal(again[1], states[11][1]) and np.array_equal(again[2], states[11][2])


# ---- commands


RIGHT = np.pi / 2
HAND_COMPUTED = {
    "none": ([0, 0, 0], [0, 0, 0]),
    "roll": ([0.3, 0, 0], [0.3, 0, 0]),
    "pitch": ([0, -0.2, 0], [0, -0.2, 0]),
    "yaw": ([0, 0, RIGHT], [0, 0, RIGHT]),
    # q = qy qx = (1/2)(1 + j)(1 + i) = (1 + i + j - k) / 2: 120 degrees about (1, 1, -1) / sqrt(3)
    "roll and pitch": ([RIGHT, RIGHT, 0], np.array([1, 1, -1]) * np.radians(120) / np.sqrt(3)),
    # q = qz qx = (1/2)(1 + k)(1 + i) = (1 + i + j + k) / 2: 120 degrees about (1, 1, 1) / sqrt(3)
    "roll and yaw": ([RIGHT, 0, RIGHT], np.array([1, 1, 1]) * np.radians(120) / np.sqrt(3)),
}


@pytest.mark.parametrize("angles, vector", HAND_COMPUTED.values(), ids=HAND_COMPUTED)
def test_euler_angles_to_rotation_vector(angles, vector):
    assert np.allclose(rotation_vector(np.array(angles, float)), vector)


def test_the_conversion_is_simpler_envs():
    """transforms3d's ``euler2axangle``, which its wrapper calls."""
    transforms = pytest.importorskip("transforms3d.euler")
    for angles in np.random.default_rng(0).uniform(-0.4, 0.4, (20, 3)):
        axis, angle = transforms.euler2axangle(*angles)
        assert np.allclose(rotation_vector(angles), axis * angle)
        assert np.allclose(euler_angles(rotation_vector(angles)), angles)


@pytest.mark.parametrize("given, expected", [(0.51, 1), (0.5, -1), (0.0, -1), (1.0, 1)])
def test_gripper_of_openvla(given, expected):
    """SimplerEnv: ``2.0 * (open_gripper > 0.5) - 1.0``."""
    boundary = Boundary(ROBOTS["widowx"], "euler_xyz", "1 opens, 0 closes")
    command = np.array([0.01, 0.02, 0.03, 0.1, 0, 0, given])
    assert np.allclose(boundary.to_robot(command), [0.01, 0.02, 0.03, 0.1, 0, 0, expected])
    assert command[6] == given  # not changed in place
    assert boundary.to_policy(np.array([0, 0, 0, 0, 0, 0, -1.0]))[6] == 0


@pytest.mark.parametrize("robot", ["panda", "widowx"])
def test_own_conventions_pass_unchanged(robot):
    command = np.linspace(-1, 1, 7)
    assert Boundary(ROBOTS[robot]).to_robot(command) is command
    assert Boundary(ROBOTS[robot], ROBOTS[robot].rotation, ROBOTS[robot].gripper).to_policy(command) is command


def test_what_cannot_be_converted():
    with pytest.raises(UserError, match="unknown rotation 'axis_angle'; choose one of: euler_xyz"):
        Boundary(ROBOTS["panda"], "axis_angle")
    with pytest.raises(UserError, match="unknown robot 'r2d2'; choose one of: .*panda"):
        find_robot("r2d2")
    with pytest.raises(UserError, match="is a dict; a robot is"):
        find_robot("robot_forgetting.tasks.simulator.robots.ROBOTS")


# ---- photos


def test_overlay():
    photo, picture = np.full((1, 3, 3), 9, np.uint8), np.full((1, 3, 3), 200, np.uint8)
    shown = Overlay(photo, kept=[4, 17]).over(picture, np.array([[4, 5, 17]], np.int16))
    assert shown[0, :, 0].tolist() == [200, 9, 200] and shown.dtype == np.uint8


# ---- assets


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A bundle of one file, and an empty asset folder."""
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path / "assets"))
    archive = tmp_path / "small.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("ManiSkill-Thing-1/thing.urdf", "<robot/>")
    source = assets.Source(archive.as_uri(), hashlib.sha256(archive.read_bytes()).hexdigest(), "robots/thing")
    bundle = assets.Bundle((source,), ("robots/thing/thing.urdf",))
    monkeypatch.setitem(assets.BUNDLES, "small", bundle)
    return bundle


def test_download(small, monkeypatch, capsys):
    asked = []
    with pytest.raises(UserError, match="nothing was downloaded; type it again with yes=true"):
        assets.fetch("small", ask=lambda text: asked.append(text) or "n")
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with pytest.raises(UserError, match="nothing was downloaded; type it again with yes=true"):
        assets.fetch("small")
    assert "small.zip" in asked[0] and "[y/N]" in asked[0]
    assert assets.missing("small") == ["robots/thing/thing.urdf"]
    assert assets.fetch("small", ask=lambda text: "y") == 0 and not assets.missing("small")
    assert (assets.data_folder() / "robots/thing/thing.urdf").read_text() == "<robot/>"
    assert assets.fetch("small", yes=True) == 0 and "are in" in capsys.readouterr().err


def test_another_checksum(small, monkeypatch):
    changed = dataclasses.replace(small.sources[0], sha256="0" * 64)
    monkeypatch.setitem(assets.BUNDLES, "small", dataclasses.replace(small, sources=(changed,)))
    with pytest.raises(UserError, match="another checksum than expected"):
        assets.fetch("small", yes=True)
    assert assets.missing("small")


def test_no_network(small, monkeypatch):
    gone = dataclasses.replace(small.sources[0], url="file:///no/such/file.zip")
    monkeypatch.setitem(assets.BUNDLES, "small", dataclasses.replace(small, sources=(gone,)))
    with pytest.raises(UserError, match="cannot download file:///no/such/file.zip .*folder=FOLDER"):
        assets.fetch("small", yes=True)


def test_a_download_that_breaks_off(small, monkeypatch):
    def broken(url, timeout):
        raise http.client.IncompleteRead(b"half", 9)

    monkeypatch.setattr("urllib.request.urlopen", broken)
    with pytest.raises(UserError, match="cannot download file:.*IncompleteRead.*folder=FOLDER"):
        assets.fetch("small", yes=True)


@pytest.mark.parametrize("layout", ["data", ".", "archive"])
def test_offline(small, tmp_path, layout):
    copy = tmp_path / "copy"
    root = copy / "data" if layout != "." else copy
    (root / "robots" / "thing").mkdir(parents=True)
    (root / "robots" / "thing" / "thing.urdf").write_text("<robot/>")
    if layout == "archive":
        import tarfile

        with tarfile.open(tmp_path / "copy.tar.gz", "w:gz") as opened:
            opened.add(copy / "data", "data")
        copy = tmp_path / "copy.tar.gz"
    assert assets.fetch("small", copy) == 0 and not assets.missing("small")


def test_offline_folders_that_lack_it(small, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        assets.fetch("small", tmp_path / "no")
    with pytest.raises(UserError, match="thing.urdf is not in"):
        (tmp_path / "empty").mkdir()
        assets.fetch("small", tmp_path / "empty")
    (tmp_path / "broken.zip").write_text("no zip")
    with pytest.raises(UserError, match="cannot be unpacked"):
        assets.fetch("small", tmp_path / "broken.zip")
    with pytest.raises(UserError, match="unknown assets 'panda'; choose one of: bridge"):
        assets.fetch("panda")


# ---- the spoon


def test_spoon_parts():
    """43.0 g at 1200 kg/m3, centre of mass 8.7 mm along x (measured in SAPIEN 2.2.2)."""
    from scipy.spatial import ConvexHull, Delaunay

    volumes, moments = [], []
    for points in spoon.vertices():
        hull = points[ConvexHull(points).vertices]
        for corners in hull[Delaunay(hull).simplices]:
            volumes.append(abs(np.linalg.det(corners[1:] - corners[0])) / 6)
            moments.append(volumes[-1] * corners.mean(axis=0))
    assert len(spoon.PARTS) == 4
    assert sum(volumes) * 1200 == pytest.approx(0.0430, abs=2e-4)
    assert (np.sum(moments, axis=0) / sum(volumes))[0] == pytest.approx(0.0087, abs=3e-4)
    text = spoon.write_mesh().read_text()
    assert text.count("\no ") + text.startswith("o ") == 4 and text.count("\nv ") == 161
