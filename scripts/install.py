"""Sets the project up: virtual environment, locked packages, a Vulkan driver that SAPIEN can render with.

Run by `make setup` with any Python >= 3.11; needs only the standard library. Safe to run again.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
TORCH = "torch==2.13.0"
TORCH_CPU = "https://download.pytorch.org/whl/cpu"
LAVAPIPE = (24, 3)  # older ones lack what SAPIEN 3 asks of a device
APT_UPDATE = "apt-get -qq update"
APT_INSTALL = "apt-get -qq install -y --no-install-recommends -o DPkg::Lock::Timeout=120 "
LAVAPIPE_PACKAGE = "mesa-vulkan-drivers"
LIBRARIES = {  # what SAPIEN and its opencv open: the package that has it
    "libvulkan.so.1": "libvulkan1",
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libgthread-2.0.so.0": "libglib2.0-0",
}


class Failure(Exception):
    """One line that says what is wrong and what to type."""


def run(*command: str | Path, **options) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], **options)


def output(*command: str) -> str:
    """Standard output of a command, or nothing where it is missing or fails."""
    try:
        result = run(*command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""


def has_nvidia_gpu() -> bool:
    return "GPU 0" in output("nvidia-smi", "-L")


# --- system packages (Debian, Ubuntu) ---


def as_root() -> list[str] | None:
    """The prefix that makes a command run as root: nothing, sudo, or None where neither works."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and (sys.stdin.isatty() or run("sudo", "-n", "true", capture_output=True).returncode == 0):
        return ["sudo"]
    return None


def apt(*lines: str) -> None:
    """Runs apt lines as root, without questions. Where the rights are missing: one line with what to type."""
    script = " && ".join(["export DEBIAN_FRONTEND=noninteractive", *lines])
    prefix = as_root()
    if prefix is None:
        raise Failure(f"no rights to install packages; have an administrator type: sudo sh -c {shlex.quote(script)}")
    result = run(*prefix, "sh", "-c", script, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise Failure(f"apt said '{reason}'; try it by hand: sudo sh -c {shlex.quote(script)}")


def version(text: str) -> tuple[int, ...]:
    """'1:25.0.7-2~bpo12+1' -> (25, 0)."""
    head = text.split(":")[-1].split("-")[0].split("~")[0].split(".")
    return tuple(int(part) for part in head[:2] if part.isdigit())


def installed_version(package: str) -> tuple[int, ...]:
    status, _, number = output("dpkg-query", "-W", "-f=${db:Status-Abbrev}|${Version}", package).partition("|")
    return version(number) if status.startswith("ii") else ()


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def apt_lines(packages: list[str]) -> list[str]:
    """The apt lines that install packages; on Debian 12 with backports, which alone have a new enough lavapipe.

    Backports are added, where lavapipe is needed, from the mirror that this machine uses already.
    """
    if output("sh", "-c", ". /etc/os-release && echo $VERSION_CODENAME").strip() != "bookworm":
        return [APT_UPDATE, APT_INSTALL + " ".join(packages)]
    rows = output("apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)").splitlines()
    mirrors = {release: uri for uri, release in (row.split() for row in rows if len(row.split()) == 2)}
    lines = [APT_UPDATE, APT_INSTALL + "-t bookworm-backports " + " ".join(packages)]
    if "bookworm-backports" in mirrors:
        return lines
    if LAVAPIPE_PACKAGE not in packages:
        return [APT_UPDATE, APT_INSTALL + " ".join(packages)]
    source = f"deb {mirrors.get('bookworm', 'http://deb.debian.org/debian')} bookworm-backports main"
    return [f"echo '{source}' > /etc/apt/sources.list.d/bookworm-backports.list", *lines]


def system_packages() -> str:
    """Sees to the libraries and the Vulkan driver that SAPIEN needs and says which driver that is."""
    if sys.platform != "linux":
        return "the system's"
    nvidia = has_nvidia_gpu()
    missing = [package for library, package in LIBRARIES.items() if not loads(library)]
    if not shutil.which("apt-get"):
        if missing:
            raise Failure(f"install with the system's package manager: Debian calls them {', '.join(missing)}")
        return "the NVIDIA driver's" if nvidia else "the system's (lavapipe has to be 24.3 or newer)"
    if not nvidia and installed_version(LAVAPIPE_PACKAGE) < LAVAPIPE:
        missing.append(LAVAPIPE_PACKAGE)
    if missing:
        apt(*apt_lines(missing))
    if nvidia:
        return "the NVIDIA driver's"
    shown = ".".join(map(str, installed_version(LAVAPIPE_PACKAGE)))
    if installed_version(LAVAPIPE_PACKAGE) < LAVAPIPE:
        raise Failure(f"this release offers lavapipe {shown}, 24.3 is needed: use a newer one")
    return f"lavapipe {shown}"


# --- Python packages ---


def make_venv() -> Path:
    """Creates .venv where it is missing or broken; on Debian/Ubuntu installs python3-venv first where needed."""
    python = VENV / "bin" / "python"
    if python.exists() and run(python, "-m", "pip", "--version", capture_output=True).returncode == 0:
        return python
    if run(sys.executable, "-c", "import ensurepip, venv", capture_output=True).returncode:
        if not shutil.which("apt-get"):
            raise Failure(
                f"{sys.executable} lacks `ensurepip`; install it, or type: make setup PYTHON=/another/python3"
            )
        apt(APT_UPDATE, f"{APT_INSTALL}python{sysconfig.get_python_version()}-venv")
    run(sys.executable, "-m", "venv", "--clear", VENV, check=True)
    return python


def torch_source() -> list[str]:
    """pip options that find the right build: without an NVIDIA GPU the CPU build, whose versions end in '+cpu'.

    A '+cpu' version sorts above the plain one, so an *extra* source is enough. It is added only where it answers (else
    pip would retry for minutes); without it pip takes what its own configuration offers.
    """
    if has_nvidia_gpu() or sys.platform != "linux":
        return []
    probe = f"import urllib.request; urllib.request.urlopen('{TORCH_CPU}/torch/', timeout=3)"
    try:  # in a child, because a name server that does not answer is not bound by urlopen's time limit
        reachable = run(sys.executable, "-c", probe, capture_output=True, timeout=6).returncode == 0
    except subprocess.TimeoutExpired:
        reachable = False
    return ["--extra-index-url", TORCH_CPU] if reachable else []


def install_packages(python: Path) -> None:
    # pip would compile the modules on one core, which takes longer than unpacking them.
    pip = [python, "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check"]
    for what, arguments in (
        # --no-deps: the lock is complete, and mani-skill's mplib, which is not used, has no build for Python >= 3.13.
        ("locked packages", ["--no-deps", "-r", ROOT / "requirements.lock"]),
        (TORCH, [TORCH, *torch_source()]),
        ("this project", ["--no-deps", "--no-build-isolation", "-e", ROOT]),
    ):
        print(f"setup: installing {what}", flush=True)
        if run(*pip, *arguments).returncode:
            raise Failure(f"pip could not install {what} (its message is above); mend that and type `make setup` again")
    # Some packages carry files that are no Python (templates, other versions' syntax); pip passes over them too.
    run(python, "-m", "compileall", "-qq", "-j", "0", VENV / "lib", stdout=subprocess.DEVNULL)


def main() -> int:
    started = time.monotonic()
    if sys.version_info < (3, 11):  # noqa: UP036  (this script is what finds out)
        found = f"{sys.executable} is {sys.version.split()[0]}"
        print(f"setup: Python >= 3.11 is needed, {found}; type: make setup PYTHON=python3.12", file=sys.stderr)
        return 2
    try:
        print("setup: Vulkan driver:", system_packages(), flush=True)
        driver_problem = None
    except Failure as failure:  # not the end: policies and reports work without pictures; said last, where it is seen
        driver_problem = failure
    try:
        install_packages(make_venv())
    except (Failure, subprocess.CalledProcessError) as failure:
        print(f"setup: {failure}", file=sys.stderr)
        return 2
    if driver_problem:
        print(f"setup: robot tasks cannot be rendered yet: {driver_problem}", file=sys.stderr)
    print(f"setup: done in {time.monotonic() - started:.0f} s; `.venv/bin/robot-forgetting doctor` checks every part")
    return 0


if __name__ == "__main__":
    sys.exit(main())
