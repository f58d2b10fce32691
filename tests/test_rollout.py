"""The rollout loop: what an episode depends on, what it records, and how it ends when its environment breaks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import CELLS, ToyPolicy, ToyTask, start

from robot_forgetting.policies.openvla.vla import new_nano
from robot_forgetting.policy import Action
from robot_forgetting.rollout import Episode, EpisodeKey, columns, rollout
from robot_forgetting.task import Transition, VectorEnv

KEYS = [EpisodeKey(seed, stream) for seed, stream in ((3, 0), (3, 1), (8, 0), (1_000_004, 5), (9, 0), (10, 0), (11, 2))]


def content(episode: Episode) -> tuple:
    """Everything about an episode but its duration."""
    return (
        episode.key,
        episode.success,
        episode.reward,
        episode.error,
        episode.action().tokens.tolist() if episode.steps else [],
        episode.action().log_prob.tolist() if episode.steps else [],
        [row["image"].tolist() for row in episode.observations],
        np.asarray(episode.commands).tolist(),
    )


def run(policy, task, keys, **options) -> dict[EpisodeKey, tuple]:
    return {episode.key: content(episode) for episode in rollout(policy, task, keys, **options)}


@pytest.mark.parametrize("num_envs", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_an_episode_depends_on_policy_task_and_key_only(num_envs, last_first, groups):
    policy = ToyPolicy(seed=1)
    alone = {key: run(policy, ToyTask(), [key], num_envs=1)[key] for key in KEYS}
    torch.manual_seed(num_envs)  # torch's own generator has no say
    task = ToyTask(groups=groups, last_first=last_first)
    assert run(policy, task, KEYS, num_envs=num_envs) == alone
    assert run(policy, task, KEYS[::-1], num_envs=num_envs) == alone
    subset = KEYS[2:5]
    assert run(policy, task, subset, num_envs=num_envs) == {key: alone[key] for key in subset}


def test_streams_and_seeds_differ():
    found = run(ToyPolicy(), ToyTask(), [EpisodeKey(3, stream) for stream in range(30)], num_envs=4)
    first_images = {str(episode[6][0]) for episode in found.values()}
    first_tokens = [tuple(episode[4][0]) for episode in found.values()]
    assert len(first_images) == 1  # the same state
    assert len(set(first_tokens)) == 9  # every pair of tokens is sampled by a uniform policy
    assert (
        len(
            {str(e[6][0]) for e in run(ToyPolicy(), ToyTask(), [EpisodeKey(s) for s in range(30)], num_envs=4).values()}
        )
        > 4
    )


def test_what_an_episode_holds():
    policy = ToyPolicy(seed=2)
    for episode in rollout(policy, ToyTask(), KEYS, num_envs=3, render=True):
        length = episode.steps
        assert 1 <= length <= 4 and episode.success == (episode.reward == 1.0)
        assert length == 4 or episode.success
        assert len(episode.observations) == len(episode.frames) == length + 1
        assert len(episode.commands) == length
        action = episode.action()
        assert action.tokens.shape == action.mask.shape == action.log_prob.shape == (length, 2)
        assert "frame" not in episode.observations[0] and episode.frames[0].shape == (32, 32, 3)
        assert episode.seconds > 0 and episode.flags == {"success": episode.success}
        # log_prob is the policy's own, teacher-forced
        obs = columns(episode.observations[:length])
        assert torch.allclose(policy.log_prob(obs, action), action.log_prob, atol=1e-6)
        # The pictures follow from the commands.
        walker, mark = start(episode.key.seed)
        for row, command in zip(episode.observations, [*episode.commands, None], strict=True):
            assert row["image"][0, :, 0].argmax() == walker and row["image"][-1, :, 0].argmax() == mark
            if command is not None:
                walker = int(np.clip(walker + command[0], 0, CELLS - 1))


def test_temperature_zero_is_greedy_and_ignores_the_stream():
    policy = ToyPolicy(seed=3)
    keys = [EpisodeKey(5, stream) for stream in range(5)]
    found = list(rollout(policy, ToyTask(), keys, num_envs=2, temperature=0.0))
    assert len({str(content(episode)[4]) for episode in found}) == 1
    obs, action = columns(found[0].observations[:1]), found[0].actions[0]
    assert torch.equal(policy.logits(obs, action).argmax(-1), action.tokens)


def test_temperature_divides_the_logits():
    policy = ToyPolicy(seed=3)
    episode = next(rollout(policy, ToyTask(), [EpisodeKey(5)], num_envs=1, temperature=0.5))
    obs, action = columns(episode.observations[:1]), episode.actions[0]
    expected = (policy.logits(obs, action) / 0.5).log_softmax(-1).gather(-1, action.tokens.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(action.log_prob, expected, atol=1e-6)


@pytest.mark.parametrize("num_envs", [1, 4, 16])
def test_a_crash_ends_its_episode_as_a_failure_and_no_other(num_envs):
    policy = ToyPolicy(seed=1)
    calm = run(policy, ToyTask(), KEYS, num_envs=4)
    lengths = {key: len(episode[4]) for key, episode in calm.items()}
    late = next(key for key in KEYS if lengths[key] == 4 and key.seed != 11)
    task = ToyTask(crashes={late.seed: 2, 11: 0})
    found = {episode.key: episode for episode in rollout(policy, task, KEYS, num_envs=num_envs)}
    assert set(found) == set(KEYS)
    broken = found[late]
    assert not broken.success and broken.error == "RuntimeError: broke at step 2"
    assert broken.steps == 2 and len(broken.observations) == 3
    at_once = found[EpisodeKey(11, 2)]
    assert not at_once.success and at_once.error and at_once.steps == 0 and len(at_once.observations) == 1
    for key in KEYS:
        if key.seed not in task.crashes:
            assert content(found[key]) == calm[key]


def test_success_and_error_at_once_is_a_failure():
    class Odd(VectorEnv):
        groups = [[0]]

        def request(self, group, resets, commands):
            self.first = bool(resets)

        def wait(self):
            row = {"image": np.zeros((4, 4, 3), np.uint8), "instruction": "reach"}
            if self.first:
                return 0, [Transition(0, row)]
            return 0, [Transition(0, row, 1.0, success=True, done=True, error="fell apart")]

        def close(self):
            pass

    (episode,) = rollout(ToyPolicy(), ToyTask(), [EpisodeKey(1)], num_envs=1, env=Odd())
    assert not episode.success and episode.error == "fell apart"


def test_the_environment_is_closed_unless_it_was_given():
    task = ToyTask()
    list(rollout(ToyPolicy(), task, KEYS, num_envs=3))
    episodes = rollout(ToyPolicy(), task, KEYS, num_envs=3)
    next(episodes)
    episodes.close()  # the consumer gives up
    assert [env.closed for env in task.made] == [True, True]
    given = task.make_env(3)
    assert len(list(rollout(ToyPolicy(), task, KEYS, num_envs=3, env=given))) == len(KEYS)
    assert not given.closed


def test_no_keys_no_environment():
    task = ToyTask()
    assert list(rollout(ToyPolicy(), task, [], num_envs=3)) == [] and task.made == []


@pytest.mark.parametrize(
    "keys, num_envs, groups, rows", [(7, 6, 2, 3), (1, 6, 2, 3), (2, 16, 2, 8), (5, 5, 2, 3), (3, 1, 2, 1)]
)
def test_the_policy_always_sees_as_many_rows(keys, num_envs, groups, rows):
    """Rounding depends on the number of rows: the last episodes of a resumed evaluation must meet the same number."""
    policy = ToyPolicy()
    list(rollout(policy, ToyTask(groups=groups), KEYS[:keys], num_envs=num_envs))
    assert set(policy.calls) == {rows}


def test_a_real_policy_decides_the_same_whatever_is_beside_it():
    """The nano OpenVLA on the toy's pictures, enlarged. (Log-probabilities are equal to rounding; how far the last bit
    depends on a row's place in the batch is up to the processor.)"""
    torch.manual_seed(0)
    size = {"image_size": 32, "dino_dim": 32, "dino_depth": 2, "siglip_dim": 32, "siglip_depth": 2, "hidden_size": 64}
    size |= {"num_layers": 1, "num_heads": 2, "intermediate_size": 64}
    policy = new_nano(**size, instructions=["reach"], check_images=False)

    class Eyes(torch.nn.Module):
        runs, noise_width = 1, 16

        def act(self, obs, **options):
            images = obs["image"].repeat(8, 1).repeat(8, 2)
            return policy.act({**obs, "image": images}, **options)

        def decode(self, action, *, statistics=None):
            return np.sign(policy.decode(action)[:, :2]).round()

    def decisions(keys):
        return {key: (episode[4], episode[6]) for key, episode in run(Eyes(), ToyTask(), keys, num_envs=8).items()}

    together = decisions(KEYS)
    assert decisions(KEYS[::-1]) == together
    for key in KEYS[:3]:
        assert decisions([key]) == {key: together[key]}


def test_action_pieces():
    action = Action(torch.arange(6).view(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.zeros(3, 2))
    assert Action.cat([action[0:1], action[1:3]]).tokens.equal(action.tokens)
    assert Action.cat([action, Action(action.tokens, action.mask)]).log_prob is None
    assert len(action[torch.tensor([2, 0])]) == 2
