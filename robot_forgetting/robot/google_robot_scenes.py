"""SimplerEnv's Google-robot scenes on SAPIEN 3: what all share, tables, and a can on a table.

Physics, initial states, cameras, lights and success tests of ManiSkill2_real2sim (Li et al. 2024, arXiv:2405.05941).
ManiSkill3 has none of these tasks. CPU simulation only.
"""

from __future__ import annotations

import numpy as np
import sapien
import torch
from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv
from mani_skill.sensors.camera import CameraConfig
from mani_skill.utils.structs.types import DefaultMaterialsConfig, SceneConfig, SimConfig

from robot_forgetting.errors import unknown
from robot_forgetting.robot import assets
from robot_forgetting.robot.assets import COLOURS
from robot_forgetting.robot.google_robot import CAMERA, FINGERS, GoogleRobot, urdf
from robot_forgetting.robot.grasp import contacts, presses
from robot_forgetting.robot.grid import STREAM, TEST_START, dealt
from robot_forgetting.robot.settling import drop

BASE_HEIGHT = 0.06205 + 0.017  # of the robot's base over the floor, metres
TABLE_HEIGHT = 0.87
STAGE = "stages/google_pick_coke_can_1_v4.glb"
INFO = "custom/info_pick_custom_baked_tex_v1.json"  # sizes and densities of what is not the can
CAN = "opened_coke_can"
# N / m, of an object's contacts (a negative restitution is PhysX 5's sign for a spring). With the rigid contacts of the
# original, PhysX 5 loses a can of 20 g between two fingers that press with 100 N; see docs/google_robot.md.
STIFFNESS = 2e5


def folder():
    return assets.data_folder() / assets.GOOGLE


def materials(body):
    """Of a render body's shapes."""
    for shape in body.render_shapes:
        for part in shape.parts if hasattr(shape, "parts") else [shape]:
            yield part.material


def looks(thing):
    """An actor's render body."""
    return thing._bodies[0].entity.find_component_by_type(sapien.render.RenderBodyComponent)


def glow(thing) -> None:
    """A baked texture glows as it is: SAPIEN 3 multiplies it by the file's emission, which is black; SAPIEN 2 puts the
    texture in its place."""
    for material in materials(looks(thing)):
        if material.emission_texture is not None:
            material.emission = [1.0, 1.0, 1.0, 1.0]


class GoogleScene(BaseDigitalTwinEnv):
    """The robot before a photo. Subclasses add objects, initial states and success.

    photo: in ``real_inpainting``; an episode may show another. needs: files beside the bundle's, in ``folder()``
    """

    SUPPORTED_OBS_MODES = ["rgb+segmentation"]
    SUPPORTED_REWARD_MODES = ["none"]
    SUPPORTED_ROBOTS = [GoogleRobot.uid]

    def __init__(self, photo: str, needs: tuple[str, ...] = (), **kwargs):
        assets.require("google_robot", tuple(f"{assets.GOOGLE}/{file}" for file in needs))
        GoogleRobot.urdf_path = str(urdf(COLOURS[0]))
        self.rgb_overlay_paths = {CAMERA: str(folder() / "real_inpainting" / photo)}
        # ManiSkill's are the class's, and so every environment's
        self._rgb_overlay_images, self._objects_to_remove_from_greenscreen = {}, []
        self.configuration = -1
        super().__init__(**{**kwargs, "robot_uids": GoogleRobot})

    @property
    def _default_sim_config(self):
        scene = SceneConfig(
            contact_offset=0.02,
            solver_position_iterations=25,
            solver_velocity_iterations=0,  # with 1, as in the original, PhysX 5 lets stiffly driven fingers chatter
            enable_pcm=False,
            enable_tgs=True,
        )
        friction = DefaultMaterialsConfig(static_friction=1.0, dynamic_friction=1.0)
        return SimConfig(
            sim_freq=513, control_freq=3, spacing=20, scene_config=scene, default_materials_config=friction
        )

    @property
    def _default_human_render_camera_configs(self):
        own = self.agent._sensor_configs[0]
        link = self.agent.robot.links_map["link_camera"]
        return CameraConfig("render_camera", own.pose, 512, 512, intrinsic=own.intrinsic, mount=link)

    def _load_agent(self, options: dict):
        super()._load_agent(options, sapien.Pose([-10, 0, 0]))
        names = [joint.name for joint in self.agent.robot.active_joints]
        self.fingers, self.wrist = [names.index(name) for name in FINGERS], names.index("joint_wrist")
        self._add_colours()

    def _add_colours(self) -> None:
        """The links' shapes in every colouring, of which each episode shows one."""
        links = {name: link._objs[0].entity for name, link in self.agent.robot.links_map.items()}
        self._shapes = {name: [] for name in COLOURS}
        for entity in links.values():
            body = entity.find_component_by_type(sapien.render.RenderBodyComponent)
            if body is not None:
                self._shapes[COLOURS[0]].append(body)
        for name in COLOURS[1:]:
            loader = self.scene.create_urdf_loader()
            for builder in loader.parse(str(urdf(name)))["articulation_builders"][0].link_builders:
                if builder.visual_records:
                    body = builder.build_render_component()
                    links[builder.name].add_component(body)
                    self._shapes[name].append(body)

    def _show(self, colours: str) -> None:
        for name, bodies in self._shapes.items():
            for body in bodies:
                body.visibility = float(name == colours)

    def _polish(self) -> None:
        """The robot's surfaces as the original has them over tables."""
        for bodies in self._shapes.values():
            for body in bodies:
                for material in materials(body):
                    material.specular, material.roughness = 0.9, 0.3

    def _place_robot(self, x: float, y: float, yaw: float) -> None:
        half = yaw / 2
        turn = [-np.sin(half), 0.0, 0.0, np.cos(half)]  # half a turn, then the yaw
        self.agent.robot.set_pose(sapien.Pose([x, y, BASE_HEIGHT], turn))
        self.agent.reset(init_qpos=self.agent.initial_qpos())

    def draw(self, options: dict) -> tuple[int | None, np.random.Generator]:
        """The configuration's number (None in training) and random numbers of the episode's seed."""
        seed, number = int(self._episode_seed[0]), options.get("episode_id")
        if number is None and seed >= TEST_START:
            number = seed - TEST_START
        return None if number is None else int(number), np.random.default_rng([seed, STREAM])

    def pressed(self, touching: list) -> bool:
        """Whether both fingers press what ``touching`` (see ``grasp.contacts``) is about, as the original asks it."""
        links = self.agent.robot.links_map
        return all(
            presses([links[f"link_finger_tip_{side}"], links[f"link_finger_{side}"]], 1.0, touching, 1e-6, 80)
            for side in ("left", "right")
        )

    def _object(self, name: str, density: float):
        """One of the assets' models; contacts yield, see ``STIFFNESS``."""
        model = folder() / "custom" / "models" / name
        builder = self.scene.create_actor_builder()
        builder.add_multiple_convex_collisions_from_file(
            str(model / "collision.obj"), material=sapien.physx.PhysxMaterial(0.5, 0.5, -STIFFNESS), density=density
        )
        builder.add_visual_from_file(str(assets.visual(model)))
        builder.initial_pose = sapien.Pose([0, 0, 2])
        thing = builder.build(name=name)
        thing._bodies[0].linear_damping = thing._bodies[0].angular_damping = 0.1
        self.remove_object_from_greenscreen(thing)
        return thing

    def _drop(self, starts: list[tuple]) -> None:
        """Objects fall from half a metre and settle; the robot is out of the way.

        starts: (object, place [2], quaternion)
        """
        # It stands still there: fingers still driven by the last episode's targets changed how a bottle came to rest.
        self.agent.robot.set_pose(sapien.Pose([-10, 0, 0]))
        qpos = self.agent.initial_qpos()
        self.agent.reset(init_qpos=qpos)
        for joint, position in zip(self.agent.robot._objs[0].active_joints, qpos, strict=True):
            joint.set_drive_target(float(position))
            joint.set_drive_velocity_target(0.0)
        drop(self, [(thing._bodies[0], *start) for thing, *start in starts], TABLE_HEIGHT + 0.5)


PLACES = np.array([[x, y] for x in np.linspace(-0.35, -0.12, 5) for y in np.linspace(-0.02, 0.42, 5)])
ORIENTATIONS = {  # quaternions (w, x, y, z)
    "upright": [np.sqrt(0.5), np.sqrt(0.5), 0.0, 0.0],
    "laid_vertically": [np.sqrt(0.5), 0.0, 0.0, np.sqrt(0.5)],
    "lr_switch": [0.0, 0.0, 0.0, 1.0],
}
HELD_OUT = 0.02  # metres around the evaluation's places where no can stands in training


def can_state(number: int | None, rng: np.random.Generator) -> tuple[int, np.ndarray, str]:
    """Configuration (-1: in training), place [2] and colouring of an episode; ``number`` None draws them."""
    if number is not None:
        configuration, place, colours = dealt(number, len(PLACES), len(COLOURS))
        return configuration, PLACES[place], COLOURS[colours]
    colours, place = str(rng.choice(COLOURS)), rng.uniform(PLACES.min(axis=0), PLACES.max(axis=0))
    while np.linalg.norm(place - PLACES, axis=1).min() < HELD_OUT:
        place = rng.uniform(PLACES.min(axis=0), PLACES.max(axis=0))
    return -1, place, colours


class Tabletop(GoogleScene):
    """Objects on a table, which a photo hides.

    table: "flat" (a slab that ends before the robot) or "stage" (the collision mesh of the assets)
    """

    def __init__(self, photo: str, needs: tuple[str, ...] = (), table: str = "flat", **kwargs):
        if table not in ("flat", "stage"):
            raise unknown("table", table, ("flat", "stage"))
        self.table = table
        super().__init__(photo, (*needs, *(STAGE,) * (table == "stage")), **kwargs)

    def _load_lighting(self, options: dict):
        self.scene.set_ambient_light([0.3, 0.3, 0.3])
        self.scene.add_directional_light([0, 0, -1], [2.2, 2.2, 2.2], shadow=False)
        self.scene.add_directional_light([-1, -0.5, -1], [0.7, 0.7, 0.7])
        self.scene.add_directional_light([1, 1, -1], [0.7, 0.7, 0.7])

    def _load_scene(self, options: dict):
        self._polish()
        builder = self.scene.create_actor_builder()
        if self.table == "stage":
            builder.add_nonconvex_collision_from_file(str(folder() / STAGE), sapien.Pose(q=[0.707, 0.707, 0, 0]))
            builder.initial_pose = sapien.Pose([1.6616, 3.0337, 0])
        else:
            builder.add_box_collision(half_size=[0.5, 1.0, 0.02])
            builder.initial_pose = sapien.Pose([-0.55, 0.2, TABLE_HEIGHT - 0.02])
        builder.build_static(name="table")
        self._load_objects()
        self.remove_object_from_greenscreen(self.agent.robot)

    def _load_objects(self) -> None:
        """Fills ``self.objs``, name -> actor: each subclass has its own."""
        raise NotImplementedError


class PickCan(Tabletop):
    """Lift an empty can. 25 places times 4 colourings; see ``grid.dealt``.

    orientation: one of ``ORIENTATIONS``, or "any": drawn anew for every episode
    table: as ``Tabletop`` has it
    """

    def __init__(self, orientation: str = "upright", table: str = "flat", **kwargs):
        if orientation not in (*ORIENTATIONS, "any"):
            raise unknown("orientation", orientation, (*ORIENTATIONS, "any"))
        self.orientation = orientation
        self.recorded_choices = {"orientation": ORIENTATIONS, "colours": COLOURS}
        super().__init__("google_coke_can_real_eval_1.png", table=table, **kwargs)

    def _load_objects(self) -> None:
        self.can = self._object(CAN, 50)
        self.objs, self.source_obj_name = {CAN: self.can}, CAN

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        number, rng = self.draw(options)
        orientation = str(rng.choice(list(ORIENTATIONS))) if self.orientation == "any" else self.orientation
        orientation = options.get("orientation", orientation)
        self.configuration, place, colours = can_state(number, rng)
        self._show(options.get("colours", colours))
        self._drop([(self.can, options.get("place", place), ORIENTATIONS[orientation])])
        self._place_robot(0.35, 0.20, 0.0)
        self._held, self._lifted, self._high = 0, False, 0  # steps held, lifted since, steps higher than 2 cm
        self._height = float(self.can._bodies[0].entity_pose.p[2])

    def evaluate(self) -> dict:
        """The original's flags after a control step; success is a can lifted by 1 cm with nothing but the robot
        touching it while it is held, or one that was 2 cm up in five steps of the episode."""
        body = self.can._bodies[0]
        touching = contacts(self.scene, body.entity)
        held = self.pressed(touching)
        self._held = self._held + 1 if held else 0
        robot = {link.entity for link in self.agent.robot._objs[0].links}
        free = all(other in robot or np.linalg.norm(impulse) <= 1e-6 for other, impulse in touching)
        risen = float(body.entity_pose.p[2]) - self._height
        self._lifted = (held and self._lifted) or (free and risen > 0.01)
        high = self._lifted and risen > 0.02
        self._high += high
        flags = {
            "is_grasped": held,
            "consecutive_grasp": self._held >= 5,
            "lifted_object": self._lifted,
            "lifted_object_significantly": high,
            "success": self._lifted or self._high >= 5,
        }
        flags = {name: torch.tensor([bool(value)]) for name, value in flags.items()}
        return {**flags, "configuration": torch.tensor([self.configuration])}
