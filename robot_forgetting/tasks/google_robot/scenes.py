"""SimplerEnv's Google-robot scenes on SAPIEN 3: what all share, tables, and a can on a table.

Physics, initial states, cameras, lights and success tests of ManiSkill2_real2sim (Li et al. 2024, arXiv:2405.05941).
ManiSkill3 has none of these tasks.

Flags, and what a scene keeps of an episode, are tensors with a row per environment: one on the CPU, as many as a batch
has on a GPU (``batched.py``), whose episodes start from states that a CPU environment has made.
"""

from __future__ import annotations

import numpy as np
import sapien
import torch
from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv

from robot_forgetting.errors import check_choice
from robot_forgetting.machine import assets
from robot_forgetting.machine.assets import COLOURS
from robot_forgetting.tasks.google_robot.google_robot import CAMERA, FINGERS, GoogleRobot, urdf
from robot_forgetting.tasks.simulator.grasp import TOUCH, presses_batched
from robot_forgetting.tasks.simulator.grid import dealt, drawn
from robot_forgetting.tasks.simulator.settling import drop
from robot_forgetting.tasks.simulator.twins import Twin

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
    """Of a render body's shapes, in their order."""
    for shape in body.render_shapes:
        for part in shape.parts if hasattr(shape, "parts") else [shape]:
            yield part.material


def look(body):
    """The render body of a rigid body; None where nothing of it is to be seen."""
    return body.entity.find_component_by_type(sapien.render.RenderBodyComponent)


def looks(thing) -> list:
    """Render bodies of an actor or a link, one per environment; none where nothing of it is to be seen."""
    return [found for found in map(look, thing._bodies) if found is not None]


def glow(thing) -> None:
    """A baked texture glows as it is: SAPIEN 3 multiplies it by the file's emission, which is black; SAPIEN 2 puts the
    texture in its place."""
    for body in looks(thing):
        for material in materials(body):
            if material.emission_texture is not None:
                material.emission = [1.0, 1.0, 1.0, 1.0]


class GoogleScene(Twin, BaseDigitalTwinEnv):
    """The robot before a photo. Subclasses add objects, initial states and success.

    photo: in ``real_inpainting``; an episode may show another. needs: files beside the bundle's, in ``folder()``
    """

    SUPPORTED_OBS_MODES = ["rgb+segmentation", "none"]
    SUPPORTED_REWARD_MODES = ["none"]
    SUPPORTED_ROBOTS = [GoogleRobot.uid]
    camera_link = "link_camera"
    contact_offset = 0.02  # metres

    def __init__(self, photo: str, needs: tuple[str, ...] = (), **kwargs):
        assets.require("google_robot", tuple(f"{assets.GOOGLE}/{file}" for file in needs))
        GoogleRobot.urdf_path = str(urdf(COLOURS[0]))
        self.rgb_overlay_paths = {CAMERA: str(folder() / "real_inpainting" / photo)}
        super().__init__(**{**kwargs, "robot_uids": GoogleRobot})

    @property
    def _default_sim_config(self):
        # With the hulls and contacts that PhysX has on a GPU the original's 0.02 and 25 lose the can now and then; with
        # 1 iteration for velocities, as in the original, PhysX 5 lets stiffly driven fingers chatter.
        offset, iterations = (0.005, 50) if self._on_gpu else (self.contact_offset, 25)
        return self._physics(513, 3, offset, solver_position_iterations=iterations, solver_velocity_iterations=0)

    def _load_agent(self, options: dict):
        super()._load_agent(options, sapien.Pose([-10, 0, 0]))
        names = [joint.name for joint in self.agent.robot.active_joints]
        self.fingers, self.wrist = [names.index(name) for name in FINGERS], names.index("joint_wrist")
        self._add_colours()
        # Of an episode: the evaluation's configuration (-1 in training), the robot's colouring, for how many control
        # steps the fingers have held what counts; and ``_elapsed_steps`` when ``evaluate`` was last asked.
        self.configuration, self.colouring = self._rows(dtype=torch.int64) - 1, self._rows(dtype=torch.int64)
        self.held, self._counted = self._rows(dtype=torch.int64), self._rows(dtype=torch.int64)

    def _add_colours(self) -> None:
        """Textures of every link in each colouring. Colourings differ in nothing else, so that an episode's is given to
        the shapes that are there (on a GPU none can be added, hidden or shown)."""
        self._textures = {colours: {} for colours in COLOURS}
        for colours, textures in self._textures.items():
            parsed = self.scene.create_urdf_loader().parse(str(urdf(colours)))
            for builder in parsed["articulation_builders"][0].link_builders:
                if builder.visual_records:
                    body = builder.build_render_component()
                    textures[builder.name] = [material.base_color_texture for material in materials(body)]

    def dress(self, slots: list[int]) -> None:
        """Gives the robots of some environments the colouring of their episode."""
        colouring, links = self.colouring.tolist(), self.agent.robot.links_map
        for slot in slots:
            for name, textures in self._textures[COLOURS[colouring[slot]]].items():
                for material, texture in zip(materials(look(links[name]._bodies[slot])), textures, strict=True):
                    material.base_color_texture = texture

    def _polish(self) -> None:
        """The robot's surfaces as the original has them over tables."""
        for link in self.agent.robot.links_map.values():
            for body in looks(link):
                for material in materials(body):
                    material.specular, material.roughness = 0.9, 0.3

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        if not self.gpu_sim_enabled:  # else a CPU environment's state follows
            self._begin(options)
            self.held[0] = 0
            self.dress([0])

    def _begin(self, options: dict) -> None:
        """Sets the only environment to its episode's initial state."""
        raise NotImplementedError

    def _count_held(self, holding: torch.Tensor, stepped: torch.Tensor) -> None:
        """Counts for how many steps on end the fingers hold what counts; both [N] bool."""
        self.held = torch.where(stepped, torch.where(holding, self.held + 1, 0), self.held)

    def _place_robot(self, x: float, y: float, yaw: float) -> None:
        half = yaw / 2
        turn = [-np.sin(half), 0.0, 0.0, np.cos(half)]  # half a turn, then the yaw
        self.agent.robot.set_pose(sapien.Pose([x, y, BASE_HEIGHT], turn))
        self.agent.reset(init_qpos=self.agent.initial_qpos())

    def draw(self, options: dict) -> tuple[int | None, np.random.Generator]:
        """The configuration's number (None in training) and random numbers of the episode's seed."""
        return drawn(int(self._episode_seed[0]), options.get("episode_id"))

    def pressed(self, thing) -> torch.Tensor:
        """[N] bool: whether both fingers press an object, as the original asks it."""
        links, found = self.agent.robot.links_map, []
        for side in ("left", "right"):
            finger = [links[f"link_finger_tip_{side}"], links[f"link_finger_{side}"]]
            found.append(presses_batched(self.scene, finger, 1.0, thing, TOUCH, 80))
        return found[0] & found[1]

    def touches(self, one, other) -> torch.Tensor:
        """[N] bool: whether two things press each other."""
        return self.scene.get_pairwise_contact_impulses(one, other).norm(dim=1) > TOUCH

    def _object(self, name: str, density: float, place: list[float]):
        """One of the assets' models, built at ``place`` [3]; contacts yield, see ``STIFFNESS``."""
        model = folder() / "custom" / "models" / name
        builder = self.scene.create_actor_builder()
        builder.add_multiple_convex_collisions_from_file(
            str(model / "collision.obj"), material=sapien.physx.PhysxMaterial(0.5, 0.5, -STIFFNESS), density=density
        )
        builder.add_visual_from_file(str(assets.visual(model)))
        builder.initial_pose = sapien.Pose(place)
        thing = builder.build(name=name)
        for body in thing._bodies:
            body.linear_damping = body.angular_damping = 0.1
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
        check_choice("table", table, ("flat", "stage"))
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
        self.table_top = builder.build_static(name="table")
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
        check_choice("orientation", orientation, (*ORIENTATIONS, "any"))
        self.orientation = orientation
        self.recorded_choices = {"orientation": ORIENTATIONS, "colours": COLOURS}
        super().__init__("google_coke_can_real_eval_1.png", table=table, **kwargs)

    def _load_objects(self) -> None:
        self.can = self._object(CAN, 50, [*PLACES[0], TABLE_HEIGHT + 0.1])
        self.objs, self.source_obj_name = {CAN: self.can}, CAN
        # Its height at the start, metres; whether it has been lifted since; steps on which it was higher than 2 cm.
        self.height, self.lifted = self._rows(), self._rows(dtype=torch.bool)
        self.high = self._rows(dtype=torch.int64)

    def _begin(self, options: dict) -> None:
        number, rng = self.draw(options)
        orientation = str(rng.choice(list(ORIENTATIONS))) if self.orientation == "any" else self.orientation
        orientation = options.get("orientation", orientation)
        self.configuration[0], place, colours = can_state(number, rng)
        self.colouring[0] = COLOURS.index(options.get("colours", colours))
        self._drop([(self.can, options.get("place", place), ORIENTATIONS[orientation])])
        self._place_robot(0.35, 0.20, 0.0)
        self.height[0], self.lifted[0], self.high[0] = float(self.can.pose.p[0, 2]), False, 0

    def evaluate(self) -> dict:
        """The original's flags after a control step; success is a can 1 cm up and off the table, now or earlier in the
        present grasp, or one that was so and 2 cm up in five steps of the episode. The original asks that nothing but
        the robot touches it, which in these scenes is the table."""
        stepped = self._stepped()
        held = self.pressed(self.can)
        self._count_held(held, stepped)
        free = ~self.touches(self.table_top, self.can)
        risen = self.can.pose.p[:, 2] - self.height
        self.lifted = torch.where(stepped, (held & self.lifted) | (free & (risen > 0.01)), self.lifted)
        high = self.lifted & (risen > 0.02)
        self.high += stepped & high
        return {
            "is_grasped": held,
            "consecutive_grasp": self.held >= 5,
            "lifted_object": self.lifted,
            "lifted_object_significantly": high,
            "success": self.lifted | (self.high >= 5),
            "configuration": self.configuration,
        }
