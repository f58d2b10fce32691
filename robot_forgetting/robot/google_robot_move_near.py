"""SimplerEnv's "move X near Y" (``MoveNearGoogleBakedTexInScene-v1``) on SAPIEN 3: three objects on the can's table."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import sapien
import torch

from robot_forgetting.robot.assets import COLOURS
from robot_forgetting.robot.google_robot_scenes import HELD_OUT, INFO, Tabletop, folder, glow, looks, materials
from robot_forgetting.robot.google_robot_tasks import MOVE_NEAR_OBJECTS as OBJECTS
from robot_forgetting.robot.google_robot_tasks import MOVE_NEAR_TRIPLETS as TRIPLETS
from robot_forgetting.robot.google_robot_tasks import move_near_sentence
from robot_forgetting.robot.grasp import contacts
from robot_forgetting.robot.grid import dealt

PHOTO = "google_move_near_real_eval_1.png"
HALF = float(np.sqrt(0.5))
UPRIGHT, SIDEWAYS = [HALF, HALF, 0.0, 0.0], [HALF, 0.0, 0.0, HALF]  # quaternions (w, x, y, z)
# Of an object at the start; those not named here stand upright.
TURNS = {
    "blue_plastic_bottle": [0.5, 0.5, 0.5, 0.5],
    "orange": SIDEWAYS,
    "baked_sponge_v2": SIDEWAYS,
    "baked_apple_v2": [1.0, 0.0, 0.0, 0.0],
}
DENSITIES = {"baked_apple_v2": 200, "orange": 200}  # kg / m3; of the others the assets' table says it
PATTERNS = np.array(
    [
        [[-0.33, 0.04], [-0.33, 0.34], [-0.13, 0.19]],
        [[-0.13, 0.04], [-0.33, 0.19], [-0.13, 0.34]],
    ]
)
PAIRS = tuple(permutations(range(3), 2))  # (source, target) in a triplet
EPISODES = len(TRIPLETS) * len(PATTERNS) * len(PAIRS)
SPREAD = 0.04  # metres per axis by which training moves each object from its place


def move_near_state(number: int | None, rng: np.random.Generator) -> tuple[int, int, tuple[int, int], np.ndarray, str]:
    """Configuration (-1: in training), triplet, (source, target), places [3, 2] and colouring of an episode.

    Configuration k is the original's episode k % 60, see ``grid.dealt``; ``number`` None draws all, and the places
    around the original's, but none within 2 cm of them.
    """
    if number is None:
        configuration, (episode, colours) = -1, divmod(int(rng.integers(EPISODES * len(COLOURS))), len(COLOURS))
    else:
        configuration, episode, colours = dealt(number, EPISODES, len(COLOURS))
    triplet, rest = divmod(episode, len(PATTERNS) * len(PAIRS))
    pattern, pair = divmod(rest, len(PAIRS))
    places = PATTERNS[pattern].copy()
    if number is None:
        for place in places:
            shift = rng.uniform(-SPREAD, SPREAD, 2)
            while np.linalg.norm(shift) < HELD_OUT:
                shift = rng.uniform(-SPREAD, SPREAD, 2)
            place += shift
    return configuration, triplet, PAIRS[pair], places, COLOURS[colours]


class MoveNear(Tabletop):
    """Move one of three objects near another; 5 triplets, 2 patterns of places and 6 pairs, times 4 colourings.

    table: as ``Tabletop`` has it
    """

    def __init__(self, table: str = "flat", **kwargs):
        self.recorded_choices = {"colours": COLOURS}
        models = [f"custom/models/{name}" for name in OBJECTS]
        needs = (INFO, f"real_inpainting/{PHOTO}", *(f"{model}/collision.obj" for model in models))
        super().__init__(PHOTO, needs, table=table, **kwargs)

    @property
    def _default_sim_config(self):
        config = super()._default_sim_config
        config.scene_config.contact_offset = 0.005
        return config

    def _load_objects(self) -> None:
        about = json.loads((folder() / INFO).read_text())
        self.objs, self.sizes = {}, {}
        for name in OBJECTS:
            self.objs[name] = thing = self._object(name, DENSITIES.get(name, about[name].get("density", 1000)))
            self.sizes[name] = np.subtract(about[name]["bbox"]["max"], about[name]["bbox"]["min"])
            glow(thing)
            for material in materials(looks(thing)):  # nothing shines in the original
                material.roughness, material.metallic, material.specular = 1.0, 0.0, 0.0

    def _initialize_episode(self, env_idx: torch.Tensor, options: dict):
        number, rng = self.draw(options)
        self.configuration, triplet, pair, places, colours = move_near_state(number, rng)
        self._show(options.get("colours", colours))
        names = TRIPLETS[triplet]
        for index, name in enumerate(OBJECTS):
            _put_away(self.objs[name]._bodies[0], index)
        self._drop([(self.objs[n], place, TURNS.get(n, UPRIGHT)) for n, place in zip(names, places, strict=True)])
        self._place_robot(0.35, 0.21, -0.09)
        self.source_obj_name, self.target_obj_name = (names[index] for index in pair)
        self.shown = names
        self.instruction = move_near_sentence(self.source_obj_name, self.target_obj_name)
        self._held = 0
        self._starts = {name: self._place(name) for name in names}
        # As in the original: the size, turned as a vector, at the start; half of its diagonal over the table.
        self._radii = {
            name: float(np.linalg.norm((_frame(self.objs[name]) @ self.sizes[name])[:2])) / 2 for name in names
        }

    def _place(self, name: str) -> np.ndarray:
        """Of the object's origin, [3], in the world."""
        return np.array(self.objs[name]._bodies[0].entity_pose.p, dtype=np.float64)

    def _centre(self, name: str) -> np.ndarray:
        """Of the object's mass, [3], in the world."""
        body = self.objs[name]._bodies[0]
        return np.array((body.entity_pose * body.cmass_local_pose).p, dtype=np.float64)

    def evaluate(self) -> dict:
        """The original's flags: source moved by more than 3 cm and more than the others, nothing fallen, source within
        10 cm (plus both radii) of the target, and no farther from it than from the third object (plus 1 cm)."""
        source, target = self.source_obj_name, self.target_obj_name
        (third,) = (name for name in self.shown if name not in (source, target))
        fallen = {name: self._starts[name][2] - self._centre(name)[2] for name in (source, target)}
        keep = max(fallen.values()) < 0.15 and self._starts[third][2] - self._place(third)[2] < 0.02
        moved = {name: float(np.linalg.norm((self._place(name) - self._starts[name])[:2])) for name in self.shown}
        others = [moved[target], moved[third]]
        correct = moved[source] > 0.03 and max(others) < moved[source]
        distance = float(np.linalg.norm((self._centre(source) - self._centre(target))[:2]))
        near = distance < self._radii[source] + self._radii[target] + 0.10
        to_others = (np.linalg.norm((self._centre(source) - self._place(name))[:2]) for name in (target, third))
        closest = all(distance < other + 0.01 for other in to_others)
        held = self.pressed(contacts(self.scene, self.objs[source]._bodies[0].entity))
        self._held = self._held + 1 if held else 0
        flags = {
            "is_grasped": held,
            "all_obj_keep_height": keep,
            "moved_correct_obj": correct,
            "moved_wrong_obj": max(others) > 0.03 and max(others) > moved[source],
            "near_tgt_obj": near,
            "is_closest_to_tgt": closest,
            "success": keep and correct and near and closest,
        }
        flags = {name: torch.tensor([bool(value)]) for name, value in flags.items()}
        return {**flags, "configuration": torch.tensor([self.configuration])}


def _frame(thing) -> np.ndarray:
    return thing._bodies[0].entity_pose.to_transformation_matrix()[:3, :3]


def _put_away(body, index: int) -> None:
    """Out of the picture, where nothing moves."""
    body.entity.set_pose(sapien.Pose([-30.0 - index, 0.0, -5.0]))
    body.set_locked_motion_axes([True] * 6)
    body.set_linear_velocity(np.zeros(3))
    body.set_angular_velocity(np.zeros(3))
