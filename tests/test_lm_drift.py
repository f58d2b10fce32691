"""Drift of a language model's layers: its states on held-out texts, and its weights, against the base's."""

from __future__ import annotations

import gzip
import json
import math

import hydra
import pytest
import torch
from tiny_lm import LettersTask, tiny_lm
from toy import ToyPolicy
from toy_runs import DISTANCES, LAYERS, by_layer, run

from robot_forgetting import configs
from robot_forgetting.api.config_checks import check_root
from robot_forgetting.errors import UserError
from robot_forgetting.measure import TEXT, WEIGHTS
from robot_forgetting.measures.held_out_texts import held_out_texts
from robot_forgetting.metrics import drift, representation
from robot_forgetting.policies.causal_lm import blocks as causal_lm_layers
from robot_forgetting.policies.causal_lm.blocks import blocks_of
from robot_forgetting.records.checkpoints import trainable

TEXTS = [f"What is the sum of {a} and {b}" + "? yes no" * (a % 3) for a in range(4) for b in range(3)]
LORA = {"rank": 2, "alpha": 4}
SETTINGS = {"source": "easy", "number": 12, "characters": 2000, "neighbours": 3}


def measured(policy) -> dict[tuple[str, int | None], float]:
    return {(row["measure"], row["layer"]): row["value"] for row in by_layer(policy, TEXTS)}


@torch.no_grad()
def scale(module, factor: float) -> None:
    for parameter in module.parameters():
        parameter.mul_(factor)


@pytest.mark.parametrize("options", [{}, {"lora": LORA}, {"dtype": "bfloat16"}, {"tied": False}])
def test_a_policy_has_not_drifted_from_itself(options):
    policy = tiny_lm(**options)
    rows = by_layer(policy, TEXTS)
    assert policy.blocks == 2
    assert [row["layer"] for row in rows if row["measure"] == "cka_debiased"] == [0, 1, 2]
    assert [row["layer"] for row in rows if row["measure"] == "weight_l2_relative"] == [0, 1, 2, None]
    for row in rows:
        similar = row["measure"].startswith("c")
        assert row["value"] == pytest.approx(1 if similar else 0, abs=1e-5 if similar else 0), row
        assert row["n"] == (None if "weight" in row["measure"] else 12)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_one_changed_layer_is_seen_from_it_on(layer):
    policy = tiny_lm()
    blocks = blocks_of(policy.body)
    size = drift.weight_norm(dict(policy.model.named_parameters())).item()
    changed = [policy.model.get_input_embeddings(), *blocks][layer]
    norm = drift.weight_norm(dict(changed.named_parameters())).item()
    scale(changed, 1.25)
    found = measured(policy)
    for other in range(3):
        assert (found["activation_l2_relative", other] > 1e-3) == (other >= layer)
        assert (found["cka_debiased", other] < 1 - 1e-6) == (other >= max(layer, 1))  # scaled embeddings are similar
        assert found["weight_l2_relative", other] == pytest.approx(0.25 * (other == layer), rel=1e-6)
    assert found["weight_l2_relative", None] == pytest.approx(0.25 * norm / size, rel=1e-6)


def test_a_layer_of_noise_is_another_representation():
    policy = tiny_lm()
    with torch.no_grad():
        for parameter in blocks_of(policy.body)[1].parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    found = measured(policy)
    for mask in representation.MASKS:
        assert found[f"cknna_{mask}", 1] == pytest.approx(1, abs=1e-5)
    assert found["cknna_intersection", 2] < 0.9


def test_states_are_means_of_transformers_own(monkeypatch):
    """Over a text's tokens but the first, whatever the batches."""
    policy, texts = tiny_lm(), [*TEXTS, "A"]
    expected = []
    for text in texts:
        ids = torch.tensor([policy.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = policy.model(ids, output_hidden_states=True).hidden_states
        expected.append(torch.stack([state[0, 1:].mean(0) if ids.shape[1] > 1 else state[0, 0] for state in states]))
    expected = torch.stack(expected, 1)
    assert expected.shape == (3, 13, 32)
    for at_once in (2048, 50, 1):
        monkeypatch.setattr(causal_lm_layers, "TOKENS_AT_ONCE", at_once)
        torch.testing.assert_close(policy.hidden_states({"text": texts}), expected, atol=1e-5, rtol=1e-4)
    policy.batch_rows = 2
    torch.testing.assert_close(policy.hidden_states({"text": texts}), expected, atol=1e-5, rtol=1e-4)


def test_adapters_count_as_what_they_add():
    policy = tiny_lm(lora=LORA)
    generator, expected = torch.Generator().manual_seed(0), [0.0, 0.0, 0.0]
    for name, parameter in trainable(policy).items():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        if "lora_A" in name:
            first = parameter.data
        else:
            layer = 1 + int(name.partition("layers.")[2].partition(".")[0])
            expected[layer] += (4 / 2 * parameter.data @ first).square().sum().item()
    plain = tiny_lm()
    norms = [
        drift.weight_norm(dict(module.named_parameters())).item() ** 2
        for module in [plain.model.get_input_embeddings(), *blocks_of(plain.body)]
    ]
    found = measured(policy)
    for layer in range(3):
        value = math.sqrt(expected[layer] / norms[layer])
        assert found["weight_l2_relative", layer] == pytest.approx(value, rel=1e-4)
    whole = drift.weight_norm(dict(plain.model.named_parameters())).item()
    assert found["weight_l2_relative", None] == pytest.approx(math.sqrt(sum(expected)) / whole, rel=1e-4)
    assert found["weight_l2_relative", 0] == 0 < found["weight_l2_relative", 1]
    assert found["cka_debiased", 0] == pytest.approx(1, abs=1e-5) and found["cka_debiased", 2] < 1 - 1e-6


def test_adapters_that_were_trained_before_belong_to_the_base(tmp_path):
    first = tiny_lm(lora=LORA)
    for parameter in trainable(first).values():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    first.save(tmp_path)
    policy = tiny_lm(lora={**LORA, "adapter": str(tmp_path)})
    found = measured(policy)
    assert found["weight_l2_relative", None] == 0 and found["activation_l2_relative", 2] == 0
    for parameter in trainable(policy).values():
        parameter.data *= 2  # both factors: what the adapters add is four times as much
    moved, from_nothing = measured(policy), measured(first)
    for layer in (1, 2):
        change = 3 * from_nothing["weight_l2_relative", layer]  # over the length of the plain weights
        assert moved["weight_l2_relative", layer] == pytest.approx(change, rel=0.1)


def test_measuring_changes_nothing():
    policy = tiny_lm()
    scale(blocks_of(policy.body)[0], 1.1)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    first = measured(policy)
    assert all(torch.equal(before[name], parameter) for name, parameter in policy.named_parameters())
    assert measured(policy) == first


def test_relative_changes_by_hand():
    base, tuned = torch.tensor([[3.0, 4.0], [0.0, 5.0]]), torch.tensor([[3.0, 4.0], [0.0, 4.0]])
    assert drift.activation_l2_relative(base, tuned).item() == pytest.approx(0.5 / 5)
    assert drift.activation_l2_relative(base * 0, base * 0).item() == 0
    assert drift.weight_norm({"a": base[:1], "b": base[1]}).item() == pytest.approx(math.sqrt(50))


def test_policies_without_layers_say_so():
    policy = ToyPolicy(seed=1)
    assert policy.blocks == 0
    for ask in (lambda: policy.hidden_states({}), lambda: list(policy.layer_weights())):
        with pytest.raises(UserError, match="does not show its layers"):
            ask()


@pytest.mark.parametrize(
    ("texts", "words"),
    [({"messages": []}, "on plain texts, not on"), ({"text": ["", "a"]}, "makes no token of the text ''")],
)
def test_what_cannot_be_read(texts, words):
    with pytest.raises(UserError, match=words):
        tiny_lm().hidden_states(texts)


def test_without_a_copy_of_the_base_there_is_no_drift():
    with pytest.raises(UserError, match="keeps no copy of its base"):
        list(tiny_lm(keep_base=False).layer_weights())


# ---- the texts


def test_texts_of_a_task_are_its_prompts():
    texts = held_out_texts(SETTINGS | {"number": 50, "characters": 20}, [LettersTask("new"), LettersTask("easy")])
    assert len(texts) == len(set(texts)) == 12  # the task has no more
    assert all(text.startswith("test ") and len(text) == 20 for text in texts)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz"])
def test_texts_of_a_file(tmp_path, kind):
    texts = [f"Paragraph {index}.\nIt goes on." for index in range(9)]
    repeated = [*texts, "", texts[0]]
    file = tmp_path / f"texts.{kind}"
    if kind == "txt":
        file.write_text("\n\n\n".join(repeated))
    else:
        data = "".join(json.dumps({"text": text}) + "\n" for text in repeated).encode()
        file.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    settings = SETTINGS | {"source": str(file)}
    assert held_out_texts(settings, []) == texts
    assert held_out_texts(settings | {"number": 5}, []) == texts[::2]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"source": "hellaswag"}, LookupError, "none of the tasks is hellaswag"),
        ({"source": "easy", "neighbours": 12, "number": 50}, LookupError, "easy holds 12 different texts, too few"),
        ({"source": "nothing.txt"}, UserError, "nothing.txt does not exist"),
        ({"neighbours": 12}, UserError, "number=12 must be at least 4 and above neighbours=12"),
        ({"number": 3, "neighbours": 1}, UserError, "number=3 must be at least 4"),
    ],
)
def test_texts_that_cannot_be_had(tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        held_out_texts(SETTINGS | changes, [LettersTask("easy")])


def test_a_file_with_too_few_texts(tmp_path):
    (tmp_path / "few.txt").write_text("one\n\ntwo\n\nthree\n\nthree")
    with pytest.raises(UserError, match="few.txt holds 3 different texts, too few for held_out_text.neighbours=3"):
        held_out_texts(SETTINGS | {"source": str(tmp_path / "few.txt")}, [])


# ---- in a run


def of_run(path, **options):
    given = {"policy": tiny_lm(), "task": LettersTask(), "prior": [LettersTask("easy")]}
    given |= {"held_out_text": SETTINGS, "measures": DISTANCES + LAYERS}
    return run(path, "sft", **given | options)


@pytest.mark.usefixtures("no_renderer")
def test_a_run_records_its_layers_at_every_checkpoint(tmp_path, monkeypatch):
    folder = of_run(tmp_path / "whole")
    rows = [row for row in folder.rows("divergence") if row["states"] in (TEXT, WEIGHTS)]
    assert {row["iteration"] for row in rows} == {2, 4} and len(rows) == 2 * (4 * 3 + 4)
    places = {(row["stage"], row["task"], row["role"], row["states"]) for row in rows}
    assert places == {(1, "easy", TEXT, TEXT), (1, None, None, WEIGHTS)}
    found = {(row["iteration"], row["measure"], row["layer"]): row["value"] for row in rows}
    assert 0 < found[2, "weight_l2_relative", 1] < found[4, "weight_l2_relative", 1]
    assert found[4, "cknna_intersection", 2] < 1
    kept = [row for row in folder.summary()["divergence"] if row["states"] in (TEXT, WEIGHTS)]
    assert sorted(map(json.dumps, kept)) == sorted(map(json.dumps, rows))
    assert folder.run["left_out"] == {}
    # Continued after an interruption before its last rows, it ends with the same.
    from robot_forgetting.engine import experiment

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(experiment, "summarise", interrupt)
        of_run(tmp_path / "parts")
    again = of_run(tmp_path / "parts")
    assert again.run["restarts"] == 1 and again.rows("divergence") == folder.rows("divergence")


@pytest.mark.usefixtures("no_renderer")
@pytest.mark.parametrize("settings", [None, SETTINGS | {"source": None}, SETTINGS | {"source": "hellaswag"}])
def test_a_run_without_texts(tmp_path, capsys, settings):
    folder = of_run(tmp_path / "run", held_out_text=settings)
    assert {row["states"] for row in folder.rows("divergence") if "layer" in row} == {WEIGHTS}
    named = settings is not None and settings["source"] == "hellaswag"
    assert list(folder.run["left_out"]) == ["drift by layer"] * named
    assert ("none of the tasks is hellaswag" in capsys.readouterr().err) == named


@pytest.mark.parametrize(("kind", "source"), [("robot", None), ("text", "hellaswag")])
def test_the_default_texts(kind, source):
    with hydra.initialize_config_dir(configs.__path__[0], version_base="1.3"):
        config = hydra.compose("config", overrides=[f"kind={kind}", "budget=tiny"])
        other = hydra.compose("config", overrides=["budget=full", "held_out_text.number=-1"])
    plain = hydra.utils.instantiate(config.held_out_text, _convert_="all")
    assert plain == {"source": source, "number": 12, "characters": 2000, "neighbours": 10}
    with pytest.raises(UserError, match="held_out_text.number=-1 is not a whole number"):
        check_root(hydra.utils.instantiate(other, _convert_="all", _recursive_=False) | {"policy": None})
