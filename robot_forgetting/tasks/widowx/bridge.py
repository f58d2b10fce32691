"""SimplerEnv's Bridge scenes on SAPIEN 3 with the physics, initial states and success tests of the original.

The original is ManiSkill2_real2sim on SAPIEN 2.2.2 (Li et al. 2024, arXiv:2405.05941). What ManiSkill3's port does
differently is set back here: contact offset, solver, default friction, damping, the spoon's shape, how objects come to
rest, where positions are measured (centre of mass), and what counts as grasped and as success.

On a GPU (``batched.py``) the same scene stands there many times. Its initial states come from CPU simulations; what
PhysX does otherwise there is said in docs/gpu_simulation.md.
"""

from __future__ import annotations

import numpy as np
import sapien
import torch
from mani_skill.envs.tasks.digital_twins.base_env import BaseDigitalTwinEnv
from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval.base_env import BaseBridgeEnv
from mani_skill.utils import io_utils

from robot_forgetting.machine import assets
from robot_forgetting.tasks.simulator.grasp import TOUCH, pressing_fingers, pressing_fingers_batched
from robot_forgetting.tasks.simulator.grid import Grid
from robot_forgetting.tasks.simulator.settling import drop
from robot_forgetting.tasks.simulator.twins import Twin
from robot_forgetting.tasks.widowx import spoon
from robot_forgetting.tasks.widowx.widowx import WidowXFlatTable, WidowXSink

DROP_HEIGHT = 0.87 + 0.5  # of the table, and how far above it objects are let go
CAMERA = "3rd_view_camera"
SPOON = "bridge_spoon_generated_modified"
# Of the original's flags: metres by which a thing has moved, and by which the source's middle may be outside the
# target's box; control steps of one grasp.
MOVED, ASIDE, LONG = 0.03, 0.003, 5


class BridgeScene(Twin, BaseBridgeEnv):
    """Robot, table (or sink), source and target object. Subclasses say which.

    objects: names of the source and the target object; None: those that are drawn over the photo
    grid: their initial states
    height: of the source over the target, metres more than their boxes, that still is success
    nothing_else: whether the source may touch only the robot and the target then
    bundle: the assets it needs, see ``assets.BUNDLES``; photo: its background
    """

    objects: tuple[str, str] | None = None
    grid: Grid
    height, nothing_else = 0.02, True
    bundle, photo = "bridge", "bridge_real_eval_1.png"
    SUPPORTED_OBS_MODES = ("rgb+segmentation", "none")

    def __init__(self, robot_uids=None, **kwargs):
        objects = self.objects or self.objects_excluded_from_greenscreening
        assets.require(self.bundle, tuple(f"{assets.MODELS}/{name}/collision.obj" for name in objects))
        folder = assets.bridge_folder()
        self.objs, self.obj_names = {}, list(objects)
        self.source_obj_name, self.target_obj_name = objects
        self.xyz_configs, self.quat_configs = np.zeros(0), np.zeros(0)  # ManiSkill's own; we place the objects
        sink = self.scene_setting == "sink"
        self.rgb_overlay_paths = {CAMERA: str(folder / "real_inpainting" / self.photo)}
        # ManiSkill's are the class's, and so every environment's
        self._rgb_overlay_images, self._objects_to_remove_from_greenscreen = {}, []
        self.model_db = io_utils.load_json(folder / "custom" / self.MODEL_JSON)
        BaseDigitalTwinEnv.__init__(self, robot_uids=WidowXSink if sink else WidowXFlatTable, **kwargs)

    @property
    def _default_sim_config(self):
        return self._physics(500, 5, 0.005, solver_position_iterations=25)

    def _build_actor_helper(self, model_id: str, scale: float = 1, kinematic: bool = False, initial_pose=None):
        """ManiSkill's, with the original's damping, and the spoon in its parts."""
        folder = assets.bridge_folder() / "custom" / "models" / model_id
        friction = sapien.physx.PhysxMaterial(self.obj_static_friction, self.obj_dynamic_friction, 0.0)
        builder = self.scene.create_actor_builder()
        builder.add_multiple_convex_collisions_from_file(
            filename=str(spoon.write_mesh() if model_id == SPOON else folder / "collision.obj"),
            scale=[scale] * 3,
            material=friction,
            density=self.model_db[model_id].get("density", 1000),
        )
        builder.add_visual_from_file(filename=str(assets.visual(folder)), scale=[scale] * 3)
        builder.initial_pose = sapien.Pose() if initial_pose is None else initial_pose
        if kinematic:
            return builder.build_kinematic(name=model_id)
        actor = builder.build(name=model_id)
        for body in actor._bodies:
            body.linear_damping = body.angular_damping = 0.1
        return actor

    # ---- initial states

    def _load_scene(self, options: dict):
        super()._load_scene(options)
        # Of an episode, with a row per environment: places [N, 2, 3] and world-aligned boxes [N, 2, 3] of source and
        # target once they lay still, steps since when the source is held [N], and configuration [N]; and
        # ``_elapsed_steps`` when ``evaluate`` was last asked.
        self.at_rest, self.extents = self._rows(2, 3), self._rows(2, 3)
        self.consecutive_grasp, self.configuration = self._rows(dtype=torch.int64), self._rows(dtype=torch.int64) - 1
        self._counted = self._rows(dtype=torch.int64)
        self._mass_centres = [self.objs[name].cmass_local_pose for name in self.obj_names]  # before the GPU takes over

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        if self.gpu_sim_enabled:  # a CPU simulation's state follows; until then nothing may lie in another thing
            for name, place in zip(self.obj_names, self.grid.places[0], strict=True):
                self.objs[name].set_pose(sapien.Pose([*place, DROP_HEIGHT]))
            self._place_robot()
            return
        configuration, places, turns = self.grid.state(int(self._episode_seed[0]), options.get("episode_id"))
        self.agent.robot.set_pose(sapien.Pose([-10, 0, 0]))
        drop(self, list(zip(map(self._body, self.obj_names), places, turns, strict=True)), DROP_HEIGHT)
        self._place_robot()
        rest, extents = [], []
        for name in self.obj_names:
            rest.append(self._body(name).entity_pose.p)
            box = self.model_db[name]["bbox"]
            turn = self._body(name).entity_pose.to_transformation_matrix()[:3, :3]
            extents.append(turn @ (np.array(box["max"]) - np.array(box["min"])))
        self.at_rest, self.extents = (torch.from_numpy(np.stack([rows])) for rows in (rest, extents))
        self.consecutive_grasp, self.configuration = torch.tensor([0]), torch.tensor([configuration])

    def _place_robot(self) -> None:
        qpos, base = INITIAL[self.scene_setting]
        self.agent.robot.set_pose(sapien.Pose(base, [0, 0, 0, 1]))
        self.agent.reset(init_qpos=np.array(qpos))

    def _body(self, name: str):
        return self.objs[name]._bodies[0]

    # ---- success

    def _found_of_many(self, *things) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Centres of mass [N, 3] of source and target, and whether the source is grasped, [N] bool."""
        centres = [(thing.pose * own).p for thing, own in zip(things, self._mass_centres, strict=True)]
        return centres, pressing_fingers_batched(self.agent, things[0])

    def _found(self, *things) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The same of the only environment, in a fifth of the time."""
        bodies = (thing._bodies[0] for thing in things)
        centres = [torch.from_numpy((body.entity_pose * body.cmass_local_pose).p)[None] for body in bodies]
        return centres, torch.tensor([pressing_fingers(self.agent, things[0])])

    def evaluate(self) -> dict:
        """The original's flags, of this instant; ``configuration`` is that of the evaluation grid, -1 in training.

        Centres are of mass, but of the target's movement, as the original has it; boxes those that both had when they
        came to rest. Contacts are known by pairs: what the source may touch besides robot and target is the arena.
        """
        source, target = (self.objs[name] for name in self.obj_names)
        centres, grasped = (self._found_of_many if self.gpu_sim_enabled else self._found)(source, target)
        now = torch.stack([centres[0], target.pose.p], dim=1)
        moved = (now - self.at_rest)[..., :2].norm(dim=2)
        held = torch.where(grasped, self.consecutive_grasp + 1, 0)
        self.consecutive_grasp = torch.where(self._stepped(), held, self.consecutive_grasp)
        offset, halves = centres[0] - centres[1], self.extents / 2
        on_target = offset[:, :2].norm(dim=1) <= halves[:, 1, :2].norm(dim=1) + ASIDE
        on_target &= (0 < offset[:, 2]) & (offset[:, 2] <= self.height + halves[:, 0, 2] + halves[:, 1, 2])
        if self.nothing_else:
            arena = self.scene.get_pairwise_contact_impulses(self.scene.actors["arena"], source)
            on_target &= arena.norm(dim=1) <= TOUCH
        return {
            "is_src_obj_grasped": grasped,
            "consecutive_grasp": self.consecutive_grasp >= LONG,
            "src_on_target": on_target,
            "moved_correct_obj": (moved[:, 0] > MOVED) & (moved[:, 1] < moved[:, 0]),
            "moved_wrong_obj": (moved[:, 1] > MOVED) & (moved[:, 1] > moved[:, 0]),
            "success": on_target,
            "configuration": self.configuration,
        }


class StockScene(Twin):
    """Before a stock Bridge environment in the list of bases: its own photo, and our seeds for its initial states."""

    grid: Grid

    def __init__(self, **kwargs):
        assets.require("bridge")
        self.configuration = -1
        super().__init__(**kwargs)

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        self.configuration, places, turns = self.grid.state(int(self._episode_seed[0]), options.get("episode_id"))
        heights = self.xyz_configs[0, :, 2:]
        self.xyz_configs = torch.cat([torch.tensor(places, dtype=heights.dtype), heights], dim=1)[None]
        self.quat_configs = torch.tensor(np.asarray(turns), dtype=heights.dtype)[None]
        super()._initialize_episode(env_idx, {**options, "episode_id": torch.tensor([0])})

    def evaluate(self) -> dict:
        return {**super().evaluate(), "configuration": torch.tensor([self.configuration])}


# Joint positions (radians, metres) and base position (metres) as measured on the real robot, per scene.
INITIAL = {
    "flat_table": (
        [-0.01840777, 0.0398835, 0.22242722, -0.00460194, 1.36524296, 0.00153398, 0.037, 0.037],
        [0.147, 0.028, 0.870],
    ),
    "sink": (
        [-0.2600599, -0.12875618, 0.04461369, -0.00652761, 1.7033415, -0.26983038, 0.037, 0.037],
        [0.127, 0.060, 0.85],
    ),
}
