"""Local copies of the benchmarks' original files as the columns that lm-eval's own task configurations read.

$ROBOT_FORGETTING_DATA/hellaswag and so on, in the layouts of the original repositories. Nothing is written: the rows go
into lm-eval as data sets in memory.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from robot_forgetting.errors import UserError
from robot_forgetting.tasks.sources import VARIABLE, local_folder, read_rows

Splits = dict[str, list[dict]]
MARKS = re.compile(r"\[(header|title|step|substeps)\]")  # of HellaSwag's WikiHow half
FRAGMENT = re.compile(r"(.*[.?!][\"')\]]*)\s+([^.?!]*)", re.DOTALL)


def local_splits(name: str) -> dict[str, Splits] | None:
    """{data set name of lm-eval, or "" for the only one: {split: rows}}; None without a local folder of that name."""
    folder = local_folder(name)
    if folder is None or not folder.is_dir():
        return None
    return LAYOUTS[name](folder)


def _file(folder: Path, *patterns: str) -> Path:
    for pattern in patterns:
        if found := sorted(folder.glob(pattern)):
            return found[0]
    raise UserError(f"{folder} holds no {patterns[0]}; put it there, or unset {VARIABLE} to use the Hub")


def _rows(file: Path, columns: dict[str, type]) -> list[dict]:
    """Rows with these columns checked; others are kept."""
    return [
        dict(row.value) | {key: row.get(key, kind=kind) for key, kind in columns.items()} for row in read_rows(file)
    ]


def hellaswag(folder: Path) -> dict[str, Splits]:
    """hellaswag_val*.jsonl: the original columns, or {activity_label, ctx, endings, label} with ``ctx`` taken apart.

    ctx is ctx_a and, in its ActivityNet half, the beginning of a sentence ctx_b, which lm-eval capitalises.
    """
    rows = []
    for row in read_rows(_file(folder, "*val*.jsonl")):
        context, endings = row.get("ctx"), row.get("endings", kind=list)
        label = str(row.get("label", kind=(int, str)))
        if not all(isinstance(ending, str) for ending in endings) or label not in map(str, range(len(endings))):
            raise UserError(f"{row.where}: label '{label}' is none of its endings, texts numbered from 0; repair it")
        if "ctx_a" in row.value:
            parts = row.get("ctx_a"), row.get("ctx_b")
        else:
            match = None if MARKS.search(context) else FRAGMENT.fullmatch(context)
            parts = match.groups() if match else (context, "")
        made = {"activity_label": row.get("activity_label"), "ctx_a": parts[0], "ctx_b": parts[1]}
        rows.append(made | {"endings": endings, "label": label})
    return {"": {"validation": rows}}


def mmlu(folder: Path) -> dict[str, Splits]:
    """test/SUBJECT_test.csv and dev/SUBJECT_dev.csv without header: question, A, B, C, D, letter."""
    found = {}
    for file in sorted((folder / "test").glob("*_test.csv")):
        subject = file.name.removesuffix("_test.csv")
        splits = {"test": file, "dev": _file(folder, f"dev/{subject}_dev.csv")}
        found[subject] = {split: _questions(path, subject) for split, path in splits.items()}
    if not found:
        raise UserError(f"{folder} holds no test/*_test.csv; put them there, or unset {VARIABLE} to use the Hub")
    return found


def _questions(file: Path, subject: str) -> list[dict]:
    rows = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as handle:
            for number, cells in enumerate(csv.reader(handle), 1):
                if len(cells) != 6 or cells[5].strip() not in tuple("ABCD"):
                    raise UserError(f"{file}, row {number} is not question, A, B, C, D, letter; repair or remove it")
                row = {"question": cells[0], "subject": subject, "choices": cells[1:5]}
                rows.append(row | {"answer": "ABCD".index(cells[5].strip())})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} cannot be read ({error}); download it again") from error
    return rows


def truthfulqa(folder: Path) -> dict[str, Splits]:
    """mc_task.json: [{question, mc1_targets: {choice: 1 or 0}, mc2_targets}]; the right one of mc1 comes first."""
    rows = []
    for row in read_rows(_file(folder, "mc_task.json")):
        made = {"question": row.get("question")}
        for key in ("mc1_targets", "mc2_targets"):
            labels = row.get(key, kind=dict)
            if any(label not in (0, 1) for label in labels.values()):
                raise UserError(f"{row.where}: {key} needs 1 or 0 for each choice; repair or remove that row")
            pairs = sorted(labels.items(), key=lambda pair: -pair[1])  # stable
            made[key] = {"choices": [choice for choice, _ in pairs], "labels": [label for _, label in pairs]}
        if sum(made["mc1_targets"]["labels"]) != 1:
            raise UserError(f"{row.where}: mc1_targets needs exactly one right choice; repair or remove that row")
        rows.append(made)
    return {"": {"validation": rows}}


def ifeval(folder: Path) -> dict[str, Splits]:
    """input_data.jsonl: {key, prompt, instruction_id_list, kwargs}, of which both lists belong together."""
    rows = []
    for row in read_rows(_file(folder, "input_data.jsonl", "*.jsonl")):
        names, options = row.get("instruction_id_list", kind=list), row.get("kwargs", kind=list)
        for index in range(max(len(names), len(options))):
            row.get("instruction_id_list", index)
            row.get("kwargs", index, kind=dict)
        checked = {"key": row.get("key", kind=int), "prompt": row.get("prompt")}
        rows.append(row.value | checked | {"instruction_id_list": names, "kwargs": options})
    return {"": {"train": rows}}


def winogrande(folder: Path) -> dict[str, Splits]:
    """dev.jsonl, and one of train_*.jsonl for examples in the prompt: {sentence, option1, option2, answer}."""
    columns = ("sentence", "option1", "option2", "answer")
    files = {"validation": _file(folder, "dev.jsonl")}
    if train := sorted(folder.glob("train_xl.jsonl")) or sorted(folder.glob("train_*.jsonl")):
        files["train"] = train[0]
    made: dict[str, list[dict]] = {split: [] for split in files}
    for split, file in files.items():
        for row in read_rows(file):
            values = {key: row.get(key) for key in columns}
            if values["sentence"].count("_") != 1 or values["answer"] not in ("1", "2"):
                raise UserError(f"{row.where}: needs one '_' and the answer 1 or 2; repair or remove that row")
            made[split].append(values)
    return {"": made}


def humaneval(folder: Path) -> dict[str, Splits]:
    """HumanEval.jsonl, gzipped or not: {task_id, prompt, entry_point, canonical_solution, test}."""
    columns = dict.fromkeys(("task_id", "prompt", "entry_point", "canonical_solution", "test"), str)
    return {"": {"test": _rows(_file(folder, "HumanEval.jsonl*"), columns)}}


LAYOUTS: dict[str, Callable[[Path], dict[str, Splits]]] = {
    layout.__name__: layout for layout in (hellaswag, mmlu, truthfulqa, ifeval, winogrande, humaneval)
}
