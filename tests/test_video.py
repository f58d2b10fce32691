"""Videos: every frame there, none blank, readable by anyone."""

from __future__ import annotations

import os
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest

from robot_forgetting.errors import UserError
from robot_forgetting.records.video import (
    BAR,
    Recording,
    check_frames,
    count_frames,
    draw,
    heights,
    video_name,
    write_episode,
    write_grid,
)


def episode(length: int, size: int = 64, seed: int = 0):
    generator = np.random.default_rng(seed)
    frames = np.full((length + 1, size, size, 3), 90, dtype=np.uint8)
    for step, frame in enumerate(frames):
        x = 4 + step * (size - 16) // max(length, 1)
        frame[20:30, x : x + 10] = (200, 60, 60)
    return frames, generator.uniform(-1.2, 1.2, size=(length, 7)).astype(np.float32)


def read(path):
    """The file's own description, and its frames decoded by ffmpeg."""
    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    said = subprocess.run([ffmpeg, "-i", str(path)], capture_output=True, text=True, check=False).stderr
    width, height = map(int, re.search(r", (\d+)x(\d+)", said).groups())
    command = [ffmpeg, "-v", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(command, capture_output=True, check=True).stdout
    return said, list(np.frombuffer(data, np.uint8).reshape(-1, height, width, 3))


@pytest.mark.parametrize(("length", "fps"), [(0, 10), (1, 10), (23, 5), (60, 30)])
def test_frame_count_is_steps_plus_one(tmp_path, length, fps):
    frames, actions = episode(length)
    path = write_episode(tmp_path / "new" / "a.mp4", frames, "stack the cube", actions, True, fps=fps, pixels=128)
    said, pictures = read(path)
    assert len(pictures) == length + 1 == count_frames(path)
    assert pictures[0].shape == (128 + BAR, 128, 3)
    assert all(word in said for word in ("h264", "yuv420p", f" {fps} fps"))
    for picture, frame in zip(pictures, frames, strict=True):
        assert picture[:128].std() > 3  # not blank
        middle = picture[8:120, 8:120].astype(float)  # the drawn frame is the given one
        assert np.abs(middle.mean() - np.repeat(np.repeat(frame, 2, 0), 2, 1)[8:120, 8:120].mean()) < 6
    assert [file.name for file in path.parent.iterdir()] == ["a.mp4"]


def test_outcome_shows_on_the_last_frame_only(tmp_path):
    frames, actions = episode(5)
    for success, dominant in ((True, 2), (False, 0)):  # blue, orange
        _, pictures = read(write_episode(tmp_path / "a.mp4", frames, "x", actions, success))
        corner = pictures[-1][384 + 62 : 384 + 66, 20:80].reshape(-1, 3).mean(0)
        assert corner.argmax() == dominant
        assert pictures[-2][384 + 62 : 384 + 66, 20:80].mean() < 60


def test_bars_of_actions_in_any_units():
    actions = np.array([[0.01, -0.04, 0.0, 0.1, 0.0, 0.2, 1.0], [0.02, 0.0, 0.0, 0.0, -0.05, 0.0, -1.0]])
    expected = [[0.25, -1.0, 0.0, 0.5, 0.0, 1.0, 1.0], [0.5, 0.0, 0.0, 0.0, -0.25, 0.0, -1.0]]
    assert np.allclose(heights(actions), expected)
    assert np.allclose(heights(np.array([[3.0, 0.0], [-1.5, 0.0]])), [[1.0, 0.0], [-0.5, 0.0]])
    assert heights(np.zeros((0, 7))).shape == (0, 7)


def test_instruction_step_and_action_change_the_picture():
    frame = episode(0)[0][0]
    reference = draw(frame, "a", 1, [0.5] * 7, None)
    assert reference.shape == (480, 384, 3)
    assert reference.dtype == np.uint8
    others = [
        draw(frame, "b", 1, [0.5] * 7, None),
        draw(frame, "a", 2, [0.5] * 7, None),
        draw(frame, "a", 1, [0.4] * 7, None),
        draw(frame, "a", 1, [0.5] * 7, True),
        draw(frame, "a", 1, None, None),
        draw(frame, "a " * 200, 1, [np.nan] * 7, False),  # too long is cut, not a number is no bar
    ]
    for other in others:
        assert (other != reference).any()


def test_each_frame_has_its_own_instruction(tmp_path, monkeypatch):
    drawn = []

    def noting(frame, instruction, *rest, **named):
        drawn.append(instruction)
        return draw(frame, instruction, *rest, **named)

    monkeypatch.setattr("robot_forgetting.records.video.draw", noting)
    frames, actions = episode(2)
    for said, expected in (("x", ["x"] * 3), (["open", "open", "place"], ["open", "open", "place"])):
        write_episode(tmp_path / "a.mp4", frames, said, actions, True)
        assert drawn == expected
        drawn.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frames: frames[:-1], "5 frames for 5 actions"),
        (lambda frames: np.concatenate([frames[:-1], np.zeros_like(frames[:1])]), "frame 5 is blank"),
        (lambda frames: np.full_like(frames, 255), "frame 0 is blank"),
        (lambda frames: frames.astype(np.float32), "expected uint8"),
        (lambda frames: frames[..., :1], "expected uint8"),
    ],
)
def test_bad_frames_are_refused(tmp_path, change, message):
    frames, actions = episode(5)
    with pytest.raises(UserError, match=message):
        write_episode(tmp_path / "a.mp4", change(frames), "x", actions, True)
    assert list(tmp_path.iterdir()) == []


def test_grid(tmp_path):
    episodes = [
        Recording(episode(length, seed=length)[0], length % 2 == 0, label=f"seed {length}")
        for length in (3, 8, 12, 5, 6)
    ]
    path = write_grid(tmp_path / "grid.mp4", episodes, title="base policy", fps=10, pixels=64)
    _, pictures = read(path)
    assert len(pictures) == 13 + 10
    assert all(edge % 2 == 0 for edge in pictures[0].shape[:2])
    tile = np.s_[34 + 10 : 34 + 60, 10:60]
    assert np.abs(pictures[5][tile].astype(int) - pictures[-1][tile]).mean() < 3  # ended at step 3: frozen since
    with pytest.raises(UserError, match="at least one"):
        write_grid(tmp_path / "none.mp4", [])


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    frames, actions = episode(2)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="disk is full"):
        write_episode(tmp_path / "a.mp4", frames, "x", actions, True)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    frames, actions = episode(4)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written: .*; choose another output"):
        write_episode(tmp_path / "file" / "a.mp4", frames, "x", actions, True)


def test_names():
    assert video_name("stack_cube", 3, "base", True) == "stack_cube-seed3-base-success.mp4"
    assert re.fullmatch(r"[\w.+-]+", video_name("my task/x", 3, "sft + kl", False))


def test_browsers_can_start_before_the_whole_file_is_there(tmp_path):
    frames, actions = episode(4)
    data = write_episode(tmp_path / "a.mp4", frames, "x", actions, True).read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    check_frames(frames)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(tmp_path / "a.mp4"), "-f", "null", "-"]
    assert subprocess.run(command, capture_output=True, check=True).stderr == b""
