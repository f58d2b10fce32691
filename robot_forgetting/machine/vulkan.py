"""Which Vulkan device SAPIEN renders with, found out by rendering.

`python -m robot_forgetting.machine.vulkan` prints it as JSON.

Broken drivers end a process (abort, segmentation fault, hang), so all of it runs in a child; ``probe`` is the way in.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from robot_forgetting.errors import described
from robot_forgetting.machine import children

TIMEOUT_SECONDS = 90
LAVAPIPE_NEEDED = (24, 3)  # older ones lack what SAPIEN 3 asks of a device (ray tracing)
LAVAPIPE_PACKAGE = "mesa-vulkan-drivers"
LIBRARIES = {  # what SAPIEN and its opencv open: Debian's package that has it
    "libvulkan.so.1": "libvulkan1",
    "libEGL.so.1": "libegl1",
    "libGL.so.1": "libgl1",
    "libgthread-2.0.so.0": "libglib2.0-0",
}
ICD_FOLDERS = ("/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/usr/share/vulkan/icd.d")


@functools.cache
def probe() -> dict:
    """What ``rendered`` says of this Python; asked once."""
    return rendered(sys.executable)


def rendered(python: Path | str) -> dict:
    """Renders a small picture in a child process.

    Returns {"device", "driver", "version", "icd", "blank": bool, "seconds"} or, where that failed, {"error": one line},
    where the driver lived on with "devices", as ``physical_devices`` lists them.
    """
    # -P: no modules from the working folder
    command = [str(python), "-P", "-m", "robot_forgetting.machine.vulkan", str(os.getpid())]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return {"error": f"rendering did not finish in {TIMEOUT_SECONDS} s"}
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    if result.returncode == 0 and lines:
        return json.loads(lines[-1])
    if result.returncode < 0:
        return {"error": f"the renderer crashed ({signal.Signals(-result.returncode).name})"}
    said = [line for line in result.stderr.splitlines() if line.strip()]
    return {"error": said[-1].strip() if said else f"the renderer ended with code {result.returncode}"}


def fault(found: dict) -> str:
    """What is wrong with a probe's answer; "" where pictures can be rendered."""
    if old := old_lavapipe(found):
        return f"lavapipe is of Mesa {old}, {'.'.join(map(str, LAVAPIPE_NEEDED))} or newer is needed"
    if "error" in found:
        return found["error"]
    return f"{found['device']}, {found['driver']} {found['version']} renders a blank picture" if found["blank"] else ""


def old_lavapipe(found: dict) -> str:
    """The version of a lavapipe that SAPIEN cannot use, if it is that, or all there is; else ""."""
    rows = found.get("devices") or [found]
    versions = [mesa_version(row) for row in rows if is_lavapipe(row)]
    old = len(versions) == len(rows) and all(() < version < LAVAPIPE_NEEDED for version in versions)
    return ".".join(map(str, versions[0])) if old else ""


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def is_lavapipe(found: dict) -> bool:
    return "llvmpipe" in found.get("device", "") or "llvmpipe" in found.get("driver", "")


def mesa_version(found: dict) -> tuple[int, ...]:
    """'Mesa 25.0.7-2~bpo12+1 (LLVM 15.0.6)' -> (25, 0); () where it does not say."""
    match = re.search(r"Mesa (\d+)\.(\d+)", found.get("version", ""))
    return tuple(map(int, match.groups())) if match else ()


def chosen_by() -> str | None:
    """The environment variable that tells the loader which drivers to look at, where one does."""
    return next((name for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES") if os.environ.get(name)), None)


def installable_drivers() -> list[str]:
    """The ICD files (lvp is lavapipe) that the Vulkan loader would look at."""
    if variable := chosen_by():
        return [f"{path} (from {variable})" for path in os.environ[variable].split(os.pathsep)]
    names = (path.name for folder in ICD_FOLDERS for path in Path(folder).glob("*.json"))
    return sorted(name.removesuffix(".json").removesuffix("_icd") for name in names)


# --- in the child ---


def render() -> dict:
    """Renders a box in front of the camera; the picture has to show more than one colour."""
    import sapien

    from robot_forgetting.machine import shaders

    started = time.monotonic()
    shaders.install()
    sapien.render.set_camera_shader_dir("minimal")
    sapien.render.set_picture_format("Color", "r8g8b8a8unorm")
    scene = sapien.Scene()
    scene.set_ambient_light([0.5, 0.5, 0.5])
    builder = scene.create_actor_builder()
    builder.add_box_visual(half_size=[0.1, 0.1, 0.1], material=[0.8, 0.3, 0.2])
    builder.set_initial_pose(sapien.Pose([1.0, 0.0, 0.0]))
    builder.build_static(name="box")
    camera = scene.add_camera("camera", 32, 32, 1.0, 0.01, 10.0)
    scene.update_render()
    camera.take_picture()
    picture = camera.get_picture("Color")[..., :3]
    device = scene.render_system.device
    found = next((row for row in physical_devices() if row["device"] == device.name), {"device": device.name})
    return {
        "driver": "",
        "version": "",
        **found,
        "icd": installable_drivers(),
        "blank": bool(picture.std() < 1),
        "seconds": round(time.monotonic() - started, 2),
    }


def _structure(**fields) -> type[ctypes.Structure]:
    """One of Vulkan's, which all begin with its type and a pointer to what extends it."""
    head = [("sType", ctypes.c_uint32), ("pNext", ctypes.c_void_p)]
    return type("Structure", (ctypes.Structure,), {"_fields_": [*head, *fields.items()]})


NUMBER, TEXT, NAME = ctypes.c_uint32, ctypes.c_char_p, ctypes.c_char * 256
ApplicationInfo = _structure(
    pApplicationName=TEXT, applicationVersion=NUMBER, pEngineName=TEXT, engineVersion=NUMBER, apiVersion=NUMBER
)
InstanceCreateInfo = _structure(  # no layers, no extensions
    flags=NUMBER, pApplicationInfo=ctypes.POINTER(ApplicationInfo), nothing=ctypes.c_uint64 * 4
)
DriverProperties = _structure(driverID=NUMBER, driverName=NAME, driverInfo=NAME, conformanceVersion=ctypes.c_uint8 * 4)
# VkPhysicalDeviceProperties2; what follows deviceName is left as bytes
Properties = _structure(numbers=NUMBER * 5, deviceName=NAME, rest=ctypes.c_uint64 * 128)


def physical_devices() -> list[dict]:
    """Device, driver and version of every Vulkan device, asked of the loader itself (SAPIEN tells the name only)."""
    vulkan = ctypes.CDLL(os.environ.get("SAPIEN_VULKAN_LIBRARY_PATH", "libvulkan.so.1"))
    application = ApplicationInfo(sType=0, apiVersion=(1 << 22) | (2 << 12))  # 1.2: driver properties are core
    create = InstanceCreateInfo(sType=1, pApplicationInfo=ctypes.pointer(application))
    instance = ctypes.c_void_p()
    if vulkan.vkCreateInstance(ctypes.byref(create), None, ctypes.byref(instance)):
        return []
    count = ctypes.c_uint32()
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), None)
    devices = (ctypes.c_void_p * count.value)()
    vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), devices)
    rows = []
    for device in devices:
        driver = DriverProperties(sType=1000196000)
        properties = Properties(sType=1000059001, pNext=ctypes.addressof(driver))
        vulkan.vkGetPhysicalDeviceProperties2(ctypes.c_void_p(device), ctypes.byref(properties))
        row = {"device": properties.deviceName, "driver": driver.driverName, "version": driver.driverInfo}
        rows.append({key: value.decode(errors="replace") for key, value in row.items()})
    vulkan.vkDestroyInstance(instance, None)
    return rows


if __name__ == "__main__":
    if sys.argv[1:]:  # a driver that hangs would outlive who asked
        children.end_with(int(sys.argv[1]))
    try:
        answer = render()
    except Exception as error:  # which devices there are may say why
        answer = {"error": described(error), "devices": physical_devices()}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # some drivers crash while they are unloaded, after all is said
