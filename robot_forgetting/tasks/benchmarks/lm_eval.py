"""Benchmarks of the LM Evaluation Harness, scored in process on the policy's own model: the paper's prior tasks.

Prompts, answer extraction and metrics are lm-eval's own (its task configurations, its ``HFLM``), so that every item's
score equals that of its command line on the same model and items. HumanEval alone differs: lm-eval would run the code
that the model writes in its own process; here it goes through ``code_sandbox``.

Items are numbered as lm-eval numbers them; MMLU's subjects follow one another in alphabetical order. Log-likelihoods
round differently in batches of other rows: with ``batch_size`` 1, lm-eval's default, an item's numbers do not depend on
which others are scored, and items are recorded as they come; larger batches hold what lm-eval would put into them, and
a benchmark is recorded when all of it is scored.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated

import numpy as np

from robot_forgetting.contracts import checked_settings
from robot_forgetting.errors import UserError, one_line
from robot_forgetting.machine.progress import say
from robot_forgetting.policy import Policy
from robot_forgetting.ranges import Count, Range, Tokens
from robot_forgetting.rollout import Episode, EpisodeKey
from robot_forgetting.scored import ScoredTask
from robot_forgetting.tasks.benchmarks.code_sandbox import check_allowed, protection, run_tests
from robot_forgetting.tasks.benchmarks.lm_eval_data import Splits, local_splits
from robot_forgetting.tasks.benchmarks.lm_eval_library import installed, punkt, quiet
from robot_forgetting.tasks.sources import VARIABLE

FEWSHOT_SEED = 1234  # of lm-eval's command line
CHUNK = {"multiple_choice": 8, "generate_until": 4}  # items scored and recorded at once where batches hold one row
SPLITTING = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}  # IFEval's that need punkt


class LmEval(ScoredTask):
    """One benchmark.

    name: hellaswag, mmlu, truthfulqa, ifeval, winogrande or humaneval: the folder of its data
    configuration: lm-eval's yaml below its ``tasks`` folder, or a pattern for one yaml per subject
    metric: the key of lm-eval whose value makes an item a success; the others are kept as flags
    num_fewshot: examples in the prompt; chat_template: whether prompts are put into the model's chat format
    limit: only so many items, see ``ScoredTask.chosen``
    batch_size: rows of a forward pass; None: 1 on a CPU, 16 on an accelerator
    max_new_tokens: of generated answers; None: lm-eval's own number (IFEval 1280, HumanEval 1024)
    allow_code_execution: false, true or "unconfined", see ``code_sandbox.check_allowed``; HumanEval alone asks
    """

    def __init__(
        self,
        name: str,
        *,
        configuration: str,
        metric: str,
        num_fewshot: Annotated[int, Range(0, 1000)] = 0,
        chat_template: bool = False,
        limit: Count | None = None,
        batch_size: Count | None = None,
        max_new_tokens: Tokens | None = None,
        allow_code_execution: bool | str = False,
    ):
        self.name, self.configuration, self.metric = name, configuration, metric
        self.num_fewshot, self.chat_template, self.limit = num_fewshot, chat_template, limit
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.allow_code_execution = allow_code_execution
        self._drawn: dict[str, list] = {}  # task -> prompts with their examples
        self._drawn_for: str | None = None  # the chat template they were made with
        checked_settings(self)

    # ---- ScoredTask

    def size(self) -> int:
        return len(self._index)

    def left_out(self) -> str | None:
        return check_allowed(self.allow_code_execution, self.name) if self._runs_code else None

    def chance(self, seeds: Sequence[int]) -> float:
        """Mean of 1 / choices over the items; 0 where answers are written freely."""
        levels = []
        for item in self.items(seeds):
            subtask, number = self._index[item]
            task = self._tasks[subtask]
            several = task.OUTPUT_TYPE == "multiple_choice"
            levels.append(1 / len(task.doc_to_choice(self._documents[subtask][number])) if several else 0.0)
        return float(np.mean(levels))

    def prompts(self, seeds: Sequence[int]) -> dict:
        """The items' questions as one user message each, without examples and without the choices' continuations."""
        messages = []
        for item in self.items(seeds):
            subtask, number = self._index[item]
            text = self._tasks[subtask].fewshot_context(self._documents[subtask][number], 0)
            if isinstance(text, list):  # one context per choice, as in WinoGrande: what they have in common
                text = os.path.commonprefix(text).rpartition(" ")[0]
            messages.append([{"role": "user", "content": text.strip()}])
        return {"messages": messages}

    def score(self, policy: Policy, seeds: Sequence[int]) -> Iterator[Episode]:
        if (reason := self.left_out()) is not None:
            raise UserError(reason)
        model = self._model(policy)
        items = dict(zip(self.items(seeds), seeds, strict=True))
        kind = next(iter(self._tasks.values())).OUTPUT_TYPE
        chunk = CHUNK[kind] if model.batch_size == 1 else len(items)
        order, cut = list(items), Counter()
        for start in range(0, len(order), max(1, chunk)):
            started = time.perf_counter()
            part = order[start : start + chunk]
            found = self._scored(model, part)
            seconds = (time.perf_counter() - started) / len(part)
            for item in part:
                metrics, given = found[item]
                value = float(metrics[self.metric])
                episode = Episode(EpisodeKey(items[item]), success=value >= 1, reward=value, seconds=seconds)
                episode.flags = {"subtask": self._index[item][0], **metrics}
                episode.commands = [given]
                cut.update(key for key in ("prompt_cut", "answer_cut") if key in metrics)
                yield episode
        self._say_cut(cut, len(order), model)

    def _say_cut(self, cut: Counter, count: int, model) -> None:
        if cut["prompt_cut"]:
            say(
                f"  {self.name}: {cut['prompt_cut']} of {count} prompts have more than the {model.max_length} tokens "
                f"that {model.reader} reads with its answer; their beginnings were cut off, as lm-eval does"
            )
        if cut["answer_cut"]:
            say(f"  {self.name}: {cut['answer_cut']} of {count} answers were cut off at their longest length")

    # ---- what a record must say

    @property
    def spec(self) -> dict:
        """Settings and items: rows that differ in any of it are never pooled."""
        from importlib.metadata import version

        return {"lm_eval": version("lm_eval"), **self._protocol(), "items": self._items_digest}

    def settings(self) -> dict:
        """The protocol, for run.json, and how well programs were locked in."""
        return self._protocol() | ({"code": protection(self.allow_code_execution)} if self._runs_code else {})

    def _protocol(self) -> dict:
        keys = ("configuration", "metric", "num_fewshot", "chat_template", "max_new_tokens")
        without = {"without": self._without[1]} if self._without[0] else {}
        return {key: getattr(self, key) for key in keys} | without

    @cached_property
    def _items_digest(self) -> str:
        digest = hashlib.sha256()
        for subtask, number in self._index:
            digest.update(json.dumps(self._documents[subtask][number], sort_keys=True, default=str).encode())
        return digest.hexdigest()[:16]

    # ---- lm-eval

    @property
    def _runs_code(self) -> bool:
        return self.name == "humaneval"

    @cached_property
    def _tasks(self) -> dict:
        """lm-eval's task object by name, in alphabetical order."""
        folder = installed()
        local = local_splits(self.name)
        found = {}
        for file in sorted(folder.glob(self.configuration)):
            if file.name.startswith("_"):
                continue
            config = self._config(file)
            subject = (config.get("dataset_name") or "") if len(local or {}) > 1 else ""
            if local is not None and subject not in local:
                continue  # a sample of the subjects
            found[config["task"]] = self._built(config, None if local is None else local[subject])
        if not found:
            raise UserError(f"task '{self.name}': lm-eval has no {self.configuration}; see its tasks folder {folder}")
        return dict(sorted(found.items()))

    def _config(self, file: Path) -> dict:
        from lm_eval.tasks._yaml_loader import load_yaml

        # HumanEval's functions are not imported: that alone would run code in this process.
        if self.name == "ifeval":
            punkt()  # before lm-eval looks for it
        with quiet(), contextlib.redirect_stdout(io.StringIO()):
            config = copy.deepcopy(load_yaml(file, resolve_func=not self._runs_code))
        for key in ("tag", "group", "task_list"):
            config.pop(key, None)
        config["num_fewshot"] = self.num_fewshot
        if self.max_new_tokens is not None and "generation_kwargs" in config:
            config["generation_kwargs"]["max_gen_toks"] = self.max_new_tokens
        if self._runs_code:
            instruct = "build_predictions_instruct" in str(config["filter_list"])
            predictions = partial(_programs, end="```" if instruct else None)
            config["filter_list"] = [
                {"name": "create_test", "filter": [{"function": "custom", "filter_fn": predictions}]}
            ]
            config["metric_list"] = [{"metric": "pass@1", "aggregation": "mean", "higher_is_better": True}]
            config["process_results"] = self._passed
            config["unsafe_code"] = False  # it is not lm-eval that runs it
        return config

    def _built(self, config: dict, local: Splits | None):
        from datasets import Dataset
        from lm_eval.api.task import ConfigurableTask

        if local is not None:
            splits = {split: Dataset.from_list(rows) for split, rows in local.items()}
            if config.get("training_split") not in splits:
                config = config | {"training_split": None}
            config = config | {"custom_dataset": lambda **_: splits, "dataset_kwargs": None}
        self._check_examples(config)
        try:
            with quiet():
                return ConfigurableTask(config=config)
        except (OSError, ValueError) as error:  # what `datasets` raises without a network, or for a data set that moved
            if local is not None:
                raise
            text = one_line(error)[:200]
            raise UserError(
                f"{self.name} cannot be loaded from the Hub ({text}); set {VARIABLE} to a folder with {self.name}/"
            ) from error

    def _check_examples(self, config: dict) -> None:
        """``UserError`` where lm-eval would take the examples in the prompt from the items that are asked."""
        asked = config.get("test_split") or config.get("validation_split")
        keys = ("fewshot_split", "training_split", "validation_split")
        source = next(filter(None, map(config.get, keys)), asked)
        if self.num_fewshot and source == asked and not (config.get("fewshot_config") or {}).get("samples"):
            raise UserError(
                f"task '{self.name}': num_fewshot={self.num_fewshot} takes examples from the training split, and there "
                f"is none beside the items that are asked; use 0, or add its file (or unset {VARIABLE})"
            )

    @cached_property
    def _documents(self) -> dict[str, list[dict]]:
        with quiet():
            return {name: list(task.eval_docs) for name, task in self._tasks.items()}

    @cached_property
    def _index(self) -> list[tuple[str, int]]:
        """Item index -> (lm-eval's task, its document)."""
        every = [(name, number) for name, found in self._documents.items() for number in range(len(found))]
        return [item for item in every if item not in self._without[0]]

    @cached_property
    def _without(self) -> tuple[set[tuple[str, int]], str]:
        """Items that cannot be scored here, and why: some of IFEval's split sentences with nltk's punkt_tab."""
        if self.name != "ifeval":
            return set(), ""
        documents = self._documents["ifeval"]
        needing = {("ifeval", n) for n, row in enumerate(documents) if SPLITTING & set(row["instruction_id_list"])}
        if not needing or punkt():
            return set(), ""
        why = f"{len(needing)} of {len(documents)} items, which need nltk's punkt_tab"
        say(
            f"  ifeval: without {why}: it is not installed and cannot be downloaded; to have all, unpack it to "
            f"nltk_data/tokenizers/punkt_tab in the home folder or in ${VARIABLE}"
        )
        return needing, why

    def _model(self, policy: Policy):
        """lm-eval's view of the policy's model as it is at this moment: adapters on or off, base or fine-tuned."""
        installed()
        from robot_forgetting.tasks.benchmarks.lm_eval_model import WatchedModel

        for key in ("model", "tokenizer"):
            if not hasattr(policy, key):
                raise UserError(f"policy '{policy.name}' is no language model; {self.name} needs one")
        if self.chat_template and not policy.tokenizer.chat_template:
            raise UserError(f"task '{self.name}' asks for a chat format, which {policy.name}'s tokenizer lacks")
        size = self.batch_size or (1 if policy.device.type == "cpu" else 16)
        return WatchedModel(
            policy.model,
            tokenizer=copy.deepcopy(policy.tokenizer),  # lm-eval chooses a padding token of its own
            backend="causal",
            batch_size=size,
            max_length=policy.prompts.context if hasattr(policy, "prompts") else None,
            task=self.name,
            reader=policy.name,
        )

    def _requests(self, model, items: Sequence[int]) -> list:
        """(task, request) of the items, as lm-eval makes them; a request's ``doc_id`` is its document's number."""
        made = []
        chat = {"apply_chat_template": self.chat_template}
        chat["chat_template"] = model.apply_chat_template if self.chat_template else None
        for item in items:
            subtask, number = self._index[item]
            task, document = self._tasks[subtask], self._documents[subtask][number]
            context = self._context(subtask, number, model.tokenizer.chat_template, chat)
            about = {"doc": document, "ctx": context, "metadata": (task.config.task, number, 1)}
            requests = task.construct_requests(**about, **chat)
            made += [(subtask, one) for one in (requests if isinstance(requests, list) else [requests])]
        return made

    def _context(self, subtask: str, number: int, template: str | None, chat: dict):
        """The prompt of a document; examples are drawn document by document, so all before it come first."""
        task = self._tasks[subtask]

        def made(index: int):
            document = self._documents[subtask][index]
            more = {"fewshot_as_multiturn": self.chat_template, "gen_prefix": task.doc_to_prefix(document)}
            return task.fewshot_context(document, self.num_fewshot, **more, **chat)

        if not self.num_fewshot:
            return made(number)
        if self._drawn_for != template:
            self._drawn_for, self._drawn = template, {}
        if subtask not in self._drawn:
            task.set_fewshot_seed(FEWSHOT_SEED)
        contexts = self._drawn.setdefault(subtask, [])
        contexts += [made(index) for index in range(len(contexts), number + 1)]
        return contexts[number]

    def _scored(self, model, items: Sequence[int]) -> dict[int, tuple[dict, list]]:
        """Item -> (metrics, what the model said: log-likelihoods or texts)."""
        made = self._requests(model, items)
        requests = [request for _, request in made]
        kind = requests[0].request_type
        with quiet():
            answers, cut = model.answers(kind, requests)
        grouped: dict[tuple[str, int], list] = {}
        shortened: dict[tuple[str, int], dict] = {}
        for (subtask, request), answer, lost in zip(made, answers, cut, strict=True):
            request.resps.append(answer)
            grouped.setdefault((subtask, request.doc_id), []).append(request)
            most = shortened.setdefault((subtask, request.doc_id), {})
            most |= {key: max(value, most.get(key, 0)) for key, value in lost.items()}
        found = {}
        for item in items:
            subtask, number = self._index[item]
            task, mine = self._tasks[subtask], sorted(grouped[subtask, number], key=lambda request: request.idx)
            task._instances = mine
            task.apply_filters()
            (key,) = mine[0].filtered_resps
            document = self._documents[subtask][number]
            metrics = task.process_results(document, [request.filtered_resps[key] for request in mine])
            if self.metric not in metrics:
                raise UserError(f"task '{self.name}' has no metric {self.metric}; choose one of: {', '.join(metrics)}")
            given = [request.resps[0] for request in mine]
            if kind == "loglikelihood":
                metrics = metrics | {"log_likelihoods": [float(likelihood) for likelihood, _ in given]}
            found[item] = (metrics | shortened[subtask, number], given)
        return found

    def _passed(self, document: dict, results: list) -> dict:
        """HumanEval's pass@1 of one completion."""
        keys = ("prompt", "entry_point", "test")
        confine = self.allow_code_execution is True
        verdict = run_tests(results[0][0], **{key: document[key] for key in keys}, confine=confine)
        return {"pass@1": float(verdict.passed), "why": verdict.why} | ({} if confine else {"confined": False})


def _programs(resps: list[list[str]], docs: list[dict], end: str | None = None) -> list[list[str]]:
    """Of each completion the program up to ``end``, where a code block that the prompt has begun is over."""
    pairs = zip(resps, docs, strict=True)
    return [[doc["prompt"] + (text.partition(end)[0] if end else text) for text in texts] for texts, doc in pairs]
