"""A multi-layer perceptron over a fixed set of labels."""

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

    Two parameters whatever the depth, ``matrices`` [1, .] (they decay) and ``vectors`` [.], since the optimiser pays
    for each; a ``Repeated`` column's values are multiplied once.
    weights: layer name -> tensor ("layer1.weight" [in, out], "layer1.bias" [out], ...); default: torch.nn.Linear's
        distribution, from torch's global generator. They are also the base.
    dtype: of weights, gradients and optimiser state; the products are always float32
    """

    declares = ConventionSpec(action_dimensions=1, action_mode="label")
    noise_width = 1
    layers_read = "features"
    splits_batches = False  # a batch takes a millisecond, sending a part of it to another process as long

    def __init__(
        self,
        *,
        sizes: Sequence[int] = (785, 512, 256, 10),
        weights: dict[str, Tensor] | None = None,
        dtype: str = "float32",
        name: str = "mlp",
    ):
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise UserError(f"mlp: two sizes or more of at least 1 are needed, not {list(sizes)}")
        if dtype not in ("float32", "bfloat16"):
            raise UserError(f"unknown dtype '{dtype}'; choose one of: bfloat16, float32")
        self.name, self.sizes = name, tuple(sizes)
        self._shapes = list(zip(self.sizes, self.sizes[1:], strict=False))
        self.depth = len(self._shapes)
        self.blocks = self.depth - 1
        given = _fresh(self._shapes) if weights is None else weights
        shapes = {f"layer{n}.weight": shape for n, shape in enumerate(self._shapes, start=1)}
        shapes |= {f"layer{n}.bias": shape[1:] for n, shape in enumerate(self._shapes, start=1)}
        if {key: tuple(value.shape) for key, value in given.items()} != shapes:
            raise UserError(f"these weights do not fit an mlp of sizes {list(sizes)}; give other sizes or weights")
        flat = torch.cat([given[key].flatten() for key in shapes]).to(getattr(torch, dtype))
        matrices, vectors = flat.split([flat.numel() - sum(self.sizes[1:]), sum(self.sizes[1:])])
        self.matrices, self.vectors = nn.Parameter(matrices.unsqueeze(0).clone()), nn.Parameter(vectors.clone())
        self.keep_as_base()
        self._inside_base = False
        self._kept: _Forward | None = None  # the last pass, for a loss and a penalty on the same rows

    def layers(self, matrices: Tensor, vectors: Tensor) -> dict[str, Tensor]:
        """Views by layer name of tensors shaped like the two parameters."""
        weights = matrices[0].split([math.prod(shape) for shape in self._shapes])
        parts = zip(weights, vectors.split(self.sizes[1:]), self._shapes, strict=True)
        return {
            f"layer{number}.{kind}": value
            for number, (weight, bias, shape) in enumerate(parts, start=1)
            for kind, value in (("weight", weight.view(shape)), ("bias", bias))
        }

    def network(self) -> dict[str, Tensor]:
        """The weights by layer name, as ``weights=`` takes them; views."""
        return self.layers(self.matrices.detach(), self.vectors.detach())

    def base_network(self) -> dict[str, Tensor]:
        return dict(self._base)

    def train(self, mode: bool = True) -> MLPPolicy:
        self.training = mode  # no layer behaves differently; walking the modules takes longer than a small product
        return self

    # ---- the policy

    def convention(self) -> ConventionSpec:
        return self.declares

    def logits(self, obs: dict, action: Action) -> Tensor:
        found, times = self._pass(obs["features"])
        logits = found.out
        if torch.is_grad_enabled() and not self._inside_base:
            if found.graph is None:  # loss and penalty share one backward pass
                found.graph = _Network.apply(self, found, self.matrices, self.vectors)
            logits = found.graph
        return (logits.repeat_interleave(times, dim=0) if times > 1 else logits).unsqueeze(1)

    @torch.no_grad()
    def act(self, obs: dict, *, temperature: float = 1.0, noise: Tensor | None = None) -> Action:
        found, times = self._pass(obs["features"])
        logits = found.out
        tokens = logits.argmax(-1, keepdim=True).expand(-1, times)
        log_prob = torch.zeros(tokens.shape)
        if temperature > 0:
            noise = torch.rand(tokens.numel(), 1) if noise is None else noise
            log_probs = (logits / temperature).log_softmax(-1)
            below = log_probs.exp().cumsum(-1).unsqueeze(1) <= noise[:, 0].view(-1, times, 1)
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

    def keep_as_base(self) -> None:
        self._base = {key: value.float().clone() for key, value in self.network().items()}

    @torch.no_grad()
    def activations(self, features: np.ndarray | Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden layers [N, width] after their ReLU, and logits [N, V]."""
        found = self._forward(torch.as_tensor(features))
        return found.hidden[1:], found.out

    @torch.no_grad()
    def hidden_states(self, obs: dict) -> list[Tensor]:
        """The features, and each hidden layer after its ReLU, [N, width]."""
        return self._pass(obs["features"])[0].hidden

    def layer_weights(self) -> Iterator[tuple[int | None, dict[str, Tensor], dict[str, Tensor]]]:
        own = self.network()
        for layer in range(1, self.depth + 1):
            names = (f"layer{layer}.weight", f"layer{layer}.bias")
            sides = ({name: side[name] for name in names} for side in (self._base, own))
            yield (layer if layer <= self.blocks else None, *sides)

    def base_slopes(self, obs: dict, action: Action) -> Iterator[tuple[Tensor, Tensor]]:
        own, base = self.network(), {key: value.clone().requires_grad_() for key, value in self._base.items()}
        with torch.enable_grad():
            out = torch.as_tensor(obs["features"])
            for layer in range(1, self.depth + 1):
                out = out @ base[f"layer{layer}.weight"] + base[f"layer{layer}.bias"]
                out = out.relu() if layer < self.depth else out.log_softmax(-1)
            slopes = torch.autograd.grad(out.gather(1, action.tokens).sum(), list(base.values()))
        for (name, before), slope in zip(base.items(), slopes, strict=True):
            yield slope, own[name].float() - before.detach()

    # ---- products

    def _pass(self, column) -> tuple[_Forward, int]:
        """The forward pass of a column's distinct rows, and how many decisions each stands for."""
        values, times = (column.values, column.times) if isinstance(column, Repeated) else (column, 1)
        values = torch.as_tensor(np.asarray(values) if isinstance(values, list) else values)
        if self._inside_base:
            return self._forward(values), times
        # The version changes when weights are loaded; the fused optimiser leaves it as it is, hence
        # ``_Network.backward`` drops what was kept as well: no optimiser step without a backward pass.
        version = self.matrices._version + self.vectors._version
        if self._kept is None or self._kept.column is not column or self._kept.version != version:
            self._kept = self._forward(values)
            self._kept.column, self._kept.version = column, version
        return self._kept, times

    @torch.no_grad()
    def _forward(self, values: Tensor) -> _Forward:
        layers = self._base if self._inside_base else self.network()
        if layers["layer1.weight"].dtype != torch.float32:
            layers = {key: part.float() for key, part in layers.items()}
        hidden = [values]
        for layer in range(1, self.depth + 1):
            out = torch.addmm(layers[f"layer{layer}.bias"], hidden[-1], layers[f"layer{layer}.weight"])
            if layer < self.depth:
                hidden.append(out.relu_())
        return _Forward(hidden, out, layers)


class _Forward:
    """Inputs and hidden layers of one forward pass, its logits [n, V], and the float32 weights it used."""

    def __init__(self, hidden: list[Tensor], out: Tensor, layers: dict[str, Tensor]):
        self.hidden, self.out, self.layers = hidden, out, layers
        self.column, self.version, self.graph = None, -1, None


class _Network(torch.autograd.Function):
    """The network as one operation: nobody needs the gradient of the inputs, and all gradients land in two tensors.

    Weights are [in, out], for which the weight gradient is inputs^T @ gradient: the transposed product is up to twice
    as slow here (49 against 76 GFLOP/s).
    """

    @staticmethod
    def forward(ctx, policy: MLPPolicy, kept: _Forward, matrices: Tensor, vectors: Tensor):
        ctx.policy, ctx.kept, ctx.shapes, ctx.dtype = policy, kept, (matrices.shape, vectors.shape), matrices.dtype
        return kept.out.view_as(kept.out)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        policy, kept = ctx.policy, ctx.kept
        policy._kept = None
        flat = [torch.empty(shape) for shape in ctx.shapes]
        found = policy.layers(*flat)
        for layer in range(policy.depth, 0, -1):
            inputs = kept.hidden[layer - 1]
            torch.mm(inputs.t(), gradient, out=found[f"layer{layer}.weight"])
            torch.sum(gradient, 0, out=found[f"layer{layer}.bias"])
            if layer > 1:
                behind = torch.mm(gradient, kept.layers[f"layer{layer}.weight"].t())
                gradient = torch.ops.aten.threshold_backward(behind, inputs, 0)
        return None, None, *(part.to(ctx.dtype) for part in flat)


def _fresh(shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    weights = {}
    for layer, (inputs, outputs) in enumerate(shapes, start=1):
        bound = math.sqrt(1 / inputs)  # torch.nn.Linear's own
        weights[f"layer{layer}.weight"] = (torch.rand(inputs, outputs) * 2 - 1) * bound
        weights[f"layer{layer}.bias"] = (torch.rand(outputs) * 2 - 1) * bound
    return weights
