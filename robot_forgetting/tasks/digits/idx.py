"""Images and labels in the idx format of MNIST and its relatives, from a local folder or the Hub."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from robot_forgetting.errors import UserError, one_line
from robot_forgetting.tasks.sources import VARIABLE, local_folder

STEMS = {"train": "train", "test": "t10k"}
HUB = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}
DIMENSIONS = {"images": 3, "labels": 1}
KINDS = {"images": 0x0803, "labels": 0x0801}  # unsigned bytes in 3 and in 1 dimensions


@dataclass(frozen=True)
class Images:
    """pixels: [N, 784] uint8; labels: [N] uint8."""

    pixels: np.ndarray
    labels: np.ndarray


def load_images(name: str, split: str) -> Images:
    """A split of ``mnist`` or ``fashion_mnist``, kept in memory after the first call.

    Looks into $ROBOT_FORGETTING_DATA/NAME for ``train-images-idx3-ubyte[.gz]`` and its companions. Without the
    variable, downloads through ``datasets`` if that is installed. UserError where neither works, or a file is damaged.
    """
    return _load(local_folder(name), name, split)


@lru_cache(maxsize=8)
def _load(folder: Path | None, name: str, split: str) -> Images:
    if folder is None:
        return _from_hub(name, split)
    files = {kind: _find(folder, f"{STEMS[split]}-{kind}-idx{n}-ubyte") for kind, n in DIMENSIONS.items()}
    pixels, labels = (read_idx(files[kind], kind) for kind in ("images", "labels"))
    if len(pixels) != len(labels):
        raise UserError(f"{files['images']} has {len(pixels)} images, {files['labels'].name} {len(labels)} labels")
    return Images(pixels.reshape(len(pixels), -1), labels)


def _find(folder: Path, name: str) -> Path:
    for file in (folder / f"{name}.gz", folder / name):
        if file.is_file():
            return file
    wanted = ", ".join(f"{stem}-{kind}-idx{n}-ubyte.gz" for stem in STEMS.values() for kind, n in DIMENSIONS.items())
    raise UserError(f"{folder} holds no {name}.gz; put the files {wanted} there, or unset {VARIABLE} to download them")


def read_idx(file: Path, kind: str) -> np.ndarray:
    """The array of an idx file, uint8; ``UserError`` where it is no such file or cut off."""
    try:
        data = file.read_bytes()
        data = gzip.decompress(data) if file.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    dimensions = DIMENSIONS[kind]
    if len(data) < 4 + 4 * dimensions or int.from_bytes(data[:4], "big") != KINDS[kind]:
        found = data[:4].hex() or "nothing"
        raise UserError(f"{file} is no idx file of {kind}: it begins with {found}, not {KINDS[kind]:08x}")
    shape = tuple(np.frombuffer(data, ">u4", dimensions, 4).tolist())
    body = data[4 + 4 * dimensions :]
    if len(body) != int(np.prod(shape)):
        raise UserError(f"{file} is damaged: {len(body)} bytes for {' x '.join(map(str, shape))}; download it again")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _from_hub(name: str, split: str) -> Images:
    where = f"set {VARIABLE} to a folder that holds {name}/train-images-idx3-ubyte.gz and its three companions"
    try:
        from datasets import load_dataset
    except ImportError:
        raise UserError(
            f"no {name} data: {where}, or install the extra robot-forgetting[data] to download {HUB[name]} from the Hub"
        ) from None
    try:
        table = load_dataset(HUB[name], split=split)
    except Exception as error:  # no network, no such data set, a full disk
        text = one_line(error)[:200]
        raise UserError(f"{HUB[name]} cannot be downloaded ({text}); or {where}") from error
    pixels = np.stack([np.asarray(image, np.uint8).reshape(-1) for image in table["image"]])
    return Images(pixels, np.asarray(table["label"], np.uint8))
