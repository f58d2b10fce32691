"""A world small enough to compute by hand: 4x4 pictures, four cells in a row, a tabular policy of two tokens.

The picture shows the walker in row 0 and a mark in row 3. "reach": walk to the mark; "mirror": walk to the cell
opposite to it. Token 0 is the step (left, stay, right); token 1 moves nothing, the expert always says "right".
Everything is a table look-up, so that results do not depend on the batch an observation is in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from robot_forgetting.method import Batch
from robot_forgetting.methods.sft import encode_demonstrations
from robot_forgetting.policy import Action, ConventionSpec, Policy
from robot_forgetting.task import Demonstration, Task, Transition, VectorEnv

CELLS, TOKENS, CHOICES = 4, 2, 3
INSTRUCTIONS = ("reach", "mirror")


class ToyPolicy(Policy):
    """logits of token 0: table[instruction, state, 0]; of token 1: table[instruction, state, 1] + coupling[token 0]."""

    name = "toy"

    def __init__(self, *, image_size: int = CELLS, seed: int | None = None, dtype: torch.dtype = torch.float32):
        super().__init__()
        draw = torch.Generator().manual_seed(seed or 0)
        scale = 0.0 if seed is None else 1.0
        shapes = {
            "table": (len(INSTRUCTIONS), CELLS * CELLS, TOKENS, CHOICES),
            "coupling": (CHOICES, CHOICES),
            "bias": (CHOICES,),
        }
        for name, shape in shapes.items():
            values = torch.randn(shape, generator=draw, dtype=torch.float64) * scale
            setattr(self, name, nn.Parameter(values.to(dtype)))
        self.image_size = image_size
        self.calls: list[int] = []  # rows of every ``act``
        self._kept = [parameter.detach().clone() for parameter in self.parameters()]

    def convention(self) -> ConventionSpec:
        return ConventionSpec(action_dimensions=TOKENS, action_mode="delta", image_size=self.image_size)

    def _states(self, obs: dict) -> tuple[Tensor, Tensor]:
        images = np.asarray(obs["image"])
        state = images[:, 0, :, 0].argmax(1) * CELLS + images[:, -1, :, 0].argmax(1)
        return torch.tensor([INSTRUCTIONS.index(text) for text in obs["instruction"]]), torch.from_numpy(state)

    def _token_logits(self, obs: dict, tokens: Tensor, position: int) -> Tensor:
        logits = self.table[(*self._states(obs), position)] + self.bias
        return logits + self.coupling[tokens[:, 0]] if position else logits

    def logits(self, obs: dict, action: Action) -> Tensor:
        return torch.stack([self._token_logits(obs, action.tokens, position) for position in range(TOKENS)], 1)

    @torch.no_grad()
    def act(self, obs: dict, *, temperature: float = 1.0, noise: Tensor | None = None) -> Action:
        count = len(obs["image"])
        self.calls.append(count)
        noise = torch.rand(count, TOKENS) if noise is None else noise
        tokens, log_prob = torch.zeros(count, TOKENS, dtype=torch.int64), torch.zeros(count, TOKENS)
        for position in range(TOKENS):
            logits = self._token_logits(obs, tokens, position)
            if temperature == 0:
                tokens[:, position] = logits.argmax(-1)
                continue
            log_probs = (logits / temperature).log_softmax(-1)
            below = log_probs.exp().cumsum(-1) <= noise[:, position : position + 1]
            tokens[:, position] = below.sum(-1).clamp_max(CHOICES - 1)
            log_prob[:, position] = log_probs.gather(-1, tokens[:, position : position + 1]).squeeze(-1)
        return Action(tokens, torch.ones_like(tokens, dtype=torch.bool), log_prob)

    def decode(self, action: Action, *, statistics: str | None = None) -> np.ndarray:
        return action.tokens.numpy().astype(np.float32) - 1

    def encode(self, commands, *, statistics: str | None = None) -> Action:
        tokens = torch.from_numpy(np.asarray(commands).round().astype(np.int64)) + 1
        return Action(tokens, torch.ones_like(tokens, dtype=torch.bool))

    @contextmanager
    def base(self) -> Iterator[None]:
        self._swap()
        try:
            with torch.no_grad():
                yield
        finally:
            self._swap()

    def keep_as_base(self) -> None:
        self._kept = [parameter.detach().clone() for parameter in self.parameters()]

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters()):
            parameter.data, self._kept[index] = self._kept[index], parameter.data


def start(seed: int) -> tuple[int, int]:
    """Cells of walker and mark, never such that either task is solved at the start."""
    rng = np.random.default_rng([seed, 7])
    walker = int(rng.integers(CELLS))
    mark = int(rng.choice([cell for cell in range(CELLS) if cell not in (walker, CELLS - 1 - walker)]))
    return walker, mark


def picture(walker: int, mark: int) -> np.ndarray:
    image = np.full((CELLS, CELLS, 3), 20, np.uint8)
    image[0, walker], image[-1, mark] = 255, 200
    return image


class ToyTask(Task):
    """crashes: seed -> the step at which its environment fails (0: at reset); last_first: the late answer first."""

    def __init__(
        self,
        name: str = "reach",
        *,
        max_steps: int = 4,
        groups: int = 2,
        image_size: int = CELLS,
        crashes: dict[int, int] | None = None,
        last_first: bool = False,
    ):
        self.name = self.instruction = name
        self.max_steps, self.processes, self.image_size = max_steps, groups, image_size
        self.crashes, self.last_first = dict(crashes or {}), last_first
        self.made: list[ToyEnv] = []

    def convention(self) -> ConventionSpec:
        return ConventionSpec(action_dimensions=TOKENS, action_mode="delta", image_size=self.image_size, control_hz=1.0)

    def make_env(self, num_envs: int, *, render: bool = False) -> ToyEnv:
        self.made.append(ToyEnv(self, num_envs, render))
        return self.made[-1]

    def goal(self, mark: int) -> int:
        return mark if self.name == "reach" else CELLS - 1 - mark

    def demonstrations(self, count: int, *, split: str = "train", start: int = 0) -> Iterator[Demonstration]:
        for seed in self.seeds(split)[start : start + count]:
            walker, mark = globals()["start"](seed)
            images, commands = [], []
            while walker != self.goal(mark):
                step = int(np.sign(self.goal(mark) - walker))
                images.append(picture(walker, mark))
                commands.append([step, 1.0])
                walker += step
            yield Demonstration(np.stack(images), np.array(commands, np.float32), self.instruction, seed)


class ToyEnv(VectorEnv):
    """Everything happens in ``request``; ``wait`` hands the answers out."""

    def __init__(self, task: ToyTask, num_envs: int, render: bool):
        self.task, self.render, self.closed = task, render, False
        split = np.array_split(np.arange(num_envs), min(task.processes, num_envs))
        self.groups = [[int(slot) for slot in group] for group in split]
        self._slots: dict[int, list[int]] = {}  # slot -> [seed, steps, walker, mark]
        self._answers: list[tuple[int, list[Transition]]] = []

    def request(self, group: int, resets: dict[int, int], commands: dict[int, np.ndarray]) -> None:
        answers = []
        for slot, seed in resets.items():
            assert slot in self.groups[group]
            self._slots[slot] = [seed, 0, *start(seed)]
            answers.append(self._answer(slot))
        for slot, command in commands.items():
            assert slot in self.groups[group]
            state = self._slots[slot]
            state[1] += 1
            state[2] = int(np.clip(state[2] + command[0], 0, CELLS - 1))
            answers.append(self._answer(slot))
        self._answers.append((group, answers))

    def _answer(self, slot: int) -> Transition:
        seed, steps, walker, mark = self._slots[slot]
        observation = {"image": picture(walker, mark), "instruction": self.task.instruction}
        if self.task.crashes.get(seed) == steps:
            blank = {**observation, "image": np.zeros_like(observation["image"])}
            return Transition(slot, blank, done=True, error=f"RuntimeError: broke at step {steps}")
        if self.render:
            observation["frame"] = observation["image"].repeat(8, 0).repeat(8, 1)
        success = steps > 0 and walker == self.task.goal(mark)
        done = success or steps >= self.task.max_steps
        return Transition(slot, observation, float(success), success, done, {"success": success})

    def wait(self) -> tuple[int, list[Transition]]:
        return self._answers.pop(-1 if self.task.last_first else 0)

    def close(self) -> None:
        self.closed = True


def a_batch(seeds=range(6), task: ToyTask | None = None, policy: ToyPolicy | None = None) -> Batch:
    """States of the demonstrations with the given policy's own sampled tokens."""
    policy, task = policy or ToyPolicy(seed=1), task or ToyTask()
    data = encode_demonstrations(policy, task, task.demonstrations(len(seeds), start=seeds[0]))
    noise = torch.rand(len(data), 2, generator=torch.Generator().manual_seed(0))
    return Batch(data.obs, policy.act(data.obs, noise=noise))
