"""The steps of `gpu_check.py`, in groups; each group runs in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from gpu_nano import moved_a_little, nano

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

    from robot_forgetting.measure import States, measured
    from robot_forgetting.measures.distributions import ForwardKL

    rows = 8 if steps.dry else 64
    forget_peak(steps)
    started = time.perf_counter()
    found = measured([ForwardKL()], policy, States(observations(policy, rows), np.arange(rows)))
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
