"""The language studies: a grid of ordinary runs, resumed and reported; with a tiny model on made-up questions."""

from __future__ import annotations

import json
from pathlib import Path

import hydra
import pytest
from text_data import write_science
from tiny_lm import tiny_folder

from robot_forgetting import configs
from robot_forgetting.api.composing import written
from robot_forgetting.cli import command_line as cli
from robot_forgetting.errors import UserError
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.studies.llm import Study, _iterations
from robot_forgetting.tasks.sources import VARIABLE

STUDIES = sorted(path.stem for path in (Path(configs.__path__[0]) / "reproduce" / "llm").glob("*.yaml"))
OF_THE_PAPER = ["math", "science", "tool_use"]


def made(**changes) -> Study:
    values = {"name": "llm/x", "common": {}, "grid": {"sft": {"rates": [1e-5]}}, "seeds": 1, "quick": {}}
    return Study(**{**values, **changes})


def test_there_is_one_study_per_experiment_of_the_paper():
    assert STUDIES == [*OF_THE_PAPER[:2], "skills", OF_THE_PAPER[2]]


def test_skills_cross_annotators_with_rates():
    with hydra.initialize_config_dir(configs.__path__[0], version_base="1.3"):
        study = hydra.utils.instantiate(hydra.compose("config", ["reproduce=llm/skills"]).reproduce, _convert_="all")
    specs = {spec.id: spec.settings for spec in study.specs(study.grid, range(study.seeds))}
    assert len(specs) == 3 * (3 * 3 + 3 + 2 * 3)
    assert specs["grpo-lr0.0001-seed0"] == {"method": "grpo", "seed": 0, "method.optimiser.learning_rate": 1e-4}
    assert specs["grpo-iterations72-lr0.0001-seed0"]["method.iterations"] == 72
    assert specs["sft-next-iterations24-lr0.0001-seed2"]["method.iterations"] == 24
    assert specs["sft-next-lr0.0003-seed1"] == {
        "method": "sft", "seed": 1, "task.annotator": "next", "method.optimiser.learning_rate": 3e-4,
    }  # fmt: skip


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_the_grid_is_the_papers(name):
    """Table 2: 5 rates x 2 schedules x 2 epochs x 4 batch sizes for SFT, 5 rates x 2 updates for RL."""
    with hydra.initialize_config_dir(configs.__path__[0], version_base="1.3"):
        config = hydra.compose("config", overrides=[f"reproduce=llm/{name}"])
    study = hydra.utils.instantiate(config.reproduce, _convert_="all")
    specs = study.specs(study.grid, [0])
    methods = [spec.id.partition("-")[0] for spec in specs]
    assert (methods.count("sft"), methods.count("grpo")) == (80, 10)
    assert len({spec.id for spec in specs}) == 90
    assert study.common == {"policy": "qwen2.5-3b-instruct", "task": name, "budget": "full"}
    (one,) = [spec for spec in specs if spec.id == "sft-passes2-batch64-cosine-lr7e-05-seed0"]
    assert one.settings == {
        "method": "sft", "seed": 0, "method.batch_size": 64, "method.optimiser.schedule": "cosine",
        "method.optimiser.learning_rate": 7e-05,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "passes", "size", "expected"),
    [
        ({"groups": 8}, 1, 2150, {"method.iterations": 268}),
        ({"groups": 8}, 1, 5, {"method.iterations": 1}),
        ({"batch_size": 16}, 1, 2150, {"method.steps_per_iteration": 13, "method.iterations": 10}),  # 134 steps
        ({"batch_size": 128}, 2, 2150, {"method.steps_per_iteration": 3, "method.iterations": 11}),  # 33
        ({"batch_size": 32}, 1, 20, {"method.steps_per_iteration": 1, "method.iterations": 1}),
    ],
)
def test_passes_over_the_questions(method, passes, size, expected):
    assert _iterations(method, passes, size) == expected


def test_a_grid_without_values_is_said():
    with pytest.raises(UserError, match="asks for no run at all"):
        made(grid={"sft": {"rates": []}}).run(Path("nowhere"), point=None)


@pytest.fixture
def here(tmp_path, monkeypatch, no_renderer):
    """A project folder with a tiny model, a prior task and data."""
    monkeypatch.chdir(tmp_path)
    write_science(tmp_path / "data")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "data"))
    tiny_folder(tmp_path / "model", context=2048)
    for group in ("task", "policy"):
        (tmp_path / "mine" / group).mkdir(parents=True)
    (tmp_path / "mine" / "task" / "easy.yaml").write_text(
        "# @package _global_\n# Letters\nkind: text\ntask: {_target_: tiny_lm.LettersTask, name: easy}\n"
    )
    (tmp_path / "mine" / "policy" / "small.yaml").write_text(
        "# Small\n_target_: robot_forgetting.policies.causal_lm.CausalLM\n"
        "checkpoint: model\nmax_new_tokens: ${oc.select:answer_tokens,6}\nbatch_rows: 8\n"
    )
    keys = ["policy=small", "task=science_letter", "prior=[easy]", "budget=tiny", "hydra.searchpath=[file://mine]"]
    rates = ["reproduce.quick.grid.sft.rates=[1e-3, 1e-2]", "reproduce.quick.grid.grpo.rates=[1e-3]"]
    return [*keys, "processes=1", "quick=true", "reproduce.quick.seeds=1", *rates]


IDS = {"sft-lr0.001-seed0", "sft-lr0.01-seed0", "grpo-lr0.001-seed0"}


def test_a_sweep_its_resume_and_its_report(here, tmp_path, capsys, monkeypatch):
    command = ["reproduce", "llm/science", *here]
    from robot_forgetting.studies import llm

    run, started = llm.run, []

    def second_fails(setup):
        started.append(setup.run_dir.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return run(setup)

    monkeypatch.setattr(llm, "run", second_fails)
    assert cli.main(command) == 130, capsys.readouterr().err
    assert cli.main(command) == 0, capsys.readouterr().err
    assert len(started) == 4 and set(started) == IDS  # the finished one was not begun again
    root = tmp_path / "runs" / "llm" / "science-quick"
    folders = {path.parent.name: RunFolder(path.parent) for path in root.glob("*/run.json")}
    assert set(folders) == IDS and all(folder.finished for folder in folders.values())
    assert {folder.run["verb"] for folder in folders.values()} == {"run"}
    config = folders["sft-lr0.01-seed0"].config()
    assert config["method"]["optimiser"]["learning_rate"] == 0.01 and config["policy"]["max_new_tokens"] == 4
    assert "reproduce" not in config or config["reproduce"] is None
    # The base policy was measured once.
    sources = [{row["source"] for row in folder.episodes() if row["stage"] == 0} for folder in folders.values()]
    assert sources.count({None}) == 1
    report = json.loads((root / "report.json").read_text())
    assert {row["run"] for row in report["runs"]} == IDS
    assert report["checkpoints"] and "fronts" in report and "predictors" in report
    assert "KL" in (root / "report.html").read_text()
    assert not list(root.glob("*/checkpoints/*"))


def test_a_diverged_run_is_left_out_and_the_others_go_on(here, tmp_path, capsys):
    rates = ["reproduce.quick.grid.sft.rates=[1e-3, 1e30]", "reproduce.quick.grid.grpo.rates=[1e-3]"]
    assert cli.main(["reproduce", "llm/science", *here[:-2], *rates]) == 0
    said = capsys.readouterr().err
    assert "sft-lr1e+30-seed0: policy" in said and "are no numbers" in said and "2 runs of 3 finished" in said
    assert RunFolder(tmp_path / "runs" / "llm" / "science-quick" / "grpo-lr0.001-seed0").finished


def test_without_data_there_is_one_line(here, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    assert cli.main(["reproduce", "llm/science", *here]) == 2
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error")]
    assert "holds no molar_weight_calculation.jsonl" in line
    assert not (tmp_path / "runs").exists()


def test_unknown_names(here, capsys):
    assert cli.main(["reproduce", "llm/sciense"]) == 2
    assert (
        "unknown reproduce 'llm/sciense'; choose one of: llm/math, llm/science, llm/skills, llm/tool_use"
        in capsys.readouterr().err
    )
    assert cli.main(["reproduce", "llm/science", "reproduce.grids=1"]) == 2
    assert "unknown key 'reproduce.grids'" in capsys.readouterr().err


def test_list_names_the_studies(capsys):
    assert cli.main(["list"]) == 0
    assert "  llm/science " in capsys.readouterr().out


@pytest.mark.parametrize("name", STUDIES)
def test_quick_composes(name, monkeypatch):
    """What quick=true asks for exists: every key of every run is accepted."""
    with hydra.initialize_config_dir(configs.__path__[0], version_base="1.3"):
        config = hydra.compose("config", overrides=[f"reproduce=llm/{name}"])
        study = hydra.utils.instantiate(config.reproduce, _convert_="all")
        common = study.common | study.quick.get("common", {})
        for spec in study.specs(study.quick.get("grid", study.grid), [0]):
            keys = (common | spec.settings).items()
            run = hydra.compose("config", overrides=[f"{key}={written(value)}" for key, value in keys])
            assert run.kind == "text"
            assert run.policy.name == ("qwen-nano" if name == "skills" else "smollm2-135m-instruct")
