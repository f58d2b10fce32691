"""What this machine has and lacks: one line per part, with what to type; and what is recorded of it in run.json."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from robot_forgetting.errors import described
from robot_forgetting.machine import nvidia, vulkan

# Installed versions of these go into run.json: what a result may depend on.
PACKAGES = (
    "torch", "transformers", "mani-skill", "sapien", "peft", "gymnasium", "numpy", "hydra-core", "imageio",
    "imageio-ffmpeg", "safetensors",
)  # fmt: skip
SHIPPED = Path(__file__).parents[1] / "weights"
GIGABYTE = 10**9
NEEDED = ".".join(map(str, vulkan.LAVAPIPE_NEEDED))
INSTALL_LAVAPIPE = (
    f"type: make setup, or apt-get install {vulkan.LAVAPIPE_PACKAGE} ({NEEDED} or newer draws on the CPU)"
)


@dataclass(frozen=True)
class Check:
    """state: "ok", "warn" (works, but) or "FAIL" (a needed part is missing); cure: what to type."""

    name: str
    state: str
    found: str
    cure: str = ""

    def __str__(self) -> str:
        return f"{self.state:4}  {self.name:9}  {self.found}" + (f"; {self.cure}" if self.cure else "")


def doctor() -> int:
    """Prints one line per part; returns 0, or 2 where a needed part fails."""
    failed = False
    parts = (python, packages, libraries, torchvision, gpu, vulkan_device, assets, simpler, disk, weights)
    for examine in parts:
        check = guarded(examine)
        failed |= check.state == "FAIL"
        print(check, flush=True)
    return 2 if failed else 0


def guarded(examine: Callable[[], Check]) -> Check:
    """A check that itself fails is a finding too."""
    try:
        return examine()
    except Exception as error:
        return Check(examine.__name__, "FAIL", described(error))


# --- the checks ---


def python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    if sys.version_info < (3, 11):  # noqa: UP036  (what a doctor is for)
        return Check("Python", "FAIL", found, "3.11 or newer is needed; type: make setup PYTHON=python3.12")
    if places := os.environ.get("PYTHONPATH"):  # ROS sets it
        return Check("Python", "warn", f"{found}, but PYTHONPATH={places} goes first", "type: unset PYTHONPATH")
    return Check("Python", "ok", found)


def packages() -> Check:
    """Everything that pyproject.toml asks for, as the installed package tells it."""
    from packaging.requirements import Requirement

    wanted = map(Requirement, importlib.metadata.requires("robot-forgetting") or [])
    missing, unfit = [], []
    for one in wanted:
        found = _version(one.name)
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        if found is None:
            missing.append(one.name)
        elif not one.specifier.contains(found, prereleases=True):
            unfit.append(f"{one.name} {found} (needed: {one.specifier})")
    if missing or unfit:
        words = [f"missing: {', '.join(missing)}"] * bool(missing) + [f"unfit: {', '.join(unfit)}"] * bool(unfit)
        return Check("packages", "FAIL", "; ".join(words), "in a clone type: make setup, or python -m pip install .")
    shown = ("torch", "transformers", "mani-skill", "sapien")
    return Check("packages", "ok", ", ".join(f"{name} {_version(name)}" for name in shown))


def libraries() -> Check:
    """mani-skill imports opencv, which opens system libraries that a bare machine lacks."""
    result = subprocess.run([sys.executable, "-P", "-c", "import cv2"], capture_output=True, text=True, timeout=60)
    if result.returncode:
        said = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        lacking = [package for library, package in vulkan.LIBRARIES.items() if not vulkan.loads(library)]
        needed = " ".join(lacking or vulkan.LIBRARIES.values())
        return Check("libraries", "FAIL", said, f"type: make setup, or apt-get install {needed}")
    return Check("libraries", "ok", "opencv finds its system libraries")


def torchvision() -> Check:
    """transformers imports torchvision where it is installed, and a CUDA build of it dies beside a CPU torch."""
    torch, vision = _version("torch") or "", _version("torchvision")
    if vision is None:
        return Check("vision", "ok", "torchvision is not installed, nor needed")
    if "+cpu" in torch and "+cpu" not in vision:
        found = f"torchvision {vision} is not the CPU build, torch {torch} is: importing transformers may fail"
        return Check("vision", "warn", found, "type: python -m pip uninstall torchvision")
    return Check("vision", "ok", f"torchvision {vision}")


def gpu() -> Check:
    from robot_forgetting.machine.device import unusable_gpu

    if reason := unusable_gpu():
        return Check("GPU", "warn", reason)
    if names := _gpu_names():
        return Check("GPU", "ok", f"{', '.join(names)}; simulation=gpu is untried: docs/gpu_simulation.md")
    code, said = nvidia.nvidia_smi("-L")
    if code:
        found = f"nvidia-smi fails: {' '.join(said.split())[:200]}"
        return Check("GPU", "warn", found, "without a GPU ignore it; with one, install its driver anew, or reboot")
    hidden = " that CUDA_VISIBLE_DEVICES lets torch see" if said else ""
    return Check("GPU", "ok", f"none{hidden}; everything runs on {_cores()} CPU cores")


def vulkan_device() -> Check:
    found = vulkan.probe()
    drivers = ", ".join(vulkan.installable_drivers()) or "none"
    if fault := vulkan.fault(found):
        return Check("Vulkan", "FAIL", f"{fault} (driver files: {drivers})", render_cure(found))
    said = f"{found['device']}, {found['driver']} {found['version']} renders (driver files: {drivers})"
    if vulkan.is_lavapipe(found) and not vulkan.mesa_version(found):
        return Check("Vulkan", "warn", said, f"lavapipe's version is not recognised; {NEEDED} or newer is needed")
    return Check("Vulkan", "ok", said)


def render_cure(found: dict) -> str:
    """What to type where nothing renders; never what has been done already."""
    drivers = vulkan.installable_drivers()
    if variable := vulkan.chosen_by():
        return f"{variable} allows no other driver; type: unset {variable}"
    on_the_cpu = ""
    if not any(name.startswith("lvp") for name in drivers):
        on_the_cpu = INSTALL_LAVAPIPE
    elif vulkan.old_lavapipe(found) and _release() == "bookworm":
        on_the_cpu = "type: make setup (it takes lavapipe from backports)"
    elif vulkan.old_lavapipe(found):
        on_the_cpu = f"use a release that has Mesa {NEEDED} or newer (Debian 13, Ubuntu 24.04 with its updates)"
    if nvidia.gpus() and not vulkan.loads("libGLX_nvidia.so.0"):
        start = "a container gets the GPU's Vulkan driver with: docker run -e NVIDIA_DRIVER_CAPABILITIES=all"
        return f"{start}; or draw on the CPU: {on_the_cpu}" if on_the_cpu else start
    if on_the_cpu:
        return on_the_cpu
    if any("nvidia" in name for name in drivers):
        return f"to draw on the CPU, type: export VK_DRIVER_FILES=$(ls {vulkan.ICD_FOLDERS[-1]}/lvp*.json)"
    return "the loader says why: VK_LOADER_DEBUG=all python -P -m robot_forgetting.machine.vulkan"


def _release() -> str:
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


def assets() -> Check:
    """The Panda's meshes are inside the mani-skill wheel; SimplerEnv's tasks have theirs in MS_ASSET_DIR."""
    spec = importlib.util.find_spec("mani_skill")
    if spec is None or not spec.submodule_search_locations:
        return Check("assets", "FAIL", "mani-skill is not installed", "type: make setup")
    robot = Path(spec.submodule_search_locations[0]) / "assets" / "robots" / "panda"
    meshes = len(list(robot.glob("franka_description/meshes/collision/*.stl")))
    if not (robot / "panda_v2.urdf").is_file() or not meshes:
        cure = "type: python -m pip install --force-reinstall --no-deps mani-skill"
        return Check("assets", "FAIL", f"no Panda meshes in {robot}", cure)
    own = os.environ.get("MS_ASSET_DIR")
    if own and not Path(own).is_dir():
        return Check("assets", "warn", f"MS_ASSET_DIR={own} does not exist", "type: unset MS_ASSET_DIR, or correct it")
    return Check("assets", "ok", f"Panda and {meshes} collision meshes" + (f"; MS_ASSET_DIR={own}" if own else ""))


def simpler() -> Check:
    """SimplerEnv's meshes and photos, which only its tasks need."""
    from robot_forgetting.machine.assets import BUNDLES, data_folder, missing

    absent = [name for name in BUNDLES if missing(name)]
    there = [name for name in BUNDLES if name not in absent]
    found = f"{', '.join(there) or 'no assets'} of SimplerEnv in {data_folder()}"
    cure = f"for their tasks type: robot-forgetting assets {absent[0]}" if absent else ""
    missed = f" ({', '.join(absent)} not)" if there and absent else ""
    return Check("Simpler", "ok", found + missed, cure)


def disk() -> Check:
    free = shutil.disk_usage(".").free
    found = f"{free / GIGABYTE:.1f} GB free here"
    if not os.access(".", os.W_OK):
        return Check(
            "disk", "FAIL", f"{Path.cwd()} cannot be written", "change to a folder of yours; runs/ is made there"
        )
    if free < GIGABYTE / 5:
        return Check("disk", "FAIL", found, "make room: a run needs about 0.2 GB")
    return Check("disk", "warn" if free < 2 * GIGABYTE else "ok", found)


def weights() -> Check:
    """Reads the header of every shipped safetensors file, and so finds truncated ones."""
    cure = "install again, or train one: robot-forgetting pretrain"
    files = sorted(SHIPPED.glob("*/*.safetensors"))
    if not files:
        return Check("weights", "FAIL", f"no base policy in {SHIPPED}", cure)
    from safetensors import SafetensorError, safe_open

    count = 0
    for file in files:
        try:
            with safe_open(file, framework="numpy") as tensors:
                count += len(tensors.keys())
        except (SafetensorError, OSError) as error:
            return Check("weights", "FAIL", f"{file} cannot be read: {error}", cure)
    megabytes = sum(file.stat().st_size for file in files) / 10**6
    names = ", ".join(file.parent.name for file in files)
    return Check("weights", "ok", f"{names}: {count} tensors, {megabytes:.1f} MB")


# --- for other modules ---


def render_backend() -> dict:
    """What pictures were rendered with: device, driver, version; or the error that kept them from being rendered."""
    found = vulkan.probe()
    return {key: found[key] for key in ("device", "driver", "version", "error") if key in found}


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Installed versions of what a result may depend on; None where a package is missing."""
    ours = {"robot-forgetting": _version("robot-forgetting"), "python": platform.python_version()}
    return {**ours, **{name: _version(name) for name in PACKAGES}}


def hardware() -> dict:
    """Processor, cores this process may use, memory in bytes, GPUs, operating system."""
    return {
        "processor": _processor(),
        "cores": _cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpu_names(),
        "system": platform.platform(),
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
