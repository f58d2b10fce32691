"""Videos of episodes: what the policy saw, with instruction, step, action and outcome drawn below it.

One mp4 (H.264, yuv420p, plays in browsers) per episode with exactly steps + 1 frames, or a grid of many episodes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import imageio_ffmpeg
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from robot_forgetting.errors import UserError

FPS = 10
PIXELS = 384  # edge of the drawn picture; even, as yuv420p demands
BAR = 96  # height of the text bar below it
BACKGROUND, INK, FAINT = (24, 26, 30), (240, 240, 240), (150, 155, 165)
SUCCESS, FAILURE = (86, 180, 233), (230, 159, 0)  # Okabe and Ito's blue and orange: apart for colour-blind eyes too
LEAST = 1e-3  # of an action, metres or radians: less is no motion
DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "grip")


@dataclass(frozen=True)
class Recording:
    """One episode: frames [L+1, H, W, 3] uint8, and how it ended.

    label: a word drawn on its tile of a grid, such as "base, seed 3"
    """

    frames: Sequence[np.ndarray]
    success: bool
    label: str = ""


def video_name(task: str, seed: int, who: str, success: bool) -> str:
    """``<task>-seed<seed>-<base or method>-<success or failure>.mp4``."""
    parts = [task, f"seed{seed}", who, "success" if success else "failure"]
    return "-".join(re.sub(r"[^\w.+]+", "_", part) for part in parts) + ".mp4"


def draw(
    frame: np.ndarray,
    instruction: str,
    step: int,
    action: Sequence[float] | None,
    outcome: bool | None,
    *,
    steps: int | None = None,
    pixels: int = PIXELS,
) -> np.ndarray:
    """A frame [H, W, 3] uint8, enlarged to pixels x pixels with a text bar below: [pixels + BAR, pixels, 3] uint8.

    action: the command about to be executed, one small bar per dimension (full height = 1, see ``heights``); None at
        the end
    outcome: None while the episode runs
    """
    canvas = Image.new("RGB", (pixels, pixels + BAR), BACKGROUND)
    canvas.paste(_enlarge(frame, pixels), (0, 0))
    pen = ImageDraw.Draw(canvas)
    pen.text((10, pixels + 8), _fit(instruction, pixels - 20, 16), fill=INK, font=_font(16))
    count = f"step {step}" + ("" if steps is None else f" of {steps}")
    pen.text((10, pixels + 36), count, fill=FAINT, font=_font(14))
    if outcome is not None:
        word, colour = ("success", SUCCESS) if outcome else ("failure", FAILURE)
        pen.rounded_rectangle((10, pixels + 60, 96, pixels + 86), radius=5, fill=colour)
        pen.text((53, pixels + 73), word, fill=(0, 0, 0), font=_font(15), anchor="mm")
        pen.rectangle((0, 0, pixels - 1, pixels - 1), outline=colour, width=4)
    if action is not None:
        _draw_action(pen, np.asarray(action, dtype=float), left=128, right=pixels - 10, top=pixels + 34)
    return np.asarray(canvas)


def write_episode(
    path: str | Path,
    frames: Sequence[np.ndarray],
    instruction: str | Sequence[str],
    actions: np.ndarray,
    success: bool,
    *,
    fps: float = FPS,
    pixels: int = PIXELS,
) -> Path:
    """Writes one mp4 of L + 1 frames for L actions, reads it back, and returns its path.

    instruction: one for all frames, or one for each

    Raises ``UserError`` where a frame is blank (the renderer does not work), frames and actions do not belong together,
    or the file could not be written.
    """
    actions = np.asarray(actions)
    if len(frames) != len(actions) + 1:
        raise UserError(f"{path}: {len(frames)} frames for {len(actions)} actions; an episode has one frame more")
    check_frames(frames, path)
    last = len(actions)
    said = [instruction] * len(frames) if isinstance(instruction, str) else instruction
    bars = heights(actions)
    pictures = (
        draw(
            frame,
            said[step],
            step,
            bars[step] if step < last else None,
            bool(success) if step == last else None,
            steps=last,
            pixels=pixels,
        )
        for step, frame in enumerate(frames)
    )
    return _write(Path(path), pictures, len(frames), fps)


def heights(actions: np.ndarray) -> np.ndarray:
    """Actions [L, A] as bars in [-1, 1]: whatever the units, the greatest of an episode has full height.

    Of a manipulator's seven, the three translations have one scale and the three rotations another. An episode that
    hardly moves (``LEAST``) shows that.
    """
    sizes = np.abs(np.nan_to_num(actions.astype(float))).max(axis=0, initial=0.0)
    if len(sizes) == len(DIMENSIONS):
        sizes = np.repeat([sizes[:3].max(), sizes[3:6].max(), sizes[6]], [3, 3, 1])
    return actions / np.maximum(sizes, LEAST)


def write_grid(
    path: str | Path, episodes: Sequence[Recording], *, title: str = "", fps: float = FPS, pixels: int = 160
) -> Path:
    """Writes many episodes side by side; one that has ended shows its last frame in the colour of its outcome."""
    if not episodes:
        raise UserError(f"{path}: no episode to draw; record at least one")
    for episode in episodes:
        check_frames(episode.frames, path)
    columns = math.ceil(math.sqrt(len(episodes)))
    rows = math.ceil(len(episodes) / columns)
    header, gap = (34 if title else 0), 4
    width, height = columns * (pixels + gap) + gap, header + rows * (pixels + gap) + gap
    length = max(len(episode.frames) for episode in episodes) + round(fps)  # the end stays for a second

    def pictures() -> Iterator[np.ndarray]:
        for step in range(length):
            canvas = Image.new("RGB", (width + width % 2, height + height % 2), BACKGROUND)
            pen = ImageDraw.Draw(canvas)
            if title:
                pen.text((8, 8), _fit(title, width - 16, 16), fill=INK, font=_font(16))
            for index, episode in enumerate(episodes):
                x, y = gap + index % columns * (pixels + gap), header + gap + index // columns * (pixels + gap)
                ended = step >= len(episode.frames) - 1
                canvas.paste(_enlarge(episode.frames[-1 if ended else step], pixels), (x, y))
                if ended:
                    colour, word = (SUCCESS, "success") if episode.success else (FAILURE, "failure")
                    pen.rectangle((x, y, x + pixels - 1, y + pixels - 1), outline=colour, width=4)
                    pen.rectangle((x + 4, y + pixels - 22, x + 60, y + pixels - 5), fill=colour)
                    pen.text((x + 32, y + pixels - 13), word, fill=(0, 0, 0), font=_font(12), anchor="mm")
                if episode.label:
                    text = _fit(episode.label, pixels - 20, 12)
                    pen.rectangle((x + 4, y + 4, x + 12 + _font(12).getlength(text), y + 20), fill=BACKGROUND)
                    pen.text((x + 8, y + 12), text, fill=INK, font=_font(12), anchor="lm")
            yield np.asarray(canvas)

    return _write(Path(path), pictures(), length, fps)


def check_frames(frames: Iterable[np.ndarray], name: object = "video") -> None:
    """Raises ``UserError`` for a frame that is not uint8 [H, W, 3] or is of one colour."""
    for index, frame in enumerate(frames):
        frame = np.asarray(frame)
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[-1] != 3:
            raise UserError(f"{name}: frame {index} is {frame.dtype} {list(frame.shape)}; expected uint8 [H, W, 3]")
        if frame.std(axis=(0, 1)).max() < 1.0:
            raise UserError(
                f"{name}: frame {index} is blank; the renderer does not work, see `robot-forgetting doctor`"
            )


def count_frames(path: str | Path) -> int:
    """The number of frames that really decode from a video; 0 where the file is broken."""
    command = [_ffmpeg(), "-v", "error", "-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough"]
    result = subprocess.run([*command, "-f", "framemd5", "-"], capture_output=True, text=True, check=False)
    return sum(not line.startswith("#") for line in result.stdout.splitlines())


def _write(path: Path, pictures: Iterable[np.ndarray], expected: int, fps: float) -> Path:
    pictures = iter(pictures)
    first = next(pictures)
    height, width = first.shape[:2]
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.mp4")  # ffmpeg tells the format from the ending
    command = [_ffmpeg(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(fps), "-i", "-", "-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "23"]
    command += ["-preset", "veryfast", "-threads", "1", "-movflags", "+faststart", str(temporary)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # ffmpeg says why it failed on its error stream, a file because a pipe that nobody empties could block it.
        with tempfile.TemporaryFile() as log:
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=log) as process:
                with contextlib.suppress(BrokenPipeError):
                    for picture in itertools.chain([first], pictures):
                        process.stdin.write(np.ascontiguousarray(picture).tobytes())
                    process.stdin.close()
            log.seek(0)
            said = " ".join(log.read().decode(errors="replace").split())
        if process.returncode != 0:
            raise OSError(errno.ENOSPC if "No space left" in said else errno.EIO, said[-200:] or "ffmpeg failed")
        found = count_frames(temporary)
        if found != expected:
            raise UserError(f"{path}: {found} of {expected} frames could be read back; record it again")
        os.replace(temporary, path)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        reason = "the disk is full; free some space" if full else f"{error.strerror}; choose another output"
        raise UserError(f"{path} could not be written: {reason}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    return path


def _ffmpeg() -> str:
    return imageio_ffmpeg.get_ffmpeg_exe()


def _enlarge(frame: np.ndarray, pixels: int) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(frame)).resize((pixels, pixels), Image.Resampling.LANCZOS)


def _draw_action(pen: ImageDraw.ImageDraw, action: np.ndarray, left: int, right: int, top: int) -> None:
    """One bar per dimension from a middle line, up for positive; what exceeds 1 is cut at full height."""
    pitch, half = (right - left) / max(len(action), 1), 18
    middle = top + half
    pen.line((left, middle, right, middle), fill=FAINT)
    names = DIMENSIONS if len(action) == len(DIMENSIONS) else [str(i) for i in range(len(action))]
    for i, (value, name) in enumerate(zip(action, names, strict=True)):
        x = left + (i + 0.5) * pitch
        end = middle - half * float(np.clip(np.nan_to_num(value), -1, 1))
        pen.rectangle((x - 6, min(middle, end), x + 6, max(middle, end)), fill=INK)
        pen.text((x, middle + half + 9), name, fill=FAINT, font=_font(11), anchor="mm")


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # comes with Pillow: no system font is needed


def _fit(text: str, width: int, size: int) -> str:
    font = _font(size)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."
