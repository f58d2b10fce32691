"""Pictures of a simulated camera: taken directly, laid over a photo of the real scene where a digital twin has one.

SimplerEnv's "visual matching": only the robot and the objects are drawn, everything else is the photo (Li et al. 2024,
arXiv:2405.05941). ManiSkill keeps the photos in a dictionary of the class, so that two environments of one process show
each other's; here each camera has its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from robot_forgetting.errors import UserError


class Overlay:
    """A photo of the scene without the things in it, and which things to draw over it.

    photo: uint8 [H, W, 3] of the camera's size
    kept: segmentation numbers (per actor) of what is drawn
    """

    def __init__(self, photo: np.ndarray, kept: Iterable[int]):
        self.photo = photo
        self.background = np.ones(2**15, dtype=bool)  # segmentation numbers are int16
        self.background[list(kept)] = False

    def over(self, picture: np.ndarray, segmentation: np.ndarray) -> np.ndarray:
        """The photo wherever the segmentation [H, W] shows something that is not kept."""
        return np.where(self.background[segmentation][..., None], self.photo, picture)


class Camera:
    """One camera of a CPU environment.

    sensor: ManiSkill's camera
    size: (width, height) of ``take``'s pictures; they are area-averaged where the camera has more pixels
    overlay: None, or what the background is replaced by
    """

    def __init__(self, sensor, size: tuple[int, int], overlay: Overlay | None = None):
        self._camera = sensor.camera._render_cameras[0]
        self._minimal = sensor.config.shader_pack == "minimal"
        self.resize(size)
        self._overlay = overlay

    def resize(self, size: tuple[int, int]) -> None:
        """Another ``size`` of the pictures from now on."""
        self._size = size if (self._camera.width, self._camera.height) != size else None

    def change_photo(self, path: str) -> None:
        """Another photo for the background from now on."""
        height, width = self._overlay.photo.shape[:2]
        self._overlay.photo = read_photo(path, (width, height))

    def take(self) -> np.ndarray:
        """uint8 [height, width, 3]; the scene's render state must be up to date."""
        self._camera.take_picture()
        picture = self._camera.get_picture("Color")[..., :3]
        if picture.dtype != np.uint8:
            picture = (picture.clip(0, 1) * 255).astype(np.uint8)
        if self._overlay is not None:
            texture, channel = segmentation_of(self._minimal)
            picture = self._overlay.over(picture, self._camera.get_picture(texture)[..., channel])
        if self._size is not None:
            picture = area_average(picture, self._size)
        return np.ascontiguousarray(picture)


class BatchedCamera:
    """One camera of N environments, in torch, on the CPU or the GPU; arguments and pictures are those of ``Camera``."""

    def __init__(self, sensor, size: tuple[int, int], overlay: Overlay | None = None):
        self._camera, self._overlay = sensor.camera, overlay
        self._textures, self._area = ["Color"], None
        if overlay is not None:
            texture, self._channel = segmentation_of(sensor.config.shader_pack == "minimal")
            self._textures.append(texture)
            self._photo, self._background = torch.from_numpy(overlay.photo), torch.from_numpy(overlay.background)
            self._photos = {}  # by file, of the camera's size
        if (own := (self._camera.width, self._camera.height)) != size:
            self._area = [torch.from_numpy(area_weights(*pixels)) for pixels in zip(own, size, strict=True)]

    def change_photos(self, paths: list[str]) -> None:
        """Other photos for the backgrounds from now on, one per environment."""
        size = self._camera.width, self._camera.height
        for path in set(paths) - self._photos.keys():
            self._photos[path] = torch.from_numpy(read_photo(path, size))
        alike = len(set(paths)) == 1
        self._photo = self._photos[paths[0]] if alike else torch.stack([self._photos[path] for path in paths])

    def take(self) -> np.ndarray:
        """uint8 [N, height, width, 3]; the scene's render state must be up to date."""
        self._camera.take_picture()
        colour, *other = self._camera.get_picture(self._textures)  # [N, H, W, 4]
        picture, device = colour[..., :3], colour.device
        if picture.dtype != torch.uint8:
            picture = (picture.clamp(0, 1) * 255).to(torch.uint8)
        if self._overlay is not None:
            self._photo, self._background = self._photo.to(device), self._background.to(device)
            hidden = self._background[other[0][..., self._channel].int()]
            picture = torch.where(hidden[..., None], self._photo, picture)
        if self._area is not None:
            self._area = [weights.to(device) for weights in self._area]
            across, down = self._area
            rows = down @ picture.float().flatten(2)  # [N, height, W * 3]
            rows = across @ rows.unflatten(2, (-1, 3))
            picture = rows.round().clamp(0, 255).to(torch.uint8)
        return np.ascontiguousarray(picture.cpu().numpy())


def segmentation_of(minimal: bool) -> tuple[str, int]:
    """The texture in which a shader ("minimal" or not) has the number of an actor or link, and its channel there."""
    return ("PositionSegmentation", 3) if minimal else ("Segmentation", 1)


def area_weights(pixels: int, fewer: int) -> np.ndarray:
    """Weights [fewer, pixels] float32, by which averaging over areas makes one row of pixels of another."""
    edges = np.linspace(0, pixels, fewer + 1)[:, None]
    place = np.arange(pixels)
    covered = np.minimum(edges[1:], place + 1) - np.maximum(edges[:-1], place)
    return (covered.clip(0) * fewer / pixels).astype(np.float32)


def area_average(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture [H, W, 3] uint8 reduced to ``size`` (width, height), as SimplerEnv's policies do it."""
    import cv2

    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def read_photo(path: str | Path, size: tuple[int, int]) -> np.ndarray:
    """A photo as uint8 [height, width, 3] in RGB, reduced or enlarged to ``size`` (width, height)."""
    import cv2

    photo = cv2.imread(str(path))
    if photo is None:
        raise UserError(f"{path} is not a picture that can be read; fetch the assets again")
    photo = cv2.cvtColor(photo, cv2.COLOR_BGR2RGB)
    smaller = size[0] < photo.shape[1]
    return cv2.resize(photo, size, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
