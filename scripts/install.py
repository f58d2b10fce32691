"""Sets the project up: virtual environment, locked packages, a Vulkan driver that SAPIEN can render with.

Run by `make setup` with any Python >= 3.11; needs only the standard library. Safe to run again.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036  (this script is what finds out)
    found = f"{sys.executable} is {sys.version.split()[0]}"
    print(f"setup: Python >= 3.11 is needed, {found}; type: make setup PYTHON=python3.12", file=sys.stderr)
    sys.exit(2)

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from robot_forgetting.machine import nvidia, vulkan  # noqa: E402  (both need only the standard library)

VENV = ROOT / ".venv"
TORCH = "2.13.0"
TORCH_VERSION = "import importlib.metadata; print(importlib.metadata.version('torch'))"
APT_UPDATE = "apt-get -qq update"
APT_INSTALL = "apt-get -qq install -y --no-install-recommends -o DPkg::Lock::Timeout=120 "


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
    if vulkan.LAVAPIPE_PACKAGE not in packages:
        return [APT_UPDATE, APT_INSTALL + " ".join(packages)]
    source = f"deb {mirrors.get('bookworm', 'http://deb.debian.org/debian')} bookworm-backports main"
    return [f"echo '{source}' > /etc/apt/sources.list.d/bookworm-backports.list", *lines]


def install_libraries() -> None:
    """What SAPIEN and opencv open; and lavapipe at once where there is no Vulkan driver at all."""
    missing = [package for library, package in vulkan.LIBRARIES.items() if not vulkan.loads(library)]
    if not vulkan.installable_drivers():
        missing.append(vulkan.LAVAPIPE_PACKAGE)
    if sys.platform != "linux" or not missing:
        return
    if not shutil.which("apt-get"):
        raise Failure(f"install with the system's package manager: Debian calls them {', '.join(missing)}")
    apt(*apt_lines(missing))


def vulkan_driver(python: Path) -> str:
    """What renders here; lavapipe is installed where nothing does, with a GPU or without."""
    found = vulkan.rendered(python)
    fault = vulkan.fault(found)
    if fault and sys.platform == "linux" and shutil.which("apt-get"):
        apt(*apt_lines([vulkan.LAVAPIPE_PACKAGE]))
        found = vulkan.rendered(python)
        fault = vulkan.fault(found)
    if fault:
        raise Failure(f"{fault}; `.venv/bin/robot-forgetting doctor` says what to do")
    return f"{found['device']}, {found['driver']} {found['version']}"


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


def torch_source(python: Path) -> list[str]:
    """What pip is given for the build of torch that this machine can use.

    Without a usable NVIDIA GPU the CPU build, with one the build for its driver's CUDA. Their versions end in '+cpu'
    and '+cu126' and sort above the plain one, so an *extra* source is enough. It is added only where it answers (else
    pip would retry for minutes); without it pip takes what its own configuration offers.
    """
    plain = [f"torch=={TORCH}"]
    if sys.platform != "linux":
        return plain
    gpus = nvidia.gpus()
    if gpus:
        build = nvidia.fitting(gpus)
        if build is not None and (build.index is None or answers(build.index)):
            print(f"setup: {nvidia.described(gpus)}: torch for CUDA {build.cuda}", flush=True)
            if "+cpu" in output(str(python), "-c", TORCH_VERSION):  # of an earlier setup: pip would be content with it
                run(python, "-m", "pip", "uninstall", "-qq", "-y", "torch")
            return build.requirement(TORCH)
        if build is None:
            reason = nvidia.mismatch(gpus, TORCH, None)
        else:
            later = " ".join(build.requirement(TORCH))
            reason = f"{build.index} does not answer; later type: .venv/bin/python -m pip install {later}"
        print(f"setup: torch will compute on the CPU: {reason}", flush=True)
    return [*plain, "--extra-index-url", nvidia.CPU_INDEX] if answers(nvidia.CPU_INDEX) else plain


def answers(index: str) -> bool:
    probe = f"import urllib.request; urllib.request.urlopen('{index}/torch/', timeout=3)"
    try:  # in a child, because a name server that does not answer is not bound by urlopen's time limit
        return run(sys.executable, "-c", probe, capture_output=True, timeout=6).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def install_packages(python: Path) -> None:
    # pip would compile the modules on one core, which takes longer than unpacking them.
    pip = [python, "-m", "pip", "install", "-qq", "--no-compile", "--disable-pip-version-check"]
    torch = torch_source(python)
    for what, arguments in (
        # --no-deps: the lock is complete, and mani-skill's mplib, which is not used, has no build for Python >= 3.13.
        ("locked packages", ["--no-deps", "-r", ROOT / "requirements.lock"]),
        (torch[0], torch),
        ("this project", ["--no-deps", "--no-build-isolation", "-e", ROOT]),
    ):
        print(f"setup: installing {what}", flush=True)
        if run(*pip, *arguments).returncode:
            raise Failure(f"pip could not install {what} (its message is above); mend that and type `make setup` again")
    # Some packages carry files that are no Python (templates, other versions' syntax); pip passes over them too.
    run(python, "-W", "ignore", "-m", "compileall", "-qq", "-j", "0", VENV / "lib", stdout=subprocess.DEVNULL)


def clear_environment() -> None:
    """Forgets settings under which Python or pip would work in another place than .venv (conda, ROS, clusters)."""
    for name in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_REQUIREMENT", "PIP_NO_DEPS"):
        os.environ.pop(name, None)
    os.environ["PIP_USER"] = "0"
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pip"
        cache.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # a home that cannot be written: pip would fail when it has built a wheel
        os.environ["PIP_NO_CACHE_DIR"] = "1"


def main() -> int:
    started = time.monotonic()
    clear_environment()
    problems = []  # not the end: policies and reports work without pictures; said last, where it is seen
    try:
        install_libraries()
    except Failure as failure:
        problems.append(failure)
    try:
        python = make_venv()
        install_packages(python)
    except (Failure, subprocess.CalledProcessError) as failure:
        print(f"setup: {failure}", file=sys.stderr)
        return 2
    try:
        print("setup: pictures are rendered by", vulkan_driver(python), flush=True)
    except Failure as failure:
        problems.append(failure)
    for problem in problems:
        print(f"setup: robot tasks cannot be rendered yet: {problem}", file=sys.stderr)
    print(f"setup: done in {time.monotonic() - started:.0f} s; `.venv/bin/robot-forgetting doctor` checks every part")
    return 0


if __name__ == "__main__":
    sys.exit(main())
