"""What SimplerEnv's tasks lose by the shapes and contacts that PhysX has on a GPU, measured without one.

    python tests/benchmarks/check_gpu_hulls.py gpu|cpu experts [task ...]
    python tests/benchmarks/check_gpu_hulls.py gpu|cpu recordings FOLDER

With gpu, convex shapes are cooked as for one (at most 64 vertices and 64 faces), contacts are made by PCM, and settings
are those that the scenes have there; the solver is the CPU's. Experts: successes on the first configurations, ten
minutes for all tasks. Recordings: as `check` repeats them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sapien.pysapien.physx

ON_GPU = sys.argv[1:2] == ["gpu"]
if ON_GPU:
    sapien.pysapien.physx._enable_gpu()  # how shapes are cooked; before anything else of PhysX. It needs no GPU.

sys.path.insert(0, str(Path(__file__).parents[1]))
from bridge_tasks import RUNNABLE  # noqa: E402
from robot_tasks import configured  # noqa: E402

from robot_forgetting.conformance.recordings import Player, recordings_of  # noqa: E402
from robot_forgetting.tasks.google_robot.scenes import GoogleScene  # noqa: E402
from robot_forgetting.tasks.simulator.simulation import Simulation  # noqa: E402
from robot_forgetting.tasks.widowx.bridge import BridgeScene  # noqa: E402

GOOGLE = {  # task without its prefix -> configurations, control steps
    "pick_standing_coke_can": (25, 45),
    "pick_horizontal_coke_can": (9, 45),
    "pick_vertical_coke_can": (9, 45),
    "move_near": (24, 80),
    "open_top_drawer": (9, 100),
    "close_top_drawer": (9, 70),
    "place_apple_in_closed_top_drawer": (9, 175),
}
TASKS = {f"google_robot_{name}": numbers for name, numbers in GOOGLE.items()} | dict.fromkeys(RUNNABLE, (24, 60))


def expert(name: str) -> None:
    policy = "openvla-nano-google" if name.startswith("google") else "openvla-nano-bridge"  # what commands mean
    spec = configured(name, f"policy={policy}", "image_size=64", "full_pictures=false").spec
    simulation, lost = Simulation(spec), []
    simulation._cameras = {}
    configurations, steps = TASKS[name]
    for number in range(configurations):
        simulation.reset(1_000_000 + number)
        for _ in range(steps):
            flags = simulation.step(simulation.expert_command())[4]
        lost += [] if flags["success"] else [number]
    print(f"{name}: {configurations - len(lost)} of {configurations}, without success: {lost}", flush=True)
    simulation.close()


def recordings(folder: Path) -> None:
    for name in ("google_robot_pick_coke_can", *RUNNABLE):
        task = configured(name)
        player = Player(task)
        for file in recordings_of(task, folder):
            print(f"{file.stem}: {player.replay(file)}", flush=True)
        player.close()


def main() -> None:
    BridgeScene._on_gpu = GoogleScene._on_gpu = ON_GPU  # the settings of the physics
    match sys.argv[1:]:
        case ["gpu" | "cpu", "recordings", folder]:
            recordings(Path(folder))
        case ["gpu" | "cpu", "experts", *names]:
            for name in names or TASKS:
                expert(name)
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
