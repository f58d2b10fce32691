"""A policy without tokens, as docs/plug_ins.md prints it: checked, trained by its own loss, and what its page says."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from robot_forgetting.cli import command_line as cli
from robot_forgetting.conformance.check_table import Table
from robot_forgetting.conformance.task_checks import check_task
from robot_forgetting.conformance.toy_task import ToyEnv, ToyTask, tiny_policy
from robot_forgetting.engine.drift_rows import Drift
from robot_forgetting.errors import UserError
from robot_forgetting.methods.sft import SFT, demonstration_columns, encode_demonstrations
from robot_forgetting.policy import Action, Policy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.rollout import EpisodeKey, noise_of_many, rollout
from robot_forgetting.task import Demonstration

DOCUMENT = (Path(__file__).resolve().parents[1] / "docs" / "plug_ins.md").read_text(encoding="utf-8")
SNIPPETS = dict(re.findall(r"^```(?:python|yaml) (\S+)\n(.*?)^```$", DOCUMENT, re.M | re.S))
SNIPPETS |= {"my_configs/task/toy.yaml": "# A dot\n_target_: test_numbers.Recorded\n"}
RUN = ["task=toy", "prior=[]", "held_out=[]", "budget=tiny", "image_size=32", "num_envs=2",
       "processes=1", "device=cpu"]  # fmt: skip


class Recorded(ToyTask):
    """Twelve recorded demonstrations, no more; a second camera and proprioception beside the picture."""

    demonstration_count = 12

    def __init__(self, count: int = 12):
        super().__init__()
        self.demonstration_count = count

    def demonstrations(self, count, *, split="train", start=0):
        end = min(start + count, self.demonstration_count)
        for episode in super().demonstrations(end - start, split=split, start=start):
            images = episode.observations["image"]
            more = {"wrist_image": images[:, ::2, ::2], "proprioception": np.zeros((len(images), 3), np.float32)}
            yield replace(episode, observations={**episode.observations, **more})

    def make_env(self, num_envs, *, render=False):
        return SeenEnv(self, num_envs)


class SeenEnv(ToyEnv):
    def _row(self, picture):
        more = {"wrist_image": picture[::2, ::2], "proprioception": np.zeros(3, np.float32)}
        return {**super()._row(picture), **more}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in SNIPPETS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    sys.modules.pop("my_numbers", None)


def command(verb: str, *changes: str) -> int:
    return cli.main([verb, "hydra.searchpath=[file://my_configs]", *changes])


def test_check(folder, capsys, no_renderer):
    assert command("check", "policy=gaussian", "image_size=32") == 0, capsys.readouterr().out
    capsys.readouterr()
    parts = ["policy=flow", "task=toy", "method=clone_by_flow", "budget=tiny", "image_size=32"]
    assert command("check", *parts) == 0, capsys.readouterr().out
    out = capsys.readouterr().out
    assert "12 recorded, 2 of them for divergences alone" in out and "a copy of policy 'flow'" in out


@pytest.mark.parametrize("policy, method", [("gaussian", "sft"), ("gaussian", "grpo"), ("flow", "clone_by_flow")])
def test_a_run(folder, capsys, no_renderer, policy, method):
    measures = ["measures=[forward_kl, gaussian_kl]", f"budget.videos={int(policy == 'flow')}"]
    assert command("run", f"policy={policy}", f"method={method}", *RUN, *measures) == 0, capsys.readouterr().err
    (run,) = (folder / "runs" / "default").iterdir()
    rows = RunFolder(run).rows("train")
    assert all(np.isfinite(row["loss"]) for row in rows if row["loss"] is not None)
    assert {row["stage"] for row in json.loads((run / "summary.json").read_text())["success"]} == {0, 1}
    found = RunFolder(run).rows("divergence")
    assert {row["measure"] for row in found} == ({"gaussian_kl"} if policy == "gaussian" else set())
    assert all(row["value"] > 0 for row in found if row["iteration"] == 2 and method == "sft")
    assert len(list(run.glob("videos/*.mp4"))) == (2 if policy == "flow" else 0)
    if policy == "flow":
        assert cli.main(["report", "runs/default"]) == 0
        page = (folder / "report.html").read_text()
        assert re.search(r"forward KL: not defined \(policy .*flow.* has no tokens", page)


@pytest.mark.parametrize(
    "changes, lacks",
    [
        (["policy=flow", "method=sft"], "FlowPolicy lacks `log_prob`, which SFT needs"),
        (["policy=flow", "method=grpo"], "FlowPolicy lacks `log_prob`, which GRPO needs"),
        (["policy=gaussian", "method=sft", "penalty=kl_forward"], "GaussianPolicy lacks `logits`, which KL needs"),
    ],
)
def test_what_needs_tokens_is_refused_before_anything_is_measured(folder, capsys, no_renderer, changes, lacks):
    assert command("run", *changes, *RUN) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and re.search(rf"^error: my_numbers.py, line \d+: {lacks}", said[0]), said
    assert not list(folder.glob("runs/**/*.jsonl"))


# ---- actions and noise


def test_actions_in_numbers():
    action = Action.of_numbers(torch.arange(6.0).view(3, 2), torch.zeros(3, 2))
    assert len(action) == 3 and len(action[1:]) == 2 and action.tokens is None
    both = Action.cat([action[:1], Action.of_numbers(torch.ones(1, 4))])
    assert both.values.tolist() == [[0, 1, 0, 0], [1, 1, 1, 1]] and both.log_prob is None
    assert both.mask.sum(1).tolist() == [2, 4]


def test_more_noise_leaves_the_first_sixteen_numbers_as_they_are():
    narrow, wide = (noise_of_many(np.random.default_rng(3), 5, width) for width in (16, 40))
    assert wide.shape == (5, 40) and np.array_equal(narrow, wide[:, :16])
    assert np.array_equal(narrow, np.random.default_rng(3).random((5, 16), dtype=np.float32))
    assert len(np.unique(wide)) == wide.size

    class Wide(torch.nn.Module):
        runs, noise_width = 1, 40

        def __init__(self):
            super().__init__()
            self.inner = tiny_policy(ToyTask())
            self.seen = []

        def act(self, obs, *, temperature, noise):
            self.seen.append(noise)
            return self.inner.act(obs, temperature=temperature, noise=noise)

        def decode(self, action, *, statistics=None):
            return self.inner.decode(action, statistics=statistics)

    wide = Wide()
    (more,), (usual,) = (list(rollout(policy, ToyTask(), [EpisodeKey(4)], num_envs=1)) for policy in (wide, wide.inner))
    assert more.action().tokens.equal(usual.action().tokens) and wide.seen[0].shape == (1, 40)


# ---- demonstrations


def test_columns_of_demonstrations():
    old = Demonstration(np.zeros((2, 4, 4, 3)), np.ones((2, 7)), "go", 3)
    assert old.images.shape == (2, 4, 4, 3) and old.instruction == ["go", "go"]
    named = Demonstration(images=np.zeros((2, 4, 4, 3)), commands=np.ones((2, 7)), instruction=["go", "go"], seed=3)
    for one in (old, named):
        assert one.observations["instruction"] == ["go", "go"] and one.observations["image"].shape == (2, 4, 4, 3)
    task, policy = Recorded(), tiny_policy(ToyTask())
    batch = encode_demonstrations(policy, task, task.demonstrations(3))
    assert {key: len(column) for key, column in batch.obs.items()} == dict.fromkeys(
        ("image", "instruction", "wrist_image", "proprioception"), len(batch)
    )
    missing = replace(next(iter(task.demonstrations(1))), observations={"proprioception": np.zeros((2, 3))})
    with pytest.raises(UserError, match=r"needs observations with 'image'; this task gives \['proprioception'\]"):
        policy.log_prob(demonstration_columns(task, [missing]), encode_demonstrations(policy, task, [missing]).action)
    ragged = replace(missing, observations={"proprioception": np.zeros((1, 3))})
    with pytest.raises(UserError, match="gives a column 'proprioception' with 1 rows for 2 commands; give one each"):
        demonstration_columns(task, [ragged])
    with pytest.raises(UserError, match="gives columns proprioception in one episode, and image"):
        demonstration_columns(task, [missing, *task.demonstrations(1)])


@pytest.mark.parametrize("count, learned", [(12, 10), (10, 9), (2, 1), (1, 1)])
def test_recorded_demonstrations(count, learned, capsys):
    task, sft = Recorded(count), SFT(iterations=1, steps_per_iteration=1, batch_size=2, demonstrations=99,
                                     optimiser=None, seed=7)  # fmt: skip
    sft.begin(tiny_policy(ToyTask()), task, [])
    assert f"learning from {learned} of its {count} demonstrations" in capsys.readouterr().err
    seen = [episode.seed for episode in task.training_demonstrations(99, seed=7)]
    kept = [episode.seed for episode in task.held_out_demonstrations(99)]
    assert seen == list(range(learned)) and kept == list(range(learned, count))
    assert ("demonstrations" in task.compared_at()) is (count > 1)
    budget = {"divergence_episodes": 1, "divergence_states": 1}
    drift = Drift([], tiny_policy(ToyTask()), [task], budget, held_out_text=None, seed=0, num_envs=1)
    assert list(drift.without) == ([] if count > 1 else ["demonstrations of 'toy'"])


def test_recorded_demonstrations_that_go_on(no_renderer):
    class Endless(Recorded):
        def demonstrations(self, count, *, split="train", start=0):
            return ToyTask.demonstrations(self, count, split=split, start=start)

    table = Table()
    check_task(table, Endless())
    (row,) = (row for row in table.rows if row.state == "FAIL")
    assert row.name == "demonstrations" and "goes on after demonstration_count" in row.detail


def test_two_levels():
    assert not Policy.can("logits") and not Policy.can("log_prob") and type(tiny_policy(ToyTask())).can("compared")
