"""Policies: what every one can do, and what those of tokens add (a classifier, a language model, a VLA)."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robot_forgetting.built_with import BuiltWith
from robot_forgetting.errors import UserError


@dataclass(frozen=True)
class Action:
    """N decisions of up to T tokens, or of T numbers; what rollouts and methods keep of them is on the CPU.

    tokens: [N, T] int64, indices into the policy's action vocabulary (0 .. V-1); None: decisions in numbers
    mask: [N, T] bool, True where a token (or number) counts
    log_prob: [N, T] float, natural logarithm under the policy that sampled it (numbers: of the density), or None
    values: [N, T] float, the decisions of a policy without tokens, in units of its own (see ``of_numbers``)
    """

    tokens: Tensor | None
    mask: Tensor
    log_prob: Tensor | None = None
    values: Tensor | None = None

    @staticmethod
    def of_numbers(values: Tensor, log_prob: Tensor | None = None) -> Action:
        """Decisions without tokens, [N, T]; all numbers count."""
        return Action(None, torch.ones_like(values, dtype=torch.bool), log_prob, values)

    def __len__(self) -> int:
        return len(self.mask)

    def __getitem__(self, index) -> Action:
        return self._each(lambda part: part[index])

    def to(self, device) -> Action:
        return self._each(lambda part: part.to(device))

    @staticmethod
    def cat(actions: Sequence[Action]) -> Action:
        """All rows, right-padded to the longest decision."""
        longest = max(action.mask.shape[1] for action in actions)
        parts = zip(*(action._padded(longest)._parts() for action in actions), strict=True)
        return Action(*(None if any(one is None for one in part) else torch.cat(part) for part in parts))

    def _padded(self, width: int) -> Action:
        missing = width - self.mask.shape[1]
        return self._each(lambda part: F.pad(part, (0, missing))) if missing else self

    def _parts(self) -> tuple[Tensor | None, ...]:
        return self.tokens, self.mask, self.log_prob, self.values

    def _each(self, function: Callable[[Tensor], Tensor]) -> Action:
        return Action(*(None if part is None else function(part) for part in self._parts()))


@dataclass(frozen=True)
class ConventionSpec:
    """What an action and an observation mean; a task and a policy declare one each and they are compared first.

    ``None`` in a field means "any" (a policy that resizes images itself declares ``image_size=None``).
    """

    action_dimensions: int | None = None
    action_mode: str | None = None  # "delta" or "absolute"
    rotation: str | None = None  # "axis_angle", "euler_xyz", ...
    gripper: str | None = None  # "+1 opens" or "+1 closes"
    image_size: int | None = None  # pixels, square
    control_hz: float | None = None
    statistics: str | None = None  # a task: the key it expects

    def mismatches(self, other: ConventionSpec) -> list[str]:
        """Fields on which both sides commit themselves and disagree, as 'field: mine, theirs'."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__dataclass_fields__)
        return [f"{name}: {a!r} against {b!r}" for name, a, b in pairs if None not in (a, b) and a != b]


@dataclass(frozen=True)
class Reference:
    """Whom a policy is compared with in the place of its base: another policy, and what that one observes.

    Its tokens must mean the same (``Policy.check_tokens``); what it observes of a decision may differ.
    """

    policy: Policy
    obs: dict


class Policy(BuiltWith, nn.Module, ABC):
    """Maps observations to decisions.

    ``obs`` is a dict of equally long columns that only the policy looks into. Robot tasks give
    ``image`` (uint8 [N, H, W, 3]) and ``instruction`` (list of N strings), and any further ones of their own.

    Two levels. Every policy acts, decodes, says its conventions and can be its own base. One whose decisions are
    sequences of tokens adds ``logits``: with them come ``log_prob`` and ``compared`` (exact divergences). A policy of
    numbers (Gaussian, diffusion, flow, behind a server) leaves ``logits`` out, and may have a ``log_prob`` of its own,
    which policy gradients and cloning ask for; ``can`` says what there is.
    """

    name: str = "policy"
    # What every policy of this class means, known before one is built and its weights are fetched, and compared first;
    # the arguments action_mode, rotation, gripper and control_hz take its place where they are given.
    declares: ConventionSpec = ConventionSpec()
    # Whether a part of a batch is worth computing in another process.
    splits_batches: bool = True
    # Decisions of one-step tasks that are worth asking for at once; so many are lost at most when a run is interrupted.
    decisions_at_once: int = 1024
    # The longest decision that is sampled, in tokens; None: all are equally long.
    max_new_tokens: int | None = None
    # Blocks one above the other whose states and weights can be looked at apart; 0: none, and no ``hidden_states``.
    blocks: int = 0
    # The observations' column that its layers read in ``hidden_states``.
    layers_read: str = "text"
    # Rows of one forward pass where memory sets no limit.
    most_rows: int = 256
    # Uniform numbers of ``noise`` that one decision uses at most.
    noise_width: int = 16

    @classmethod
    def can(cls, hook: str) -> bool:
        """Whether a policy of this class has one of the optional methods below, its own or by its ``logits``."""
        own = getattr(cls, hook) is not getattr(Policy, hook)
        return own or (hook in ("log_prob", "compared") and cls.can("logits"))

    def lacks(self, hook: str, what: str) -> str:
        """Why something cannot be had of this policy, in words."""
        return f"policy '{self.name}' {what}; it lacks `{hook}`"

    @abstractmethod
    def act(self, obs: dict, *, temperature: float = 1.0, noise: Tensor | None = None) -> Action:
        """Samples one decision per observation, without gradients, batched.

        temperature: 0 is greedy; otherwise logits are divided by it. ``log_prob`` is at that temperature.
        noise: [N, noise_width] uniform numbers in [0, 1), turned into tokens (or numbers) by inverse CDF, so that an
            episode's actions depend on its own seed and not on the batch it happened to be in. Default: torch's global
            generator.
        """

    def logits(self, obs: dict, action: Action) -> Tensor:
        """Teacher-forced logits over the action vocabulary, [N, T, V] float32, on the policy's device, differentiable.

        obs are columns in the host's memory; the action may be there or on the device.
        """
        raise UserError(self.lacks("logits", "has no tokens"))

    def log_prob(self, obs: dict, action: Action) -> Tensor:
        """Log-probability of each token (or number: its density) in nats at temperature 1, [N, T], differentiable; zero
        where masked."""
        logits = self.logits(obs, action)
        action = action.to(logits.device)
        chosen = logits.gather(-1, action.tokens.unsqueeze(-1)).squeeze(-1)
        return (chosen - logits.logsumexp(-1)) * action.mask

    def compared(
        self,
        obs: dict,
        action: Action,
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]],
        reference: Reference | None = None,
    ) -> dict[str, Tensor]:
        """Functions of the base's and the own logits at each token of the same decisions, differentiable in the own.

        Each takes two float32 tensors [..., V] (base, own) and gives [...]. Returns [N, T] by name; what stands where
        the mask is False is not defined. A policy with a large vocabulary never holds all logits at once.
        reference: whose logits take the place of the base's
        """
        with torch.no_grad():
            if reference is not None:
                base = reference.policy.logits(reference.obs, action).to(self.device)
            else:
                with self.base():
                    base = self.logits(obs, action)
        own = self.logits(obs, action)
        return {name: function(base, own) for name, function in functions.items()}

    def check_tokens(self, other: Policy) -> None:
        """``UserError`` unless the tokens of both policies mean the same."""
        differences = self.convention().mismatches(other.convention())
        if differences:
            raise UserError(
                f"the tokens of policies '{self.name}' and '{other.name}' differ in meaning: {'; '.join(differences)}"
            )

    @abstractmethod
    def decode(self, action: Action, *, statistics: str | None = None) -> Sequence:
        """Actions to what the environment takes: a label, a text, or un-normalised commands [N, 7] float32."""

    def encode(self, commands, *, statistics: str | None = None) -> Action:
        """The inverse of ``decode``: demonstrations' commands to actions (tokens: of the nearest bins)."""
        raise UserError(self.lacks("encode", "cannot turn demonstrations into actions"))

    def set_statistics(self, ranges: dict) -> None:
        """Replaces the ranges by which commands are normalised: key -> {"action": {"q01", "q99", "min", "max": [A]
        float each, "mask": [A] bool}}. `pretrain` measures them before it trains a policy for robots."""
        raise UserError(self.lacks("set_statistics", "has no ranges of commands"))

    def save(self, folder) -> None:
        """Writes what `pretrain` has trained into a folder, for the policy's own constructor to read."""
        raise UserError(self.lacks("save", "cannot be saved"))

    @abstractmethod
    def base(self) -> AbstractContextManager:
        """Inside the context this object *is* the frozen base policy (LoRA: adapters off; else: swapped weights)."""

    def keep_as_base(self) -> None:
        """Makes the weights of now the base's, for a run that goes on from another one's (`checkpoint=`)."""
        raise UserError(
            f"policy '{self.name}' cannot go on from a finished run: it lacks `keep_as_base`; leave checkpoint= out"
        )

    @abstractmethod
    def convention(self) -> ConventionSpec:
        """What this policy assumes of a task."""

    def copied(self) -> Policy:
        """Another policy with trainable weights of its own; what is frozen is shared."""
        return copy.deepcopy(self, {id(tensor): tensor for tensor in self._frozen_tensors()})

    def _frozen_tensors(self) -> list[Tensor]:
        return [*(parameter for parameter in self.parameters() if not parameter.requires_grad), *self.buffers()]

    def rows_at_once(self, *, gradients: int = 0) -> int:
        """Rows of a forward pass for which its device has memory, at most ``most_rows``.

        gradients: passes whose activations are kept at once for the backward pass; 0: none (sampling, measuring). Asked
            before the first step, it leaves room for gradients and the optimiser's moments.
        """
        return self.most_rows

    def check_training(self, *, compared: bool = True) -> None:
        """``UserError``, before anything is measured, where this policy cannot be trained as it is set up.

        compared: whether it will be asked to act as its base too
        """

    def hidden_states(self, obs: dict) -> Sequence[Tensor]:
        """What each layer makes of an observation, one vector each: 1 + blocks of [N, D] float32, without gradients.

        The first layer is the embedding, then come the blocks. ``layers_read`` is the column that must be there: a
        language model reads plain texts, and is then compared on held-out ones; others read what tasks show.
        """
        raise UserError(self.lacks("hidden_states", "does not show its layers"))

    def layer_weights(self) -> Iterator[tuple[int | None, dict[str, Tensor], dict[str, Tensor]]]:
        """Per layer its number as in ``hidden_states``, and the base's and its own weights by name; None: the rest."""
        raise UserError(self.lacks("layer_weights", "does not show its layers"))

    def base_slopes(self, obs: dict, action: Action) -> Iterator[tuple[Tensor, Tensor]]:
        """Of each weight tensor that was trained, adapters merged: the gradient of the decisions' log-probability by it
        at the base's weights, and its change since."""
        raise UserError(self.lacks("base_slopes", "does not show the gradients of its base"))

    def cut_off(self, action: Action) -> list[bool]:
        """Of each row, whether its decision was stopped by its longest length before it had ended."""
        return [False] * len(action)

    def metrics(self) -> dict[str, float]:
        """Numbers about the last ``act`` for train.jsonl."""
        return {}

    @property
    def device(self) -> torch.device:
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))
