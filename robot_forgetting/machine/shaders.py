"""Ten seconds less at the start of every process that renders on a CPU.

SAPIEN's "minimal" and "default" shaders declare a lookup table for reflections of an environment map. Filling it takes
a software renderer 10 s of CPU time, in every process, before the first picture. Our scenes have no environment map, so
the table is only ever multiplied by zero: the same shaders without it give the same pixels (none differs in StackCube
and in SimplerEnv's carrot).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from robot_forgetting.machine.files import cache_folder

DECLARATION = "uniform sampler2D samplerBRDFLUT"
LOOKUP = "texture(samplerBRDFLUT, vec2(roughness, dotNV)).xy"
LOOKUPS = {"minimal": 1, "default": 2}  # shader -> how many of its files look the table up


def install() -> None:
    """Makes the names mean the shaders without the table, in this process. A SAPIEN it does not know is left alone."""
    import sapien

    original = sapien.render.set_camera_shader_dir
    if hasattr(original, "without_table"):
        return
    own = Path(sapien.__file__).parent / "vulkan_shader"
    folders = {name: without_table(own, sapien.__version__, name) for name in LOOKUPS}

    def set_camera_shader_dir(name: str) -> None:
        original(str(folders.get(name) or name))

    set_camera_shader_dir.without_table = folders
    sapien.render.set_camera_shader_dir = set_camera_shader_dir


def without_table(shaders: Path, version: str, name: str = "minimal") -> Path | None:
    """A cached copy of a shader that needs no table; None where its text is not the expected one."""
    cache = cache_folder()
    target = cache / (f"shaders-{version}" if name == "minimal" else f"shaders-{version}-{name}")
    if (target / name).is_dir():
        return target / name
    if not (shaders / name).is_dir():
        return None
    texts = {path.name: path.read_text(encoding="utf-8") for path in (shaders / name).iterdir()}
    if sum(LOOKUP in text for text in texts.values()) != LOOKUPS[name]:
        return None
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache))
    except OSError:  # a home that cannot be written
        scratch = Path(tempfile.mkdtemp(prefix="robot_forgetting-"))
        target = scratch / "shaders"
    made = scratch / "made"
    shutil.copytree(shaders / "common", made / "common")  # the shaders include ../common
    (made / name).mkdir()
    for file, text in texts.items():
        lines = [line for line in text.replace(LOOKUP, "vec2(0.0)").splitlines() if DECLARATION not in line]
        (made / name / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
    try:
        made.rename(target)
    except OSError:  # another process was faster
        pass
    if target.parent != scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    return target / name
