"""Run folders of a controlled study (`robot-forgetting reproduce`) as points and parts, and what had to be left out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from robot_forgetting.errors import UserError
from robot_forgetting.records.config_file import differing_keys
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.report.runs import with_defaults
from robot_forgetting.report.words import plural, some
from robot_forgetting.studies.digits.study_law import Law

# What differs between the runs of one study; any other key of config.yaml must be the same.
OWN = ("method", "learning_rate", "schedule", "epochs", "seed", "teacher", "every", "dtype")
DECODE = "greedy"  # accuracy is that of the most likely class
# The paper's five methods, in which its fits are pooled.
FIVE = ("grpo", "grpo_kl", "sft_1", "sft_2", "sft_oracle")
LABELS = {
    "grpo": "GRPO",
    "grpo_kl": "GRPO + KL",
    "sft_1": "SFT-1",
    "sft_2": "SFT-2",
    "sft_oracle": "oracle SFT",
    "sft_oracle_soft": "oracle SFT, soft labels",
    "reinforce_1_0": "1-0 REINFORCE",
    "simpo": "SimPO",
    "sft_teacher": "SFT on an RL teacher",
    "sft_kl": "SFT-1 + KL",
    "self_sft": "Self-SFT",
    "iterative_sft": "iterative SFT",
}


def label(method: str) -> str:
    return LABELS.get(method, method.replace("_", " "))


@dataclass
class StudyRun:
    """A finished run of the study, read once."""

    id: str
    method: str
    seed: int
    state: dict
    config: dict
    success: list[dict]
    divergence: list[dict]
    dynamics: list[dict]

    @property
    def setting(self) -> str:
        """Learning rate, schedule and epochs in words."""
        rate = self.config.get("learning_rate")
        parts = [f"learning rate {rate:.2e}" if isinstance(rate, (int, float)) else ""]
        parts += [str(self.config.get("schedule") or ""), plural(self.config.get("epochs") or 1, "epoch")]
        return ", ".join(part for part in parts if part)


@dataclass
class Study:
    """A study's runs by part. ``left_out``: {"run", "why"} of every folder that no number comes from."""

    name: str
    config: dict = field(default_factory=dict)
    sweep: list[StudyRun] = field(default_factory=list)
    teacher: list[StudyRun] = field(default_factory=list)
    dynamics: list[StudyRun] = field(default_factory=list)
    precision: list[StudyRun] = field(default_factory=list)
    theorem: list[dict] = field(default_factory=list)
    left_out: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tasks: dict[str, str] = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    hardware: dict = field(default_factory=dict)
    points: list[dict] = field(default_factory=list)
    asked: list[dict] = field(default_factory=list)  # settings of every run of the sweep, also of those left out

    @property
    def methods(self) -> list[str]:
        """Methods with points: the paper's first, then as named in ``LABELS``, then others as met."""
        found = dict.fromkeys(point["method"] for point in self.points)
        return [m for m in LABELS if m in found] + [m for m in found if m not in LABELS]

    @property
    def seeds(self) -> list:
        return sorted({run.seed for run in self.sweep}, key=str)

    @cached_property
    def laws(self) -> dict[str, Law]:
        """The fits over the paper's methods ("paper", if there are any) and, if there are others, over all ("all")."""
        five = [method for method in self.methods if method in FIVE]
        found = {"paper": Law(self.points, five)} if five else {}
        return found | ({"all": Law(self.points, self.methods)} if len(five) < len(self.methods) else {})

    @property
    def law(self) -> Law | None:
        """The fit that the page is about; ``law_of_all``: the one beside it."""
        return self.laws.get("paper") or self.laws.get("all")

    @property
    def law_of_all(self) -> Law | None:
        return self.laws.get("all") if "paper" in self.laws else None

    def of(self, method: str) -> list[dict]:
        return [point for point in self.points if point["method"] == method]


def is_study(folder: RunFolder) -> bool:
    return folder.run.get("verb") == "reproduce"


def load_study(folders: Sequence[RunFolder]) -> Study:
    """Reads run folders; what cannot be used is named in ``left_out`` or ``notes``, and nothing of it is pooled.

    Raises UserError where there is no run of a study at all.
    """
    foreign = [folder.id for folder in folders if not is_study(folder)]
    folders = [folder for folder in folders if is_study(folder)]
    if not folders:
        raise UserError(
            "none of the folders holds a run of a study; run `robot-forgetting reproduce parity_mnist` first"
        )
    states = {id(folder): folder.run for folder in folders}
    configs = {id(folder): folder.config() for folder in folders}
    names = [states[id(folder)].get("study") or "study" for folder in folders]
    name = max(dict.fromkeys(names), key=names.count)
    study = Study(name)
    if foreign:
        what = "run folder is" if len(foreign) == 1 else "run folders are"
        study.notes.append(f"{len(foreign)} {what} of no study and left out: {some(foreign)}. Report them apart.")
    other = [folder.id for folder, its in zip(folders, names, strict=True) if its != name]
    if other:
        study.notes.append(f"{plural(len(other), 'run')} of another study left out: {some(other)}. Report them apart.")
    mine = [folder for folder, its in zip(folders, names, strict=True) if its == name]
    kept, config = _one_setting(mine, configs, states, study)
    study.config = config
    seen: dict[tuple, str] = {}
    for folder in kept:
        state = states[id(folder)]
        _add(study, folder, state, configs[id(folder)], seen)
    study.points = [point for run in study.sweep for point in points_of(run, study.left_out)]
    return study


def _one_setting(folders, configs, states, study: Study) -> tuple[list[RunFolder], dict]:
    """The folders whose shared settings most runs of the sweep have; a note names the others and how they differ."""
    groups: dict[str, list[RunFolder]] = {}
    shared: dict[str, dict] = {}
    for folder in folders:
        if states[id(folder)].get("part") == "theorem":
            continue
        config = {key: value for key, value in configs[id(folder)].items() if key not in OWN}
        mark = json.dumps(with_defaults(config), sort_keys=True, default=str)
        groups.setdefault(mark, []).append(folder)
        shared[mark] = config
    if not groups:
        return list(folders), {}
    sweeps = {m: sum(states[id(f)].get("part", "sweep") == "sweep" for f in fs) for m, fs in groups.items()}
    best = max(groups, key=lambda mark: (sweeps[mark], len(groups[mark])))
    for mark, members in groups.items():
        if mark != best:
            lines = "; ".join(differing_keys(shared[best], shared[mark])[:3])
            ids = some([folder.id for folder in members])
            study.notes.append(f"{plural(len(members), 'run')} with other settings ({lines}) left out: {ids}.")
    theorem = [folder for folder in folders if states[id(folder)].get("part") == "theorem"]
    return [*groups[best], *theorem], shared[best]


def _add(study: Study, folder: RunFolder, state: dict, config: dict, seen: dict) -> None:
    part = state.get("part") or "sweep"
    where = folder.id if part == "sweep" else f"{part}/{folder.id}"
    study.versions = study.versions or state.get("versions") or {}
    study.hardware = study.hardware or state.get("hardware") or {}
    study.tasks = study.tasks or {role: " + ".join(map(str, t)) for role, t in (state.get("roles") or {}).items() if t}
    if part == "sweep":
        study.asked.append({key: config.get(key, state.get(key)) for key in OWN[:5]})
    summary = folder.summary() if folder.finished else None
    if summary is None:
        why = state.get("error") or f"is {folder.status}; the same command continues it"
        study.left_out.append({"run": where, "why": f"diverged: {why}" if state.get("diverged") else why})
        return
    if part == "theorem":
        study.theorem = study.theorem or folder.rows("theorem")
        return
    key = (part, *(str(config.get(name, state.get(name))) for name in (*OWN[:5], "dtype")))
    if key in seen:
        study.left_out.append({"run": where, "why": f"the same run as {seen[key]} in another folder"})
        return
    seen[key] = where
    run = StudyRun(
        id=folder.id,
        method=str(state.get("method")),
        seed=state.get("seed"),
        state=state,
        config=config,
        success=summary.get("success") or [],
        divergence=summary.get("divergence") or folder.rows("divergence"),
        dynamics=(summary.get("dynamics") or folder.rows("dynamics")) if part == "dynamics" else [],
    )
    parts = {"sweep": study.sweep, "teacher": study.teacher, "dynamics": study.dynamics, "precision": study.precision}
    if part in parts:
        parts[part].append(run)
    else:
        study.left_out.append({"run": where, "why": f"is of a part that this page does not know: {part}"})


def points_of(run: StudyRun, left_out: list[dict]) -> list[dict]:
    """A dict per checkpoint: run, method, seed, iteration, final, new, prior, base_new, base_prior, forgetting.

    predictors: {"measure|role": value or None}, role "" for one of the weights alone. A checkpoint whose policy is no
    longer finite, or that lacks an accuracy, goes into ``left_out`` instead.
    """
    rates: dict[tuple, dict[str, float]] = {}
    for row in run.success:
        if row.get("decode") == DECODE and row.get("rate") is not None:
            rates.setdefault((row["stage"], row["iteration"]), {})[row["role"]] = row["rate"]
    base = rates.get((0, 0), {})
    found: dict[tuple, dict[str, float | None]] = {}
    for row in run.divergence:
        value = row.get("value")
        value = value if value is not None and math.isfinite(value) else None
        found.setdefault((row["stage"], row["iteration"]), {})[f"{row['measure']}|{row.get('role') or ''}"] = value
    if not {"new", "prior"} <= base.keys():
        left_out.append({"run": run.id, "why": "the base policy's accuracy is missing"})
        return []
    trained = sorted(checkpoint for checkpoint in rates if checkpoint[0] > 0)
    points, odd = [], []
    for checkpoint in trained:
        now, predictors = rates[checkpoint], found.get(checkpoint, {})
        outputs = [value for name, value in predictors.items() if name.startswith(("forward_kl|", "total_variation|"))]
        if not {"new", "prior"} <= now.keys() or (outputs and all(value is None for value in outputs)):
            odd.append(checkpoint[1])
            continue
        points.append(
            {
                "run": run.id,
                "method": run.method,
                "seed": run.seed,
                "setting": run.setting,
                "iteration": checkpoint[1],
                "final": checkpoint == trained[-1],
                **now,
                "base_new": base["new"],
                "base_prior": base["prior"],
                "forgetting": base["prior"] - now["prior"],
                "predictors": predictors,
            }
        )
    if odd:
        steps = ", ".join(map(str, odd[:3])) + (" ..." if len(odd) > 3 else "")
        left_out.append({"run": run.id, "why": f"no finite policy at {plural(len(odd), 'checkpoint')} (step {steps})"})
    if not trained:
        left_out.append({"run": run.id, "why": "no evaluated checkpoint"})
    return points
