"""What methods and policies are tried on in seconds: a task without a simulator, a tiny policy, pictures, noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from robot_forgetting.policy import ConventionSpec, Policy
from robot_forgetting.records.checkpoints import trainable
from robot_forgetting.task import Demonstration, Task, Transition, VectorEnv

TINY = {
    "patch_size": 16, "dino_dim": 32, "dino_depth": 2, "registers": 1, "siglip_dim": 32, "siglip_depth": 2,
    "vision_heads": 2, "hidden_size": 32, "num_layers": 1, "num_heads": 2, "intermediate_size": 64, "text_tokens": 384,
}  # fmt: skip


def tiny_policy(task: Task, seed: int = 0, *, device: str = "cpu", **options) -> Policy:
    """An openvla-nano with random weights for the task's pictures and instruction; options: those of ``new_nano``."""
    from robot_forgetting.policies.openvla.vla import new_nano

    size = task.convention().image_size
    ranges = {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return new_nano(
            image_size=-(-size // 16) * 16,
            instructions=list(task.sentences),
            norm_stats={task.convention().statistics or "toy": {"action": ranges}},
            device=device,
            **{**TINY, **options},
        )


class ToyTask(Task):
    """Push a dot to the right edge: success once the first command has added up to 0.6 within three steps.

    A policy with random weights succeeds in about a third of the episodes, so that methods that learn from differences
    between episodes find some.
    """

    def __init__(self, name: str = "toy", image_size: int = 32, max_steps: int = 3):
        self.name, self.instruction, self.max_steps = name, "push the dot to the right", max_steps
        self.image_size, self.statistics = image_size, "toy"

    def convention(self) -> ConventionSpec:
        return ConventionSpec(7, "delta", "euler_xyz", "+1 opens", self.image_size, 20.0, self.statistics)

    def make_env(self, num_envs: int, *, render: bool = False) -> VectorEnv:
        return ToyEnv(self, num_envs)

    def demonstrations(self, count: int, *, split: str = "train", start: int = 0) -> Iterator[Demonstration]:
        for index in range(count):
            seed, state = self.seeds(split)[start + index], ToyState(self)
            images, commands = [state.reset(self.seeds(split)[start + index])], []
            while not state.success:
                commands.append(np.array([0.3, 0, 0, 0, 0, 0, 1], np.float32))
                images.append(state.step(commands[-1]))
            yield Demonstration(np.stack(images[:-1]), np.stack(commands), self.instruction, seed)


class ToyState:
    """A dot on a grey square; its row follows from the seed, its column from the commands."""

    def __init__(self, task: ToyTask):
        self.task = task

    def reset(self, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        self.row, self.column, self.background = rng.random(), 0.0, rng.integers(40, 120, size=3)
        self.steps = 0
        return self.picture()

    @property
    def success(self) -> bool:
        return bool(self.column >= 0.6 - 1e-6)

    def step(self, command: np.ndarray) -> np.ndarray:
        if np.shape(command) != (7,):
            raise ValueError(f"a command has 7 numbers, this one has shape {np.shape(command)}")
        self.column = float(np.clip(self.column + command[0], 0.0, 1.0))
        self.steps += 1
        return self.picture()

    def picture(self) -> np.ndarray:
        size = self.task.image_size
        image = np.full((size, size, 3), self.background, np.uint8)
        top, left = (int(round(part * (size - 6))) for part in (self.row, self.column))
        image[top : top + 6, left : left + 6] = [230, 40, 40]
        return image


class ToyEnv(VectorEnv):
    """All slots in one group, in this process; answers when waited for."""

    def __init__(self, task: ToyTask, num_envs: int):
        self.task, self.states = task, [ToyState(task) for _ in range(num_envs)]
        self.groups: Sequence[Sequence[int]] = [list(range(num_envs))]
        self._pending: list[tuple[int, dict, dict]] = []

    def request(self, group: int, resets: dict[int, int], commands: dict[int, np.ndarray]) -> None:
        self._pending.append((group, resets, commands))

    def wait(self) -> tuple[int, list[Transition]]:
        group, resets, commands = self._pending.pop(0)
        begun = [Transition(slot, self._row(self.states[slot].reset(seed))) for slot, seed in resets.items()]
        return group, begun + [self._step(slot, command) for slot, command in commands.items()]

    def _step(self, slot: int, command: np.ndarray) -> Transition:
        state = self.states[slot]
        try:
            picture = state.step(command)
        except Exception as error:
            blank = np.zeros((self.task.image_size,) * 2 + (3,), np.uint8)
            return Transition(slot, self._row(blank), done=True, error=f"{type(error).__name__}: {error}")
        done = state.success or state.steps >= self.task.max_steps
        return Transition(slot, self._row(picture), float(state.success), state.success, done)

    def _row(self, picture: np.ndarray) -> dict:
        return {"image": picture, "instruction": self.task.instruction}

    def close(self) -> None:
        self._pending.clear()


def observations(size: int, instructions: list[str]) -> dict:
    """Six pictures: four of random blocks, a black and a white one; instructions in turn."""
    blocks = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    repeats = -(-size // 8)
    pictures = blocks.repeat(repeats, axis=1).repeat(repeats, axis=2)[:, :size, :size]
    flat = [np.zeros((size, size, 3), np.uint8), np.full((size, size, 3), 255, np.uint8)]
    images = np.ascontiguousarray(np.concatenate([pictures, np.stack(flat)]))
    return {"image": images, "instruction": [instructions[i % len(instructions)] for i in range(len(images))]}


@torch.no_grad()
def perturb(policy: Policy, scale: float = 0.05, seed: int = 0) -> None:
    """Adds noise to every trainable weight."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(policy).values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_((scale * noise).to(parameter))
