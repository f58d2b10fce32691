"""Which runs the study's page is made of, how to make them again, and what its words mean."""

from __future__ import annotations

from importlib import resources

import numpy as np
import yaml
from markupsafe import Markup

from robot_forgetting.metrics import published
from robot_forgetting.report.markup import bullets, definitions, join, note, paragraph
from robot_forgetting.report.words import duration
from robot_forgetting.studies.digits import study_words
from robot_forgetting.studies.digits.study_runs import Study
from robot_forgetting.studies.digits.study_sections import StudyPart, StudySection

ALL = 60  # runs left out that the page names; the JSON file names all
TERMS = {
    "Forgetting": "The base policy's accuracy on the prior task minus the fine-tuned policy's, in points.",
    "Forward, reverse KL": "KL(base || fine-tuned) and KL(fine-tuned || base) of the ten class probabilities, exact, "
    "in nats, mean over test images.",
    "Front": "The checkpoints of a method that no other of its checkpoints beats on both tasks; it is picked from "
    "noisy points and so lies a little too high.",
    "Brackets": "95 % percentile intervals: seeds are drawn with replacement, then runs within them; a run's "
    "checkpoints stay together. With one seed, they say nothing about other base policies.",
    "SFT-1, SFT-2, oracle": "Labels 0 and 1 for even and odd; {0, 4} and {1, 5} at random; sampled from the nearest "
    "policy to the base that is always right.",
}


class StudyProvenance(StudySection):
    name, title, once = "provenance", "Provenance", True

    def rows(self, study: Study) -> dict:
        return {
            "study": study.name,
            "command": command(study),
            "runs": [
                {"run": r.id, "method": r.method, "seed": r.seed, "setting": r.setting}
                for r in study.sweep + study.teacher
            ],
            "left_out": study.left_out,
            "notes": study.notes,
            "divergence": divergence_rows(study),
            "checkpoints": study.points,
            "choices": [{"what": what, "here": here} for what, here in choices(study)],
            "published": {
                "table_1": published.TABLE_1,
                "replication": published.REPLICATION_TABLE,
                "law": published.FORGETTING_LAW,
                "fronts": published.FRONTS,
            },
        }

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        study, left_out = part.study, part.rows("left_out")
        why = [Markup('<span class="path">{}</span>: {}').format(row["run"], row["why"]) for row in left_out[:ALL]]
        why += [f"and {len(left_out) - ALL} more in the JSON file"] * (len(left_out) > ALL)
        seeds = ", ".join(map(str, study.seeds)) or "none"
        made = {
            "Versions": ", ".join(f"{name} {version}" for name, version in study.versions.items()),
            "Hardware": ", ".join(f"{key} {value}" for key, value in study.hardware.items() if value),
        }
        return join(
            [
                Markup('<p class="path"><code>{}</code></p>\n').format(part.tables["command"]),
                paragraph(f"{study_words.scope(study)}; seeds: {seeds}. {cost(study)}"),
                Markup("<h3>Choices where the paper is silent</h3>\n"),
                definitions((row["what"], row["here"]) for row in part.rows("choices")),
                Markup("<h3>Left out</h3>\n"),
                bullets(why) if why else note("Nothing: no run failed or diverged."),
                definitions((name, text) for name, text in made.items() if text),
            ]
        )


class StudyTerms(StudySection):
    name, title, once = "terms", "Terms", True

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        return definitions(TERMS.items())


def divergence_rows(study: Study) -> list[dict]:
    """Every measure of each run's last checkpoint."""
    return [
        {"run": point["run"], "method": point["method"], "seed": point["seed"], "measure": name, "inputs": role}
        | {"value": value, "new": point["new"], "prior": point["prior"]}
        for point in study.points
        if point["final"]
        for (name, _, role), value in ((key.partition("|"), value) for key, value in point["predictors"].items())
    ]


def choices(study: Study) -> list[tuple[str, str]]:
    """(what, how it was done here) where the paper does not say, from the runs' own settings."""
    c = study.config
    before, probe, kl = (c.get(key) or {} for key in ("pretraining", "probe", "kl"))
    schedule = f"{before.get('epochs')} epochs of {before.get('images')} images of each set, batches of "
    schedule += f"{before.get('batch_size')}, learning rate {before.get('learning_rate')}, cosine after warm-up"
    found = [
        ("Accuracy", "of the most likely class (greedy); forgetting is base minus fine-tuned accuracy"),
        ("Optimiser", "AdamW without weight decay, state in float32"),
        ("Batch", f"{c.get('batch_size')} images per step, the same for every method"),
        ("GRPO", f"{c.get('group_size')} answers to each image, advantages divided by their standard deviation"),
        (
            "KL penalty",
            f"{kl.get('direction')} KL, coefficient {kl.get('coefficient')} (the paper gives 0.1, not the direction)",
        ),
        ("Fine-tuning set", f"{c.get('images') or 'all 60,000'} training images"),
        (
            "Warm-up, gradient norm",
            f"{_percent(c.get('warmup_ratio'))} of the steps; clipped at {c.get('max_grad_norm')}",
        ),
        ("Pre-training", schedule if before else None),
        ("Measured on", f"{probe.get('images')} test images of each task, evenly spread" if probe else None),
        (
            "CKA, CKNNA",
            f"hidden layer {probe.get('layer')}, {probe.get('similarity')} images, k = {probe.get('k')}, both masks"
            if probe
            else None,
        ),
        ("Fisher", f"diagonal, the base policy's own, on {probe.get('fisher')} training images" if probe else None),
        ("Activations", "of both hidden layers together"),
        ("Spectral norm", "the largest over the weight matrices"),
        (
            "Oracle",
            "sampled from q* proportional to π₀R; the KL printed in the paper is infinite for every q in question",
        ),
        ("± in Table 1", "the paper does not say over what; ours are 95 % bootstrap intervals"),
    ]
    return [(what, how) for what, how in found if how and "None" not in how]


def command(study: Study) -> str:
    """The command that makes these runs: what differs from the shipped configuration, and quick=true where it fits."""
    default = _default(study.name)
    if not study.asked or default is None:
        return f"robot-forgetting reproduce {study.name}"
    asked = {key: list(dict.fromkeys(run[key] for run in study.asked)) for key in study.asked[0]}
    seeds = sorted(asked["seed"])
    wanted = {key: value for key, value in study.config.items() if key != "study"}
    wanted |= {"methods": asked["method"], "rates": sorted(asked["learning_rate"]), "seeds": len(seeds)}
    wanted |= {"schedules": asked["schedule"], "epochs": sorted(asked["epochs"])}
    words, keys = [f"robot-forgetting reproduce {study.name}"], _differing(default, wanted)
    if "rates" in keys and "checkpoints" in keys:
        quick = _differing(_quick(default), wanted)
        if len(quick) < len(keys):
            words, keys = [*words, "quick=true"], quick
    words += [f"seed={seeds[0]}"] * (seeds[0] != 0)
    return " ".join(words + [_override(key, value) for key, value in keys.items()])


def _default(name: str) -> dict | None:
    try:
        file = resources.files("robot_forgetting.configs") / "reproduce" / f"{name}.yaml"
        return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (ModuleNotFoundError, yaml.YAMLError):
        return None


def _quick(default: dict) -> dict:
    from robot_forgetting.studies.digits.sweep import QUICK, QUICK_PROBE  # heavy: loads torch

    return {**default, **QUICK, "probe": {**default["probe"], **QUICK_PROBE}}


def _differing(default: dict, wanted: dict) -> dict:
    found = {}
    rates = default.get("rates")
    if isinstance(rates, int):
        rates = [float(f"{r:.6g}") for r in np.geomspace(default["lowest_rate"], default["highest_rate"], rates)]
    for key, value in wanted.items():
        standard = rates if key == "rates" else default.get(key)
        if isinstance(value, dict) and isinstance(standard, dict):
            found |= {f"{key}.{k}": v for k, v in value.items() if v != standard.get(k)}
        elif isinstance(value, list) and isinstance(standard, list):
            if sorted(map(str, value)) != sorted(map(str, standard)):
                found[key] = value
        elif value != standard:
            found[key] = value
    return found


def _override(key: str, value) -> str:
    if isinstance(value, list):
        return f"'reproduce.{key}=[{','.join(f'{v:g}' if isinstance(v, float) else str(v) for v in value)}]'"
    return f"reproduce.{key}={'null' if value is None else value}"


def cost(study: Study) -> str:
    """How long training and measuring took, of one core."""
    runs = [run.state.get("timings") or {} for run in study.sweep]
    train, measure = (sum(t.get(key) or 0.0 for t in runs) for key in ("train", "evaluate"))
    if not train:
        return ""
    return f"Training took {duration(train)} of a process, measuring {duration(measure)}, summed over the runs."


def _percent(value) -> str:
    return "None" if value is None else f"{100 * value:g} %"
