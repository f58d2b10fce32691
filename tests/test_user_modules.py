"""Code beside the data never runs; a user's own modules do."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from robot_forgetting.machine import user_modules, vulkan

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "results" / "three-seeds" / "stack_cube-sft-table-seed0"
# The commands of one process, which the installed script would be, one after the other. It imports nothing itself.
SCRIPT = """
import sys
from robot_forgetting.cli import main

if __name__ == "__main__":
    said = []
    for number, arguments in enumerate({commands!r}):
        with open(f"{place}-{{number}}", "w+") as sys.stderr:
            code = main(arguments)
            sys.stderr.seek(0)
            said.append((code, sys.stderr.read(), list(sys.path)))
    with open("{place}", "w") as file:
        file.write(repr(said))
"""
INSTALLED = ("numpy", "markupsafe", "torch", "yaml", "datasets", "robot_forgetting", "sapien", "hydra", "transformers")
STANDARD = ("json", "multiprocessing", "random", "signal", "logging", "sitecustomize", "usercustomize")
OPTIONAL = ("numexpr", "bottleneck", "flash_attn", "tensorflow", "torchvision", "wandb")  # used where they are there
TRAP = "import pathlib\npathlib.Path(__file__ + '.was-run').touch()\n"
METHOD = "from robot_forgetting.methods.sft import SFT\n\n\nclass Mine(SFT):\n    pass\n"
NAME = "my_method.Mine"
PAGES = ("page.html", "again.html")
TEXT = ("policy=qwen-nano", "task=skill_reverse", "prior=[]", "held_out=[]", "device=cpu", "held_out_text.source=null")


def plant(folder: Path) -> Path:
    """A folder of somebody's runs, in which every module that might be asked for leaves a mark when it is."""
    shutil.copytree(RUN, folder / "run")
    for name in (*INSTALLED, *STANDARD, *OPTIONAL, "hydra_plugins/trap", "planted"):
        for place in (folder, folder / "run"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / f"{name}.py").write_text(TRAP)
    (folder / "planted-1.0.dist-info").mkdir()
    (folder / "planted-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (folder / "planted-1.0.dist-info" / "entry_points.txt").write_text("[gymnasium.envs]\n__root__ = planted\n")
    return folder


@pytest.fixture
def downloaded(tmp_path) -> Path:
    return plant(tmp_path / "downloaded")


def typed(folder: Path, *commands: tuple[str, ...]) -> list[tuple[int, str, list[str]]]:
    """Types commands in ``folder``; (exit code, what it said on stderr, the path that modules are looked for on).

    The script's own folder is first on the path, not the working one, as with the installed script.
    """
    script, place = folder.parent / "bin" / "robot-forgetting", folder.parent / "said"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT.format(commands=commands, place=place))
    kept = os.environ.keys() - {"PYTHONSAFEPATH", "ROBOT_FORGETTING_DATA"}
    environment = {key: os.environ[key] for key in kept} | {"HF_HUB_OFFLINE": "1"}
    ended = subprocess.run([sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ast.literal_eval(place.read_text())


def marks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.was-run"))


VERBS = [
    (None, ("doctor",)),
    (0, ("list",)),
    (2, ("assets",)),
    (0, ("report", "run", "output=page.html")),
    (0, ("check", "method=sft")),
    (0, ("evaluate", *TEXT, "episodes=2")),
    (0, ("run", *TEXT, "budget=tiny", "budget.interim_points=0", "budget.divergence_episodes=1", "run_dir=mine")),
    (None, ("pretrain", *TEXT, "pretrain.iterations=1", "pretrain.demonstrations={skill_reverse: 8}",
            "pretrain.steps_per_iteration=1", "pretrain.episodes=1", "run_dir=first", "output=mine")),
    (2, ("reproduce", "parity_mnist", "quick=true", "output=nowhere")),
]  # fmt: skip
RECORD = (0, ("record", "task=push_cube", "episodes=1", "processes=1", "task.max_steps=2", "device=cpu"))
# A downloaded run's config.yaml is read as plain values, or as nothing at all.
OF_A_RUN = [
    (None, ("list", "--config-dir", "run")),
    (None, ("list", "hydra.searchpath=[file://run]")),
    (None, ("evaluate", "--config-dir", "run", *TEXT, "episodes=2")),
    (None, ("evaluate", "task=push_cube", "checkpoint=run")),
]
# What transformers could be talked into: auto_map of model and tokenizer, a generate of the folder's own.
TEMPLATES = {"plain": None, "bad": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "worse": "{% include 'x' %}"}
OF_A_MODEL = [
    (0 if template is None else 2, ("evaluate", *TEXT, "episodes=2", f"policy.checkpoint=./{name}"))
    for name, template in TEMPLATES.items()
]


def test_nothing_that_lies_in_the_working_folder_runs(downloaded):
    bait(downloaded / "run")
    for name, template in TEMPLATES.items():
        bait_model(downloaded / name, template)
    commands = [*VERBS, *OF_A_RUN, *OF_A_MODEL, *([RECORD] if vulkan.physical_devices() else [])]
    found = typed(downloaded, *(arguments for _, arguments in commands))
    assert marks(downloaded) == [], found
    for (code, arguments), (ended, said, path) in zip(commands, found, strict=True):
        assert ended in ((0, 2) if code is None else (code,)) and "Traceback" not in said, (arguments, said)
        assert not {"", ".", str(downloaded)} & set(path), arguments
    # Matplotlib reads a `matplotlibrc` of the working folder: this one would run LaTeX and paint in red.
    (downloaded / "matplotlibrc").write_text("backend: module://planted\ntext.usetex: True\nfigure.facecolor: red\n")
    ((code, said, _),) = typed(downloaded, ("report", "run", "output=again.html"))
    assert code == 0, said
    page, again = (re.findall(r"<svg.*?</svg>", (downloaded / name).read_text(), re.S) for name in PAGES)
    assert page == again and page
    assert marks(downloaded) == []


def bait(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    assert "_target_: robot_forgetting." in text
    text = text.replace("_target_: robot_forgetting.", "_target_: planted.") + "hydra:\n  searchpath: [file://model]\n"
    (run / "config.yaml").write_text(text + "again: {_target_: os.system, command: touch planted.py.was-run}\n")
    (run / "task").mkdir()
    (run / "task" / "other.yaml").write_text("_target_: planted.Task\n")


def bait_model(model: Path, template: str | None) -> None:
    shutil.copytree(ROOT / "robot_forgetting" / "weights" / "qwen-nano", model)
    for name in ("modeling", "custom_generate/generate", "tokenization", "configuration"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / f"{name}.py").write_text(TRAP)
    for file, kinds in (("config.json", ("AutoConfig", "AutoModelForCausalLM")), ("tokenizer_config.json", ("Auto",))):
        values = json.loads((model / file).read_text())
        values["auto_map"] = {kind: ["tokenization.Trap", None] for kind in ("AutoTokenizer",)} | {
            kind: "modeling.Trap" for kind in kinds
        }
        (model / file).write_text(json.dumps(values))
    if template is not None:
        (model / "chat_template.jinja").write_text(template)


def test_an_own_module_runs_beside_them(downloaded):
    (downloaded / "my_method.py").write_text(METHOD)
    (downloaded / "method").mkdir()
    yaml = (ROOT / "configs" / "method" / "sft.yaml").read_text().replace("robot_forgetting.methods.sft.SFT", NAME)
    (downloaded / "method" / "mine.yaml").write_text(yaml)
    (downloaded / "method" / "hidden.yaml").write_text("_target_: datasets.Mine\n")
    for name in OPTIONAL:  # the folder is behind the installed modules: what is not installed it may answer for
        (downloaded / f"{name}.py").unlink()
    searched = "hydra.searchpath=[file://.]"
    hidden, mine = typed(downloaded, ("check", "method=hidden", searched), ("check", "method=mine", searched))
    assert mine[:2] == (0, ""), mine
    assert hidden[0] == 2 and hidden[1].count("\n") == 1
    assert f"{downloaded / 'datasets.py'} is hidden by " in hidden[1]
    assert "give your module a name that no installed one has" in hidden[1]
    assert marks(downloaded) == []


def test_only_an_unknown_name_opens_the_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(user_modules, "folders", [])
    (tmp_path / "quite_my_own.py").write_text("VALUE = 3\n")
    user_modules.search([tmp_path])
    assert user_modules.load_object("robot_forgetting.method.Method") and str(tmp_path) not in sys.path
    assert user_modules.load_object("quite_my_own.VALUE") == 3
    assert sys.path[-1] == str(tmp_path)
    sys.modules.pop("quite_my_own")


def test_every_python_that_is_started_takes_the_safe_path():
    """`python -c` and `python -m` put the working folder first; -P and -I do not."""
    started = re.compile(r"\[[^\[\]]*(?:sys\.executable|python)\b[^\[\]]*\"-[cm]\"[^\[\]]*\]", re.S)
    commands = [
        match for file in (ROOT / "robot_forgetting").rglob("*.py") for match in started.findall(file.read_text())
    ]
    assert len(commands) >= 3 and [text for text in commands if '"-P"' not in text and '"-I"' not in text] == []
