"""Rows of a run's episodes: each is measured once, and the base policy's are shared between the runs of a sweep."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path

from robot_forgetting.engine.code_digest import code_of
from robot_forgetting.engine.evaluate import episode_row, evaluate
from robot_forgetting.errors import UserError
from robot_forgetting.machine.progress import bar, say
from robot_forgetting.policy import Policy
from robot_forgetting.records.run_folder import RunFolder, holds_records
from robot_forgetting.rollout import rollout
from robot_forgetting.task import Task


def _identity(row: dict) -> tuple:
    return row["stage"], row["iteration"], row["task"], row["decode"], row["temperature"], row["seed"]


def evaluate_into(
    folder: RunFolder,
    policy: Policy,
    task: Task,
    seeds: Sequence[int],
    *,
    temperature: float | None,
    num_envs: int,
    **fields,
) -> list[dict]:
    """Evaluates the seeds that ``folder`` lacks, row by row; returns all rows of these seeds."""
    head = {**fields, "task": task.name, "temperature": temperature}
    wanted = {_identity({**head, "seed": seed}) for seed in seeds}
    rows = [row for row in folder.episodes() if _identity(row) in wanted]
    missing = [seed for seed in seeds if seed not in {row["seed"] for row in rows}]
    if not missing:
        return rows
    split = "train" if seeds[0] in task.seeds("train") else "test"
    with bar(f"{task.name} ({fields['decode']})", len(seeds), len(rows)) as progress:
        for episode in evaluate(policy, task, missing, temperature=temperature, num_envs=num_envs):
            row = episode_row(episode, **head, split=split, episode=seeds.index(episode.key.seed))
            folder.append("episodes", row)
            rows.append(row)
            progress.advance(1, f"success {sum(r['success'] for r in rows) / len(rows):.2f}")
    return rows


def reuse(folder: RunFolder, wanted: Mapping[tuple, tuple[int, str]]) -> None:
    """Copies the base policy's episodes from sibling runs that measured the same thing; their source is marked.

    wanted: identity of a row (stage, iteration, task, decode, temperature, seed) -> its number and its task's role here
    """
    mine = folder.run
    have = {_identity(row) for row in folder.episodes()}
    for sibling in sorted(folder.path.parent.glob("*/run.json")):
        if sibling.parent == folder.path:
            continue
        try:
            other = RunFolder(sibling.parent)
            theirs = other.run
            if theirs.get("fingerprint") != mine["fingerprint"] or theirs.get("decode") != mine["decode"]:
                continue
            episodes = other.episodes()
        except UserError as error:  # a damaged sibling is no reason to stop a healthy run
            say(f"  {sibling.parent.name} is passed over, no base episodes come from it: {error}")
            continue
        rows = []
        for row in episodes:
            if _identity(row) in wanted.keys() - have:
                number, role = wanted[_identity(row)]
                here = {"role": role, "episode": number, "source": row["source"] or other.id, "video": None}
                rows.append({**row, **here})
        if rows:
            folder.append("episodes", *rows)
            have |= {_identity(row) for row in rows}


def fingerprint(policy: Policy, tasks: Sequence[Task]) -> str:
    """Identifies a base policy (weights, and what it makes of pictures and tokens), the tasks it is measured on, and
    the code of both."""
    return identified(policy, tasks)["fingerprint"]


def identified(policy: Policy, tasks: Sequence[Task]) -> dict:
    """{"fingerprint", "fingerprint_parts"}, for run.json: the parts say what has changed where the whole has.

    parts: "policy", "tasks": {name: of its settings}, "code": {module: see ``code_digest``}
    """
    named = [module for task in tasks for module in task.code_modules()]
    parts = {
        "policy": _policy_mark(policy),
        "tasks": {task.name: _task_mark(task) for task in tasks},
        "code": code_of([policy, *tasks], [*named, rollout.__module__]),
    }
    return {"fingerprint": _mark(json.dumps(parts, sort_keys=True).encode()), "fingerprint_parts": parts}


def _policy_mark(policy: Policy) -> str:
    digest, trained_before = hashlib.sha256(), getattr(policy, "continues", False)
    digest.update(_text([policy.convention(), getattr(policy, "config", None), getattr(policy, "settings", None)]))
    for name, tensor in sorted(policy.state_dict().items()):
        # Fresh adapters change with the seed, the base that they leave as it is does not.
        if "lora_" in name and not trained_before:
            continue
        digest.update(f"{name} {list(tensor.shape)}".encode())
        # A sample of the numbers: a 7B model is fingerprinted in seconds, and two checkpoints do not agree in all of
        # them. (Sums would do too, but their rounding depends on the number of threads.)
        step = max(1, tensor.numel() // 4096)
        digest.update(tensor.detach().flatten()[::step].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _task_mark(task: Task) -> str:
    said = [type(task).__qualname__, task.name, task.instruction, task.max_steps, task.convention()]
    on_gpu = ["gpu"] * (getattr(task, "simulation", "cpu") == "gpu")  # other physics
    return _mark(_text([*said, getattr(task, "spec", None), *on_gpu]))


def _mark(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _text(settings: list) -> bytes:
    """The same bytes for the same settings, whatever the order of their keys; what is no dataclass is left out."""
    plain = [asdict(item) if is_dataclass(item) else item for item in settings]
    return json.dumps(plain, sort_keys=True, default=lambda item: type(item).__qualname__).encode()


def check_same_base(run_dir: Path, now: dict) -> None:
    """``UserError`` where a run began with other weights under the same name, as after training a base policy anew, or
    with other code; it names what has changed. ``now``: what ``identified`` says."""
    if not (Path(run_dir) / "run.json").is_file() or not holds_records(Path(run_dir)):
        return
    earlier = RunFolder(run_dir).run
    if earlier.get("fingerprint", now["fingerprint"]) == now["fingerprint"]:
        return
    before, parts = earlier.get("fingerprint_parts"), now["fingerprint_parts"]
    if before is None:
        what = "another base policy or other tasks, or under an earlier version, whose records do not identify code"
    else:
        tasks, code = (_differing(before[part], parts[part]) for part in ("tasks", "code"))
        what = ["another base policy"] * (before["policy"] != parts["policy"])
        what += [f"other settings of task {', '.join(tasks)}"] * bool(tasks)
        what += [f"other code (changed since: {', '.join(code[:4])}{', ...' if len(code) > 4 else ''})"] * bool(code)
        what = " and ".join(what)
    raise UserError(
        f"{run_dir} began with {what} (fingerprint {earlier['fingerprint']}, now {now['fingerprint']}): new rows would "
        "not belong to those it has; delete it, or choose another run_dir"
    )


def _differing(before: dict, now: dict) -> list[str]:
    return [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
