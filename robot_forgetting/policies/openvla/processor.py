"""OpenVLA's transforms: pictures to pixel values, commands to action bins and back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from robot_forgetting.errors import UserError, check_choice

RESIZE_STRATEGIES = ("resize-naive", "letterbox", "resize-crop")


class ImageProcessor:
    """Pictures to the six-channel input: resized once, normalised for the DINOv2 and the SigLIP tower.

    strategy: "resize-naive" stretches to the square; "letterbox" pads to a square first; "resize-crop" resizes the
        shorter side and crops the centre. All by PIL's bicubic.
    means, stds: one RGB triple per tower, of pixel values in [0, 1]
    """

    def __init__(self, size: int, strategy: str, means: Sequence[Sequence[float]], stds: Sequence[Sequence[float]]):
        check_choice("image_resize_strategy", strategy, RESIZE_STRATEGIES)
        self.size, self.strategy = size, strategy
        # The last tower's mean is the border colour: OpenVLA's loop over towers overwrites the first one's.
        self.border = tuple(int(value * 255) for value in means[-1])
        mean, std = torch.tensor(means).reshape(-1, 1, 1), torch.tensor(stds).reshape(-1, 1, 1)
        self.scale, self.shift = 1 / (255 * std), -mean / std

    def __call__(self, images, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """uint8 [N, H, W, 3] (array, tensor, or a list of pictures of any size) to [N, 6, size, size]."""
        pixels = self._squares(images).to(device).permute(0, 3, 1, 2).to(torch.float32)
        pixels = torch.cat([pixels, pixels], dim=1)
        if self.scale.device != pixels.device:
            self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        return torch.addcmul(self.shift, pixels, self.scale).to(dtype)

    def _squares(self, images) -> Tensor:
        if isinstance(images, np.ndarray) and images.dtype == np.uint8:
            images = torch.from_numpy(images)
        if isinstance(images, Tensor):
            _check(images)
            if tuple(images.shape[1:]) == (self.size, self.size, 3):
                return images
        rows = [self.resize(np.asarray(image)) for image in images]
        return torch.from_numpy(np.stack(rows))

    def resize(self, image: np.ndarray) -> np.ndarray:
        """One uint8 picture [H, W, 3] to [size, size, 3]."""
        _check(image[None] if isinstance(image, np.ndarray) else image)
        if image.shape[:2] == (self.size, self.size):
            return image
        picture = Image.fromarray(image)
        width, height = picture.size
        if self.strategy == "resize-naive":
            return np.asarray(picture.resize((self.size, self.size), Image.Resampling.BICUBIC))
        if self.strategy == "letterbox":
            longest = max(width, height)
            across, down = (longest - width) // 2, (longest - height) // 2
            square = Image.new("RGB", (width + 2 * across, height + 2 * down), self.border)
            square.paste(picture, (across, down))
            picture, (width, height) = square, square.size
        # The shorter side to ``size``, then the centre; after padding there is at most a pixel to crop.
        if width <= height:
            width, height = self.size, int(self.size * height / width)
        else:
            width, height = int(self.size * width / height), self.size
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.size) / 2.0), round((height - self.size) / 2.0)
        return np.asarray(picture.crop((left, top, left + self.size, top + self.size)))


def _check(images) -> None:
    right_type = str(images.dtype).endswith("uint8")
    if not right_type or images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
        shape = list(images.shape)
        raise UserError(f"pictures must be uint8 [N, height, width, 3]; these are {images.dtype} {shape}")


class ActionBins:
    """Uniform bins on [-1, 1] as OpenVLA has them: B edges, so B - 1 centres, and one bin to spare for +1 itself."""

    def __init__(self, count: int):
        self.count = count
        self.edges = np.linspace(-1.0, 1.0, count)
        self.centres = (self.edges[:-1] + self.edges[1:]) / 2.0

    def encode(self, normalised: np.ndarray) -> np.ndarray:
        """Normalised commands to bins 0 .. count - 1 (the last only for values of 1 and above)."""
        return np.digitize(np.clip(normalised, -1.0, 1.0), self.edges) - 1

    def decode(self, bins: np.ndarray) -> np.ndarray:
        """Bins to normalised commands, the bin's centre."""
        return self.centres[np.clip(bins, 0, self.count - 2)]


class Statistics:
    """Named ranges of commands, by which they are normalised to [-1, 1] (OpenVLA's BOUNDS_Q99).

    norm_stats: key -> {"action": {"q01", "q99", "mask", "min", "max"}}, lists of one number per
        dimension; the last three are optional
    Dimensions whose mask is False pass unchanged; those that never vary become 0.
    """

    def __init__(self, norm_stats: dict):
        self.norm_stats = norm_stats
        self._tables = {key: _table(key, entry) for key, entry in norm_stats.items()}

    @property
    def keys(self) -> list[str]:
        return sorted(self._tables)

    def only_key(self) -> str | None:
        return self.keys[0] if len(self._tables) == 1 else None

    def dimensions(self, key: str) -> int:
        return len(self._table(key)[0])

    def normalise(self, commands: np.ndarray, key: str) -> np.ndarray:
        low, high, mask, constant = self._table(key)
        scaled = np.clip(2 * (commands - low) / (high - low + 1e-8) - 1, -1, 1)
        return np.where(constant, 0.0, np.where(mask, scaled, commands))

    def unnormalise(self, values: np.ndarray, key: str) -> np.ndarray:
        low, high, mask, _ = self._table(key)
        return np.where(mask, 0.5 * (values + 1) * (high - low) + low, values)

    def _table(self, key: str) -> tuple:
        check_choice("statistics", key, self._tables)
        return self._tables[key]


def _table(key: str, entry: dict) -> tuple:
    try:
        action = entry["action"]
        low, high = (np.asarray(action[name], dtype=np.float64) for name in ("q01", "q99"))
        mask = np.asarray(action.get("mask", np.ones(len(low))), dtype=bool)
        extremes = [np.asarray(action[name]) for name in ("min", "max") if name in action]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"statistics '{key}' need action.q01, action.q99 and action.mask; trouble with {error}"
        ) from error
    if low.ndim != 1 or low.shape != high.shape or low.shape != mask.shape:
        raise UserError(f"statistics '{key}': q01, q99 and mask must be equally long lists")
    if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
        raise UserError(f"statistics '{key}': every q01 must be finite and at most its q99")
    constant = extremes[0] == extremes[1] if len(extremes) == 2 else low == high
    return low, high, mask, constant
