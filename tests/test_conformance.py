"""`robot-forgetting check`: good plug-ins pass, and each deliberate mistake is found and named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from robot_forgetting.cli import command_line as cli
from robot_forgetting.conformance import check
from robot_forgetting.conformance.check_table import Table
from robot_forgetting.conformance.method_checks import check_method, check_penalty
from robot_forgetting.conformance.policy_checks import check_policy
from robot_forgetting.conformance.task_checks import check_task
from robot_forgetting.conformance.toy_task import ToyEnv, ToyTask, tiny_policy
from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch, Method, Optimiser, Penalty
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.sft import SFT
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policy import Action, ConventionSpec

ADAM = Optimiser(learning_rate=1e-3)


def sft(**changes) -> SFT:
    return SFT(**{"iterations": 1, "steps_per_iteration": 1, "batch_size": 24, "demonstrations": 4, "optimiser": ADAM}
               | changes)  # fmt: skip


def failures(table: Table) -> dict[str, str]:
    return {row.name: row.detail for row in table.rows if row.state == "FAIL"}


# ---- what is right passes


def test_toy_task_passes():
    table = Table()
    assert not check_task(table, ToyTask(max_steps=8))
    assert not failures(table) and len(table.rows) >= 10


@pytest.mark.parametrize(
    "method",
    [
        sft(label_sigma=1.5),
        Reinforce(iterations=1, groups=16, group_size=1, optimiser=ADAM),
        GRPO(iterations=1, groups=4, group_size=4, optimiser=ADAM),
    ],
)
def test_own_methods_pass(method):
    table = Table()
    check_method(table, method)
    assert not failures(table) and len(table.rows) == 12


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_own_penalties_pass(direction):
    table = Table()
    check_penalty(table, KL(coefficient=0.1, direction=direction))
    assert not failures(table) and len(table.rows) == 7


def test_tiny_policy_passes_and_keeps_its_weights():
    policy, table = tiny_policy(ToyTask()), Table()
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    check_policy(table, policy, ToyTask())
    assert not failures(table) and len(table.rows) == 14
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())


# ---- wrong tasks


class Env(ToyEnv):
    """The toy environment with one thing wrong, by the task's ``mistake``."""

    def __init__(self, task, num_envs):
        super().__init__(task, num_envs)
        self.count = 0

    def wait(self):
        group, transitions = super().wait()
        return group, [self.spoil(transition) for transition in transitions]

    def spoil(self, transition):
        mistake, image = self.task.mistake, transition.observation["image"]
        self.count += 1
        if mistake == "blank":
            image = np.zeros_like(image)
        elif mistake == "float":
            image = image.astype(np.float32)
        elif mistake == "history":
            image = image.copy()
            image[0, 0] = self.count % 250
        elif mistake == "frozen":
            image = np.broadcast_to(np.arange(32, dtype=np.uint8)[:, None, None], image.shape).copy()
        elif mistake == "slot":
            image = image + np.uint8(transition.slot)
        elif mistake == "no instruction":
            return replace(transition, observation={"image": image})
        elif mistake == "numpy bool":
            return replace(transition, success=np.bool_(transition.success))
        elif mistake == "endless":
            return replace(transition, done=transition.error is not None)
        elif mistake == "done at once":
            return replace(transition, done=True)
        return replace(transition, observation={**transition.observation, "image": image})

    def _step(self, slot, command):
        if self.task.mistake == "raises":
            return self._answer(slot, self.states[slot].step(command))
        if self.task.mistake == "accepts all":
            command = np.resize(command, 7)
        return super()._step(slot, command)

    def _answer(self, slot, picture):
        from robot_forgetting.task import Transition

        state = self.states[slot]
        return Transition(slot, self._row(picture), done=state.steps >= self.task.max_steps)


class Wrong(ToyTask):
    def __init__(self, mistake: str, **changes):
        super().__init__(max_steps=5)
        self.mistake = mistake
        for name, value in changes.items():
            setattr(self, name, value)

    def make_env(self, num_envs, *, render=False):
        if self.mistake == "lacks a file":
            raise UserError("mesh.glb is missing; download it")
        return Env(self, num_envs)

    def seeds(self, split):
        return range(0, 5000) if self.mistake == "overlap" and split == "test" else super().seeds(split)

    def convention(self):
        spec = super().convention()
        return replace(spec, control_hz=None) if self.mistake == "open convention" else spec

    def demonstrations(self, count, *, split="train", start=0):
        for episode in super().demonstrations(count, split=split, start=start):
            commands = episode.commands
            if self.mistake == "too large":
                commands = commands * 5
            elif self.mistake == "not finite":
                commands = commands * np.nan
            elif self.mistake == "six numbers":
                commands = commands[:, :6]
            elif self.mistake in ("another sentence", "one sentence"):
                said = ["jump"] * len(commands) if self.mistake == "another sentence" else [self.instruction]
                yield replace(episode, instruction=said)
                continue
            elif self.mistake == "one picture more":
                images = episode.observations["image"]
                yield replace(episode, images=np.concatenate([images, images[:1]]))
                continue
            yield replace(episode, commands=commands)


@pytest.mark.parametrize(
    "mistake, name, words",
    [
        ("", "", ""),
        ("overlap", "seeds", "share seeds"),
        ("open convention", "convention", "leaves open: control_hz"),
        ("lacks a file", "environment starts", "mesh.glb is missing"),
        ("blank", "reset and picture", "blank"),
        ("float", "reset and picture", "float32"),
        ("no instruction", "reset and picture", "without 'instruction'"),
        ("done at once", "reset and picture", "right after its reset"),
        ("history", "same seed, same start", "twice gives two different"),
        ("slot", "same seed, same start", "slots 0 and 1"),
        ("frozen", "same seed, same start", "start alike"),
        ("frozen", "pictures change", "does not change"),
        ("numpy bool", "reset and picture", "`success` that is a numpy bool; give a bool"),
        ("history", "same commands, same end", "end differently in the same slot"),
        ("endless", "time limit", "goes on after max_steps = 5"),
        ("raises", "a crash is reported", "ends the program"),
        ("accepts all", "a crash is reported", "accepted in silence"),
        ("too large", "demonstrations", "reaches 5.00"),
        ("not finite", "demonstrations", "not finite"),
        ("six numbers", "demonstrations", "needs 7 numbers"),
        ("one picture more", "demonstrations", "a column 'image' with 3 rows for 2 commands"),
        ("another sentence", "demonstrations", "another instruction than its task"),
        ("one sentence", "demonstrations", "a column 'instruction' with 1 rows for 2 commands"),
    ],
)
def test_wrong_tasks(mistake, name, words):
    table = Table()
    assert check_task(table, Wrong(mistake)) is bool(mistake)
    assert words in failures(table).get(name, ""), failures(table)


@pytest.mark.parametrize(
    "changes, words",
    [({"name": "a/b"}, "file names"), ({"instruction": " "}, "not a sentence"), ({"max_steps": 5.0}, "whole number")],
)
def test_wrong_descriptions(changes, words):
    table = Table()
    check_task(table, Wrong("", **changes))
    assert words in failures(table)["description"]


def test_a_task_without_expert_is_fine():
    class NoExpert(ToyTask):
        demonstrations = ToyTask.__mro__[1].demonstrations

    table = Table()
    assert not check_task(table, NoExpert(max_steps=8))
    assert table.rows[-1].state == "skip" and "sft" in table.rows[-1].detail


def test_picture_of_the_initial_states(tmp_path):
    import imageio.v3 as imageio

    assert check(task=ToyTask(), output=tmp_path / "new" / "states.png") == 0
    assert imageio.imread(tmp_path / "new" / "states.png").shape == (128, 512, 3)


# ---- wrong methods


class WrongMethod(Method):
    """Cloning with one mistake."""

    def __init__(self, mistake: str):
        self.inner, self.mistake = sft(), mistake
        self.iterations, self.optimiser = (0 if mistake == "iterations" else 1), ADAM
        self.count = torch.zeros(1)
        if mistake == "optimiser":
            del self.optimiser

    def begin(self, policy, task, past):
        self.inner.begin(policy, task, past)
        if self.mistake == "changes weights":
            next(policy.parameters()).data.add_(1)

    def collect(self, policy, task, iteration):
        self.count += 1
        if self.mistake == "crash":
            return [1 / 0]
        made = self.inner.collect(policy, task, int(self.count) if self.mistake == "forgets" else iteration)
        if self.mistake == "one batch":
            return made[0]
        if self.mistake == "nothing":
            return []
        if self.mistake == "random":
            made = [replace(made[0], advantage=torch.from_numpy(np.random.default_rng().random(len(made[0]))))]
        if self.mistake == "short column":
            made = [replace(made[0], advantage=torch.ones(3))]
        if self.mistake == "float tokens":
            made = [replace(made[0], action=Action(made[0].action.tokens.float(), made[0].action.mask))]
        return made

    def loss(self, policy, batch):
        value = self.inner.loss(policy, batch)
        return {
            "vector": value.repeat(2), "sum": value * len(batch), "float": value.item(), "detached": value.detach(),
            "nan": value * torch.nan, "zero": value * 0,
        }.get(self.mistake, value)  # fmt: skip

    def metrics(self):
        return {"taken": {"loss": 1.0}, "tensor": {"a": torch.ones(())}}.get(self.mistake, {})

    def state_dict(self):
        return {"count": 3} if self.mistake == "plain state" else {}


@pytest.mark.parametrize(
    "mistake, name, words",
    [
        ("iterations", "constructor", "iterations is 0"),
        ("optimiser", "constructor", "WrongMethod.optimiser is None; take `optimiser`"),
        ("changes weights", "begin", "weights changed"),
        ("crash", "collect", ", in collect: ZeroDivisionError: division by zero"),
        ("one batch", "collect", "return a list of Batch"),
        ("nothing", "collect", "no batch in three iterations"),
        ("short column", "collect", "advantage 3"),
        ("float tokens", "collect", "give int64"),
        ("random", "collect is repeatable", "advantage"),
        ("vector", "loss and gradient", "shape [2]"),
        ("float", "loss and gradient", "return a torch scalar"),
        ("detached", "loss and gradient", "carries no gradient"),
        ("nan", "loss and gradient", "gives nan"),
        ("zero", "loss and gradient", "zero everywhere"),
        ("sum", "loss is a mean over rows", "weighted mean over two parts"),
        ("taken", "metrics", "optimiser loop writes"),
        ("tensor", "metrics", "plain number"),
        ("plain state", "state_dict", "give tensors"),
        ("forgets", "restart from a checkpoint", "state_dict()"),
    ],
)
def test_wrong_methods(mistake, name, words):
    table = Table()
    check_method(table, WrongMethod(mistake))
    assert words in failures(table)[name], failures(table)


def test_a_stateful_method_passes():
    class Counting(WrongMethod):
        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"].clone()

    table = Table()
    check_method(table, Counting("forgets"))
    assert not failures(table)


def test_wrong_penalty():
    class Detached(Penalty):
        def __call__(self, policy, batch: Batch):
            return policy.log_prob(batch.obs, batch.action).mean().detach()

    table = Table()
    check_penalty(table, Detached())
    assert "no gradient" in failures(table)["value and gradient"]


def test_a_penalty_that_forgets_at_a_restart():
    class Forgetful(KL):
        def end(self, policy, task):
            self.kept = torch.ones(1)

        def state_dict(self):
            return {"kept": self.kept} if hasattr(self, "kept") else {}

        def load_state_dict(self, state):
            pass

    table = Table()
    check_penalty(table, Forgetful(coefficient=0.1))
    assert "holds [] after loading, not ['kept']" in failures(table)["restart after a stage"]


# ---- the command


def test_table_and_exit_code(capsys):
    assert check(task=Wrong("blank"), method=sft()) == 2
    out = capsys.readouterr().out
    assert "FAIL  reset and picture" in out and "correct the task first" in out and "checks failed" in out
    assert check(method=sft()) == 0
    assert "all 12 checks passed" in capsys.readouterr().out
    with pytest.raises(UserError, match="name what to check"):
        check()


def test_command_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["check", "method=grpo", "budget=tiny", "method.groups=2", "method.group_size=4"]
    assert cli.main(command) == 0
    assert "restart from a checkpoint" in capsys.readouterr().out
    assert cli.main(["check"]) == 2
    assert "name what to check" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_golden_needs_no_other_weights(capsys, shared):
    assert cli.main(["check", "policy=openvla", f"golden={shared / 'golden' / 'openvla'}"]) == 0
    out = capsys.readouterr().out
    assert "vision_features" in out and "FAIL" not in out


# ---- one-step tasks


class Sum(OneStepTask):
    """Is the number even? Two items of each kind; ``mistake`` names what is wrong with it."""

    name, choices = "sum", 2

    def __init__(self, mistake: str = ""):
        self.mistake, self.calls = mistake, 0

    def convention(self) -> ConventionSpec:
        return ConventionSpec(action_mode=None if self.mistake == "mode" else "label")

    def size(self, split: str) -> int:
        return 4

    def observations(self, seeds: np.ndarray) -> dict:
        self.calls += self.mistake == "random"
        return {"features": (self.items(seeds)[1] + self.calls).reshape(-1, 1).astype(np.float32)}

    def rewards(self, seeds: np.ndarray, answers) -> np.ndarray:
        if self.mistake == "unanswerable":
            return np.zeros(len(seeds), np.float32)
        scale = 2.0 if self.mistake == "scale" else 1.0
        return scale * (np.asarray(answers) == self.items(seeds)[1] % 2).astype(np.float32)


@pytest.mark.parametrize(
    ("mistake", "check", "words"),
    [
        ("", None, ""),
        ("mode", "convention", "leaves action_mode open"),
        ("random", "same seed, same observation", "differs from call to call"),
        ("scale", "rewards", "rewards reach from 0 to 2"),
        ("unanswerable", "rewards", "has no right answer among its 2"),
    ],
)
def test_one_step_tasks(mistake, check, words):
    table = Table()
    assert check_task(table, Sum(mistake)) is bool(mistake)
    if mistake:
        assert words in failures(table)[check]
    else:
        assert [row.state for row in table.rows] == ["ok"] * 7
