"""SimplerEnv's meshes and photos: where they are looked for, what is missing, and how to get them.

They lie where ManiSkill looks for its own: ``$MS_ASSET_DIR/data`` (default ``~/.maniskill/data``), in the layout of its
downloader (``python -m mani_skill.utils.download_asset``), which serves as well. A folder or archive in the same
layout serves a machine without network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from robot_forgetting.errors import UserError, check_choice
from robot_forgetting.machine.files import disk
from robot_forgetting.machine.progress import bar, say

BRIDGE = "tasks/bridge_v2_real2sim_dataset"
MODELS = f"{BRIDGE}/custom/models"


@dataclass(frozen=True)
class Source:
    """One archive: its address, sha256 (None: the publisher gives none), and the folder of ``data`` it becomes.

    inside: the folder of the archive that becomes it; "": all
    """

    url: str
    sha256: str | None
    folder: str
    inside: str = ""


@dataclass(frozen=True)
class Bundle:
    """What one family of tasks needs. files: a few of each source's files, whose absence means that it is missing."""

    sources: tuple[Source, ...]
    files: tuple[str, ...]


# Addresses and checksums as in mani_skill.utils.assets.data 3.0.1; GitHub's archives of a tag have none there.
SCENES = Source(
    "https://huggingface.co/datasets/haosulab/ManiSkill_bridge_v2_real2sim/resolve/main/bridge_v2_real2sim_dataset.zip",
    "618512a205b4528cafecdad14b1788ed1130879f3064deb406516ed5b9c5ba92",
    BRIDGE,
)
WIDOWX = Source("https://github.com/haosulab/ManiSkill-WidowX250S/archive/refs/tags/v0.2.0.zip", None, "robots/widowx")
GOOGLE = "tasks/google_robot_real2sim"
GOOGLE_SCENES = Source(
    "https://github.com/simpler-env/ManiSkill2_real2sim/archive/refs/heads/main.zip", None, GOOGLE, inside="data"
)
GOOGLE_ROBOT = Source(
    "https://github.com/haosulab/ManiSkill-GoogleRobot/archive/refs/tags/v0.1.0.zip", None, "robots/googlerobot"
)
GOOGLE_URDF = "robots/googlerobot/google_robot_meta_sim_fix_wheel_fix_fingertip"
COLOURS = (
    "",
    "recolor_tabletop_visual_matching_1",
    "recolor_tabletop_visual_matching_2",
    "recolor_cabinet_visual_matching_1",
)
ROBOT_FILES = ("robots/widowx/wx250s.urdf", f"{BRIDGE}/custom/info_bridge_custom_v0.json")
BUNDLES = {
    "bridge": Bundle(
        (SCENES, WIDOWX),
        (
            *ROBOT_FILES,
            f"{BRIDGE}/custom/info_bridge_custom_baked_tex_v0.json",
            f"{BRIDGE}/real_inpainting/bridge_real_eval_1.png",
            f"{BRIDGE}/stages/bridge_table_1_v1.glb",
            f"{MODELS}/bridge_carrot_generated_modified/textured.dae",
        ),
    ),
    "bridge_sink": Bundle(
        (SCENES, WIDOWX),
        (
            *ROBOT_FILES,
            f"{BRIDGE}/real_inpainting/bridge_sink.png",
            f"{BRIDGE}/stages/bridge_table_1_v2.glb",
            f"{MODELS}/sink/collision.obj",
            f"{MODELS}/eggplant/collision.obj",
            f"{MODELS}/eggplant/textured.dae",
        ),
    ),
    "google_robot": Bundle(
        (GOOGLE_SCENES, GOOGLE_ROBOT),
        (
            *(f"{GOOGLE_URDF}{name and '_'}{name}.urdf" for name in COLOURS),
            f"{GOOGLE}/custom/mk_station_recolor.urdf",
            f"{GOOGLE}/custom/models/opened_coke_can/collision.obj",
            f"{GOOGLE}/custom/models/opened_coke_can/textured.dae",
            f"{GOOGLE}/real_inpainting/google_coke_can_real_eval_1.png",
            *(f"{GOOGLE}/real_inpainting/open_drawer_{row}{place}.png" for row in "abc" for place in "012"),
        ),
    ),
}


def data_folder() -> Path:
    """ManiSkill's folder for what its wheel does not contain; read from the environment at every call."""
    return Path(os.environ.get("MS_ASSET_DIR") or Path.home() / ".maniskill") / "data"


def bridge_folder() -> Path:
    return data_folder() / BRIDGE


def visual(model: Path) -> Path:
    """What an object of SimplerEnv's looks like: the first file in the order in which the original looks for them."""
    for kind in ("obj", "dae", "glb"):
        if (model / f"textured.{kind}").is_file():
            return model / f"textured.{kind}"
    raise UserError(
        f"{model} has no textured.obj, .dae or .glb: what the object looks like is missing; type: robot-forgetting "
        "assets bridge (or google_robot), or copy ManiSkill2_real2sim's data/custom/models there"
    )


def missing(name: str) -> list[str]:
    """Which of a bundle's files are not there, relative to ``data_folder()``."""
    return [file for file in BUNDLES[name].files if not (data_folder() / file).is_file()]


def require(name: str, files: tuple[str, ...] = ()) -> None:
    """``UserError`` where a bundle, or one of ``files`` in it, is missing; else ManiSkill is pointed to it."""
    absent = missing(name) or [file for file in files if not (data_folder() / file).is_file()]
    if absent:
        raise UserError(
            f"the {name} assets lack {absent[0]} in {data_folder()}; type: robot-forgetting assets {name} "
            "(offline: with folder=FOLDER, a copy on this machine), or set MS_ASSET_DIR to where they are"
        )
    _point_maniskill_to(data_folder())


def _point_maniskill_to(data: Path) -> None:
    """ManiSkill reads MS_ASSET_DIR once, when it is imported; a later change must not go unnoticed."""
    import mani_skill
    from mani_skill.agents.robots.widowx.widowx import WidowX250S
    from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval import base_env

    mani_skill.ASSET_DIR = data
    base_env.ASSET_DIR = data
    base_env.BRIDGE_DATASET_ASSET_PATH = data / BRIDGE
    WidowX250S.urdf_path = str(data / "robots" / "widowx" / "wx250s.urdf")


def fetch(name: str, folder: str | Path | None = None, *, yes: bool = False, ask: Callable[[str], str] = input) -> int:
    """Puts a bundle's files into place: what `robot-forgetting assets NAME` does.

    folder: a folder (or .tar.gz, .zip) that holds ``data/`` or its content; nothing is then downloaded
    yes: download without asking
    Returns 0. ``UserError`` where the source lacks files, a checksum differs, or consent is refused.
    """
    check_choice("assets", name, BUNDLES)
    target = data_folder()
    if not missing(name):
        say(f"the {name} assets are in {target} already")
        return 0
    if folder is not None:
        _copy(Path(folder), target)
    else:
        sources = [source for source in BUNDLES[name].sources if not (target / source.folder).is_dir()]
        sources = sources or list(BUNDLES[name].sources)
        addresses = ", ".join(source.url for source in sources)
        answer = "yes" if yes else ""
        with suppress(EOFError):  # nobody to ask
            answer = answer or ask(f"download {addresses} into {target}? [y/N] ")
        if answer.strip().lower() not in ("y", "yes"):
            raise UserError("nothing was downloaded; type it again with yes=true, or give folder=FOLDER")
        for source in sources:
            _download(source, target)
    if absent := missing(name):
        where = f"in {folder}" if folder is not None else "in what was downloaded"
        raise UserError(f"{absent[0]} is not {where}, nor {len(absent) - 1} others; look at its layout (data/...)")
    say(f"the {name} assets are in {target}")
    return 0


def command(arguments: Sequence[str]) -> int:
    """`robot-forgetting assets NAME [folder=FOLDER] [yes=true]`: see ``fetch``."""
    names = [text for text in arguments if "=" not in text and not text.startswith("-")]
    options = dict(text.split("=", 1) for text in arguments if "=" in text)
    yes = options.pop("yes", "false").lower() == "true" or "--yes" in arguments
    folder = options.pop("folder", None)
    strange = [*options, *(text for text in arguments if text.startswith("-") and text != "--yes")]
    if strange:
        raise UserError(f"assets does not know '{strange[0]}'; give NAME, folder=FOLDER, yes=true")
    if len(names) != 1:
        raise UserError(f"name one family of assets: {', '.join(sorted(BUNDLES))}")
    check_choice("family of assets", names[0], BUNDLES)
    return fetch(names[0], folder, yes=yes)


def _copy(source: Path, target: Path) -> None:
    """A folder's or archive's files; what is there already stays."""
    if not source.exists():
        raise UserError(f"{source} does not exist; give folder= a folder or archive that holds data/")
    with disk(target), tempfile.TemporaryDirectory() as scratch:
        if source.is_file():
            _unpack(source, Path(scratch))
            source = Path(scratch)
        source = source / "data" if (source / "data").is_dir() else source
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            place = target / file.relative_to(source)
            if not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)


def _unpack(archive: Path, folder: Path) -> None:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                opened.extractall(folder)
        else:
            with tarfile.open(archive) as opened:
                opened.extractall(folder, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); fetch it again") from error


def _download(source: Source, target: Path) -> None:
    """One archive into its folder; the download is checked before anything is unpacked."""
    with disk(target), tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "archive.zip"
        digest = hashlib.sha256()
        try:
            with urllib.request.urlopen(source.url, timeout=60) as answer, open(archive, "wb") as file:
                total = int(answer.headers.get("Content-Length") or 0)
                with bar(f"{source.folder} (MB)", max(1, total >> 20)) as progress:
                    while block := answer.read(1 << 20):
                        file.write(block)
                        digest.update(block)
                        progress.advance(1)
        except (OSError, HTTPException) as error:  # the second where an answer breaks off
            raise UserError(
                f"cannot download {source.url} ({error}); fetch it elsewhere and give folder=FOLDER"
            ) from error
        if source.sha256 is not None and digest.hexdigest() != source.sha256:
            raise UserError(f"{source.url} has another checksum than expected; it changed, or the download broke")
        unpacked = Path(scratch) / "unpacked"
        _unpack(archive, unpacked)
        inner = [path for path in unpacked.iterdir() if path.is_dir()]
        root = (inner[0] if len(inner) == 1 else unpacked) / source.inside
        place = target / source.folder
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(root, place, dirs_exist_ok=True)
