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
        network 0, and so on. They share one frozen base. A network is a row of one buffer [R, P], so that a layer is
        one batched product, and has two parameters, ``matrices`` [1, .] (they decay) and ``vectors`` [.], whatever
        its depth: the optimiser pays for each; a ``Repeated`` column's values are multiplied once per network.
    weights: layer name -> tensor of one network ("layer1.weight" [in, out], "layer1.bias" [out], ...), copied into
        all of them; default: torch.nn.Linear's distribution, from torch's global generator. They are also the base.
    dtype: of weights, gradients and optimiser state; the products are always float32
    """

    declares = ConventionSpec(action_dimensions=1, action_mode="label")
    noise_width = 1
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
        self.places, self._split, end = _places(self.sizes)
        width = -(-end // 16) * 16  # rows of whole cache lines
        self._buffer = torch.zeros(runs, width, dtype=getattr(torch, dtype))
        fresh = _fresh(self.sizes) if weights is None else weights
        if {key: tuple(value.shape) for key, value in fresh.items()} != {k: s for k, (s, _) in self.places.items()}:
            raise UserError(f"these weights do not fit an mlp of sizes {list(sizes)}; give other sizes or weights")
        self._layers = self.layers(self._buffer)
        for key, value in fresh.items():
            self._layers[key].copy_(value)
        self._base = self._buffer[:1].clone()
        self._base_layers = self.layers(self._base.float())
        self._gradients = torch.zeros(self._buffer.shape)
        self._gradient_layers = self.layers(self._gradients)
        for run in range(runs):
            if runs > 1:
                self.add_module(f"run{run}", nn.Module())
            owner = getattr(self, f"run{run}") if runs > 1 else self
            owner.matrices, owner.vectors = map(nn.Parameter, self._parts(self._buffer, run))
        self._in_order = tuple(self.parameters())  # walking the modules takes longer than a small product
        self._inside_base = False
        self._kept: _Forward | None = None  # the last pass, for a loss and a penalty on the same rows

    def layers(self, buffer: Tensor) -> dict[str, Tensor]:
        """Views of a buffer [R, P] by layer name, [R, *shape]."""
        return {
            key: buffer[:, start : start + math.prod(shape)].view(len(buffer), *shape)
            for key, (shape, start) in self.places.items()
        }

    def _parts(self, buffer: Tensor, run: int) -> tuple[Tensor, Tensor]:
        """A row of a buffer [R, P] as a network's two parameters have it."""
        vectors = sum(size for size in self.sizes[1:])
        return buffer[run : run + 1, : self._split], buffer[run, self._split : self._split + vectors]

    def network(self, run: int, *, copy: bool = True) -> dict[str, Tensor]:
        """One network's weights by layer name, as ``weights=`` takes them."""
        return {key: values[run].clone() if copy else values[run] for key, values in self._layers.items()}

    def train(self, mode: bool = True) -> MLPPolicy:
        self.training = mode  # no layer behaves differently, and there are many to tell
        return self

    @torch.no_grad()
    def reset(self, run: int) -> None:
        """Makes one network the base again."""
        for parameter, weights in zip(self.run_parameters()[run], self._parts(self._base, 0), strict=True):
            parameter.copy_(weights)

    def stacked(self) -> dict[str, Tensor]:
        """All networks' weights by layer name, [R, *shape] views."""
        return dict(self._layers)

    def gradients(self) -> dict[str, Tensor]:
        """The parameters' gradients by layer name, [R, *shape], a copy."""
        rows = [torch.cat([part.grad.flatten() for part in network]) for network in self.run_parameters()]
        return self.layers(torch.stack(rows))

    def largest_weights(self) -> list[float]:
        """The largest absolute weight of each network; nan where there is one."""
        return self._buffer.abs().amax(1).tolist()

    def base_network(self) -> dict[str, Tensor]:
        return {key: values[0].clone() for key, values in self._base_layers.items()}

    def run_parameters(self) -> list[list[nn.Parameter]]:
        return [list(self._in_order[run : run + 2]) for run in range(0, 2 * self.runs, 2)]

    # ---- the policy

    def convention(self) -> ConventionSpec:
        return self.declares

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
            kept.graph = _Network.apply(self, kept, *self._in_order)
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
    def keep_as_base(self) -> None:
        if self.runs > 1:
            raise UserError(f"mlp: a stack of {self.runs} networks shares one base; go on from one run")
        self._base.copy_(self._buffer)
        self._base_layers = self.layers(self._base.float())

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

    def _gradient_buffer(self) -> tuple[Tensor, dict[str, Tensor]]:
        """[R, P] float32 and its layers: always the same memory, since new pages cost as much as what is written to
        them; but not while the parameters still hold the last pass's gradients, to which this one's will be added."""
        if all(parameter.grad is None for parameter in self._in_order):
            return self._gradients, self._gradient_layers
        fresh = torch.empty_like(self._gradients)
        return fresh, self.layers(fresh)

    def _version(self) -> int:
        # Changes when weights are loaded; the fused optimiser leaves it as it is, hence ``_Network.backward`` drops
        # what was kept as well: no optimiser step without a backward pass.
        return sum(parameter._version for parameter in self._in_order)

    @torch.no_grad()
    def _forward(self, values: Tensor) -> _Forward:
        layers = self._base_layers if self._inside_base else self._layers
        if layers["layer1.weight"].dtype != torch.float32:
            layers = {key: part.float() for key, part in layers.items()}
        hidden, depth = [values], len(self.sizes) - 1
        runs = max(len(values), len(layers["layer1.weight"]))  # more rows of inputs than bases: one base for all
        for layer in range(1, depth + 1):
            weight, bias = layers[f"layer{layer}.weight"], layers[f"layer{layer}.bias"].unsqueeze(1)
            inputs = hidden[-1].expand(runs, -1, -1)
            out = torch.baddbmm(bias.expand(runs, -1, -1), inputs, weight.expand(runs, -1, -1))
            if layer < depth:
                hidden.append(out.relu_())
        return _Forward(hidden, out, layers)


class _Forward:
    """Inputs and hidden layers of one forward pass, its logits [R, n, V], and the float32 weights it used."""

    def __init__(self, hidden: list[Tensor], out: Tensor, layers: dict[str, Tensor]):
        self.hidden, self.out, self.layers = hidden, out, layers
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
        flat, found = policy._gradient_buffer()
        for layer in range(len(policy.sizes) - 1, 0, -1):
            inputs, weight = kept.hidden[layer - 1], kept.layers[f"layer{layer}.weight"]
            flipped = inputs.transpose(1, 2).expand(len(gradient), -1, -1)
            torch.bmm(flipped, gradient, out=found[f"layer{layer}.weight"])
            torch.sum(gradient, 1, out=found[f"layer{layer}.bias"])
            if layer > 1:
                behind = torch.bmm(gradient, weight.transpose(1, 2))
                gradient = torch.ops.aten.threshold_backward(behind, inputs, 0)
        flat = flat.to(policy._buffer.dtype)
        return None, None, *(part for run in range(policy.runs) for part in policy._parts(flat, run))


def _places(sizes: tuple[int, ...]) -> tuple[dict[str, tuple[tuple[int, ...], int]], int, int]:
    """Name -> (shape, start within a network's row of the buffer); where the biases begin, and where they end."""
    pairs = list(enumerate(zip(sizes, sizes[1:], strict=False), start=1))
    weights = {f"layer{layer}.weight": shape for layer, shape in pairs}
    biases = {f"layer{layer}.bias": shape[1:] for layer, shape in pairs}
    starts, end = {}, 0
    for key, shape in (weights | biases).items():
        starts[key], end = (shape, end), end + math.prod(shape)
    order = [key for pair in zip(weights, biases, strict=True) for key in pair]
    return {key: starts[key] for key in order}, end - sum(sizes[1:]), end


def _fresh(sizes: tuple[int, ...]) -> dict[str, Tensor]:
    weights = {}
    for layer, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
        bound = math.sqrt(1 / inputs)  # torch.nn.Linear's own
        weights[f"layer{layer}.weight"] = (torch.rand(inputs, outputs) * 2 - 1) * bound
        weights[f"layer{layer}.bias"] = (torch.rand(outputs) * 2 - 1) * bound
    return weights
