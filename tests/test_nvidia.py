"""Drivers, GPUs and builds of torch: what setup installs, what the doctor says, what `device=auto` does."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

from robot_forgetting.errors import UserError
from robot_forgetting.machine import device, doctor, nvidia, vulkan

ROOT = Path(__file__).resolve().parents[1]
CU126 = ["torch==2.13.0+cu126", "--extra-index-url", "https://download.pytorch.org/whl/cu126"]
CPU = ["torch==2.13.0", "--extra-index-url", nvidia.CPU_INDEX]
MACHINES = {  # what nvidia-smi lists: name, driver, capability; then the arguments that setup gives to pip
    "too old": (["Tesla V100-SXM2-32GB, 470.82.01, 7.0"], CPU),
    "least of 12": (["NVIDIA A100-SXM4-80GB, 525.60.13, 8.0"], CU126),
    "12.2": (["NVIDIA A100-SXM4-80GB, 535.161.08, 8.0"] * 4, CU126),
    "12.8": (["NVIDIA H100 80GB HBM3, 570.124.06, 9.0"], CU126),
    "13.0": (["NVIDIA H100 80GB HBM3, 580.65.06, 9.0"], ["torch==2.13.0"]),
    "13.2": (["NVIDIA GeForce RTX 5090, 595.71.05, 12.0"], ["torch==2.13.0"]),
    "Blackwell, driver of CUDA 12": (["NVIDIA B200, 570.124.06, 10.0"], CPU),  # CUDA 12.6 has no code for it
    "Volta, driver of CUDA 13": (["Tesla V100-SXM2-32GB, 580.65.06, 7.0"], CU126),
    "both": (["Tesla V100-SXM2-32GB, 580.65.06, 7.0", "NVIDIA A100-PCIE-40GB, 580.65.06, 8.0"], CU126),
    "capability unknown": (["Orin (nvgpu), 580.00, [N/A]"], ["torch==2.13.0"]),
}
FAKE = """#!/bin/sh
case "$*" in
{refuse}*--query-gpu=*) cat <<'END'
{rows}
END
;;
*) echo "GPU 0: one"; exit {code} ;;
esac
exit {code}
"""
REFUSE = "*compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2 ;;\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Puts an nvidia-smi on the path that lists what it is given."""
    monkeypatch.setattr(nvidia, "library_version", lambda: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    device.unusable_gpu.cache_clear()
    device._say_once.cache_clear()

    def make(rows: list[str], refuse: bool = False, code: int = 0):
        (tmp_path / "nvidia-smi").write_text(
            FAKE.format(rows="\n".join(rows), refuse=REFUSE if refuse else "", code=code)
        )
        (tmp_path / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
        return nvidia.gpus()

    yield make
    device.unusable_gpu.cache_clear()
    device._say_once.cache_clear()


@pytest.fixture(scope="module")
def install():
    spec = importlib.util.spec_from_file_location("install", ROOT / "scripts" / "install.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", MACHINES)
def test_setup_takes_the_build_that_the_driver_runs(machine, install, monkeypatch, capsys, name):
    rows, wanted = MACHINES[name]
    assert len(machine(rows)) == len(rows)
    monkeypatch.setattr(install, "answers", lambda index: True)
    assert install.torch_source(Path("/no/python")) == wanted
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and rows[0].split(",")[0] in said
    assert ("update NVIDIA's driver to 580 or newer" in said) == (wanted == CPU)


def test_setup_without_the_index_says_what_to_type_later(machine, install, monkeypatch, capsys):
    machine(MACHINES["12.2"][0])
    monkeypatch.setattr(install, "answers", lambda index: False)
    assert install.torch_source(Path("/no/python")) == ["torch==2.13.0"]
    assert f"later type: .venv/bin/python -m pip install {' '.join(CU126)}" in capsys.readouterr().out


def test_setup_without_a_gpu(machine, install, monkeypatch):
    monkeypatch.setattr(install, "answers", lambda index: True)
    assert machine([], code=6) == [] and install.torch_source(Path("/no/python")) == CPU


def test_a_driver_that_does_not_know_capabilities(machine):
    (gpu,) = machine(["Tesla P100-PCIE-16GB, 460.32.03"], refuse=True)
    assert gpu == nvidia.Gpu("Tesla P100-PCIE-16GB", "460.32.03", None)


def test_the_drivers_library_is_asked_first(machine, monkeypatch):
    gpus = machine(MACHINES["12.2"][0])
    monkeypatch.setattr(nvidia, "library_version", lambda: 13000)  # cuda-compat in a container
    assert nvidia.fitting(gpus).index is None and "supports CUDA up to 13.0" in nvidia.described(gpus)


@pytest.mark.parametrize(
    "name, version, cuda, words",
    [
        ("12.2", "2.13.0+cu130", "13.0", "A100-SXM4-80GB, driver 535.161.08, which supports CUDA up to 12.x, but torch "
         f"2.13.0 here is built for CUDA 13.0; type: python -m pip install {' '.join(CU126)}"),
        ("12.2", "2.13.0+cpu", None, f"is built for the CPU; type: python -m pip install {' '.join(CU126)}"),
        ("13.0", "2.13.0+cpu", None, "python -m pip uninstall -y torch && python -m pip install torch==2.13.0"),
        ("13.0", "2.10.0", "12.8", ""),
        ("13.2", "2.13.0+cu130", "13.0", ""),
        ("13.2", "2.13.0+cu126", "12.6", "is built for CUDA 12.6; type: python -m pip uninstall"),
        ("Volta, driver of CUDA 13", "2.13.0", "13.0", f"type: python -m pip install {' '.join(CU126)}"),
        ("too old", "2.13.0", "13.0", "up to 11.x: no build of torch runs with that; update NVIDIA's driver to 580"),
    ],
)  # fmt: skip
def test_what_to_type(machine, name, version, cuda, words):
    said = nvidia.mismatch(machine(MACHINES[name][0]), version, cuda)
    assert words in said and bool(words) == bool(said) and "make" not in said


@pytest.mark.parametrize("name", ["too old", "12.2", "13.0"])
def test_a_gpu_that_torch_cannot_use_is_said_once(machine, monkeypatch, capsys, name):
    """On this machine torch finds no GPU, whatever nvidia-smi lists."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine(MACHINES[name][0])
    assert device.parse_device("auto") == device.parse_device("auto") == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("robot-forgetting: computing on the CPU, although there is a GPU: ")
    assert MACHINES[name][0][0].split(",")[0] in line
    assert device.parse_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device=cuda, but torch cannot use the GPU: "):
        device.parse_device("cuda")
    check = doctor.gpu()
    assert check.state == "warn" and "make" not in str(check) and check.found in line
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_gpu_that_is_hidden_on_purpose_is_not_missed(machine, monkeypatch, capsys, visible):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine(MACHINES["13.0"][0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.parse_device("auto") == torch.device("cpu") and capsys.readouterr().err == ""
    assert "none that CUDA_VISIBLE_DEVICES lets torch see" in doctor.gpu().found


def test_a_choice_of_gpus_that_are_not_there_is_named(machine, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    machine(MACHINES["13.0"][0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert device.unusable_gpu().endswith("says: no GPU (CUDA_VISIBLE_DEVICES=5)")


def test_a_gpu_without_code_for_it_counts_as_unusable(machine, monkeypatch):
    """torch calls a V100 available in its build for CUDA 13, and fails at the first kernel."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"])
    machine(MACHINES["Volta, driver of CUDA 13"][0])
    assert "torch==2.13.0+cu126" in device.unusable_gpu() and device.parse_device("auto") == torch.device("cpu")
    device.unusable_gpu.cache_clear()
    machine(MACHINES["both"][0])  # one of them can be used
    assert device.unusable_gpu() == ""


def test_a_broken_driver_is_named(machine):
    machine([], code=18)
    assert doctor.gpu().state == "warn" and "nvidia-smi fails: GPU 0: one" in doctor.gpu().found


@pytest.mark.parametrize(
    "capability, compiled, answer",
    [((9, 0), ["sm_80", "sm_90"], True), ((8, 9), ["sm_80", "sm_90"], True), ((7, 0), ["sm_75", "sm_80"], False),
     ((12, 0), ["sm_90", "sm_100"], False), ((12, 1), ["sm_90", "sm_120", "compute_120"], True),
     ((13, 0), ["sm_120", "compute_120"], True), ((9, 0), ["sm_90a"], True)],
)  # fmt: skip
def test_kernels(capability, compiled, answer):
    assert nvidia.has_kernels(capability, compiled) is answer


# --- what draws ---


@pytest.mark.parametrize(
    "gpu, drivers, loads, words, absent",
    [
        (False, [], False, "make setup, or apt-get install mesa-vulkan-drivers", "NVIDIA"),
        (
            True,
            [],
            False,
            "docker run -e NVIDIA_DRIVER_CAPABILITIES=all; or draw on the CPU: type: make setup",
            "export",
        ),
        (True, ["lvp"], False, "docker run -e NVIDIA_DRIVER_CAPABILITIES=all", "make setup"),
        (True, ["lvp", "nvidia"], True, "export VK_DRIVER_FILES=", "make setup"),
        (False, ["lvp", "intel"], False, "VK_LOADER_DEBUG=all", "make setup"),
    ],
)
def test_a_cure_is_never_what_was_done_already(machine, monkeypatch, gpu, drivers, loads, words, absent):
    machine(MACHINES["13.0"][0] if gpu else [], code=0 if gpu else 6)
    monkeypatch.setattr(vulkan, "installable_drivers", lambda: drivers)
    monkeypatch.setattr(vulkan, "loads", lambda library: loads)
    monkeypatch.setattr(vulkan, "probe", lambda: {"error": "RuntimeError: failed to find a rendering device"})
    check = doctor.vulkan_device()
    assert check.state == "FAIL" and words in check.cure and absent not in check.cure


@pytest.mark.parametrize(
    "release, words, absent",
    [("bookworm", "make setup (it takes lavapipe from backports)", "Ubuntu"), ("jammy", "use a release", "make setup")],
)
@pytest.mark.parametrize("rendered", [True, False])
def test_an_old_lavapipe(machine, monkeypatch, release, words, absent, rendered):
    """Whether it draws or SAPIEN finds no device in it: only Debian 12 has a newer one to offer."""
    machine([], code=6)
    old = {"device": "llvmpipe", "driver": "llvmpipe", "version": "Mesa 22.3.6"}
    found = {**old, "blank": False} if rendered else {"error": "RuntimeError: no device", "devices": [old]}
    monkeypatch.setattr(vulkan, "installable_drivers", lambda: ["lvp"])
    monkeypatch.setattr(vulkan, "probe", lambda: found)
    monkeypatch.setattr(doctor, "_release", lambda: release)
    check = doctor.vulkan_device()
    assert "Mesa 22.3, 24.3 or newer is needed" in check.found and words in check.cure and absent not in check.cure


def test_a_driver_that_was_chosen_by_hand(monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", "/no/such/icd.json")
    assert "unset VK_ICD_FILENAMES" in doctor.render_cure({"error": "no device"})


LAVAPIPE = {"device": "llvmpipe", "driver": "llvmpipe", "version": "Mesa 25.0.7", "blank": False}
NOTHING = {"error": "no device"}


@pytest.mark.parametrize(
    "answers, installs, said",
    [
        ([{**LAVAPIPE, "device": "NVIDIA A100", "driver": "NVIDIA"}], 0, "NVIDIA A100"),
        ([NOTHING, LAVAPIPE], 1, "llvmpipe"),  # also with a GPU, in a container that cannot draw with it
        ([{**LAVAPIPE, "version": "Mesa 22.3.6"}, LAVAPIPE], 1, "llvmpipe"),
        ([NOTHING, NOTHING], 1, None),
    ],
)
def test_setup_installs_lavapipe_wherever_nothing_renders(install, monkeypatch, answers, installs, said):
    left, lines = list(answers), []
    monkeypatch.setattr(install.vulkan, "rendered", lambda python: left.pop(0))
    monkeypatch.setattr(install.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(install, "apt", lambda *text: lines.append(" ".join(text)))
    if said is None:
        with pytest.raises(install.Failure, match="no device; .*doctor"):
            install.vulkan_driver(Path(sys.executable))
    else:
        assert install.vulkan_driver(Path(sys.executable)).startswith(said)
    assert len(lines) == installs and all("mesa-vulkan-drivers" in line for line in lines) and not left
