"""Worker processes: an episode is the same in any of them, whatever dies beside it."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal

import numpy as np
import pytest
import torch
from robot_tasks import configured

from robot_forgetting.engine.evaluate import evaluate
from robot_forgetting.errors import UserError
from robot_forgetting.policy import Action
from robot_forgetting.rollout import EpisodeKey, rollout
from robot_forgetting.tasks.simulator.maniskill_task import ManiSkillTask
from robot_forgetting.tasks.simulator.serving import serve
from robot_forgetting.tasks.simulator.workers import POOL

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning:mani_skill"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning:mani_skill"),
    pytest.mark.usefixtures("renderer"),
]


class Drifting:
    """Random commands; ``hook`` is called with the number of calls so far."""

    name, runs, noise_width = "drifting", 1, 16

    def __init__(self, hook=lambda calls: None):
        self.hook, self.calls = hook, 0

    def named_parameters(self):
        return []

    def eval(self): ...

    def act(self, obs, *, temperature=1.0, noise=None):
        self.calls += 1
        self.hook(self.calls)
        tokens = (noise[:, :7] * 256).long()
        return Action(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape))

    def decode(self, action, *, statistics=None):
        return action.tokens.numpy() / 128.0 - 1


@pytest.fixture(scope="module")
def workers(request):
    """The worker processes are closed at the end, so that no other test meets them."""
    yield POOL
    POOL.close()


def fragile(**arguments) -> ManiSkillTask:
    arguments = {"max_steps": 6, "processes": 2, "expert": "robot_forgetting.envs.push_cube.expert"} | arguments
    return ManiSkillTask("push", "Fragile-PushCube-v1", "push it", modules=["fragile_env"], **arguments)


SOUND = [seed for seed in range(10, 40) if seed % 5 < 3]


def outcomes(policy, seeds, task=None, num_envs=6) -> dict[int, tuple]:
    return {
        e.key.seed: (e.error, e.success, e.steps, [row["image"].tobytes() for row in e.observations])
        for e in evaluate(policy, task or fragile(), seeds, temperature=1.0, num_envs=num_envs)
    }


@pytest.fixture(scope="module")
def undisturbed(workers, renderer):
    return outcomes(Drifting(), SOUND)


def test_an_episode_does_not_depend_on_its_slot(undisturbed):
    assert len(undisturbed) == len(SOUND) and all(error is None for error, *_ in undisturbed.values())
    some = SOUND[:5][::-1]
    assert outcomes(Drifting(), some, num_envs=3) == {seed: undisturbed[seed] for seed in some}
    assert outcomes(Drifting(), some, fragile(processes=1), num_envs=2) == {seed: undisturbed[seed] for seed in some}


@pytest.mark.parametrize("moment", [4, 5])
def test_a_worker_that_is_killed(undisturbed, moment):
    """While it steps (found when we wait for it) and while it waits (found when we ask it)."""

    def kill(calls):
        if calls == moment:
            process = POOL[0].process
            os.kill(process.pid, signal.SIGKILL)
            process.join()

    found = outcomes(Drifting(kill), SOUND)
    assert set(found) == set(SOUND)
    broken = {seed for seed, episode in found.items() if episode[0]}
    assert 1 <= len(broken) <= 3  # the episodes in its three slots
    for seed, episode in found.items():
        if seed in broken:
            assert episode[:2] == ("the simulator process died during this episode", False)
        else:
            assert episode == undisturbed[seed]
    assert outcomes(Drifting(), SOUND[:4]) == {seed: undisturbed[seed] for seed in SOUND[:4]}


def test_a_worker_killed_before_the_environment_is_left(undisturbed):
    env = fragile().make_env(2)
    env.request(0, {0: 10}, {})
    os.kill(POOL[0].process.pid, signal.SIGKILL)
    env.close()  # does not wait for an answer that never comes
    assert outcomes(Drifting(), SOUND[:2], num_envs=2) == {seed: undisturbed[seed] for seed in SOUND[:2]}


def test_a_simulation_that_raises(undisturbed):
    found = outcomes(Drifting(), range(10, 40))
    assert set(found) == set(range(10, 40))
    for seed, (error, success, steps, images) in found.items():
        if seed % 5 == 3:
            assert re.search(r"fragile_env.py, line \d+, in evaluate: ZeroDivisionError: physics left", error)
            assert (success, steps) == (False, 2) and "\n" not in error
        elif seed % 5 == 4:
            assert re.search(r"fragile_env.py, line \d+, in reset: RuntimeError: no such initial state$", error)
            assert (success, steps) == (False, 0)
        else:
            assert (error, success, steps, images) == undisturbed[seed]


class Wild(Drifting):
    """In one slot of three the third command is none."""

    def decode(self, action, *, statistics=None):
        commands = [*super().decode(action)]
        if self.calls == 3:
            commands[1] = self.command
        return commands


@pytest.mark.parametrize(
    "command, words",
    [
        ([0, 0, np.nan, 0, 0, 0, 1], r"that is not finite, \[0, 0, nan, 0, 0, 0, 1\]; look at"),
        ([0] * 6, r"of shape \[6\]"),
    ],
    ids=["not a number", "too short"],
)
def test_an_episode_with_a_command_that_is_none(undisturbed, command, words):
    """It counts as failed, says what was wrong, and its environment goes on with the next episode."""
    policy = Wild()
    policy.command = np.asarray(command)
    found = outcomes(policy, SOUND, fragile(processes=1), num_envs=3)
    broken = {seed for seed, episode in found.items() if episode[0]}
    assert len(broken) == 1 and set(found) == set(SOUND)
    error, success, steps, _ = found[broken.pop()]
    assert re.match(f"Fragile-PushCube-v1 was given a command {words}", error) and "\n" not in error
    assert (success, steps) == (False, 3)
    assert all(episode == undisturbed[seed] for seed, episode in found.items() if not episode[0])


def test_answers_of_an_abandoned_rollout_are_not_taken_for_others(undisturbed):
    episodes = rollout(Drifting(), fragile(), [EpisodeKey(seed) for seed in SOUND], num_envs=6)
    next(episodes)
    episodes.close()
    demonstrations = fragile(max_steps=50).demonstrations(20, start=10)
    next(demonstrations)
    demonstrations.close()  # two workers are in the midst of an episode
    with pytest.raises(UserError, match="unknown ManiSkill environment"):
        ManiSkillTask("no", "NoSuchThing-v1", "do", processes=2).make_env(2)  # both answer, one is heard
    assert outcomes(Drifting(), SOUND[:4]) == {seed: undisturbed[seed] for seed in SOUND[:4]}


def test_demonstrations_are_the_same_with_any_number_of_processes(workers):
    found = [list(configured("push_cube", f"processes={count}").demonstrations(3, start=50)) for count in (1, 2)]
    for one, other in zip(*found, strict=True):
        assert one.seed == other.seed and np.array_equal(one.observations["image"], other.observations["image"])
        assert np.array_equal(one.commands, other.commands)
        length = len(one.commands)
        images = one.observations["image"]
        assert images.shape == (length, 64, 64, 3) and images.dtype == np.uint8 and length <= 50
        assert one.commands.shape == (length, 7) and np.abs(one.commands).max() <= 1
    assert [d.seed for d in found[0]] == sorted(d.seed for d in found[0])


def test_an_expert_that_never_succeeds(workers):
    hopeless = ManiSkillTask(
        "push", "PushCube-v1", "push it", max_steps=2, expert="robot_forgetting.envs.push_cube.expert", processes=2
    )
    with pytest.raises(UserError, match="the expert of task 'push' succeeded in 0 of 40 episodes"):
        list(hopeless.demonstrations(20))


def test_no_expert_no_demonstrations():
    task = ManiSkillTask("push", "PushCube-v1", "push it")
    with pytest.raises(UserError, match="task 'push' has no demonstrations; give it an expert"):
        list(task.demonstrations(1))


def test_stock_and_low_poly_show_the_same_scene(workers):
    """In one program: a worker that draws the one is replaced before it draws the other."""
    images = {}
    for render in ("low_poly", "stock"):
        task = configured("stack_cube", f"render={render}", "processes=1")
        with task.make_env(1) as env:
            env.request(0, {0: 5}, {})
            images[render] = env.wait()[1][0].observation["image"].astype(float)
    low, stock = images["low_poly"], images["stock"]
    assert low.std() > 10 and stock.std() > 10 and np.abs(low - stock).mean() > 2

    def place(image, channel):  # of the cubes, red and green
        others = [other for other in range(3) if other != channel]
        mask = image[..., channel] > 1.7 * image[..., others].max(-1) + 10
        return np.argwhere(mask).mean(0)

    for channel in (0, 1):
        assert np.abs(place(low, channel) - place(stock, channel)).max() < 2


def test_a_worker_whose_parent_was_killed_ends_quietly(capfd):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    ours.send(("advance", {}, {}))
    process = context.Process(target=serve, args=(theirs,))
    process.start()
    ours.close()
    theirs.close()
    process.join(60)
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""
