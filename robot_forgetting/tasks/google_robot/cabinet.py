"""SimplerEnv's cabinet with three drawers on SAPIEN 3: open one, close one, or open one and put an apple into it."""

from __future__ import annotations

import json

import numpy as np
import sapien
import torch

from robot_forgetting.errors import UserError, check_choice
from robot_forgetting.machine.assets import COLOURS
from robot_forgetting.tasks.google_robot.google_robot import CAMERA
from robot_forgetting.tasks.google_robot.google_robot_tasks import APPLE, place_sentences
from robot_forgetting.tasks.google_robot.scenes import INFO, GoogleScene, folder, glow
from robot_forgetting.tasks.simulator.grasp import TOUCH
from robot_forgetting.tasks.simulator.grid import dealt

# name: x, y, yaw of the robot's base; each has its photo
STATIONS = {
    "a0": (0.644, -0.179, -0.03),
    "a1": (0.765, -0.182, -0.02),
    "a2": (0.889, -0.203, -0.06),
    "b0": (0.652, 0.009, 0.0),
    "b1": (0.752, 0.009, 0.0),
    "b2": (0.851, 0.035, 0.0),
    "c0": (0.665, 0.224, 0.0),
    "c1": (0.765, 0.222, -0.025),
    "c2": (0.865, 0.222, -0.025),
}
DRAWERS = ("top", "middle", "bottom")


class Cabinet(GoogleScene):
    """The robot before a cabinet, of which one drawer counts. Subclasses add success, and what else there is.

    station: the robot's place and the photo that belongs to it, or "any" of ``stations``
    drawer: one of ``DRAWERS``
    """

    def __init__(self, station: str, drawer: str, stations: tuple[str, ...], needs: tuple[str, ...] = (), **kwargs):
        for kind, name, names in (("station", station, (*stations, "any")), ("drawer", drawer, DRAWERS)):
            check_choice(kind, name, names)
        self.stations = stations if station == "any" else (station,)
        self.drawer = drawer
        self.recorded_choices = {"station": STATIONS, "colours": COLOURS}
        super().__init__(f"open_drawer_{self.stations[0]}.png", needs, **kwargs)

    def _load_lighting(self, options: dict):
        self.scene.set_ambient_light([1.0, 1.0, 1.0])
        angle = np.radians(75)
        self.scene.add_directional_light([-np.cos(angle), 0, -np.sin(angle)], [1.0, 1.0, 1.0])

    def _load_scene(self, options: dict):
        loader = self.scene.create_urdf_loader()
        loader.fix_root_link, loader.name = True, "cabinet"
        builder = loader.parse(str(folder() / "custom" / "mk_station_recolor.urdf"))["articulation_builders"][0]
        builder.initial_pose = sapien.Pose([-0.295, 0, 0.017])
        self.cabinet = builder.build(name="cabinet")
        for one in self.cabinet._objs:
            for joint in one.active_joints:
                joint.set_friction(0.05)
                joint.set_drive_property(0, 1)
        self.index = [joint.name for joint in self.cabinet.active_joints].index(f"{self.drawer}_drawer_joint")
        self.remove_object_from_greenscreen(self.cabinet)
        self.remove_object_from_greenscreen(self.agent.robot)

    def _set_opening(self, metres: float) -> None:
        """The drawer stands so far open, and the others are closed."""
        cabinet = self.cabinet._objs[0]
        qpos = np.zeros(len(cabinet.active_joints))
        qpos[self.index] = metres
        cabinet.set_qpos(qpos)
        cabinet.set_qvel(np.zeros_like(qpos))

    def _stand(self, station: str, near: np.random.Generator | None) -> None:
        """The robot at a station with its photo; with ``near``, a little off it, as the photo cannot move."""
        self.rgb_overlay_paths[CAMERA] = str(folder() / "real_inpainting" / f"open_drawer_{station}.png")
        x, y, yaw = STATIONS[station]
        if near is not None:
            x, y, yaw = np.array([x, y, yaw]) + near.uniform(-1, 1, 3) * [0.02, 0.02, 0.02]
        self._place_robot(x, y, yaw)

    def front(self) -> np.ndarray:
        """World position [3] of the middle of the drawer's front, in the only environment."""
        pose = self.cabinet.links_map[f"{self.drawer}_drawer"]._objs[0].entity_pose
        return np.asarray((pose * sapien.Pose([0.3125, 0.0, 0.0])).p)

    def openings(self) -> torch.Tensor:
        """[N] metres by which the drawer is open."""
        return self.cabinet.get_qpos()[:, self.index]

    def opening(self) -> float:
        """Of the only environment."""
        return float(self.openings()[0])


def drawer_state(number: int | None, rng: np.random.Generator, stations: tuple) -> tuple[int, str, str]:
    """Configuration (-1: in training), station and colouring of an episode; ``number`` None draws them."""
    station, colours = str(rng.choice(stations)), str(rng.choice(COLOURS[1:]))
    if number is None:
        return -1, station, colours
    configuration, station, colours = dealt(number, len(stations), len(COLOURS[1:]))
    return configuration, stations[station], COLOURS[1:][colours]


class Drawer(Cabinet):
    """Open a drawer of a cabinet (15 cm), or close one that is 20 cm open (to 5 cm).

    station: one of ``STATIONS``, or "any": 9 stations times 3 colourings (``grid.dealt``); training draws
    drawer: as ``Cabinet`` has it; closing: the opposite task
    """

    def __init__(self, station: str = "any", drawer: str = "top", closing: bool = False, **kwargs):
        self.closing = closing
        super().__init__(station, drawer, tuple(STATIONS), **kwargs)

    def _begin(self, options: dict) -> None:
        number, rng = self.draw(options)
        self.configuration[0], station, colours = drawer_state(number, rng, self.stations)
        self.colouring[0] = COLOURS.index(options.get("colours", colours))
        self._set_opening(0.2 if self.closing else 0.0)
        self._stand(options.get("station", station), rng if number is None and "station" not in options else None)

    def evaluate(self) -> dict:
        success = self.openings() <= 0.05 if self.closing else self.openings() >= 0.15
        return {"success": success, "configuration": self.configuration}


PLACE_STATIONS = ("a0", "b0", "c0")
APPLES = np.array([[x, y] for x in np.linspace(-0.08, -0.02, 3) for y in np.linspace(-0.02, 0.08, 3)])
SPAWN = np.array([[-0.10, -0.04], [-0.02, 0.10]])  # of the apple in training, x and y from and to
HELD_OUT = 0.01  # metres around the evaluation's places where no apple lies in training
LOW = 0.045  # metres of the apple's middle over a floor that it lies on, at most: it is no perfect ball
TOLD = 100  # steps after which the original moves on to the second instruction, whatever has happened


def place_state(
    number: int | None, rng: np.random.Generator, stations: tuple = PLACE_STATIONS
) -> tuple[int, str, np.ndarray, str]:
    """Configuration (-1: in training), station, the apple's place [2] and colouring; ``number`` None draws them."""
    if number is not None:
        configuration, rest, colours = dealt(number, len(stations) * len(APPLES), len(COLOURS))
        station, place = divmod(rest, len(APPLES))
        return configuration, stations[station], APPLES[place], COLOURS[colours]
    station, colours = str(rng.choice(stations)), str(rng.choice(COLOURS))
    place = rng.uniform(*SPAWN)
    while np.linalg.norm(place - APPLES, axis=1).min() < HELD_OUT:
        place = rng.uniform(*SPAWN)
    return -1, station, place, colours


class PlaceInDrawer(Cabinet):
    """Open a drawer, then place the apple from the cabinet's top into it: two instructions, one after the other.

    station: one of ``PLACE_STATIONS``, or "any": 3 stations times 9 places of the apple times 4 colourings
        (``grid.dealt``); training draws
    drawer: as ``Cabinet`` has it
    told: after so many steps, and one, the instruction changes
    """

    contact_offset = 0.005

    def __init__(self, station: str = "any", drawer: str = "top", told: int = TOLD, **kwargs):
        if type(told) is not int or told < 0:
            raise UserError(f"env_arguments.told is a number of steps, 0 or more, not {told!r}")
        self.told = told
        models = f"custom/models/{APPLE}"
        super().__init__(station, drawer, PLACE_STATIONS, (INFO, f"{models}/collision.obj"), **kwargs)

    def _load_scene(self, options: dict):
        super()._load_scene(options)
        about = json.loads((folder() / INFO).read_text())[APPLE]
        self.apple = self._object(APPLE, about["density"], [*APPLES[4], 1.0])
        glow(self.apple)
        self.objs, self.source_obj_name = {APPLE: self.apple}, APPLE
        self._drawer = self.cabinet.links_map[f"{self.drawer}_drawer"]
        (self._floor,) = (
            shape
            for shape in self._drawer._objs[0].collision_shapes
            if np.allclose(shape.local_pose.p, [0.0, 0.0, -0.06])
        )
        # Of an episode: whether the drawer was open by 15 cm once, and the apple on its floor.
        self.was_open, self.was_in = self._rows(dtype=torch.bool), self._rows(dtype=torch.bool)

    def _begin(self, options: dict) -> None:
        number, rng = self.draw(options)
        self.configuration[0], station, place, colours = place_state(number, rng, self.stations)
        self.colouring[0] = COLOURS.index(options.get("colours", colours))
        self._set_opening(0.0)
        self._drop([(self.apple, options.get("place", place), [1.0, 0.0, 0.0, 0.0])])
        self._stand(options.get("station", station), rng if number is None and "station" not in options else None)
        self.was_open[0] = self.was_in[0] = False

    @property
    def placing(self) -> torch.Tensor:
        """[N] bool: whether the second instruction holds."""
        return self._elapsed_steps > self.told

    @property
    def instructions(self) -> list[str]:
        """Of every environment, at its present step."""
        return [place_sentences(self.drawer)[placing] for placing in self.placing.tolist()]

    @property
    def instruction(self) -> str:
        return self.instructions[0]

    def inside(self) -> torch.Tensor:
        """[N] bool: whether the apple presses the drawer's floor."""
        if self.gpu_sim_enabled:
            return self.low()
        push = np.zeros(3)
        for contact in self.scene.px.get_contacts():
            if self._floor in contact.shapes and self.apple._bodies[0].entity in [b.entity for b in contact.bodies]:
                push += np.sum([point.impulse for point in contact.points], axis=0)
        return torch.tensor([bool(np.linalg.norm(push) > TOUCH)])

    def low(self) -> torch.Tensor:
        """[N] bool: whether the apple presses the drawer and is as low as one that lies on its floor. On a GPU contacts
        can be had of two bodies, and not of two shapes."""
        floor = self._drawer.pose.p[:, 2] + float(self._floor.local_pose.p[2] + self._floor.half_size[2])
        return self.touches(self._drawer, self.apple) & (self.apple.pose.p[:, 2] - floor < LOW)

    def evaluate(self) -> dict:
        """The original's flags after a control step: the drawer was open by 15 cm once, the apple was on its floor
        once; success, with the second instruction, is an apple that was there and a drawer at least 5 cm open."""
        opening, holding, stepped = self.openings(), self.pressed(self.apple), self._stepped()
        self._count_held(holding, stepped)
        self.was_open |= stepped & (opening >= 0.15)
        self.was_in |= stepped & self.inside()
        return {
            "is_grasped": holding,
            "is_drawer_open": self.was_open,
            "has_contact": self.was_in,
            "success": self.placing & (opening >= 0.05) & self.was_in,
            "configuration": self.configuration,
        }
