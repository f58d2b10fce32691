"""The Google robot of SimplerEnv's tasks: its joint drives, friction and camera, and the original controller's plans.

The numbers are those of ManiSkill2_real2sim (Li et al. 2024, arXiv:2405.05941), measured there on the real robot.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import sapien
import torch
from mani_skill.agents.base_agent import BaseAgent
from mani_skill.agents.controllers import PDJointPosControllerConfig
from mani_skill.agents.registration import register_agent
from mani_skill.sensors.camera import CameraConfig

from robot_forgetting.errors import UserError
from robot_forgetting.machine.assets import GOOGLE_URDF, data_folder
from robot_forgetting.tasks.simulator.robots import BatchedController, Controller
from robot_forgetting.tasks.widowx.widowx import quaternion

CAMERA = "overhead_camera"
# name: (initial position, stiffness, damping, force limit); radians, N m / rad, N m s / rad, N m
ARM = {
    "joint_torso": (-0.2639457174606611, 1700.0, 1059.9791902443303, 300.0),
    "joint_shoulder": (0.0831913360274175, 1737.0471680861954, 1010.4720585373592, 300.0),
    "joint_bicep": (0.5017611504652179, 979.975871856535, 767.2803161582076, 100.0),
    "joint_elbow": (1.156859026208673, 930.0, 680.0, 100.0),
    "joint_forearm": (0.028583671314766423, 1212.154500274304, 674.9946964336588, 100.0),
    "joint_wrist": (1.592598203487462, 432.96500923932535, 274.613381336198, 100.0),
    "joint_gripper": (-1.080652960128774, 468.0013365498738, 340.532560578637, 100.0),
    "joint_head_pan": (-0.00285961, 2000.0, 900.0, 100.0),
    "joint_head_tilt": (0.7851361, 2000.0, 900.0, 100.0),
}
FINGERS = ("joint_finger_right", "joint_finger_left")
FINGER_DRIVE = (200.0, 8.0, 60.0)
FINGER_ARMATURE = 0.003  # kg m2, where the original has 0; see docs/google_robot.md
CLOSED = 1.31  # the gripper's unit, radians; a little over the joints' limit, so that closed fingers press
ARM_PLAN = (1.5, 2.0, 50.0)  # greatest velocity, acceleration, jerk; rad / s ...
FINGER_PLAN = (1.0, 7.0, 50.0)


def _surface(material: str, patch: float) -> dict:
    return {"material": material, "patch_radius": patch, "min_patch_radius": patch}


def _material(static: float, dynamic: float) -> dict:
    return {"static_friction": static, "dynamic_friction": dynamic, "restitution": 0.0}


FRICTION = {
    "_materials": {
        "finger": _material(2.0, 2.0),
        "nail": _material(0.1, 0.1),
        "base": _material(0.1, 0.0),
        "wheel": _material(1.0, 0.0),
    },
    "link": {
        "link_base": _surface("base", 0.1),
        **{f"link_wheel_{side}": _surface("wheel", 0.1) for side in ("left", "right")},
        **{f"link_finger{part}_{side}": _surface("finger", 0.1) for part in ("", "_tip") for side in ("left", "right")},
        **{f"link_finger_nail_{side}": _surface("nail", 0.01) for side in ("left", "right")},
    },
}


def urdf(colours: str = "") -> Path:
    """The robot's description in one of its colourings (``COLOURS`` of the scenes); "" is the plain one."""
    return data_folder() / f"{GOOGLE_URDF}{colours and '_'}{colours}.urdf"


@register_agent()
class GoogleRobot(BaseAgent):
    """Arm, head and gripper on a base that stands still."""

    uid = "robot_forgetting_google_robot"
    urdf_config = FRICTION
    load_multiple_collisions = True

    @property
    def _sensor_configs(self):
        return [
            CameraConfig(
                uid=CAMERA,
                pose=sapien.Pose([0, 0, 0], [0.5, 0.5, -0.5, 0.5]),
                width=640,
                height=512,
                near=0.01,
                far=10,
                intrinsic=np.array([[425.0, 0, 320.0], [0, 425.0, 256.0], [0, 0, 1]]),
                entity_uid="link_camera",
            )
        ]

    @property
    def _controller_configs(self):
        """The drives; their targets come from ``PlannedController``, on a GPU from ``BatchedPlannedController``."""
        names, numbers = list(ARM), np.array(list(ARM.values()))
        arm = PDJointPosControllerConfig(
            names, None, None, numbers[:, 1], numbers[:, 2], numbers[:, 3], normalize_action=False
        )
        gripper = PDJointPosControllerConfig(list(FINGERS), None, None, *FINGER_DRIVE, normalize_action=False)
        weightless = self.scene.gpu_sim_enabled
        return {"planned": {"arm": arm, "gripper": gripper, "balance_passive_force": weightless}}

    def _after_init(self):
        self.tcp = self.robot.links_map["link_gripper_tcp"]
        for joint in self.robot.active_joints:
            if joint.name in FINGERS:
                for one in joint._objs:
                    one.set_armature(np.array([FINGER_ARMATURE], dtype=np.float32))

    def initial_qpos(self) -> np.ndarray:
        """Joint positions [11] at the start of an episode, in the articulation's order."""
        return np.array([ARM[joint.name][0] if joint.name in ARM else 0.0 for joint in self.robot.active_joints])


class Planner:
    """What the original's controllers of arm (``..._delta_pose_align_interpolate_by_planner``) and gripper make of a
    command: drive targets for every step of the physics until the next one.

    Arm: with p, q the measured pose of the tool centre point in the base frame and dp, dR the command, the pose wanted
    is p + dp, dR q; inverse kinematics gives joint positions (the measured ones where it fails), and a jerk-limited
    plan (Ruckig; Berscheid and Kroeger 2021, arXiv:2105.04830) leads there from where the last plan ended.
    Gripper: +1 closes; the position wanted moves by 1.31 rad times the command from where the last plan stands, and
    the plan starts from the measured state. A command under 1e-3 rad keeps what was wanted before.
    """

    def __init__(self, env, model=None):
        _ruckig()
        robot, self._count, self._hz = env.agent.robot, env._sim_steps_per_control, env.sim_freq
        names, links = ([one.name for one in some] for some in (robot.active_joints, robot.links))
        self._arm = np.array([names.index(name) for name in ARM])
        self.fingers = np.array([names.index(name) for name in FINGERS])
        # SAPIEN 2 (PhysX 4) clips drive targets to the joints' limits, SAPIEN 3 (PhysX 5) does not.
        self._low, self._high = robot._objs[0].get_qlimits().T
        self.model = model or kinematics(Path(env.agent.urdf_path), names, links)
        self._link = links.index(env.agent.tcp.name)
        self._moved = np.isin(np.arange(len(names)), self._arm)

    def reset(self, qpos: np.ndarray) -> None:
        """Forgets the last plan; ``qpos`` [J] is where the joints stand."""
        self._end = None  # of the arm's last plan: positions and velocities
        self.wanted = self.stands = qpos[self.fingers].astype(np.float64)

    def plan(
        self, command: np.ndarray, qpos: np.ndarray, qvel: np.ndarray, tip: sapien.Pose
    ) -> tuple[np.ndarray, np.ndarray]:
        """Positions [K + 1, J] of all joints and velocities [K + 1, 2] of the fingers, now and after each of K steps.

        qpos, qvel: [J], measured; tip: of the tool centre point in the base frame
        """
        turned = sapien.Pose(q=quaternion(command[3:6])) * sapien.Pose(q=tip.q)
        solution, solved, _ = self.model.compute_inverse_kinematics(
            self._link,
            sapien.Pose(tip.p + command[:3], turned.q),
            initial_qpos=qpos,
            active_qmask=self._moved,
            max_iterations=100,
        )
        goal = np.asarray(solution if solved else qpos)[self._arm]
        if self._end is None:
            self._end = qpos[self._arm], np.clip(qvel[self._arm], -ARM_PLAN[0], ARM_PLAN[0])
        arm = plan(*self._end, goal, ARM_PLAN, self._count, self._hz)
        self._end = arm[0][-1], arm[1][-1]
        change = CLOSED * float(np.clip(command[6], -1, 1))
        if abs(change) >= 1e-3:
            margin = 0.01
            low, high = self._low[self.fingers] - margin, self._high[self.fingers] + margin
            self.wanted = np.clip(self.stands + change, low, high)
        velocity = np.clip(qvel[self.fingers], -FINGER_PLAN[0], FINGER_PLAN[0])
        fingers = plan(qpos[self.fingers], velocity, self.wanted, FINGER_PLAN, self._count, self._hz)
        self.stands = fingers[0][-1]
        positions = np.empty((self._count + 1, len(qpos)))
        positions[:, self._arm], positions[:, self.fingers] = arm[0], fingers[0]
        return positions.clip(self._low, self._high), fingers[1]

    def stay(self, qpos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As ``plan`` has it: where the joints stand, or 0 for one that is nowhere."""
        here = np.nan_to_num(qpos, posinf=0.0, neginf=0.0).clip(self._low, self._high)
        return np.repeat(here[None], self._count + 1, axis=0), np.zeros((self._count + 1, len(self.fingers)))


class PlannedController(Controller):
    """``Planner``'s targets for one CPU environment; what gravity and its motion do to the robot is made up for."""

    def __init__(self, env):
        self.planner = Planner(env)
        self._robot, self._tcp = env.agent.robot._objs[0], env.agent.tcp._objs[0]
        self._joints = self._robot.active_joints
        self.reset()

    def reset(self) -> None:
        self.planner.reset(self._robot.qpos)
        self._step = 0

    def apply(self, command: np.ndarray) -> None:
        tip = self._robot.root_pose.inv() * self._tcp.entity_pose
        self._positions, self._velocities = self.planner.plan(command, self._robot.qpos, self._robot.qvel, tip)
        self._step = 0

    def before_simulation_step(self) -> None:
        self._step = min(self._step + 1, len(self._positions) - 1)
        for joint, position in zip(self._joints, self._positions[self._step], strict=True):
            joint.set_drive_target(position)
        for index, velocity in zip(self.planner.fingers, self._velocities[self._step], strict=True):
            self._joints[index].set_drive_velocity_target(velocity)
        self._robot.set_qf(self._robot.compute_passive_force(gravity=True, coriolis_and_centrifugal=True))


class BatchedPlannedController(BatchedController):
    """``Planner``'s targets for N environments: each planned on the CPU, and told to the physics wherever that is.

    On a GPU links have no weight, in place of forces that carry it (``GoogleRobot._controller_configs``). Coriolis and
    centrifugal forces are not made up for: PhysX does not tell them there.
    """

    def __init__(self, env):
        self._env, self._robot, self._tcp = env, env.agent.robot, env.agent.tcp
        first = Planner(env)
        self._planners = [first, *(Planner(env, first.model) for _ in range(env.num_envs - 1))]
        self._joints = self._robot.active_joints
        self._fingers = [self._joints[index] for index in first.fingers]
        self.begin(torch.arange(env.num_envs))

    def begin(self, slots: torch.Tensor) -> None:
        qpos = self._robot.get_qpos().cpu().numpy()
        for slot in slots.tolist():
            self._planners[slot].reset(qpos[slot])

    def apply(self, commands: torch.Tensor) -> dict[int, str]:
        measured = [self._robot.get_qpos(), self._robot.get_qvel(), (self._robot.pose.inv() * self._tcp.pose).raw_pose]
        rows = [values.cpu().numpy() for values in (commands.double(), *measured)]
        plans, failed = [], {}
        for slot, (planner, command, qpos, qvel, tip) in enumerate(zip(self._planners, *rows, strict=True)):
            try:
                plans.append(planner.plan(command, qpos, qvel, sapien.Pose(tip[:3], tip[3:])))
            except Exception as error:  # Ruckig's own, for a state that is not finite, say
                failed[slot] = f"{type(error).__name__}: {error}"
                plans.append(planner.stay(qpos))
        # [K + 1, N, J] and [K + 1, N, 2]
        self._targets = [
            torch.from_numpy(np.stack(parts, axis=1).astype(np.float32)).to(commands.device)
            for parts in zip(*plans, strict=True)
        ]
        self._step = 0
        return failed

    def before_simulation_step(self) -> None:
        self._step = min(self._step + 1, len(self._targets[0]) - 1)
        positions, velocities = (rows[self._step] for rows in self._targets)
        if not self._env.gpu_sim_enabled:
            self._robot.set_joint_drive_targets(positions, self._joints)
            self._robot.set_joint_drive_velocity_targets(velocities, self._fingers)
            return
        px, place = self._env.scene.px, self._robot.get_joint_target_indices
        # As ManiSkill's setters do it, without their mask of slots, which makes the CPU wait for the GPU.
        px.cuda_articulation_target_qpos.torch()[place(self._joints)] = positions
        px.cuda_articulation_target_qvel.torch()[place(self._fingers)] = velocities
        px.gpu_apply_articulation_target_position()
        px.gpu_apply_articulation_target_velocity()


def plan(
    start: np.ndarray, velocity: np.ndarray, goal: np.ndarray, limits: tuple[float, float, float], count: int, hz: float
) -> tuple[np.ndarray, np.ndarray]:
    """Positions and velocities [count + 1, J] of the fastest way from ``start`` to rest at ``goal``, every 1 / hz s.

    limits: greatest velocity, acceleration and jerk
    """
    ruckig, joints = _ruckig(), len(start)
    request, trajectory = ruckig.InputParameter(joints), ruckig.Trajectory(joints)
    request.current_position, request.current_velocity = [float(x) for x in start], [float(x) for x in velocity]
    request.target_position = [float(x) for x in goal]
    request.max_velocity, request.max_acceleration, request.max_jerk = ([limit] * joints for limit in limits)
    result = ruckig.Ruckig(joints).calculate(request, trajectory)
    if result not in (ruckig.Result.Working, ruckig.Result.Finished):
        raise ValueError(f"no plan from {start} (velocity {velocity}) to {goal}: {result}")
    times = np.clip(np.arange(count + 1) / hz, 0, trajectory.duration)
    points = [trajectory.at_time(time) for time in times]
    return np.array([point[0] for point in points]), np.array([point[1] for point in points])


def _ruckig():
    try:
        import ruckig
    except ImportError as error:
        raise UserError(
            f"the Google robot's plans need Ruckig ({error}); type: pip install 'robot-forgetting[google-robot]'"
        ) from error
    return ruckig


def kinematics(description: Path, joints: list[str], links: list[str]):
    """SAPIEN's kinematics of a robot with joints and links in this order.

    Its own export fails here, because the fixed wheels have infinite limits.
    """
    from sapien.wrapper.pinocchio_model import PinocchioModel

    text = description.read_text()
    text = re.sub(r"<(inertial|visual|collision|contact)>.*?</\1>", "", text, flags=re.DOTALL)
    model = PinocchioModel(re.sub(r'<limit upper="inf"[^>]*/>', "", text), [0, 0, -9.81])
    model.set_joint_order(joints)
    model.set_link_order(links)
    return model
