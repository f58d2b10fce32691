"""Made-up MNIST and FashionMNIST: pictures whose class is the row of a bright bar."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np

TRAIN, TEST = 160, 60


def write_idx(file: Path, values: np.ndarray) -> None:
    kind = 0x0803 if values.ndim == 3 else 0x0801
    file.write_bytes(gzip.compress(struct.pack(f">{values.ndim + 1}I", kind, *values.shape) + values.tobytes()))


def write_pictures(folder: Path) -> Path:
    """The files of both sets, as a folder that ROBOT_FORGETTING_DATA may name."""
    for number, name in enumerate(("mnist", "fashion_mnist")):
        (folder / name).mkdir(parents=True)
        for stem, count in (("train", TRAIN), ("t10k", TEST)):
            rng = np.random.default_rng([number, count])
            labels = rng.integers(10, size=count).astype(np.uint8)
            pixels = rng.integers(60, size=(count, 28, 28)).astype(np.uint8)
            pixels[np.arange(count), 2 * labels.astype(int) + number] = 255
            write_idx(folder / name / f"{stem}-images-idx3-ubyte.gz", pixels)
            write_idx(folder / name / f"{stem}-labels-idx1-ubyte.gz", labels)
    return folder
