"""Records of others: whatever stands in a run folder, a command ends well or with one line that names file and key."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from fake_runs import make_run
from test_parity_mnist import data  # noqa: F401 - a fixture

from robot_forgetting.cli import main
from robot_forgetting.engine.episode_rows import reuse
from robot_forgetting.errors import UserError
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.report import write_report
from robot_forgetting.report.media import recorded
from robot_forgetting.report.page import SECTIONS
from robot_forgetting.report.runs import load

STRANGE = [None, True, -1, 0, 1.5, 10**30, 1e300, "", "x", "9", "\ud800", "$\\frac{", "../..", [], [None], [[]], {}]
STRANGE += [{"a": 1}, {"name": None}, {"temperature": "warm"}, [{"name": []}], "a" * 3000, float("nan"), float("inf")]


def mutate(folder: Path, chance: random.Random) -> str:
    """Changes one thing in one file of a run folder; says what."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".jsonl", ".yaml")]
    file = chance.choice(files)
    if file.suffix == ".yaml":
        value = yaml.safe_load(file.read_text())
        said = _change(value, chance)
        file.write_text(yaml.safe_dump(value))
    elif file.suffix == ".json":
        value = json.loads(file.read_text())
        said = _change(value, chance)
        file.write_text(json.dumps(value))
    else:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        index, how = chance.randrange(len(rows)), chance.random()
        if how < 0.1:
            rows.insert(index, rows[index])
            said = "a row twice"
        elif how < 0.2:
            rows[index] = chance.choice(STRANGE)
            said = f"a row {rows[index]!r}"
        else:
            said = _change(rows[index], chance)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{file.name}: {said}"


def _change(value, chance: random.Random) -> str:
    """One key of an object, at any depth: dropped, made strange, or nested."""
    places, todo = [], [value]
    while todo:
        node = todo.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list) and node[key]:
                todo.append(node[key])
    node, key = chance.choice(places)
    if isinstance(node, dict) and chance.random() < 0.3:
        del node[key]
        return f"{key} dropped"
    new = chance.choice([*STRANGE, {"x": node[key]}, [node[key]], str(node[key])])
    node[key] = new
    return f"{key} = {new!r}"


@pytest.fixture
def no_drawing(monkeypatch):
    for section in SECTIONS:
        monkeypatch.setattr(section, "figure", lambda *arguments: None)


def one_line(error: object) -> bool:
    return str(error).strip().count("\n") == 0 and len(str(error)) < 2000


def ends_well(sound: Path, folder: Path, count: int, action: Callable[[], str | None]) -> int:
    """``action`` on a folder with one thing changed, ``count`` times: what it returns or raises is a line, or None.

    Returns how often there was a line.
    """
    chance, refused, wrong = random.Random(0), 0, []
    for number in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        said = mutate(folder, chance)
        try:
            line = action()
        except UserError as error:
            line = str(error)
        except Exception as error:
            wrong.append(f"{number}, {said[:200]}: {type(error).__name__}: {error}")
            continue
        if line is not None:
            refused += 1
            if not one_line(line):
                wrong.append(f"{number}, {said[:200]}: {line}")
    assert not wrong, "\n".join(wrong)
    assert refused < 0.8 * count
    return refused


def test_a_report_of_strange_records(tmp_path, no_drawing, capsys):
    sound = make_run(tmp_path / "sound", method="sft", n=6, iterations=4)
    make_run(tmp_path / "runs" / "grpo", method="grpo", n=6, iterations=4)

    def report() -> None:
        write_report([tmp_path / "runs"], tmp_path / "report.html")

    assert ends_well(sound, tmp_path / "runs" / "sft", 150, report) > 15


def test_going_on_from_strange_records(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    """`run` again in the folder of a stopped run, and `evaluate checkpoint=`."""
    monkeypatch.chdir(tmp_path)
    keys = ["policy=mlp", "task=parity_mnist", "method=sft", "budget=tiny", "policy.images=100", "processes=1"]
    assert main(["run", *keys, "run_dir=sound"]) == 0
    (tmp_path / "sound" / "summary.json").unlink()
    state = json.loads((tmp_path / "sound" / "run.json").read_text())
    (tmp_path / "sound" / "run.json").write_text(json.dumps(state | {"status": "interrupted"}))
    capsys.readouterr()

    def command(*arguments: str) -> str | None:
        code, errors = main([*arguments, *keys]), capsys.readouterr().err
        if code == 0:
            return None
        assert code == 2, errors
        return errors.partition("error: ")[2]

    ends_well(tmp_path / "sound", tmp_path / "again", 12, lambda: command("run", "run_dir=again"))

    def evaluate() -> str | None:
        shutil.rmtree("evaluated", ignore_errors=True)
        return command("evaluate", "checkpoint=again", "run_dir=evaluated")

    ends_well(tmp_path / "sound", tmp_path / "again", 12, evaluate)


@pytest.mark.parametrize(
    "row, says",
    [
        ({"seed": "7"}, "'seed' is \"7\", not a whole number"),
        ({"success": "no"}, "'success' is \"no\", not true or false"),
        ({"iteration": 1e99}, "'iteration' is 1e+99, not a whole number"),
        ({"temperature": [1.0]}, "'temperature' is [1.0], not a number or null"),
        ({"seed": 10**30}, "'seed' is 1000000000000000000000000000000, not a whole number"),
    ],
)
def test_file_line_and_key_are_named(tmp_path, row, says):
    with RunFolder.create(tmp_path / "run", config={}) as folder:
        sound = {"stage": 0, "task": "x", "seed": 0, "success": True, "own": "kept"}
        folder.append("episodes", sound, sound | row)
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "run").episodes()
    file = tmp_path / "run" / "episodes.jsonl"
    assert str(caught.value) == f"{file} line 2: {says}; remove that line"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    (read,) = RunFolder(tmp_path / "run").episodes()
    assert read["own"] == "kept" and (read["iteration"], read["decode"]) == (0, "sampled")  # of an older version


@pytest.mark.parametrize("content", ["[" * 100_000, "9" * 5000, "nan", '"x"', '{"a": "\\', "\0" * 9])
@pytest.mark.parametrize("name", ["run.json", "config.yaml", "summary.json", "episodes.jsonl"])
def test_files_that_are_none(tmp_path, name, content):
    with RunFolder.create(tmp_path / "run", config={}) as folder:
        folder.append("episodes", {"stage": 0, "task": "x", "seed": 0, "success": True})
        folder.finish({})
    (tmp_path / "run" / name).write_text(content + "\n{}\n")
    with pytest.raises(UserError, match=f"{tmp_path / 'run' / name}") as caught:
        run = RunFolder(tmp_path / "run")
        run.config(), run.summary(), run.episodes()
    assert one_line(caught.value)


def test_a_config_that_would_grow(tmp_path):
    """Ten aliases of ten aliases of ..."""
    RunFolder.create(tmp_path / "run", config={}).close()
    levels = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 10)}]\n" for n in range(1, 12))
    (tmp_path / "run" / "config.yaml").write_text(f"k0: &k0 [1]\n{levels}")
    with pytest.raises(UserError, match="an alias in line 2"):
        RunFolder(tmp_path / "run").config()


OUTSIDE = ["/etc/passwd", "../secret.mp4", "videos/link.mp4", "videos/../../secret.mp4", "videos", "v" * 5000, "a\0b",
           "videos/loop.mp4", "videos/pipe.mp4"]  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_the_run_folder(tmp_path, name):
    """Nothing but a run's own regular files goes into a page that is sent to others."""
    run = make_run(tmp_path / "run", n=2, iterations=2, evaluate_every=2)
    (tmp_path / "secret.mp4").write_text("secret")
    (run / "videos").mkdir()
    (run / "videos" / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    # by a name that says what it shows, and so without a row
    (run / "videos" / "stack_cube-seed5-base-success.mp4").symlink_to(tmp_path / "secret.mp4")
    (run / "videos" / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(run / "videos" / "pipe.mp4")
    (run / "videos" / "own.mp4").write_text("own")
    rows = [json.loads(line) | {"video": name} for line in (run / "episodes.jsonl").read_text().splitlines()]
    rows[0]["video"] = "videos/own.mp4"
    (run / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [video["path"].read_text() for video in recorded(load(RunFolder(run)))] == ["own"]


def test_a_damaged_neighbour(tmp_path, capsys):
    """It gives no base rows, and stops nobody."""
    head = {"fingerprint": "same", "decode": {"temperature": 1.0}}
    row = {"stage": 0, "iteration": 0, "task": "x", "decode": "sampled", "temperature": 1.0, "role": "new"}
    for name in ("damaged", "sound"):
        with RunFolder.create(tmp_path / name, config={}, run=head) as folder:
            folder.append("episodes", *({**row, "seed": seed, "success": True} for seed in range(3)))
    file = tmp_path / "damaged" / "episodes.jsonl"
    file.write_text(file.read_text().replace('"seed":1', '"seed":null'))
    wanted = {(0, 0, "x", "sampled", 1.0, seed): (seed, "new") for seed in range(3)}
    with RunFolder.create(tmp_path / "mine", config={}, run=head) as folder:
        reuse(folder, wanted)
        assert [(r["seed"], r["source"]) for r in folder.episodes()] == [(seed, "sound") for seed in range(3)]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "damaged is passed over" in said and "line 2: 'seed' is null" in said
