"""The doctor: what works, what fails, and a crashing renderer, each as one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from robot_forgetting.machine import doctor, vulkan

LAVAPIPE = {"device": "llvmpipe (LLVM 15.0.6)", "driver": "llvmpipe", "version": "Mesa 25.0.7-2", "blank": False}


@pytest.fixture
def found(monkeypatch):
    """Replaces what the renderer says about itself."""

    def replace(**changes):
        monkeypatch.setattr(vulkan, "probe", lambda: {**LAVAPIPE, **changes})

    replace()
    return replace


@pytest.mark.parametrize(
    "changes, state, words",
    [
        ({}, "ok", "Mesa 25.0"),
        ({"version": "Mesa 24.3.0"}, "ok", "Mesa 24.3"),
        ({"version": "Mesa 24.2.8-1"}, "FAIL", "24.3 or newer is needed"),
        ({"version": "Mesa 22.3.6"}, "FAIL", "24.3 or newer is needed"),
        ({"version": "unknown"}, "warn", "not recognised"),
        ({"device": "NVIDIA H200", "driver": "NVIDIA", "version": "580.95"}, "ok", "H200"),
    ],
)
def test_lavapipe_version(found, changes, state, words):
    found(**changes)
    check = doctor.vulkan_device()
    assert check.state == state and words in str(check)


def test_blank_picture_and_no_device(found, monkeypatch):
    monkeypatch.setattr(vulkan, "installable_drivers", lambda: [])
    assert doctor.vulkan_device().state == "ok"
    found(blank=True)
    assert "blank" in doctor.vulkan_device().found
    found(error="the renderer crashed (SIGSEGV)")
    check = doctor.vulkan_device()
    assert check.state == "FAIL" and "crashed" in check.found and "make setup" in check.cure
    assert doctor.render_backend()["error"] == "the renderer crashed (SIGSEGV)"


@pytest.mark.parametrize(
    "code, words",
    [
        ("import os; os.abort()", "crashed (SIGABRT)"),
        ("raise RuntimeError('no rendering device')", "RuntimeError: no rendering device"),
        ("import time; time.sleep(60)", "did not finish in 1 s"),
    ],
)
def test_a_renderer_that_dies_is_a_line(monkeypatch, code, words):
    run = subprocess.run
    monkeypatch.setattr(vulkan.subprocess, "run", lambda command, **more: run([sys.executable, "-c", code], **more))
    monkeypatch.setattr(vulkan, "TIMEOUT_SECONDS", 1)
    assert words in vulkan.probe.__wrapped__()["error"]


@pytest.mark.parametrize(
    "torch, torchvision, state",
    [("2.13.0+cpu", None, "ok"), ("2.13.0+cpu", "0.28.0", "warn"), ("2.13.0", "0.28.0", "ok")],
)
def test_torchvision_beside_torch(monkeypatch, torch, torchvision, state):
    monkeypatch.setattr(doctor, "_version", {"torch": torch, "torchvision": torchvision}.get)
    assert doctor.torchvision().state == state


def test_missing_and_old_packages(monkeypatch):
    assert doctor.packages().state == "ok"
    found = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"sapien": "3.0.2", "peft": None}.get(name, found(name)))
    assert doctor.packages().found == "missing: peft; unfit: sapien 3.0.2 (needed: >=3.0.3)"
    assert "make setup" in doctor.packages().cure


def test_packages_of_another_place(monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert doctor.python().state == "ok"
    monkeypatch.setenv("PYTHONPATH", "/opt/ros/jazzy/lib/python3.12/site-packages")
    assert doctor.python().state == "warn" and "unset PYTHONPATH" in str(doctor.python())


def test_weights(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "SHIPPED", tmp_path)
    assert "no base policy" in doctor.weights().found
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    assert doctor.weights().state == "FAIL" and "cannot be read" in doctor.weights().found


def test_exit_code_and_one_line_each(monkeypatch, capsys, found):
    for part in ("gpu", "weights"):
        monkeypatch.setattr(doctor, part, lambda: doctor.Check("part", "ok", "found"))
    assert doctor.doctor() == 0
    monkeypatch.setattr(doctor, "weights", lambda: 1 / 0)  # a check that fails itself
    assert doctor.doctor() == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20 and lines[-1].startswith("FAIL") and "ZeroDivisionError" in lines[-1]


def test_this_machine_renders():
    if not vulkan.installable_drivers():
        pytest.skip("no Vulkan driver on this machine; `make setup` installs one")
    assert vulkan.probe().get("blank") is False, vulkan.probe()
    assert set(doctor.render_backend()) == {"device", "driver", "version"}


def test_provenance_is_plain():
    hardware = doctor.hardware()
    assert hardware["cores"] >= 1 and hardware["memory_bytes"] > 0 and isinstance(hardware["gpus"], list)
    assert doctor.versions()["torch"]
