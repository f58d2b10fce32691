"""NVIDIA's driver and the builds of torch: which fits which, and what to type where they do not.

Only the standard library: `scripts/install.py` asks here before anything is installed.

Sources: PyTorch's RELEASE.md (CUDA support matrix; 2.12 to 2.14 have builds for CUDA 12.6 and 13, of which the package
index has 13), NVIDIA's table of minor version compatibility (CUDA 12.x from driver 525 on, 13.x from 580 on).
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
from dataclasses import dataclass

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


@dataclass(frozen=True)
class Gpu:
    name: str
    driver: str  # "535.161.08"
    capability: tuple[int, int] | None  # (8, 0) of an A100; None where the driver does not tell


@dataclass(frozen=True)
class Build:
    """A build of torch. index: where pip finds it, None for its default; capabilities: least and greatest GPU's."""

    cuda: str
    index: str | None
    driver: int
    capabilities: tuple[tuple[int, int], tuple[int, int]]

    @property
    def major(self) -> int:
        return int(self.cuda.split(".")[0])

    def runs_on(self, gpu: Gpu) -> bool:
        return gpu.capability is None or self.capabilities[0] <= gpu.capability <= self.capabilities[1]

    def requirement(self, version: str) -> list[str]:
        """What pip is given: ["torch==2.13.0+cu126", "--extra-index-url", ...]."""
        if self.index is None:
            return [f"torch=={version}"]
        return [f"torch=={version}+{self.index.rpartition('/')[2]}", "--extra-index-url", self.index]


BUILDS = (  # the preferred one first
    Build("13.0", None, 580, ((7, 5), (99, 0))),
    Build("12.6", "https://download.pytorch.org/whl/cu126", 525, ((5, 0), (9, 0))),
)


def gpus() -> list[Gpu]:
    """What nvidia-smi lists; nothing where it is missing or fails."""
    for fields in ("name,driver_version,compute_cap", "name,driver_version"):  # the last is unknown to old drivers
        code, said = nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader")
        if code == 0:
            return [_gpu(line) for line in said.splitlines() if line.count(",")]
    return []


def _gpu(line: str) -> Gpu:
    name, driver, *rest = (part.strip() for part in line.split(","))
    numbers = rest[0].split(".") if rest else []
    known = len(numbers) == 2 and all(number.isdigit() for number in numbers)
    return Gpu(name, driver, (int(numbers[0]), int(numbers[1])) if known else None)


def nvidia_smi(*arguments: str) -> tuple[int | None, str]:
    """Exit code (None: there is no such program, or it hangs) and what it said."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None, ""
    try:
        result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None, ""
    return result.returncode, (result.stdout + result.stderr).strip()


def cuda_major(gpus: list[Gpu]) -> int:
    """The newest CUDA that the driver runs: 13, 12, or 0 for older ones; within a major version all builds run.

    The driver's library is asked first: in a container it may be newer than the kernel's part (NVIDIA's cuda-compat).
    """
    if (version := library_version()) is not None:
        return version // 1000
    heads = [gpu.driver.split(".")[0] for gpu in gpus]
    numbers = [int(head) for head in heads if head.isdigit()]
    return next((build.major for build in BUILDS if numbers and min(numbers) >= build.driver), 0)


@functools.cache
def library_version() -> int | None:
    """What libcuda says it supports: 12040 for 12.4; None where it is not there."""
    try:
        library, found = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        return found.value if library.cuDriverGetVersion(ctypes.byref(found)) == 0 and found.value else None
    except (OSError, AttributeError):
        return None


def fitting(gpus: list[Gpu]) -> Build | None:
    """The build of torch for this driver and all of these GPUs, or at least one of them; None where there is none."""
    possible = [build for build in BUILDS if build.major <= cuda_major(gpus)]
    for enough in (all, any):
        for build in possible:
            if enough(build.runs_on(gpu) for gpu in gpus):
                return build
    return None


def described(gpus: list[Gpu]) -> str:
    """'NVIDIA A100, driver 535.161.08, which supports CUDA up to 12.2'; 12.x where only the driver is known."""
    version, major = library_version(), cuda_major(gpus)
    shown = f"{version // 1000}.{version % 1000 // 10}" if version else f"{major}.x" if major else "11.x"
    return f"{gpus[0].name}, driver {gpus[0].driver}, which supports CUDA up to {shown}"


def mismatch(gpus: list[Gpu], version: str, cuda: str | None) -> str:
    """Why torch ``version``, built for ``cuda`` (None: for no GPU), is the wrong one here, and what to type.

    "" where it is the right one, so that something else is the matter.
    """
    build = fitting(gpus)
    if build is None:
        needed = f"update NVIDIA's driver to {BUILDS[0].driver} or newer"
        return f"{described(gpus)}: no build of torch runs with that; {needed}"
    runs = any(same.runs_on(gpu) for same in BUILDS if cuda and same.major == int(cuda.split(".")[0]) for gpu in gpus)
    if runs and int(cuda.split(".")[0]) <= cuda_major(gpus):
        return ""
    plain = version.split("+")[0]
    install = f"python -m pip install {' '.join(build.requirement(plain))}"
    if build.index is None:  # pip would take an installed 2.13.0+cpu for 2.13.0
        install = f"python -m pip uninstall -y torch && {install}"
    built = f"built for CUDA {cuda}" if cuda else "built for the CPU"
    return f"{described(gpus)}, but torch {plain} here is {built}; type: {install}"


def has_kernels(capability: tuple[int, int], compiled: list[str]) -> bool:
    """Whether a torch whose ``torch.cuda.get_arch_list()`` is given has code for a GPU of this capability."""
    for kind, number in (name.split("_") for name in compiled if name.count("_") == 1):
        digits = "".join(letter for letter in number if letter.isdigit())
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and major == capability[0] and minor <= capability[1]:
            return True
        if kind == "compute" and (major, minor) <= capability:
            return True
    return False
