"""SimplerEnv's "move X near Y" (``MoveNearGoogleBakedTexInScene-v1``) on SAPIEN 3: three objects on the can's table."""

from __future__ import annotations

import json
from itertools import permutations

import numpy as np
import sapien
import torch

from robot_forgetting.machine.assets import COLOURS
from robot_forgetting.tasks.google_robot.google_robot_tasks import MOVE_NEAR_OBJECTS as OBJECTS
from robot_forgetting.tasks.google_robot.google_robot_tasks import MOVE_NEAR_TRIPLETS as TRIPLETS
from robot_forgetting.tasks.google_robot.google_robot_tasks import move_near_sentence
from robot_forgetting.tasks.google_robot.scenes import HELD_OUT, INFO, Tabletop, folder, glow, looks, materials
from robot_forgetting.tasks.simulator.grid import dealt

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
SHOWN = torch.tensor([[OBJECTS.index(name) for name in names] for names in TRIPLETS])  # [triplet, 3]
ASIDE = [-30.0, 0.0, -5.0]  # metres: where the other five are, each a metre beside the next
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

    contact_offset = 0.005

    def __init__(self, table: str = "flat", **kwargs):
        self.recorded_choices = {"colours": COLOURS}
        models = [f"custom/models/{name}" for name in OBJECTS]
        needs = (INFO, f"real_inpainting/{PHOTO}", *(f"{model}/collision.obj" for model in models))
        super().__init__(PHOTO, needs, table=table, **kwargs)

    def _load_objects(self) -> None:
        about = json.loads((folder() / INFO).read_text())
        self.objs, self.sizes = {}, {}
        for index, name in enumerate(OBJECTS):
            density = DENSITIES.get(name, about[name].get("density", 1000))
            self.objs[name] = thing = self._object(name, density, _aside(index))
            self.sizes[name] = np.subtract(about[name]["bbox"]["max"], about[name]["bbox"]["min"])
            glow(thing)
            for body in looks(thing):
                for material in materials(body):  # nothing shines in the original
                    material.roughness, material.metallic, material.specular = 1.0, 0.0, 0.0
        builder = self.scene.create_actor_builder()  # for a GPU, where nothing can be held in the air
        builder.add_box_collision(half_size=[10.0, 1.0, 0.1])
        builder.initial_pose = sapien.Pose(np.array(ASIDE) - [len(OBJECTS) / 2, 0.0, 0.3])
        builder.build_static(name="shelf")
        # Of an episode: triplet, pair, and of its three objects the places at the start and half of their diagonals.
        self.triplet, self.pair = self._rows(dtype=torch.int64), self._rows(dtype=torch.int64)
        self.starts, self.radii = self._rows(3, 3), self._rows(3)
        self._mass_centres = [self.objs[name].cmass_local_pose for name in OBJECTS]  # before the GPU takes over

    def _begin(self, options: dict) -> None:
        number, rng = self.draw(options)
        self.configuration[0], triplet, pair, places, colours = move_near_state(number, rng)
        self.colouring[0] = COLOURS.index(options.get("colours", colours))
        for index, name in enumerate(OBJECTS):
            _put_away(self.objs[name]._bodies[0], index)
        names = TRIPLETS[triplet]
        self._drop([(self.objs[n], place, TURNS.get(n, UPRIGHT)) for n, place in zip(names, places, strict=True)])
        self._place_robot(0.35, 0.21, -0.09)
        self.triplet[0], self.pair[0] = triplet, PAIRS.index(pair)
        for index, name in enumerate(names):
            pose = self.objs[name]._bodies[0].entity_pose
            self.starts[0, index] = torch.from_numpy(np.array(pose.p))
            # As in the original: the size, turned as a vector, at the start; half of its diagonal over the table.
            turned = pose.to_transformation_matrix()[:3, :3] @ self.sizes[name]
            self.radii[0, index] = float(np.linalg.norm(turned[:2])) / 2

    @property
    def shown(self) -> tuple[str, ...]:
        """The only environment's objects, of which ``source_obj_name`` is to be moved near ``target_obj_name``."""
        return TRIPLETS[int(self.triplet[0])]

    @property
    def source_obj_name(self) -> str:
        return self.shown[PAIRS[int(self.pair[0])][0]]

    @property
    def target_obj_name(self) -> str:
        return self.shown[PAIRS[int(self.pair[0])][1]]

    @property
    def instruction(self) -> str:
        return move_near_sentence(self.source_obj_name, self.target_obj_name)

    def start(self, name: str) -> np.ndarray:
        """World position [3] at which one of the only environment's objects began."""
        return self.starts[0, self.shown.index(name)].numpy()

    def evaluate(self) -> dict:
        """The original's flags: source moved by more than 3 cm and more than the others, nothing fallen, source within
        10 cm (plus both radii) of the target, and no farther from it than from the third object (plus 1 cm)."""
        stepped, device = self._stepped(), self.device
        every = [self.objs[name].pose for name in OBJECTS]
        places, centres = (
            torch.stack([pose.p for pose in poses], dim=1)
            for poses in (every, [pose * own for pose, own in zip(every, self._mass_centres, strict=True)])
        )
        row = torch.arange(self.num_envs, device=device)[:, None]
        pairs = torch.tensor(PAIRS, device=device)[self.pair]
        order = torch.cat([pairs, 3 - pairs.sum(dim=1, keepdim=True)], dim=1)  # source, target, third
        objects = SHOWN.to(device)[self.triplet][row, order]  # [N, 3]
        places, centres = places[row, objects], centres[row, objects]  # [N, 3, 3]
        starts, radii = self.starts[row, order], self.radii[row, order]
        moved = (places - starts)[..., :2].norm(dim=2)  # [N, 3]
        others = moved[:, 1:].max(dim=1).values
        fallen = (starts - centres)[:, :2, 2].max(dim=1).values
        keep = (fallen < 0.15) & ((starts - places)[:, 2, 2] < 0.02)
        correct = (moved[:, 0] > 0.03) & (others < moved[:, 0])
        distance = (centres[:, 0] - centres[:, 1])[:, :2].norm(dim=1)
        near = distance < radii[:, 0] + radii[:, 1] + 0.10
        to_others = (centres[:, :1] - places[:, 1:])[..., :2].norm(dim=2)  # as the original has it, from their origins
        closest = (distance[:, None] < to_others + 0.01).all(dim=1)
        holding = torch.zeros_like(stepped)
        for index in objects[:, 0].unique().tolist():  # contacts of what is no slot's source need not be looked up
            holding |= (objects[:, 0] == index) & self.pressed(self.objs[OBJECTS[index]])
        self._count_held(holding, stepped)
        return {
            "is_grasped": holding,
            "all_obj_keep_height": keep,
            "moved_correct_obj": correct,
            "moved_wrong_obj": (others > 0.03) & (others > moved[:, 0]),
            "near_tgt_obj": near,
            "is_closest_to_tgt": closest,
            "success": keep & correct & near & closest,
            "configuration": self.configuration,
        }


def _aside(index: int) -> np.ndarray:
    return np.array(ASIDE) - [index, 0.0, 0.0]


def _put_away(body, index: int) -> None:
    """Out of the picture, where nothing moves."""
    body.entity.set_pose(sapien.Pose(_aside(index)))
    body.set_locked_motion_axes([True] * 6)
    body.set_linear_velocity(np.zeros(3))
    body.set_angular_velocity(np.zeros(3))
