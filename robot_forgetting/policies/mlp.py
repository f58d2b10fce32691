"""Multi-layer perceptrons over a fixed set of labels; several of one shape can be stacked and trained as one policy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from robot_forgetting.errors import UserError
from robot_forgetting.one_step import Repeated
from robot_forgetting.policy import Action, ConventionSpec, Policy


class MLPPolicy(Policy):
    """One token out of ``sizes[-1]`` labels from the column ``features`` [N, sizes[0]] float32; ReLU between layers.

    runs: R networks of the same shape, trained side by side. Rows are then run-major: the first N / R belong to
        network 0, and so on. They share one frozen base. Parameters are views of one buffer [R, P], a network's in a
        row, so that a layer is one batched product; a ``Repeated`` column's values are multiplied once per network.
    weights: layer name -> tensor of one network ("layer1.weight" [in, out], "layer1.bias" [out], ...), copied into
        all of them; default: torch.nn.Linear's distribution, from torch's global generator. They are also the base.
    dtype: of weights, gradients and optimiser state; the products are always float32
    """

    splits_batches = False  # a batch takes a millisecond, sending a part of it to another process as long

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (785, 512, 256, 10),
        runs: int = 1,
        weights: dict[str, Tensor] | None = None,
        dtype: str = "float32",
        name: str = "mlp",
    ):
        super().__init__()
        if runs < 1 or len(sizes) < 2 or min(sizes) < 1:
            raise UserError(f"mlp: runs and sizes must be at least 1, with two sizes or more; not {runs}, {sizes}")
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"unknown dtype '{dtype}'; choose one of: bfloat16, float32")
        self.name, self.runs, self.sizes = name, runs, tuple(sizes)
        self.places = _places(self.sizes)
        width = -(-max(end for _, _, end in self.places.values()) // 16) * 16  # rows of whole cache lines
        self._buffer = torch.zeros(runs, width, dtype=getattr(torch, dtype))
        fresh = _fresh(self.sizes) if weights is None else weights
        if {key: tuple(value.shape) for key, value in fresh.items()} != {k: s for k, (s, _, _) in self.places.items()}:
            raise UserError(f"these weights do not fit an mlp of sizes {list(sizes)}; give other sizes or weights")
        for key, value in fresh.items():
            self._view(self._buffer, key).copy_(value)
        self._base = self._buffer[:1].clone()
        for run in range(runs):
            for key in self.places:
                self._register(run, key)
        self._parameters_in_order = tuple(self.parameters())  # walking the modules costs more than a small layer
        self._gradients = torch.zeros(self._buffer.shape)
        self._inside_base = False
        self._kept: _Forward | None = None  # the last pass, for a loss and a penalty on the same rows

    def _register(self, run: int, key: str) -> None:
        layer, kind = key.split(".")
        owner = self
        for part in [f"run{run}", layer] if self.runs > 1 else [layer]:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.register_parameter(kind, nn.Parameter(self._view(self._buffer[run : run + 1], key)[0]))

    def _view(self, buffer: Tensor, key: str) -> Tensor:
        """[R, *shape] view of one layer's part of a buffer [R, P]."""
        shape, start, end = self.places[key]
        return buffer[:, start:end].view(len(buffer), *shape)

    def network(self, run: int, *, copy: bool = True) -> dict[str, Tensor]:
        """One network's weights by layer name, as ``weights=`` takes them."""
        views = {key: self._view(self._buffer[run : run + 1], key)[0] for key in self.places}
        return {key: view.clone() for key, view in views.items()} if copy else views

    def train(self, mode: bool = True) -> MLPPolicy:
        self.training = mode  # no layer behaves differently, and there are many to tell
        return self

    @torch.no_grad()
    def reset(self, run: int) -> None:
        """Makes one network the base again."""
        for parameter, weights in zip(self.run_parameters()[run], self.base_network().values(), strict=True):
            parameter.copy_(weights)

    def stacked(self) -> dict[str, Tensor]:
        """All networks' weights by layer name, [R, *shape] views."""
        return {key: self._view(self._buffer, key) for key in self.places}

    def largest_weights(self) -> list[float]:
        """The largest absolute weight of each network; nan where there is one."""
        return self._buffer.abs().amax(1).tolist()

    def base_network(self) -> dict[str, Tensor]:
        return {key: self._view(self._base, key)[0].float().clone() for key in self.places}

    def run_parameters(self) -> list[list[nn.Parameter]]:
        parameters = list(self._parameters_in_order)
        each = len(self.places)
        return [parameters[run * each : (run + 1) * each] for run in range(self.runs)]

    # ---- the policy

    def convention(self) -> ConventionSpec:
        return ConventionSpec(action_dimensions=1, action_mode="label")

    def logits(self, obs: dict, action: Action) -> Tensor:
        column, shape = obs["features"], (len(action), 1, self.sizes[-1])
        values, inner = self._inputs(column)
        if self._inside_base:
            return self._spread(self._forward(values).out, inner).reshape(shape)
        kept = self._kept
        if kept is None or kept.column is not column or kept.version != self._version():
            kept = self._keep(column, self._forward(values))
        if not torch.is_grad_enabled():
            return self._spread(kept.out, inner).reshape(shape)
        if kept.graph is None:  # loss and penalty share one backward pass
            kept.graph = _Network.apply(self, kept, *self._parameters_in_order)
        return self._spread(kept.graph, inner).reshape(shape)

    @torch.no_grad()
    def act(self, obs: dict, *, temperature: float = 1.0, noise: Tensor | None = None) -> Action:
        column = obs["features"]
        values, inner = self._inputs(column)
        forward = self._forward(values)
        if not self._inside_base:
            self._keep(column, forward)
        logits = forward.out.expand(self.runs, -1, -1)  # the base is one network for all
        tokens = logits.argmax(-1, keepdim=True).expand(*logits.shape[:2], inner)
        log_prob = torch.zeros(tokens.shape)
        if temperature > 0:
            noise = torch.rand(len(column), 1) if noise is None else noise
            log_probs = (logits / temperature).log_softmax(-1)
            below = log_probs.exp().cumsum(-1).unsqueeze(2) <= noise[:, 0].view(*logits.shape[:2], inner, 1)
            tokens = below.sum(-1).clamp_max(self.sizes[-1] - 1)
            log_prob = log_probs.gather(-1, tokens)
        tokens = tokens.reshape(-1, 1)
        return Action(tokens, torch.ones_like(tokens, dtype=torch.bool), log_prob.reshape(-1, 1))

    def decode(self, action: Action, *, statistics: str | None = None) -> np.ndarray:
        """Labels [N] int64."""
        return action.tokens[:, 0].numpy()

    def encode(self, commands, *, statistics: str | None = None) -> Action:
        tokens = torch.from_numpy(np.asarray(commands).astype(np.int64).reshape(-1, 1))
        return Action(tokens, torch.ones_like(tokens, dtype=torch.bool))

    @contextmanager
    def base(self) -> Iterator[None]:
        before, self._inside_base = self._inside_base, True
        try:
            with torch.no_grad():
                yield
        finally:
            self._inside_base = before

    @torch.no_grad()
    def activations(self, features: np.ndarray | Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden layers [R, N, width] after their ReLU, and logits [R, N, V], of the same inputs for every network."""
        forward = self._forward(torch.as_tensor(features).unsqueeze(0))
        return forward.hidden[1:], forward.out

    # ---- products

    def _inputs(self, column) -> tuple[Tensor, int]:
        """Features [1 or R, n, in] (1: the networks share them), and how many decisions each row stands for."""
        if isinstance(column, Repeated) and column.outer in (1, self.runs):
            values = torch.as_tensor(column.values)
            shared = column.outer == self.runs
            return values.unsqueeze(0) if shared else values.view(self.runs, -1, self.sizes[0]), column.inner
        values = torch.as_tensor(np.asarray(column) if isinstance(column, list) else column[:])
        if len(values) % self.runs:
            raise ValueError(f"{len(values)} rows are no whole number for each of {self.runs} networks")
        return values.view(self.runs, -1, self.sizes[0]), 1

    def _spread(self, logits: Tensor, inner: int) -> Tensor:
        logits = logits.expand(self.runs, -1, -1)
        return logits.repeat_interleave(inner, dim=1) if inner > 1 else logits

    def _keep(self, column, forward: _Forward) -> _Forward:
        forward.column, forward.version = column, self._version()
        self._kept = forward
        return forward

    def _gradient_buffer(self) -> Tensor:
        """[R, P] float32: always the same memory, new pages cost more than the products' writes; but not while the
        parameters still hold the last pass's gradients, to which this one's will be added."""
        held = any(parameter.grad is not None for parameter in self._parameters_in_order)
        return torch.empty_like(self._gradients) if held else self._gradients

    def _version(self) -> int:
        # Changes when weights are loaded; the fused optimiser leaves it as it is, hence ``_Network.backward`` drops
        # what was kept as well: no optimiser step without a backward pass.
        return sum(parameter._version for parameter in self._parameters_in_order)

    def _forward(self, values: Tensor) -> _Forward:
        buffer = self._base if self._inside_base else self._buffer
        if len(buffer) == 1 and len(values) > 1:  # the base on rows that differ from network to network
            buffer = buffer.expand(len(values), -1)
        buffer = buffer.float()
        hidden, depth = [values], len(self.sizes) - 1
        with torch.no_grad():
            for layer in range(1, depth + 1):
                weight = self._view(buffer, f"layer{layer}.weight")
                bias = self._view(buffer, f"layer{layer}.bias").unsqueeze(1)
                out = torch.baddbmm(bias, hidden[-1].expand(len(weight), -1, -1), weight)
                if layer < depth:
                    hidden.append(out.relu_())
        return _Forward(hidden, out, buffer)


class _Forward:
    """Inputs and hidden layers of one forward pass, its logits [R, n, V], and the float32 weights it used."""

    def __init__(self, hidden: list[Tensor], out: Tensor, buffer: Tensor):
        self.hidden, self.out, self.buffer = hidden, out, buffer
        self.column, self.version, self.graph = None, -1, None


class _Network(torch.autograd.Function):
    """The networks as one operation: nobody needs the gradient of the inputs, and every network's gradients land in
    one row of one buffer.

    Weights are [in, out], for which the weight gradient is inputs^T @ gradient: the transposed product is up to twice
    as slow here (49 against 76 GFLOP/s).
    """

    @staticmethod
    def forward(ctx, policy: MLPPolicy, kept: _Forward, *parameters):
        ctx.policy, ctx.kept = policy, kept
        return kept.out.view_as(kept.out)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        policy, kept = ctx.policy, ctx.kept
        policy._kept = None
        flat = policy._gradient_buffer()
        for layer in range(len(policy.sizes) - 1, 0, -1):
            inputs, weight = kept.hidden[layer - 1], policy._view(kept.buffer, f"layer{layer}.weight")
            flipped = inputs.transpose(1, 2).expand(len(gradient), -1, -1)
            torch.bmm(flipped, gradient, out=policy._view(flat, f"layer{layer}.weight"))
            torch.sum(gradient, 1, out=policy._view(flat, f"layer{layer}.bias"))
            if layer > 1:
                gradient = torch.bmm(gradient, weight.transpose(1, 2))
                torch.ops.aten.threshold_backward.grad_input(gradient, inputs, 0, grad_input=gradient)  # the ReLU's
        flat = flat.to(policy._buffer.dtype)
        return None, None, *(policy._view(flat[r : r + 1], key)[0] for r in range(len(flat)) for key in policy.places)


def _places(sizes: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Name -> (shape, start, end) within a network's row of the buffer."""
    places, start = {}, 0
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
        for kind, shape in (("weight", (inputs, outputs)), ("bias", (outputs,))):
            end = start + math.prod(shape)
            places[f"layer{layer}.{kind}"] = (shape, start, end)
            start = end
    return places


def _fresh(sizes: tuple[int, ...]) -> dict[str, Tensor]:
    weights = {}
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
        bound = math.sqrt(1 / inputs)  # torch.nn.Linear's own
        weights[f"layer{layer}.weight"] = (torch.rand(inputs, outputs) * 2 - 1) * bound
        weights[f"layer{layer}.bias"] = (torch.rand(outputs) * 2 - 1) * bound
    return weights
