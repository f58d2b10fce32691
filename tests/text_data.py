"""A handful of made-up chemistry questions in the files of SciKnowEval."""

from __future__ import annotations

import json
from pathlib import Path

from robot_forgetting.tasks.text.science import FILES, FOLDER


def choice_row(question: str, answer: str = "B", options=("1", "2", "3", "4"), **more) -> dict:
    return {
        "question": question,
        "choices": {"text": list(options), "label": list("ABCD")},
        "answerKey": answer,
        "answer": "",
        "type": "mcq-4-choices",
        "details": {"level": "L3", "task": "molar_weight_calculation", "subtask": "i2w"},
        **more,
    }


def equation_row(question: str, answer: str) -> dict:
    row = choice_row(question, "", ())
    details = {"level": "L3", "task": "balancing", "subtask": "balancing"}
    return {**row, "answer": answer, "type": "filling", "choices": {"text": [], "label": []}, "details": details}


def write_science(root: Path, count: int = 40) -> Path:
    """``count`` questions of choice in the first file, one in each other, six equations in the last."""
    folder = root / FOLDER
    folder.mkdir(parents=True)
    for number, file in enumerate(FILES):
        rows = [choice_row(f"Question {number} on {file}?", "ABCD"[number % 4])]
        if number == 0:
            rows += [choice_row(f"What weighs molecule {index}?", "ABCD"[index % 4]) for index in range(count)]
        if file.startswith("balancing"):
            rows = [
                equation_row(f"Balance this, case {n}:\nH2 + O2 = H2O\nThe balanced equation is:", "2H2 + O2 = 2H2O")
                for n in range(6)
            ]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
