"""Speed of generating the seven action tokens: batched against one by one, KV cache against none, fused against plain.

    python tests/benchmarks/bench_generation.py [batch]

All variants take turns in one run, so that their ratios hold on a busy machine too. One thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from robot_forgetting.policies.openvla import vla_model as openvla_model
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy, new_nano
from robot_forgetting.policies.openvla.vla_model import sample_bins

INSTRUCTION = "stack the red cube on top of the green cube"
ROUNDS = 30


def without_cache(policy: OpenVLAPolicy, obs: dict, noise: torch.Tensor) -> torch.Tensor:
    """Every token by a pass over the whole sequence so far (the picture is still encoded once)."""
    model = policy.model
    ids, _, pixels = policy._inputs(obs)
    hidden, rows, bins = model.embed(ids, pixels), model._head_rows(), []
    for step in range(model.config.action_tokens):
        chosen, _ = sample_bins(model._head(model._run(hidden, None)[:, -1], rows), 1.0, noise[:, step])
        bins.append(chosen)
        token = model.language_model.model.embed_tokens(model.bins_to_ids(chosen))
        hidden = torch.cat([hidden, token.unsqueeze(1)], dim=1)
    return torch.stack(bins, 1)


def variants(policy: OpenVLAPolicy, batch: int) -> dict[str, Callable]:
    rng = np.random.default_rng(0)
    size = policy.config.image_size
    images = rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    noise = torch.rand(batch, policy.config.action_tokens)
    obs = {"image": images, "instruction": [INSTRUCTION] * batch}
    rows = [{"image": images[i : i + 1], "instruction": [INSTRUCTION]} for i in range(batch)]

    def plain():
        fused, openvla_model.WIDEST_FUSED = openvla_model.WIDEST_FUSED, 0
        try:
            return policy.act(obs, noise=noise).tokens
        finally:
            openvla_model.WIDEST_FUSED = fused

    return {
        "batched, KV cache": lambda: policy.act(obs, noise=noise).tokens,
        "one by one": lambda: torch.cat([policy.act(row, noise=noise[i : i + 1]).tokens for i, row in enumerate(rows)]),
        "no KV cache": lambda: without_cache(policy, obs, noise),
        "unfused layers": plain,
        "picture encoding alone": lambda: policy.model.encode_images(policy._inputs(obs)[2]),
    }


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    torch.manual_seed(0)
    policy = new_nano(instructions=[INSTRUCTION], device="cpu")
    calls = variants(policy, batch)
    reference = calls["batched, KV cache"]()
    for name, call in calls.items():
        if "alone" not in name:
            assert torch.equal(call(), reference), f"'{name}' samples other tokens"
    seconds = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    first = medians["batched, KV cache"]
    print(f"openvla-nano, batch {batch}, 7 tokens, median of {ROUNDS} rounds, one thread")
    for name, value in medians.items():
        print(f"{name:24s} {value * 1e3:8.1f} ms {value * 1e3 / batch:7.2f} ms per picture {value / first:6.2f} x")


if __name__ == "__main__":
    main()
