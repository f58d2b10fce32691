"""Measures of a change: values by hand, every one on every kind of policy, in a run, of a user's own."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_lm import LettersTask, tiny_lm
from toy import ToyPolicy
from toy_runs import DISTANCES, run

from robot_forgetting.api.arguments import Arguments
from robot_forgetting.cli import command_line as cli
from robot_forgetting.conformance.policy_checks import observations
from robot_forgetting.conformance.toy_task import ToyTask, perturb, tiny_policy
from robot_forgetting.engine.drift_rows import Drift
from robot_forgetting.errors import PluginError
from robot_forgetting.measure import BASE, TEXT, WEIGHTS, Measure, Quantity, States, measured
from robot_forgetting.measures import weights
from robot_forgetting.measures.distributions import JensenShannon
from robot_forgetting.metrics import drift
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.records.checkpoints import trainable
from robot_forgetting.studies.digits.probe import fisher

CONFIGS = Path(__file__).parents[1] / "configs" / "measure"
DOCUMENT = (Path(__file__).parents[1] / "docs" / "measures.md").read_text(encoding="utf-8")
LORA = {"rank": 2, "alpha": 4}


@pytest.fixture(scope="module")
def every() -> list[Measure]:
    names = [file.stem for file in CONFIGS.glob("*.yaml")]
    return Arguments("run", [f"measures=[{','.join(names)}]"]).value("measures")


# ---- every measure, every kind of policy


def robot(**options) -> tuple:
    obs = observations(32, ["push the dot to the right", "stop"])
    obs = {key: np.tile(column, (2, 1, 1, 1)) if key == "image" else column * 2 for key, column in obs.items()}
    return tiny_policy(ToyTask(), **options), States(obs, np.arange(12) // 3)


def language(**options) -> tuple:
    task = LettersTask()
    return tiny_lm(**options), States(task.observations(task.seeds("test")[:12]), np.arange(12))


def digits() -> tuple:
    features = np.random.default_rng(0).random((12, 5), dtype=np.float32)
    return MLPPolicy(sizes=(5, 8, 6, 3)), States({"features": features}, np.arange(12))


KINDS = {
    "robot": robot, "robot-lora": lambda: robot(lora=LORA), "language": language,
    "language-lora": lambda: language(lora=LORA), "digits": digits,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_measure_on_every_kind_of_policy(every, kind):
    policy, states = KINDS[kind]()
    assert [one.undefined(policy) for one in every] == [None] * len(every)
    texts = [f"What is the sum of {index}" + "? yes no" * (index % 3) for index in range(12)]
    places = [states, States({"text": texts}, np.arange(12), TEXT), States(name=WEIGHTS)]

    def rows() -> list[dict]:
        return [row for place in places for row in measured(every, policy, place)]

    with policy.base():
        pass
    at_base, similar = rows(), {one.name: float(one.similarity) for one in every}
    assert {row["measure"] for row in at_base} == similar.keys()
    for row in at_base:
        assert row["value"] == pytest.approx(similar[row["measure"]], abs=1e-5), row
        assert Quantity.of(row).unit in next(one.units for one in every if one.name == row["measure"])
    with torch.no_grad():
        perturb(policy)
    moved = rows()
    assert moved == rows() and len(moved) == len(at_base) and all(math.isfinite(row["value"]) for row in moved)
    assert {row["measure"] for row in moved if row["value"] != similar[row["measure"]]} == similar.keys()


# ---- by hand


class Weights(ToyPolicy):
    """Two layers and a rest, whose numbers are given."""

    BASE = [torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([0.0, 0.0]), torch.tensor([[5.0]])]
    OWN = [torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([0.0, 0.0]), torch.tensor([[9.0]])]

    def layer_weights(self):
        for layer, base, own in zip((0, 1, None), self.BASE, self.OWN, strict=True):
            yield layer, {"w": base}, {"w": own}


@pytest.mark.parametrize(
    ("measure", "values"),
    [
        (weights.RelativeL1(), [3 / 7, None, 7 / 12]),
        (weights.RelativeL2(), [3 / 5, None, math.sqrt(25 / 50)]),
        (weights.Spectral(), [3, 0, 4]),
        (weights.Sparsity(), [3 / 4, 1, 5 / 7]),
        (weights.Sparsity(tolerance=3), [1, 1, 6 / 7]),
        (weights.Rank(), [1 / 2, None, 3 / 4]),
        (weights.EffectiveRank(), [1 / 2, None, 3 / 4]),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_changes_of_weights_by_hand(measure, values):
    """By layer 0 and 1, and of all weights; where a layer has no length or no matrix, a ratio to it is not defined."""
    rows = measured([measure], Weights(seed=1), States(name=WEIGHTS))
    assert [row["layer"] for row in rows] == [0, 1, None]
    assert [row["value"] for row in rows] == [None if v is None else pytest.approx(v) for v in values]


def test_jensen_shannon_of_distributions_that_share_nothing_is_log_2():
    given = {"layer1.weight": torch.zeros(1, 2), "layer1.bias": torch.tensor([99.0, 0.0])}
    policy = MLPPolicy(sizes=(1, 2), weights=given)
    with torch.no_grad():
        policy.vectors.copy_(torch.tensor([0.0, 99.0]))
    (row,) = measured([JensenShannon()], policy, States({"features": np.zeros((3, 1), np.float32)}, np.arange(3)))
    assert row["value"] == pytest.approx(math.log(2)) and row["n"] == row["episodes"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_at_the_base_are_those_along_the_change(kind):
    """Their inner product with the change is the derivative of the log-probability from the base towards the policy."""
    policy, states = KINDS[kind]()
    start = {name: parameter.detach().clone() for name, parameter in trainable(policy).items()}
    with policy.base(), torch.no_grad():
        action = policy.act(states.obs, noise=torch.full((12, policy.noise_width), 0.4))
        at_base = policy.log_prob(states.obs, action).sum().item()
    with torch.no_grad():
        perturb(policy, scale=0.02)
        slope = sum((slope * change).sum() for slope, change in policy.base_slopes(states.obs, action)).item()
        for name, parameter in trainable(policy).items():
            if "lora_A" not in name:
                parameter.copy_(start[name] + 0.01 * (parameter - start[name]))
        moved = policy.log_prob(states.obs, action).sum().item()
    assert slope == pytest.approx((moved - at_base) / 0.01, rel=0.05, abs=0.02)


def test_the_change_by_the_fisher_is_that_of_the_exact_fisher():
    policy, _ = digits()
    features = torch.rand(1, 5, generator=torch.Generator().manual_seed(1))
    start = policy.base_network()
    with torch.no_grad():
        perturb(policy)
    exact = drift.weight_fisher_l2(start, policy.network(), fisher(start, features)).item()
    states = States({"features": features.expand(1500, -1).numpy()}, np.arange(1500))
    (row,) = measured([weights.FisherL2(decisions=1500)], policy, states)
    assert row["value"] == pytest.approx(exact, rel=0.1) and row["n"] == 1500


def test_a_quantity_is_written_as_before():
    row = {"measure": "weight_l2_relative", "unit": "1", "role": None, "states": WEIGHTS}
    assert str(Quantity.of(row)) == "weight_l2_relative|1||weights"
    assert str(Quantity("forward_kl", "nats/token", "new", BASE)) == "forward_kl|nats/token|new|base"


# ---- in a run


class Odd(Measure):
    name, title = "odd", "odd one"

    def __init__(self, value, name: str = "odd"):
        self.value, self.name = value, name

    def at(self, policy):
        return (WEIGHTS,)

    def measure(self, policy, states):
        return [{"measure": "odd", "unit": "1", "value": self.value, "standard_error": None, "n": None}]


@pytest.mark.usefixtures("no_renderer")
def test_a_run_measures_once_leaves_out_what_is_undefined_and_names_what_is_no_number(tmp_path, capsys):
    measures = [*DISTANCES, weights.RelativeL2(), Odd(math.nan)]
    folder = run(tmp_path / "run", "sft", measures=measures)
    said = capsys.readouterr().err
    assert folder.run["undefined"] == {
        "weight_l2_relative": "policy 'toy' does not show its weights; it lacks `layer_weights`"
    }
    assert folder.run["measures"]["odd"] == {"title": "odd one", "similarity": False}
    assert said.count("iteration 4: odd (weights) is nan; its row says null\n") == 1
    rows = folder.rows("divergence")
    assert [row["value"] for row in rows if row["measure"] == "odd"] == [None, None]  # an interim point, and the end
    policy, tasks = ToyPolicy(seed=1), {"new": [], "prior": []}
    drift = Drift(measures, policy, [], {"divergence_episodes": 3, "divergence_states": 9},
                  held_out_text=None, seed=0, num_envs=1)  # fmt: skip
    drift.measure(folder, tasks, stage=1, iteration=4)
    assert folder.rows("divergence") == rows


def test_rows_of_another_name_are_the_measures_fault():
    said = r"test_measures.py, line \d+: Odd.measure\(\) gives .*list rows .* of 'mine' in '1'"
    with pytest.raises(PluginError, match=said):
        measured([Odd(1.0, "mine")], ToyPolicy(seed=1), States(name=WEIGHTS))


# ---- a user's own, as the document prints it


def test_a_measure_of_ones_own_is_one_class_and_one_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"^```(?:python|yaml) (\S+)\n(.*?)^```$", DOCUMENT, re.M | re.S):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    command = re.search(r"^    robot-forgetting (check .*)$", DOCUMENT, re.M)[1].replace("'", "").split()
    assert cli.main(command) == 0
    assert "Hellinger distance, in 1/token" in capsys.readouterr().out
    assert cli.main(["run", "hydra.searchpath=[file://my_configs]", "measures=[l2,helinger]"]) == 2
    assert "unknown measure 'helinger'; choose one of: activation_l1_relative" in capsys.readouterr().err
    assert cli.main(["run", "measure=l2"]) == 2
    assert "measure= is for `check`; write measures=[forward_kl,l2]" in capsys.readouterr().err


def test_the_document_names_every_measure():
    assert set(re.findall(r"^\| `(\w+)`", DOCUMENT, re.M)) == {file.stem for file in CONFIGS.glob("*.yaml")}
