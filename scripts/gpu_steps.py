"""The steps of `gpu_check.py`, in groups; each group runs in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "gpu_check:"  # before every line that a group's process has for its parent
GB = 10**9


class Skip(Exception):
    """Why a step has nothing to do here."""


class Steps:
    """Runs steps one after the other in a group's process; each reports its start, and then its numbers or its error.

    dry: nano sizes; device: where policies compute; until: monotonic time after which steps are skipped
    """

    def __init__(self, dry: bool, device: str, until: float):
        self.dry, self.device, self.until = dry, device, until

    def __call__(self, name: str, step: Callable[[], dict]) -> bool:
        """Whether it passed. A step gives numbers by name; an AssertionError says which of them is wrong."""
        _tell({"start": name})
        started, row = time.monotonic(), {"name": name, "state": "PASS", "error": None}
        try:
            if started > self.until:
                raise Skip("no time left")
            row["numbers"] = step()
        except Skip as reason:
            row |= {"state": "SKIP", "error": str(reason)}
        except Exception as error:
            row |= {"state": "FAIL", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"}
        _tell(row | {"seconds": round(time.monotonic() - started, 2)})
        return row["state"] == "PASS"


def _tell(row: dict) -> None:
    print(MARK + json.dumps(row), flush=True)


# ---- machine: what there is, and how fast


def machine(steps: Steps) -> None:
    steps("torch and driver", lambda: torch_and_driver(steps))
    steps("memory bandwidth", lambda: bandwidth(steps))
    steps("bfloat16 products", lambda: products(steps))
    steps("rendering", rendering)


def torch_and_driver(steps: Steps) -> dict:
    import torch

    from robot_forgetting.machine import nvidia

    row = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpus": [str(gpu) for gpu in nvidia.gpus()]}
    if not steps.dry:
        free, total = torch.cuda.mem_get_info()
        row |= {"name": torch.cuda.get_device_name(), "free_gb": free / GB, "total_gb": total / GB}
    return row


def bandwidth(steps: Steps) -> dict:
    import torch

    source = torch.ones((10**6 if steps.dry else 4 * GB) // 4, device=steps.device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), steps.device)
    return {"gb_per_second": 2 * source.numel() * 4 / GB / seconds}


def products(steps: Steps) -> dict:
    import torch

    size = 256 if steps.dry else 8192
    a, b = (torch.randn(size, size, device=steps.device, dtype=torch.bfloat16) for _ in range(2))
    return {"tflops": 2 * size**3 / 1e12 / timed(lambda: a @ b, steps.device)}


def rendering() -> dict:
    from robot_forgetting.machine import vulkan

    found = vulkan.probe()
    if "error" in found:
        raise RuntimeError(found["error"])
    assert not found["blank"], "the picture is blank"
    return {key: found[key] for key in ("device", "driver", "version", "seconds")}


def timed(call: Callable[[], object], device: str, repeats: int = 3) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    call()
    best = float("inf")
    for _ in range(repeats):
        synchronise(device)
        started = time.perf_counter()
        call()
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return best


def synchronise(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


# ---- nano: whole small runs of every policy with every loss and penalty


LORA = {"rank": 4, "alpha": 8}
# Policy: (kind, name of its weights, options).
POLICIES = {
    "openvla": ("robot", "openvla-nano", {}),
    "language": ("text", "qwen-nano", {}),
    "openvla-lora": ("robot", "openvla-nano", {"lora": LORA, "dtype": "bfloat16", "gradient_checkpointing": True}),
    "language-lora": ("text", "qwen-nano", {"lora": LORA, "gradient_checkpointing": True}),
    "openvla-mixed": ("robot", "openvla-nano", {"dtype": "mixed"}),
    "language-mixed": ("text", "qwen-nano", {"dtype": "mixed"}),
}


def methods(kind: str, iterations: int, rows: int) -> dict[str, Callable]:
    """Every method for a kind of policy, of about ``rows`` rows an iteration; each is made for a policy."""
    from robot_forgetting.method import Optimiser
    from robot_forgetting.methods.distillation import SDFT, OnPolicyDistillation
    from robot_forgetting.methods.grpo import GRPO
    from robot_forgetting.methods.labels import Labeler, Labels
    from robot_forgetting.methods.reinforce import Reinforce
    from robot_forgetting.methods.self_sft import SelfSFT
    from robot_forgetting.methods.sft import SFT
    from robot_forgetting.methods.simpo import SimPO

    adam = Optimiser(learning_rate=1e-3, weight_decay=0.01, micro_batch=max(2, rows // 2 + 1))
    every = {"iterations": iterations, "optimiser": adam}
    supervised = {**every, "steps_per_iteration": 2, "batch_size": rows}
    on_policy = {**every, "groups": max(4, rows // 4), "group_size": 4}

    def distillation(policy):
        return OnPolicyDistillation(**on_policy, teacher=moved_a_little(policy.copied()))

    class Zeros(Labeler):
        """A wrong answer to every question of numbers."""

        def label(self, policy, task, seeds, stream) -> Labels:
            return Labels(["000"] * len(seeds))

    found = {
        "sft": lambda policy: SFT(**supervised, demonstrations=3),
        "grpo": lambda policy: GRPO(**on_policy, minibatch_size=4 * rows),
        "reinforce": lambda policy: Reinforce(**on_policy),
        "self_sft": lambda policy: SelfSFT(**supervised, states=max(2, rows // 2), iterative=True),
        "distillation": distillation,
    }
    if kind == "robot":
        return found | {"sft-smoothed": lambda policy: SFT(**supervised, demonstrations=3, label_sigma=1.5)}
    return found | {
        "simpo": lambda policy: SimPO(**supervised, negatives=Zeros()),
        "sdft": lambda policy: SDFT(**every, batch_size=rows, template="{question} {demonstration}"),
    }


def penalties() -> dict:
    from robot_forgetting.methods.kl import KL

    return {"none": None} | {f"kl_{way}": KL(coefficient=0.1, direction=way) for way in ("forward", "reverse")}


def moved_a_little(policy, size: float = 0.02):
    """The policy with every trained weight changed, by numbers that do not depend on the device."""
    import torch

    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_((torch.randn(parameter.shape, generator=draw) * size).to(parameter))
    return policy


def small_run(folder: Path, policy, task, method, penalty, **options) -> dict:
    """A whole run (base, training, checkpoint, divergence); what was recorded, without durations."""
    from robot_forgetting.engine import experiment
    from robot_forgetting.records.run_folder import RunFolder

    budget = {"episodes": 2, "greedy_episodes": 1, "interim_points": 1, "interim_episodes": 1, "videos": 0}
    budget |= {"divergence_episodes": 1, "divergence_states": 3}
    arguments = {
        "policy": policy, "sequence": [task], "method": method, "penalty": penalty, "prior": [], "held_out": [],
        "budget": budget, "names": {"policy": policy.name, "method": type(method).__name__, "penalty": "none"},
        "config": {}, "run_dir": folder, "seed": 0, "temperature": 1.0, "episodes": None, "seed_start": None,
        "num_envs": 8, "processes": 1,
    }  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):
        experiment.run(experiment.Setup(**arguments | options))
    run = RunFolder(folder)
    rows = {
        table: [{key: value for key, value in row.items() if "seconds" not in key} for row in run.rows(table)]
        for table in ("train", "divergence", "episodes")
    }
    return rows | {"summary": run.summary()}


def interrupted(method):
    """Another method like this one, which stops before its second iteration, as Ctrl-C would."""
    stops = copy.copy(method)
    collect = stops.collect

    def until_then(policy, task, iteration: int):
        if iteration:
            raise KeyboardInterrupt
        return collect(policy, task, iteration)

    stops.collect = until_then
    return stops


def nano(steps: Steps) -> None:
    rows = 4 if steps.dry else 16
    for policy, (kind, weights, options) in POLICIES.items():
        if steps.dry and not policy.endswith("lora"):
            continue  # every policy, method and penalty runs in the tests, on a pretended GPU
        for method in methods(kind, 1, rows):
            names = [name for name in penalties() if name == "none" or method in ("sft", "grpo")]
            if steps.dry and method != "grpo":
                continue
            for penalty in names[1:2] if steps.dry else names:
                arguments = (steps, kind, weights, options, method, penalty, rows)
                steps(f"{policy}, {method}, penalty {penalty}", lambda arguments=arguments: one_run(*arguments))
        steps(f"{policy}: restart and repetition", lambda a=(steps, kind, weights, options, rows): restarted(*a))


def built(kind: str, weights: str, options: dict, device: str):
    """A shipped small policy, and a task for it that needs no simulator."""
    import torch

    torch.manual_seed(0)  # of fresh adapters
    if kind == "robot":
        from robot_forgetting.conformance.toy_task import ToyTask
        from robot_forgetting.policies.openvla.vla import OpenVLAPolicy

        task = ToyTask(image_size=64, max_steps=5)
        task.statistics = "maniskill_panda"
        return OpenVLAPolicy(weights, name=weights, device=device, **options), task
    from robot_forgetting.policies.causal_lm.lm import CausalLM
    from robot_forgetting.tasks.text.skills import Skill

    folder = f"package:robot_forgetting/weights/{weights}"
    policy = CausalLM(folder, name=weights, max_new_tokens=8, device=device, **options)
    return policy, Skill(name="skill_over", skill="over", items=64)


def one_run(steps: Steps, kind, weights, options, method, penalty, rows) -> dict:
    policy, task = built(kind, weights, options, steps.device)
    with tempfile.TemporaryDirectory() as folder:
        made = methods(kind, 1, rows)[method](policy)
        found = small_run(Path(folder) / "run", policy, task, made, penalties()[penalty])
    dtypes = {str(parameter.dtype) for parameter in policy.parameters() if parameter.requires_grad}
    assert dtypes == {"torch.float32"}, f"what is trained is held in {dtypes}"
    assert str(policy.device).split(":")[0] == steps.device.split(":")[0], f"the policy is on {policy.device}"
    last = found["train"][-1]
    return {"loss": last["loss"], "penalty": last["penalty"], "grad_norm": last["grad_norm"]}


def restarted(steps: Steps, kind, weights, options, rows) -> dict:
    """The same run twice, and once with an interruption. On a GPU sums may come in another order: how far apart?"""
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for name in ("first", "again", "interrupted"):
            policy, task = built(kind, weights, options, steps.device)
            method, path = methods(kind, 2, rows)["grpo"](moved_a_little(policy)), Path(folder) / name / "run"
            if name == "interrupted":
                with contextlib.suppress(KeyboardInterrupt):
                    small_run(path, policy, task, interrupted(method), None)
                policy, task = built(kind, weights, options, steps.device)
                moved_a_little(policy)
            runs.append(small_run(path, policy, task, method, None))
    apart = {name: largest_difference(runs[0], run) for name, run in zip(("again", "restarted"), runs[1:], strict=True)}
    if steps.device == "cpu":
        assert apart == {"again": 0.0, "restarted": 0.0}, apart
    return {"largest_difference": apart}


def largest_difference(one, other) -> float:
    """Of the losses and gradient norms of two runs, relative to their size; inf where their steps are not as many."""
    if len(one["train"]) != len(other["train"]):
        return float("inf")
    pairs = [
        (a[key], b[key])
        for a, b in zip(one["train"], other["train"], strict=True)
        for key in ("loss", "grad_norm")
        if a[key] is not None and b[key] is not None
    ]
    return max((abs(a - b) / max(abs(a), abs(b), 1e-3) for a, b in pairs), default=0.0)


# ---- OpenVLA-7B at full size, with random weights


def openvla_7b(steps: Steps) -> None:
    folder = Path(tempfile.mkdtemp(prefix="openvla-7b-"))
    try:
        if not steps("built with random weights, saved", lambda: build_and_save(steps, folder)):
            return
        policy = []
        if not steps("loaded, with adapters", lambda: load(steps, folder, policy)):
            return
        for rows in (1, 4, 16, 64):
            steps(f"act, {rows} rows", lambda rows=rows: act(steps, policy[0], rows))
        steps("sampled against forced log-probabilities", lambda: sampled_against_forced(steps, policy[0]))
        steps("divergence of 64 states", lambda: divergence(steps, policy[0]))
        for rows in (1, 4, 16, 64):
            steps(f"LoRA step, micro-batch {rows}", lambda rows=rows: lora_step(steps, policy[0], rows, True))
        for rows in (1, 4):
            name = f"LoRA step, micro-batch {rows}, nothing computed again"
            steps(name, lambda rows=rows: lora_step(steps, policy[0], rows, False))
        steps("rows at once, as estimated", lambda: rows_at_once(policy[0]))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build_and_save(steps: Steps, folder: Path) -> dict:
    import torch

    from robot_forgetting.conformance.toy_task import ToyTask, tiny_policy
    from robot_forgetting.policies.openvla import vla_checkpoint as openvla_checkpoint
    from robot_forgetting.policies.openvla.prompt_tokenizer import train_small_tokenizer
    from robot_forgetting.policies.openvla.vla_model import OpenVLAConfig, OpenVLAModel

    started = time.perf_counter()
    if steps.dry:
        small = tiny_policy(ToyTask())
        model, tokenizer = small.model, small.tokenizer
    else:
        if shutil.disk_usage(folder).free < 20 * GB:
            raise Skip(f"{folder} has less than 20 GB free; set TMPDIR to a folder with more")
        statistics = {"bridge_orig": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}}
        with torch.device("meta"):
            model = OpenVLAModel(OpenVLAConfig(norm_stats=statistics)).to(torch.bfloat16)
        model = model.to_empty(device=steps.device)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        tokenizer = train_small_tokenizer(["pick up the cube"])
    parameters, made = sum(p.numel() for p in model.parameters()), time.perf_counter()
    openvla_checkpoint.save(folder, model, tokenizer)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    seconds = time.perf_counter() - made
    return {"parameters": parameters, "build_seconds": made - started, "save_gb_per_second": size / GB / seconds}


def load(steps: Steps, folder: Path, found: list) -> dict:
    from robot_forgetting.policies.openvla.vla import OpenVLAPolicy

    forget_peak(steps)
    started = time.perf_counter()
    dtype = "float32" if steps.dry else "bfloat16"
    options = {"dtype": dtype, "device": steps.device, "lora": {"rank": 32, "alpha": 16}}
    policy = OpenVLAPolicy(str(folder), name="openvla-7b", gradient_checkpointing=True, **options)
    seconds = time.perf_counter() - started
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert {str(parameter.dtype) for parameter in trained} == {"torch.float32"}, "adapters are not float32"
    found.append(policy)
    return {"gb_per_second": size / GB / seconds, "adapters": sum(p.numel() for p in trained), **peak(steps)}


def observations(policy, rows: int) -> dict:
    import numpy as np

    size = policy.config.image_size
    images = np.random.default_rng(0).integers(0, 256, (rows, size, size, 3), dtype=np.uint8)
    return {"image": images, "instruction": ["pick up the cube"] * rows}


def act(steps: Steps, policy, rows: int) -> dict:
    import torch

    obs, tokens = observations(policy, rows), policy.config.action_tokens
    noise = torch.full((rows, tokens), 0.5)
    forget_peak(steps)
    whole = timed(lambda: policy.act(obs, noise=noise), steps.device)
    with torch.no_grad(), policy._products():
        ids, mask, pixels = policy._inputs(obs)
        seeing = timed(lambda: policy.model.encode_images(pixels), steps.device)
        first = {"temperature": 1.0, "noise": noise.to(policy.device), "tokens": 1}
        prefill = timed(lambda: policy.model.generate_actions(ids, mask, pixels, **first), steps.device)
    milliseconds = {"act": whole, "towers": seeing, "prefill": prefill, "token": (whole - prefill) / (tokens - 1)}
    shown = {f"{name}_ms": round(1000 * value, 2) for name, value in milliseconds.items()}
    return {**shown, "decode_share": 1 - prefill / whole, "decisions_per_second": rows / whole, **peak(steps)}


def sampled_against_forced(steps: Steps, policy) -> dict:
    import torch

    moved_a_little(policy, 1e-3)
    obs, draw = observations(policy, 16), torch.Generator().manual_seed(0)
    action = policy.act(obs, noise=torch.rand(16, policy.config.action_tokens, generator=draw)).to("cpu")
    with torch.no_grad():
        forced = policy.log_prob(obs, action).cpu()
    apart = (forced - action.log_prob).abs()
    assert torch.isfinite(forced).all() and apart.mean() < 0.05, f"{apart.mean().item():.3g} nats per token apart"
    return {"mean_nats": apart.mean().item(), "largest_nats": apart.max().item()}


def divergence(steps: Steps, policy) -> dict:
    import numpy as np

    from robot_forgetting.engine.evaluate import States, measure_divergence

    rows = 8 if steps.dry else 64
    forget_peak(steps)
    started = time.perf_counter()
    found = measure_divergence(policy, States(observations(policy, rows), np.arange(rows)))
    forward = next(row["value"] for row in found if row["measure"] == "forward_kl" and row["unit"] == "nats/token")
    assert forward >= 0, f"forward KL {forward}"
    return {"seconds": time.perf_counter() - started, "forward_kl": forward, **peak(steps)}


def lora_step(steps: Steps, policy, rows: int, recompute: bool) -> dict:
    """Forward, backward and AdamW, the second time (the first makes the moments)."""
    import torch

    obs = observations(policy, rows)
    action = policy.act(obs, noise=torch.full((rows, policy.config.action_tokens), 0.5))
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=1e-6, fused=True)
    policy.model.gradient_checkpointing = recompute

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        (-policy.log_prob(obs, action).mean()).backward()
        adam.step()

    forget_peak(steps)
    try:
        seconds = timed(step, steps.device, repeats=1)
    except torch.OutOfMemoryError as error:
        raise Skip(f"out of memory: {' '.join(str(error).split())[:120]}") from None
    finally:
        policy.model.gradient_checkpointing = True
        adam.zero_grad(set_to_none=True)
    norm = torch.nn.utils.get_total_norm(trained).item()
    assert norm == norm, "the adapters are no numbers"
    return {"seconds": seconds, "rows_per_second": rows / seconds, **peak(steps)}


def rows_at_once(policy) -> dict:
    return {"acting": policy.rows_at_once(), "training": policy.rows_at_once(gradients=1)}


def forget_peak(steps: Steps) -> None:
    import torch

    if steps.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(steps: Steps) -> dict:
    import torch

    return {} if steps.device == "cpu" else {"peak_gb": round(torch.cuda.max_memory_allocated() / GB, 2)}


# ---- simulator: the tests that are skipped where there is no GPU


def simulator(steps: Steps) -> None:
    for file in ("test_batched", "test_batched_bridge", "test_batched_google"):
        steps(f"simulation=gpu, {file}", lambda file=file: pytest(steps, file))


def pytest(steps: Steps, file: str) -> dict:
    missing = [name for name in ("mani_skill", "sapien", "pytest") if importlib.util.find_spec(name) is None]
    if missing:
        raise Skip(f"not installed: {', '.join(missing)}")
    if steps.dry:
        raise Skip("the tests run with all others where there is no GPU")
    if not list(Path.home().glob(".sapien/physx/*/libPhysXGpu_64.so")):
        raise Skip("PhysX's library for GPUs is not in ~/.sapien/physx: see docs/gpu_simulation.md")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "gpu", "-p", "no:cacheprovider", f"tests/{file}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    last = " ".join(done.stdout.strip().splitlines()[-3:])
    assert done.returncode == 0, last or done.stderr[-400:]
    return {"pytest": last}


GROUPS = {"machine": machine, "nano": nano, "openvla_7b": openvla_7b, "simulator": simulator}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--device", required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    GROUPS[given.group](Steps(given.dry, given.device, time.monotonic() + given.seconds))


if __name__ == "__main__":
    main()
