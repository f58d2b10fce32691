"""The ``low_poly`` render option: the same physics, far fewer triangles.

On a CPU renderer (lavapipe) the picture's cost is vertex work: the stock Panda has about 134,000 triangles, the ground
20,000. Here every robot link is drawn as its own collision mesh, the table as a box, and the ground not at all: about
2,500 triangles. Collision shapes, masses and friction are untouched.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import sapien
from mani_skill import PACKAGE_ASSET_DIR
from mani_skill.agents.registration import REGISTERED_AGENTS, register_agent
from mani_skill.agents.robots.panda.panda import Panda

from robot_forgetting.machine.files import cached

TABLE_COLOR = [0.62, 0.5, 0.38, 1.0]
LINK_COLOR = "0.75 0.75 0.78 1"
FINGER_COLOR = "0.1 0.1 0.12 1"


def low_poly_urdf() -> str:
    """ManiSkill's Panda with collision meshes as visuals, dark fingers, and absolute mesh paths."""
    folder = Path(PACKAGE_ASSET_DIR) / "robots" / "panda"
    text = (folder / "panda_v2.urdf").read_text()
    text = re.sub(r"meshes/visual/(\w+)\.glb", r"meshes/collision/\1.stl", text)
    text = re.sub(r'filename="(?!/)', f'filename="{folder}/', text)

    def coloured(match: re.Match) -> str:
        color = FINGER_COLOR if "finger" in match.group(0) else LINK_COLOR
        material = f'<material name="color_{color.replace(" ", "_")}"><color rgba="{color}"/></material>'
        return match.group(0).replace("</visual>", f"{material}</visual>")

    return re.sub(r"<visual>.*?</visual>", coloured, text, flags=re.DOTALL)


def install() -> None:
    """Makes every environment built in this process low-poly. Call it before ``gym.make``; a worker process does."""
    if installed():
        return
    file = cached("panda_low_poly.urdf", low_poly_urdf())

    class PandaLowPoly(Panda):
        uid = "panda"
        urdf_path = str(file)
        low_poly = True

    del REGISTERED_AGENTS["panda"]
    register_agent()(PandaLowPoly)

    # ``import a.b.scene_builder as x`` finds a package attribute of the same name, hence sys.modules.
    table = sys.modules["mani_skill.utils.scene_builder.table.scene_builder"]
    table.TableSceneBuilder.build = _build_table


def installed() -> bool:
    """Whether environments built in this process are low-poly."""
    return getattr(REGISTERED_AGENTS["panda"].agent_cls, "low_poly", False)


def _build_table(self) -> None:
    """ManiSkill's table with the same collision box, drawn as a plain box."""
    height = 0.9196429
    builder = self.scene.create_actor_builder()
    half_size = (2.418 / 2, 1.209 / 2, height / 2)
    builder.add_box_collision(pose=sapien.Pose(p=[0, 0, height / 2]), half_size=half_size)
    material = sapien.render.RenderMaterial(base_color=TABLE_COLOR, roughness=0.9, specular=0.1)
    builder.add_box_visual(pose=sapien.Pose(p=[0, 0, height / 2]), half_size=half_size, material=material)
    quarter_turn = [0.7071068, 0, 0, 0.7071068]
    builder.initial_pose = sapien.Pose(p=[-0.12, 0, -height], q=quarter_turn)
    self.table = builder.build_kinematic(name="table-workspace")
    self.table_length, self.table_width, self.table_height = 1.2090765, 2.4180652, 0.9196429
    ground = self.scene.create_actor_builder()
    ground.add_plane_collision(sapien.Pose(p=[0, 0, -height], q=[0.7071068, 0, -0.7071068, 0]))
    ground.initial_pose = sapien.Pose()
    self.ground = ground.build_static(name="ground")
    self.scene_objects = [self.table, self.ground]
