"""Benchmarks: every number of every item against lm-eval's own command line, and the policy as it is at the moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretend_cuda import pretended_cuda
from tiny_lm import tiny_folder, tiny_lm

pytest.importorskip("lm_eval")

from robot_forgetting.errors import UserError
from robot_forgetting.policies.causal_lm.lm import CausalLM
from robot_forgetting.tasks.benchmarks.lm_eval import LmEval

START = 1_000_000
CONFIGURATIONS = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "acc"),
    "mmlu": ("mmlu/default/mmlu_*.yaml", "acc"),
    "truthfulqa": ("truthfulqa/truthfulqa_mc1.yaml", "acc"),
    "winogrande": ("winogrande/default.yaml", "acc"),
    "ifeval": ("ifeval/ifeval.yaml", "prompt_level_strict_acc"),
    "humaneval": ("humaneval/humaneval.yaml", "pass@1"),
}

# Made-up items: as the original files hold them, and as lm-eval's configurations read them from the Hub.
ENDINGS = [
    ["sits down.", "flies away.", "is blue.", "eats a [title] roof."],
    ["runs.", "stops.", "sings.", "adds one."],
]
HELLASWAG = [
    {"activity_label": "Walking", "ctx": "A man walks. the Man", "endings": ENDINGS[0], "label": 3},
    {"activity_label": "Home", "ctx": "[header] How to add [title] 1. [step] 2.", "endings": ENDINGS[1], "label": 0},
    {"activity_label": "Sums", "ctx": "What is it? She is 2 m. tall. he asks", "endings": ENDINGS[1], "label": 1},
]  # fmt: skip
PARTS = [("A man walks.", "the Man"), (HELLASWAG[1]["ctx"], ""), ("What is it? She is 2 m. tall.", "he asks")]
MMLU = {"anatomy": ["liver", "lung", "hand"], "virology": ["virus", "host"]}
TRUTHFUL = [
    {"question": "Is one two?", "mc1_targets": {"No.": 1, "Yes.": 0}, "mc2_targets": {"No.": 1, "Yes.": 0}},
    {"question": "What?", "mc1_targets": {"A": 0, "B": 0, "C": 1}, "mc2_targets": {"A": 0, "B": 1, "C": 1}},
]
WINOGRANDE = [
    {"sentence": f"The {a} did not fit in the {b} because _ was big.", "option1": a, "option2": b, "answer": answer}
    for a, b, answer in (("sum", "letter", "1"), ("user", "system", "2"), ("answer", "one", "1"))
]
IFEVAL = [
    {"key": 1, "prompt": "Add two. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {"key": 2, "prompt": "Letters only.",
     "instruction_id_list": ["length_constraints:number_words", "change_case:english_lowercase"],
     "kwargs": [{"num_words": 3, "relation": "at least"}, {}]},
]  # fmt: skip


def _question(word: str, index: int) -> tuple[str, list[str], int]:
    return f"What is a {word}, {index}?", [word, "one, two", "yes", "no"], index % 4


def _lines(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """A data folder in the original files' layouts."""
    import csv

    root = tmp_path_factory.mktemp("data")
    _lines(root / "hellaswag" / "hellaswag_val.jsonl", HELLASWAG)
    (root / "truthfulqa").mkdir()
    (root / "truthfulqa" / "mc_task.json").write_text(json.dumps(TRUTHFUL))
    for file, rows in (("dev", WINOGRANDE), ("train_xs", WINOGRANDE[::-1])):
        _lines(root / "winogrande" / f"{file}.jsonl", [{"qID": "x", **row} for row in rows])
    _lines(root / "ifeval" / "input_data.jsonl", IFEVAL)
    for split in ("test", "dev"):
        for subject, words in MMLU.items():
            path = root / "mmlu" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                for index, word in enumerate(words if split == "test" else [*words, "letter", "sum"]):
                    question, choices, answer = _question(word, index)
                    csv.writer(file).writerow([question, *choices, "ABCD"[answer]])
    return root


@pytest.fixture(scope="module")
def hub_files(tmp_path_factory) -> dict[str, dict]:
    """lm-eval's configuration file -> {split: file} with the columns of the Hub's data sets."""
    root = tmp_path_factory.mktemp("hub")
    hellaswag = [
        {key: row[key] for key in ("activity_label", "endings")} | {"ctx_a": a, "ctx_b": b, "label": str(row["label"])}
        for row, (a, b) in zip(HELLASWAG, PARTS, strict=True)
    ]  # fmt: skip
    truthful = [
        {"question": row["question"]}
        | {key: {"choices": choices, "labels": labels} for key, (choices, labels) in targets.items()}
        for row, targets in zip(
            TRUTHFUL,
            [
                {"mc1_targets": (["No.", "Yes."], [1, 0]), "mc2_targets": (["No.", "Yes."], [1, 0])},
                {"mc1_targets": (["C", "A", "B"], [1, 0, 0]), "mc2_targets": (["B", "C", "A"], [1, 1, 0])},
            ],
            strict=True,
        )
    ]
    made = {
        "hellaswag/hellaswag.yaml": {"validation": hellaswag, "train": hellaswag},
        "truthfulqa/truthfulqa_mc1.yaml": {"validation": truthful},
        "winogrande/default.yaml": {"validation": WINOGRANDE, "train": WINOGRANDE[::-1]},
        "ifeval/ifeval.yaml": {"train": IFEVAL},
    }
    for subject, words in MMLU.items():
        made[f"mmlu/default/mmlu_{subject}.yaml"] = {
            split: [
                dict(zip(("question", "choices", "answer"), _question(word, index), strict=True)) | {"subject": subject}
                for index, word in enumerate(words if split == "test" else [*words, "letter", "sum"])
            ]
            for split in ("test", "dev")
        }
    return {
        name: {split: str(_lines(root / f"{Path(name).stem}_{split}.jsonl", rows)) for split, rows in splits.items()}
        for name, splits in made.items()
    }


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), context=1024)


def command_line(model: Path, files: dict, names: list[str], folder: Path, *more: str) -> dict[str, dict[int, dict]]:
    """Task -> document -> what `lm_eval --log_samples` wrote of it."""
    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks"
    wanted = []
    for name in names:
        wanted.append(f"ours_{Path(name).stem}")
        config = f"include: {tasks / name}\ntask: {wanted[-1]}\ndataset_path: json\ndataset_name: null\n"
        config += f"dataset_kwargs: {json.dumps({'data_files': files[name]})}\n"
        if name.startswith("ifeval"):
            config += "generation_kwargs: {until: [], do_sample: false, temperature: 0.0, max_gen_toks: 12}\n"
        (folder / f"{wanted[-1]}.yaml").write_text(config)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model},dtype=float32"]
    command += ["--tasks", ",".join(wanted), "--include_path", str(folder), "--device", "cpu", "--batch_size", "1"]
    command += ["--log_samples", "--output_path", str(folder / "out"), *more]
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for name, task in zip(names, wanted, strict=True):
        (file,) = (folder / "out").glob(f"**/samples_{task}_*.jsonl")
        rows = map(json.loads, file.read_text().splitlines())
        found[name] = {row["doc_id"]: row for row in rows}
    return found


def ours(name: str, policy, **options) -> dict[tuple[str, int], object]:
    """(lm-eval's task, document) -> episode."""
    configuration, metric = CONFIGURATIONS[name]
    task = LmEval(name, configuration=configuration, metric=metric, **options)
    episodes = list(task.score(policy, task.chosen(None)))
    assert sorted(episode.key.seed for episode in episodes) == list(range(START, START + task.size()))
    return {task._index[episode.key.seed - START]: episode for episode in episodes}


def same(theirs: dict, episode, metric: str) -> None:
    """Metrics, and log-likelihoods or texts, without any tolerance."""
    for key in theirs["metrics"]:
        assert episode.flags[key] == theirs[key], key
    assert episode.reward == float(theirs[metric]) and episode.success == (theirs[metric] == 1)
    said = [response[0] for response in theirs["resps"]]
    (given,) = episode.commands
    if isinstance(said[0], list):
        assert [(float(a), str(b)) for a, b in said] == [(a, str(b)) for a, b in given]
        assert episode.flags["log_likelihoods"] == [float(a) for a, _ in said]
    else:
        assert said == given


@pytest.mark.parametrize("chat", [False, True])
def test_every_number_is_that_of_the_command_line(originals, hub_files, model_folder, tmp_path, monkeypatch, chat):
    """Without examples and chat format, all of them; with both, those that have a split to draw examples from."""
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    more = ["--apply_chat_template", "--num_fewshot", "2"] if chat else []
    names = [name for name in hub_files if not chat or name.startswith(("mmlu", "winogrande", "ifeval"))]
    theirs = command_line(model_folder, hub_files, names, tmp_path, *more)
    policy = CausalLM(str(model_folder), name="tiny", device="cpu")
    options = {"chat_template": chat}
    for name in dict.fromkeys(name.partition("/")[0] for name in names):
        shots = 2 if chat and name != "ifeval" else 0  # lm-eval's configuration of ifeval insists on none
        found = ours(name, policy, num_fewshot=shots, max_new_tokens=12, **options)
        files = [file for file in names if file.startswith(name)]
        assert len(found) == sum(len(theirs[file]) for file in files) > 0
        for (subtask, number), episode in found.items():
            file = next(file for file in files if name != "mmlu" or file.endswith(f"{subtask}.yaml"))
            same(theirs[file][number], episode, CONFIGURATIONS[name][1])


def test_larger_batches_hold_what_the_command_line_puts_into_them(
    originals, hub_files, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    name = "hellaswag/hellaswag.yaml"
    theirs = command_line(model_folder, hub_files, [name], tmp_path, "--batch_size", "5")
    found = ours("hellaswag", CausalLM(str(model_folder), name="tiny", device="cpu"), batch_size=5)
    for (_, number), episode in found.items():
        same(theirs[name][number], episode, "acc")


# ---- the policy


def likelihoods(task: LmEval, policy) -> list[list[float]]:
    return [episode.flags["log_likelihoods"] for episode in task.score(policy, task.chosen(None))]


@pytest.fixture
def winogrande(originals, monkeypatch) -> LmEval:
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    return LmEval("winogrande", configuration="winogrande/default.yaml", metric="acc")


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4, "targets": None}])
def test_fine_tuned_and_base_are_told_apart(winogrande, lora):
    plain = likelihoods(winogrande, tiny_lm())
    policy = tiny_lm(lora=lora)
    assert likelihoods(winogrande, policy) == plain
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tuned = likelihoods(winogrande, policy)
    assert all(a != b for a, b in zip(sum(tuned, []), sum(plain, []), strict=True))
    with policy.base():
        assert likelihoods(winogrande, policy) == plain
    assert likelihoods(winogrande, policy) == tuned


def test_scoring_leaves_the_policy_and_the_random_numbers_alone(winogrande):
    policy = tiny_lm()
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    pad, side = policy.tokenizer.pad_token, policy.tokenizer.padding_side
    state = torch.random.get_rng_state()
    likelihoods(winogrande, policy)
    assert torch.equal(state, torch.random.get_rng_state())
    assert (pad, side) == (policy.tokenizer.pad_token, policy.tokenizer.padding_side)
    assert all(torch.equal(before[key], value) for key, value in policy.state_dict().items())


def test_items_do_not_depend_on_which_others_are_scored(originals, monkeypatch):
    """Examples in the prompt are drawn document by document, as the whole benchmark would."""
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    policy = tiny_lm()
    make = {"configuration": "winogrande/default.yaml", "metric": "acc", "num_fewshot": 1}
    whole = likelihoods(LmEval("winogrande", **make), policy)
    task = LmEval("winogrande", **make)
    order = [seed - START for seed in task.chosen(None)]
    alone = {}
    for item in (2, 0, 1):
        (episode,) = task.score(policy, [START + item])
        alone[item] = episode.flags["log_likelihoods"]
    assert [alone[item] for item in order] == whole


# ---- tasks


def test_mmlu_is_all_its_subjects_one_after_another(originals, monkeypatch):
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    task = LmEval("mmlu", configuration="mmlu/default/mmlu_*.yaml", metric="acc", limit=3)
    assert [task._index[i] for i in range(5)] == [("mmlu_anatomy", 0), ("mmlu_anatomy", 1), ("mmlu_anatomy", 2),
                                                  ("mmlu_virology", 0), ("mmlu_virology", 1)]  # fmt: skip
    assert task.chosen(None) == [START, START + 4, START + 2] == task.chosen(10)
    assert task.chosen(2) == [START, START + 4]
    assert task.chance(task.chosen(None)) == 0.25
    assert task.items([START + 5]) == [0]  # beyond its size: again, in the order of `chosen`
    messages = task.prompts([START + 3])["messages"]
    assert messages[0][0]["content"].endswith("What is a virus, 0?\nA. virus\nB. one, two\nC. yes\nD. no\nAnswer:")


def test_chance_is_that_of_the_chosen_items(originals, monkeypatch):
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    task = LmEval("truthfulqa", configuration="truthfulqa/truthfulqa_mc1.yaml", metric="acc")
    assert task.chance([START, START + 1]) == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert LmEval("ifeval", configuration="ifeval/ifeval.yaml", metric="prompt_level_strict_acc").chance([START]) == 0


def test_winogrande_prompts_end_before_the_options(winogrande):
    text = winogrande.prompts([START])["messages"][0][0]["content"]
    assert text == "The sum did not fit in the letter because"


def test_other_settings_or_items_are_other_benchmarks(originals, tmp_path, monkeypatch):
    """``spec`` goes into the fingerprint: base rows of the one are never used for the other."""
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    make = {"configuration": "winogrande/default.yaml", "metric": "acc"}
    one = LmEval("winogrande", **make).spec
    assert LmEval("winogrande", limit=2, batch_size=4, **make).spec == one
    assert LmEval("winogrande", num_fewshot=1, **make).spec != one
    _lines(tmp_path / "winogrande" / "dev.jsonl", WINOGRANDE[:2])
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(tmp_path))
    assert LmEval("winogrande", **make).spec != one


def test_what_cannot_be_scored_says_why(winogrande, originals, shared, monkeypatch):
    from toy import ToyPolicy

    task = LmEval("winogrande", configuration="winogrande/default.yaml", metric="accuracy")
    with pytest.raises(UserError, match="has no metric accuracy; choose one of: acc"):
        list(task.score(tiny_lm(), [START]))
    with pytest.raises(UserError, match="policy 'toy' is no language model"):
        list(winogrande.score(ToyPolicy(), [START]))
    with pytest.raises(UserError, match="num_fewshot=1 takes examples from the training split"):
        LmEval("hellaswag", configuration="hellaswag/hellaswag.yaml", metric="acc", num_fewshot=1).size()
    with pytest.raises(UserError, match="limit=0 is not a whole number from 1"):
        LmEval("winogrande", configuration="winogrande/default.yaml", metric="acc", limit=0)
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(shared / "data"))
    humaneval = LmEval("humaneval", configuration="humaneval/humaneval.yaml", metric="pass@1")
    with pytest.raises(UserError, match="allow_code_execution=true"):
        list(humaneval.score(tiny_lm(), [START]))


# ---- what is cut off, what does not fit, where examples come from


def test_prompts_and_answers_that_are_cut_are_counted_and_said(originals, model_folder, monkeypatch, capsys):
    """By hand: HellaSwag's longest request of an item, in tokens beyond the context and the one that is predicted."""
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    whole = CausalLM(str(model_folder), device="cpu")
    task = LmEval("hellaswag", configuration="hellaswag/hellaswag.yaml", metric="acc")
    assert not any("prompt_cut" in episode.flags for episode in task.score(whole, range(START, START + 3)))
    assert not capsys.readouterr().err
    short = CausalLM(str(model_folder), device="cpu", context=14)
    found = list(task.score(short, range(START, START + 3)))
    for episode, document in zip(found, task._documents["hellaswag"], strict=True):
        longest = max(
            len(whole.prompts.tokens([document["query"]])[0]) + len(whole.prompts.tokens([" " + choice])[0])
            for choice in document["choices"]
        )
        assert episode.flags.get("prompt_cut", 0) == max(0, longest - 15)
    count = sum("prompt_cut" in episode.flags for episode in found)
    assert 0 < count
    assert f"hellaswag: {count} of 3 prompts have more than the 14 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_that_end_by_themselves_are_not_cut(originals, model_folder, monkeypatch, capsys, batch_size):
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    options = {"configuration": "ifeval/ifeval.yaml", "metric": CONFIGURATIONS["ifeval"][1], "batch_size": batch_size}
    policy = CausalLM(str(model_folder), device="cpu")
    task = LmEval("ifeval", max_new_tokens=5, **options)
    assert [episode.flags.get("answer_cut") for episode in task.score(policy, [START, START + 1])] == [True, True]
    assert "ifeval: 2 of 2 answers were cut off" in capsys.readouterr().err

    def generate(self, context, max_length, stop, **more):  # the first row ends, the others do not
        made = torch.full((len(context), max_length), 7)
        made[:, : context.shape[1]] = context
        made[0, context.shape[1] + 2] = self.eot_token_id
        return made

    monkeypatch.setattr(HFLM, "_model_generate", generate)
    flags = [episode.flags.get("answer_cut") for episode in task.score(policy, [START, START + 1])]
    assert sorted(flags, key=str) == ([None, None] if batch_size == 1 else [None, True])


@pytest.mark.parametrize(("name", "context", "said"), [
    ("hellaswag", 4, "has an answer of .* tokens, and policy 'causal-lm' reads 4 at most"),
    ("ifeval", 1024, "lets an answer have 1280 tokens, and policy 'causal-lm' reads 1024 .*lower task.max_new_tokens"),
])  # fmt: skip
def test_a_benchmark_that_does_not_fit_into_the_context_is_one_line(
    originals, model_folder, monkeypatch, name, context, said
):
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(originals))
    configuration, metric = CONFIGURATIONS[name]
    policy = CausalLM(str(model_folder), device="cpu", context=context, max_new_tokens=2)
    with pytest.raises(UserError, match=said):
        list(LmEval(name, configuration=configuration, metric=metric).score(policy, [START]))


@pytest.mark.parametrize("name", ["winogrande", "hellaswag", "ifeval", "truthfulqa"])
def test_examples_are_never_the_items_that_are_asked(name, originals, tmp_path, monkeypatch):
    import shutil

    shutil.copytree(originals, tmp_path / "data")
    for file in (tmp_path / "data" / "winogrande").glob("train*"):
        file.unlink()
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(tmp_path / "data"))
    configuration, metric = CONFIGURATIONS[name]
    assert LmEval(name, configuration=configuration, metric=metric).size() > 0
    with pytest.raises(UserError, match="num_fewshot=1 takes examples from the training split, and there is none"):
        LmEval(name, configuration=configuration, metric=metric, num_fewshot=1).size()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_byte_order_mark_is_no_part_of_a_text(name, originals, shared, tmp_path, monkeypatch):
    import shutil

    source = originals / name if name != "humaneval" else None
    if source is None:
        rows = [{"task_id": "t", "prompt": "p", "entry_point": "f", "canonical_solution": "s", "test": "x"}]
        source = _lines(tmp_path / "plain" / "HumanEval.jsonl", rows).parent
    for copy in ("plain", "marked"):
        shutil.copytree(source, tmp_path / copy / name, dirs_exist_ok=True)
    for file in (tmp_path / "marked").rglob("*.*"):
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    from robot_forgetting.tasks.benchmarks.lm_eval_data import local_splits

    found = []
    for copy in ("plain", "marked"):
        monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(tmp_path / copy))
        found.append(local_splits(name))
    assert found[0] == found[1]


# ---- humaneval


@pytest.mark.parametrize("punkt", [True, False])
def test_ifeval_does_without_the_items_that_need_punkt(tmp_path, monkeypatch, capsys, punkt):
    needs = {"key": 3, "prompt": "Two sentences.", "instruction_id_list": ["length_constraints:number_sentences"],
             "kwargs": [{"num_sentences": 2, "relation": "at least"}]}  # fmt: skip
    _lines(tmp_path / "ifeval" / "input_data.jsonl", [IFEVAL[0], needs, IFEVAL[1]])
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(tmp_path))
    monkeypatch.setattr("robot_forgetting.tasks.benchmarks.lm_eval.punkt", lambda: punkt)
    configuration, metric = CONFIGURATIONS["ifeval"]
    task = LmEval("ifeval", configuration=configuration, metric=metric, max_new_tokens=4)
    assert task.left_out() is None
    assert task.size() == (3 if punkt else 2)
    assert ("without" in task.settings()) != punkt
    assert ("1 of 3 items, which need nltk's punkt_tab" in capsys.readouterr().err) != punkt
    if not punkt:
        numbers = [number for _, number in task._index]
        assert numbers == [0, 2]  # lm-eval's own numbers
        assert [episode.key.seed for episode in task.score(tiny_lm(context=512), task.chosen(None))] == task.chosen(
            None
        )


def test_humaneval_scores_what_the_model_would_have_written(shared, monkeypatch):
    """The model's texts are replaced by known ones; prompts, stops and programs stay lm-eval's."""
    from lm_eval.models.huggingface import HFLM

    from robot_forgetting.tasks.benchmarks.code_sandbox import lock_problem

    if (problem := lock_problem()) is not None:
        pytest.skip(f"no jail on this machine: {problem}")
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(shared / "data"))
    seen = []

    def generate(self, requests, disable_tqdm=False):
        seen.extend(request.args for request in requests)
        return [request.doc["canonical_solution"] if request.doc_id % 2 else "    pass\n" for request in requests]

    monkeypatch.setattr(HFLM, "generate_until", generate)
    options = {"max_new_tokens": 32, "allow_code_execution": True}
    task = LmEval("humaneval", configuration="humaneval/humaneval.yaml", metric="pass@1", **options)
    assert task.size() == 164
    episodes = list(task.score(tiny_lm(), range(START, START + 4)))
    assert [episode.success for episode in episodes] == [False, True, False, True]
    assert [episode.flags["pass@1"] for episode in episodes] == [0.0, 1.0, 0.0, 1.0]
    assert episodes[0].flags["why"].startswith("AssertionError")
    assert seen[0][0].startswith("from typing import List\n\n\ndef has_close_elements(")
    assert seen[0][1]["until"] == ["\nclass", "\ndef", "\n#", "\nif", "\nprint"] and seen[0][1]["max_gen_toks"] == 32
    assert "evaluate" not in sys.modules or "code_eval" not in str(vars(sys.modules["evaluate"]))


# ---- data


def test_layouts_of_the_original_files(shared, monkeypatch):
    from robot_forgetting.tasks.benchmarks.lm_eval_data import local_splits

    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(shared / "data"))
    sizes = {
        name: [len(rows) for splits in local_splits(name).values() for rows in splits.values()]
        for name in CONFIGURATIONS
    }
    assert sizes["hellaswag"] == [305] and sizes["humaneval"] == [164] and sizes["ifeval"] == [541]
    assert sizes["truthfulqa"] == [300] and sizes["winogrande"] == [300, 160]
    assert (len(sizes["mmlu"]), sum(sizes["mmlu"])) == (114, 342 + 285)
    first = local_splits("hellaswag")[""]["validation"][0]
    assert (first["ctx_a"], first["ctx_b"], first["label"]) == ("A man is sitting on a roof.", "he", "3")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("winogrande/dev.jsonl", '{"sentence": "no", "option1": "a", "option2": "b", "answer": "1"}', "needs one '_'"),
        ("winogrande/dev.jsonl", '{"sentence": "a _"}', "row 1: no 'option1'"),
        ("winogrande/dev.jsonl", "", "holds no rows"),
        ("truthfulqa/mc_task.json", '[{"question": "?", "mc1_targets": {"a": 0}, "mc2_targets": {}}]', "one right"),
        ("mmlu/test/anatomy_test.csv", "a,b,c", "row 1 is not question, A, B, C, D, letter"),
        ("mmlu/test/anatomy_test.csv", "q,a,b,c,d,AB", "row 1 is not question, A, B, C, D, letter"),
        ("mmlu/test/anatomy_test.csv", "q,a,b,c,d,", "row 1 is not question, A, B, C, D, letter"),
        ("truthfulqa/mc_task.json", '[{"question": "?", "mc1_targets": {"a": "1"}, "mc2_targets": {}}]', "row 1: mc1"),
        ("hellaswag/other.jsonl", "{}", r"holds no \*val\*.jsonl"),
        ("hellaswag/val.jsonl", json.dumps({**HELLASWAG[0], "label": None}), "row 1: 'label' is not a whole number or"),
        ("hellaswag/val.jsonl", '{"ctx": "a", "activity_label": "b", "endings": ["c"]}', "row 1: no 'label'"),
        ("hellaswag/val.jsonl", json.dumps({**HELLASWAG[0], "label": 4}), "row 1: label '4' is none of its endings"),
        ("hellaswag/val.jsonl", json.dumps({**HELLASWAG[0], "endings": [1, 2]}), "row 1: label '3' is none"),
        ("ifeval/input_data.jsonl", json.dumps({**IFEVAL[1], "kwargs": [{}]}), "row 1: no 'kwargs.1'"),
        ("winogrande/dev.jsonl", "\n" + json.dumps({**WINOGRANDE[0], "answer": "3"}), "row 2: needs one"),
        ("humaneval/HumanEval.jsonl", json.dumps({"task_id": "\ud800"}), "row 1: 'task_id' holds half a character"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tmp_path, monkeypatch, file, text, message):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    if "mmlu" in file:
        (tmp_path / "mmlu" / "dev").mkdir()
        (tmp_path / "mmlu" / "dev" / "anatomy_dev.csv").write_text("q,a,b,c,d,A\n")
    monkeypatch.setenv("ROBOT_FORGETTING_DATA", str(tmp_path))
    name = file.partition("/")[0]
    with pytest.raises(UserError, match=message):
        LmEval(name, configuration=CONFIGURATIONS[name][0], metric="acc").size()


def test_a_benchmark_is_scored_on_a_gpu(winogrande):
    on_cpu = likelihoods(winogrande, tiny_lm())
    with pretended_cuda():
        on_gpu = likelihoods(winogrande, tiny_lm(device="cuda"))
    assert [row == pytest.approx(other, rel=1e-4) for row, other in zip(on_gpu, on_cpu, strict=True)] == [True] * len(
        on_cpu
    )
