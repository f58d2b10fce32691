"""Sequences on the toy tasks: however often killed, they end with the same summary; what a stage hands to the next."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch
from toy import ToyPolicy, ToyTask
from toy_runs import run, same, summary
from toy_training import die, killed

from robot_forgetting.api.arguments import Arguments
from robot_forgetting.cli import main
from robot_forgetting.engine import experiment
from robot_forgetting.engine.roles import stages_of
from robot_forgetting.engine.run_policy import with_checkpoint
from robot_forgetting.errors import UserError
from robot_forgetting.machine import doctor
from robot_forgetting.method import Optimiser, Penalty
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.metrics.sequence import sequence_metrics
from robot_forgetting.metrics.statistics import wilson
from robot_forgetting.records.checkpoints import latest_checkpoint, load_weights
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.records.video import video_name
from robot_forgetting.report import write_report
from robot_forgetting.report.media import recorded
from robot_forgetting.report.runs import load

pytestmark = pytest.mark.usefixtures("no_renderer", "four_instructions")
NAMES = ["reach", "mirror", "again"]
ITERATIONS = 2
METHODS = []


@pytest.fixture(scope="module")
def four_instructions():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("toy.INSTRUCTIONS", (*NAMES, "before"))
        yield


class Merging(GRPO):
    """At the end of a stage it goes a quarter of the way back to where the stage began."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.learned: list = []
        self.drawn: list = []
        self.starts: list = []

    def begin(self, policy, task, past):
        self.start = [p.detach().clone() for p in policy.parameters()]
        self.starts.append(policy.table.sum().item())
        self.learned.append((task.name, [other.name for other in past]))

    def collect(self, policy, task, iteration):
        self.drawn.append((iteration, torch.initial_seed()))
        return super().collect(policy, task, iteration)

    def end(self, policy, task):
        with torch.no_grad():
            for parameter, start in zip(policy.parameters(), self.start, strict=True):
                parameter.lerp_(start, 0.25)


class Anchor(Penalty):
    """(w - w*)^2, with w* the mean of the weights at the ends of earlier stages."""

    def __init__(self):
        self.mean: dict = {}

    def end(self, policy, task):
        old, count = self.mean, 1 + int(self.mean.get("count", 0))
        self.mean = {n: p.detach() / count + old.get(n, 0) * (1 - 1 / count) for n, p in policy.named_parameters()}
        self.mean["count"] = torch.tensor(count)

    def __call__(self, policy, batch):
        parts = [(p - self.mean[name]).square().sum() for name, p in policy.named_parameters() if self.mean]
        return 0.1 * sum(parts, start=torch.zeros(()))

    def state_dict(self):
        return self.mean

    def load_state_dict(self, state):
        self.mean = dict(state)


def learn(path, names=NAMES, **options) -> RunFolder:
    optimiser = Optimiser(learning_rate=0.05)
    method = Merging(iterations=ITERATIONS, groups=4, group_size=3, optimiser=optimiser, minibatch_size=20, seed=0)
    METHODS.append(method)
    arguments = {"made": method, "penalty": Anchor(), "prior": [ToyTask("before")], "held_out": []} | options
    return run(path, sequence=[ToyTask(name) for name in names], **arguments)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, four_instructions) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "render_backend", dict)
        folder = learn(tmp_path_factory.mktemp("sweep") / "whole", keep_stages=True)
    assert METHODS[0].drawn == [(iteration, iteration) for iteration in range(3 * ITERATIONS)]  # no noise drawn twice
    assert METHODS[0].learned == [(NAMES[k], [*NAMES[:k], "before"]) for k in range(3)]  # one, through all stages
    return folder


def in_collect(stage: int):
    collect = GRPO.collect

    def dying(self, policy, task, iteration):
        made = collect(self, policy, task, iteration)
        return die() if iteration == (stage - 1) * ITERATIONS + stage % ITERATIONS else made

    GRPO.collect = dying


def after_rows(stage: int, table: str):
    """Between the rows and the checkpoint, amid an evaluation, amid the divergences."""
    append = RunFolder.append

    def dying(self, name, *rows):
        append(self, name, *rows)
        if (name, rows[0]["stage"], rows[0]["iteration"]) == (table, stage, ITERATIONS):
            die()

    RunFolder.append = dying


def in_end(stage: int):
    end = Anchor.end

    def dying(self, policy, task):
        end(self, policy, task)
        if task.name == NAMES[stage - 1]:
            die()

    Anchor.end = dying


def between_stages(stage: int):
    """The next stage is said to have begun; nothing of it is there."""
    experiment.drop_moments = lambda store: die()


POINTS = [
    (how, stage, *more)
    for stage in (1, 2, 3)
    for how, *more in (
        (in_collect,), (after_rows, "train"), (in_end,), (after_rows, "episodes"), (after_rows, "divergence"),
        (between_stages,),
    )
    if (how, stage) != (between_stages, 3)
]  # fmt: skip


def test_killed_at_every_step_of_every_stage(tmp_path, undisturbed):
    for how, *where in POINTS:

        def doomed(how=how, where=where):
            how(*where)
            learn(tmp_path / "parts")

        assert killed(doomed) == -signal.SIGKILL, (how, where)
        assert RunFolder(tmp_path / "parts").status == "interrupted"
    folder = learn(tmp_path / "parts")
    assert folder.run["restarts"] == len(POINTS)
    assert METHODS[-1].starts == METHODS[0].starts[1:]  # also in the stage that the restart only looks back to
    same(folder, undisturbed)
    assert os.listdir(folder.checkpoints) == ["stage_03"]


def test_a_stage_that_later_ones_go_on_from_is_missed(tmp_path):
    def interrupting(self, stage, iteration):
        if stage.number == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment.Experiment, "interim_evaluation", interrupting)
        learn(tmp_path / "run")
    with pytest.raises(UserError, match="is at stage 1 of 3, iteration 2 of 2 .interrupted.; finish it first"):
        with_checkpoint(ToyPolicy(seed=1), str(tmp_path / "run"), trained=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "stage_01")
    with pytest.raises(UserError, match="stage_01 holds no checkpoint to go on from; delete the run folder"):
        learn(tmp_path / "run")


# ---- what is recorded


def test_records(undisturbed):
    header = undisturbed.run
    assert header["sequence"] == NAMES and header["task"] == "reach + mirror + again"
    assert header["roles"] == {"new": NAMES, "prior": ["before"], "held_out": []}
    assert header["stages"][1] == {"new": ["mirror"], "prior": ["reach", "before"], "held_out": [], "unseen": ["again"]}
    trained = [(row["stage"], row["iteration"]) for row in undisturbed.rows("train")]
    assert trained == sorted(trained) and len(set(trained)) == 3 * ITERATIONS
    found = {(row["stage"], row["iteration"], row["task"], row["role"]) for row in undisturbed.episodes()}
    roles = {
        0: ("new", "unseen", "unseen"), 1: ("new", "unseen", "unseen"), 2: ("prior", "new", "unseen"),
        3: ("prior", "prior", "new"),
    }  # fmt: skip
    expected = {
        (stage, ITERATIONS if stage else 0, *pair)
        for stage, said in roles.items()
        for pair in zip([*NAMES, "before"], [*said, "prior"], strict=True)
    }
    interim = {(stage, 1, task, role) for stage, _, task, role in expected if stage and role != "unseen"}
    assert found == expected | interim
    trained = {(row["stage"], *row["trained_on"]) for row in undisturbed.episodes()}
    assert trained == {(stage, *NAMES[:stage]) for stage in range(4)}
    drift = {(row["stage"], row["task"]) for row in undisturbed.rows("divergence")}
    assert drift == {(stage, task) for stage in (1, 2, 3) for task in [*NAMES[:stage], "before"]}


def test_matrix_by_hand(undisturbed):
    found, episodes = summary(undisturbed), undisturbed.episodes()
    assert found["matrix"].keys() == {"sequence", "prior", "held_out"}
    rates = []
    for stage in range(4):
        rates.append([])
        for number, task in enumerate(NAMES):
            where = (stage, ITERATIONS if stage else 0, task, "sampled")
            rows = [r for r in episodes if (r["stage"], r["iteration"], r["task"], r["decode"]) == where]
            won, n = sum(row["success"] for row in rows), len(rows)
            low, high = wilson(won, n)
            cell = {"n": 6, "successes": won, "rate": won / n, "low": low, "high": high}
            assert found["matrix"]["sequence"]["sampled"][stage][number] == cell
            rates[-1].append(won / n)
    assert found["matrix"]["prior"]["tasks"] == ["before"] and len(found["matrix"]["prior"]["greedy"]) == 4
    assert found["matrix"]["held_out"] == {"tasks": []}
    assert found["sequence"]["sampled"] == sequence_metrics(rates[0], rates[1:])
    # A task's rows pair with the base's, whatever it is called in a stage.
    paired = {(row["stage"], row["task"]) for row in found["forgetting"] if row["iteration"] == ITERATIONS}
    assert paired == {(stage, task) for stage in (1, 2, 3) for task in [*NAMES, "before"]}


def test_the_page_of_a_sequence(tmp_path, undisturbed):
    shutil.copytree(undisturbed.path, tmp_path / "run")
    (tmp_path / "run" / "videos").mkdir()
    for who in ("base", "grpo_stage1", "grpo_stage3"):
        (tmp_path / "run" / "videos" / video_name("reach", 1_600_000, who, True)).touch()
    write_report([tmp_path / "run"], tmp_path / "page.html")
    assert "reach + mirror + again" in (tmp_path / "page.html").read_text()
    found = {(row["stage"], row["iteration"]) for row in recorded(load(RunFolder(tmp_path / "run")))}
    assert found == {(0, 0), (1, ITERATIONS), (3, ITERATIONS)}


# ---- what a stage hands to the next


def test_the_first_stage_is_the_run_of_one_task(tmp_path, undisturbed):
    options = {"held_out": [ToyTask(name) for name in NAMES[1:]]}
    alone = learn(tmp_path / "alone", NAMES[:1], **options)
    assert os.listdir(alone.checkpoints) == [f"iteration_{ITERATIONS:06d}"]
    for table, different in (("train", ()), ("episodes", ("role", "source")), ("divergence", ())):
        rows = [
            sorted(
                str({key: value for key, value in row.items() if "seconds" not in key and key not in different})
                for row in folder.rows(table)
                if row["stage"] <= 1
            )
            for folder in (alone, undisturbed)
        ]
        assert rows[0] == rows[1]


def test_the_policy_of_a_sequence(tmp_path, undisturbed):
    state = with_checkpoint(ToyPolicy(seed=1), str(undisturbed.path))
    assert (state["stage"], state["iteration"], state["trained_on"]) == (3, ITERATIONS, NAMES)
    stores = sorted(undisturbed.checkpoints.iterdir())
    assert [store.name for store in stores] == ["stage_01", "stage_02", "stage_03"]  # keep_stages
    policy = ToyPolicy(seed=1)
    assert not [file for store in stores[:2] for file in store.glob("*/optimizer.safetensors")]
    load_weights(policy, latest_checkpoint(undisturbed))
    second = ToyPolicy(seed=1)
    state = with_checkpoint(second, str(stores[1]), trained=True)
    assert (state["stage"], state["trained_on"]) == (2, NAMES[:2])
    assert not torch.equal(second.table, policy.table)
    following = learn(tmp_path / "next", ["before"], prior=[], checkpoint=str(undisturbed.path))
    assert following.run["checkpoint_state"]["trained_on"] == NAMES
    with pytest.raises(UserError, match="keeps no weights of stage 1; run it with keep_stages=true"):
        with_checkpoint(second, f"{following.path}/checkpoints/stage_01")


# ---- bad input


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("run sequence=[]", "sequence=[] is no list of tasks"),
        ("run sequence=stack_cube", "sequence=stack_cube is no list of tasks"),
        ("run sequence=[stack_cube,place_sphere] task=stack_cube", "'task=stack_cube' beside a sequence"),
        ("run sequence=[stack_cube,place_sphere] task.max_steps=3", "'task.max_steps=3' beside a sequence"),
        ("run sequence=[stack_cube,nothing]", "unknown task 'nothing'"),
        ("run sequence=[nothing,stack_cube]", "unknown task 'nothing'"),
        ("evaluate sequence=[stack_cube,place_sphere]", "evaluate does not use sequence=; run does"),
    ],
)
def test_no_sequence(tmp_path, capsys, arguments, words):
    assert main([*arguments.split(), f"run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "sequence, words",
    [("reach reach", "'reach' stands twice in the sequence"), ("reach before", "'before' has two roles")],
)
def test_no_sequence_of_these_tasks(tmp_path, sequence, words):
    with pytest.raises(UserError, match=words):
        learn(tmp_path / "run", sequence.split())
    assert not (tmp_path / "run").exists()


def test_a_benchmark_cannot_be_learned(tmp_path):
    class Untrainable(ToyTask):
        def untrainable(self):
            return "it is a benchmark"

    first, benchmark, other = ToyTask("reach"), Untrainable("mirror"), ToyTask("again")
    with pytest.raises(UserError, match="it is a benchmark"):
        run(tmp_path / "run", sequence=[first, benchmark], prior=[])
    (stage,) = stages_of({"new": [first], "prior": [benchmark, other], "held_out": []})
    assert stage.past == [other]


def test_the_first_task_brings_its_keys(capsys):
    """A key that only its yaml adds, and ``--cfg`` shows the configuration that would run."""
    command = "run sequence=[skill_over,skill_add] policy=qwen-nano method=sft answer_tokens=6"
    assert Arguments("run", command.split()[1:]).plain["answer_tokens"] == 6
    assert main([*command.split(), "--cfg", "job"]) == 0
    said = capsys.readouterr().out
    assert "kind: text" in said and "answer_tokens: 6" in said and "stack_cube" not in said.split("pretrain:")[0]


def test_a_sequence_of_one_is_the_task():
    one, other = (Arguments("run", [text]) for text in ("sequence=[place_sphere]", "task=place_sphere"))
    assert {**one.plain, "sequence": None} == other.plain
    assert one.run_folder(experiment.run) == other.run_folder(experiment.run)
    assert [task.name for task in one.value("sequence")] == ["place_sphere"]
