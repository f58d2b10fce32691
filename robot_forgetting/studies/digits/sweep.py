"""RL's Razor's controlled study (arXiv 2509.04259, sections 4 to 6): a sweep of small networks, a run folder for each.

FOLDER/METHOD-lrRATE-SCHEDULE-epochsE-seedS/ holds a run: config.yaml, run.json, train.jsonl (every log_every-th step),
divergence.jsonl (every predictor at every checkpoint) and summary.json. There is no episodes.jsonl: success at a
checkpoint is a row of the summary with n and successes, and not thousands of rows of single pictures. Run folders below
FOLDER/teacher, dynamics, precision and theorem are no part of the sweep; ``part`` in run.json says what they are.
FOLDER/weights holds base policies and teachers, by seed and a fingerprint of what they were made with.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.machine.doctor import hardware, versions
from robot_forgetting.machine.progress import bar, say
from robot_forgetting.methods.kl import KL
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.ranges import ArgumentsOf, Count, LearningRate, Range, Seeds, Share, Width
from robot_forgetting.studies.digits import base_policy as base
from robot_forgetting.studies.digits import extras
from robot_forgetting.studies.digits import study_methods as methods
from robot_forgetting.studies.digits.probe import Probe, Settings, mean_success
from robot_forgetting.studies.digits.train_run import Recipe, Spec, done, train_run
from robot_forgetting.studies.jobs import work_through
from robot_forgetting.tasks.digits.parity_mnist import FashionMNIST, ParityMNIST

# What `quick=true` changes.
QUICK = {"rates": 6, "schedules": ["constant"], "epochs": [1], "checkpoints": 5, "images": 40_000}
QUICK_PROBE = {"images": 1000, "similarity": 300}
QUICK_DYNAMICS = {"rates": [1e-4]}


MethodName, Schedule = Literal[tuple(methods.METHODS)], Literal["constant", "cosine"]


class Teacher(TypedDict):
    method: MethodName
    learning_rate: LearningRate
    schedule: Schedule
    epochs: Count


class Dynamics(TypedDict):
    rates: list[LearningRate]
    every: Count


class Precision(TypedDict):
    methods: list[MethodName]
    learning_rate: LearningRate


class Extras(TypedDict, total=False):
    """See ``extras.jobs``."""

    dynamics: Dynamics | None
    precision: Precision | None
    theorem: bool


class Study:
    """The sweep: methods x learning rates x schedules x epochs x seeds.

    rates: how many learning rates, evenly spaced in the logarithm from ``lowest_rate`` to ``highest_rate``; or a list
    checkpoints: measurements per run, evenly spaced, the last at its end
    images: training pictures of the new task, None for all
    stack: runs that one process does in turn; what they share is prepared once
    pretraining: arguments of ``base.pretrain``; teacher: method, learning_rate, schedule and epochs of the run whose
        samples ``sft_teacher`` clones; kl: coefficient and direction of the +KL methods
    extras: settings of ``extras.jobs``: dynamics, precision, theorem
    """

    name = "parity_mnist"

    def __init__(
        self,
        *,
        methods: list[MethodName],
        rates: Annotated[int, Range(1, 1000)] | list[LearningRate],
        lowest_rate: LearningRate,
        highest_rate: LearningRate,
        schedules: list[Schedule],
        epochs: list[Count],
        seeds: Seeds,
        checkpoints: Count,
        batch_size: Count,
        group_size: Annotated[int, Range(2, 1_000_000)],
        warmup_ratio: Share,
        max_grad_norm: Annotated[float, Range(0, 1e9, above=True)] | None,
        images: Count | None,
        stack: Annotated[int, Range(1, 10_000)],
        log_every: Count,
        kl: Annotated[dict, ArgumentsOf(KL)],
        pretraining: Annotated[dict, ArgumentsOf(base.pretrain, without=("seed", "sizes"))],
        teacher: Teacher,
        probe: Annotated[dict, ArgumentsOf(Settings)],
        extras: Extras,
        sizes: list[Width],
    ):
        self.settings = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        for key in ("methods", "rates", "schedules", "epochs"):
            if self.settings[key] == []:
                raise UserError(f"reproduce.{key} is empty; name at least one")
        if not lowest_rate <= highest_rate:
            raise UserError("reproduce.lowest_rate must not be above reproduce.highest_rate")

    def run(self, folder: Path, *, quick: bool = False, processes: int = 2, first_seed: int = 0) -> int:
        """Does what is missing in ``folder``; returns 0."""
        settings = dict(self.settings)
        if quick:
            settings |= QUICK | {"probe": {**settings["probe"], **QUICK_PROBE}}
            if settings["extras"].get("dynamics"):
                dynamics = {**settings["extras"]["dynamics"], **QUICK_DYNAMICS}
                settings["extras"] = {**settings["extras"], "dynamics": dynamics}
        sweep = Sweep(folder, settings, first_seed)
        with bar(f"{self.name}{' (quick)' if quick else ''}", sweep.total_steps, sweep.done_steps) as progress:
            for jobs in sweep.phases():
                work_through(jobs, processes, progress.advance)
        failed = [spec.id for spec in sweep.specs if not sweep.finished(spec)]
        for name in failed:
            say(f"  {name}: diverged; it is left out")
        say(f"{len(sweep.specs) - len(failed)} runs of {len(sweep.specs)} finished: {folder}")
        return 0


class Sweep:
    """A study's settings made into runs, and the jobs that are still to do."""

    def __init__(self, folder: Path, settings: dict, first_seed: int):
        self.folder, self.settings = Path(folder), settings
        self.seeds = list(range(first_seed, first_seed + settings["seeds"]))
        self.tasks: dict[str, OneStepTask] = {"new": ParityMNIST(limit=settings["images"]), "prior": FashionMNIST()}
        self.probe_settings = Settings(**settings["probe"])
        size = self.tasks["new"].size("train")
        self.steps_per_epoch = size // min(settings["batch_size"], size)
        rates = settings["rates"]
        if isinstance(rates, int):
            rates = np.geomspace(settings["lowest_rate"], settings["highest_rate"], rates).tolist()
        self.specs = [
            Spec(method, float(f"{rate:.6g}"), schedule, epochs, seed)
            for seed in self.seeds
            for method in settings["methods"]
            for epochs in settings["epochs"]
            for schedule in settings["schedules"]
            for rate in rates
        ]
        self.total_steps = sum(spec.epochs for spec in self.specs) * self.steps_per_epoch
        self.done_steps = sum(s.epochs for s in self.specs if done(self.folder, s)) * self.steps_per_epoch

    def finished(self, spec: Spec) -> bool:
        return (self.folder / spec.id / "summary.json").is_file()

    def phases(self):
        """Lists of jobs; a phase needs what the one before it made."""
        yield [functools.partial(self._make_base, seed) for seed in self.seeds]
        if "sft_teacher" in self.settings["methods"]:
            yield [functools.partial(self._make_teacher, seed) for seed in self.seeds]
        yield [functools.partial(self.train, stack) for stack in self.stacks()]
        yield extras.jobs(self, self.settings["extras"])

    def stacks(self) -> list[list[Spec]]:
        """Runs still to do that can be trained together, the longest first, so that no process ends alone for long."""
        groups: dict[tuple, list[Spec]] = {}
        for spec in self.specs:
            if not done(self.folder, spec):
                groups.setdefault((spec.seed, spec.method, spec.epochs), []).append(spec)
        width, stacks = self.settings["stack"], []
        for group in groups.values():
            count = -(-len(group) // width)
            stacks += [group[len(group) * k // count : len(group) * (k + 1) // count] for k in range(count)]
        return sorted(stacks, key=lambda stack: -stack[0].epochs * len(stack))

    # ---- jobs

    def _make_base(self, seed: int, tell) -> None:
        self.base(seed)

    def base(self, seed: int) -> dict[str, Tensor]:
        """The seed's base weights, trained once and kept."""
        settings = {"sizes": self.settings["sizes"], **self.settings["pretraining"]}
        file = self._weights("base", seed, settings)
        if not file.is_file():
            new, prior = ParityMNIST(), FashionMNIST()
            weights = base.pretrain(new, prior, seed=seed, **settings)
            base.save_weights(weights, file)
            rows = self.probe(seed, weights).base_success()
            new, prior = (mean_success(rows, role) for role in ("new", "prior"))
            say(f"  base policy, seed {seed}: parity {new:.3f}, fashion {prior:.3f}")
        return base.load_weights(file)

    def _make_teacher(self, seed: int, tell) -> None:
        file = self._teacher_file(seed)
        if not file.is_file():
            spec = Spec(seed=seed, **self.settings["teacher"])
            base.save_weights(self.train([spec], tell, part="teacher").network(), file)

    def train(self, specs: Sequence[Spec], tell, *, part: str = "sweep", dtype: str = "float32") -> MLPPolicy:
        """One run after the other, of one method and seed; returns the last one's policy.

        dtype: of weights, gradients and moments, for the sparsity of an update
        """
        folder = {"sweep": self.folder, "precision": self.folder / part / dtype}.get(part, self.folder / part)
        seed, weights = specs[0].seed, self.base(specs[0].seed)
        recipe, probe, config = self.recipe(specs[0]), self.probe(seed, weights), self.config()
        if specs[0].method == "sft_teacher":
            config["teacher"] = self.settings["teacher"]
        if dtype != "float32":
            config["dtype"] = dtype
            rounded = {key: value.to(getattr(torch, dtype)).float() for key, value in weights.items()}
            probe = Probe(MLPPolicy(sizes=self.settings["sizes"], weights=rounded), self.tasks, self.probe_settings)
        for spec in specs:
            policy = train_run(
                spec,
                recipe,
                weights,
                self.tasks,
                probe,
                folder,
                settings=self.settings,
                config=config,
                header={**self.header(), "part": part},
                dtype=dtype,
                advanced=tell if part == "sweep" else (lambda steps: None),  # the bar counts the sweep
            )
        return policy

    # ---- parts

    def recipe(self, spec: Spec) -> Recipe:
        names = ("batch_size", "group_size", "kl")
        teacher = base.load_weights(self._teacher_file(spec.seed)) if spec.method == "sft_teacher" else None
        details = methods.Details(**{name: self.settings[name] for name in names}, teacher=teacher)
        return methods.build(
            spec.method, epochs=spec.epochs, steps_per_epoch=self.steps_per_epoch, details=details, seed=spec.seed
        )

    def probe(self, seed: int, weights: dict[str, Tensor]) -> Probe:
        if getattr(self, "_probe", (None,))[0] != seed:  # one per process and seed
            policy = MLPPolicy(sizes=self.settings["sizes"], weights=weights)
            self._probe = (seed, Probe(policy, self.tasks, self.probe_settings))
        return self._probe[1]

    def config(self) -> dict:
        """What every run's config.yaml says: what its numbers depend on, and not which other runs there are."""
        other = "methods rates lowest_rate highest_rate schedules epochs seeds stack extras teacher".split()
        return {"study": Study.name, **{key: value for key, value in self.settings.items() if key not in other}}

    @functools.cache  # noqa: B019 - one sweep per command
    def header(self) -> dict:
        return {
            "verb": "reproduce",
            "study": Study.name,
            "policy": "mlp",
            "task": self.tasks["new"].name,
            "roles": {"new": [self.tasks["new"].name], "prior": [self.tasks["prior"].name], "held_out": []},
            "decode": {"temperature": 1.0},
            "versions": versions(),
            "hardware": hardware(),
        }

    def _teacher_file(self, seed: int) -> Path:
        return self._weights("teacher", seed, {"teacher": self.settings["teacher"], **self.config()})

    def _weights(self, what: str, seed: int, settings: dict) -> Path:
        """weights/WHAT-seedS-FINGERPRINT.safetensors: other settings make another file."""
        mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / "weights" / f"{what}-seed{seed}-{mark}.safetensors"
