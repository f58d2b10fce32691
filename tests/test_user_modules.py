"""Code beside the data never runs; a user's own modules do."""

from __future__ import annotations

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
SCRIPT = "import sys\nfrom robot_forgetting.cli import main\n\nif __name__ == '__main__':\n    sys.exit(main())\n"
INSTALLED = ("numpy", "markupsafe", "torch", "yaml", "datasets", "robot_forgetting", "sapien", "hydra", "transformers")
STANDARD = ("json", "multiprocessing", "random", "signal", "logging", "sitecustomize", "usercustomize")
OPTIONAL = ("numexpr", "bottleneck", "flash_attn", "tensorflow", "torchvision", "wandb")  # used where they are there
TRAP = "import pathlib\npathlib.Path(__file__ + '.was-run').touch()\n"
METHOD = "from robot_forgetting.methods.sft import SFT\n\n\nclass Mine(SFT):\n    pass\n"
NAME = "my_method.Mine"
PAGES = ("page.html", "usual.html")
TEXT = ("policy=qwen-nano", "task=skill_reverse", "prior=[]", "held_out=[]", "device=cpu", "held_out_text.source=null")
needs_vulkan = pytest.mark.skipif(not vulkan.physical_devices(), reason="no Vulkan device; `make setup` installs one")


@pytest.fixture
def downloaded(tmp_path) -> Path:
    """A folder of somebody's runs, in which every module that might be asked for leaves a mark when it is."""
    folder = tmp_path / "downloaded"
    shutil.copytree(RUN, folder / "run")
    for name in (*INSTALLED, *STANDARD, *OPTIONAL, "hydra_plugins/trap", "planted"):
        for place in (folder, folder / "run"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / f"{name}.py").write_text(TRAP)
    (folder / "planted-1.0.dist-info").mkdir()
    (folder / "planted-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1.0\n")
    (folder / "planted-1.0.dist-info" / "entry_points.txt").write_text("[gymnasium.envs]\n__root__ = planted\n")
    return folder


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """What the installed script does, in ``folder``: its own folder is first on the path, not the working one."""
    script = folder.parent / "bin" / "robot-forgetting"
    script.parent.mkdir(exist_ok=True)
    script.write_text(SCRIPT)
    kept = os.environ.keys() - {"PYTHONSAFEPATH", "ROBOT_FORGETTING_DATA"}
    environment = {key: os.environ[key] for key in kept} | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, script, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


def marks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.was-run"))


@pytest.mark.parametrize(
    "code, arguments",
    [
        (None, ("doctor",)),
        (0, ("list",)),
        (2, ("assets",)),
        (0, ("report", "run", "output=page.html")),
        (0, ("check", "method=sft")),
        (0, ("evaluate", *TEXT, "episodes=2")),
        (0, ("run", *TEXT, "budget=tiny", "run_dir=mine")),
        (None, ("pretrain", *TEXT, "pretrain.iterations=1", "pretrain.demonstrations={skill_reverse: 8}",
                "pretrain.steps_per_iteration=1", "pretrain.episodes=1", "run_dir=first", "output=mine")),
        (2, ("reproduce", "parity_mnist", "quick=true", "output=nowhere")),
        pytest.param(0, ("record", "task=push_cube", "episodes=1", "processes=1", "task.max_steps=2", "device=cpu"),
                     marks=needs_vulkan),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)  # fmt: skip
def test_no_verb_runs_what_lies_in_the_working_folder(downloaded, code, arguments):
    result = command(downloaded, *arguments)
    assert marks(downloaded) == [], result.stderr
    assert code is None or result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr


def test_an_own_module_runs_beside_them(downloaded):
    (downloaded / "my_method.py").write_text(METHOD)
    (downloaded / "method").mkdir()
    yaml = (ROOT / "configs" / "method" / "sft.yaml").read_text().replace("robot_forgetting.methods.sft.SFT", NAME)
    (downloaded / "method" / "mine.yaml").write_text(yaml)
    for name in OPTIONAL:  # the folder is behind the installed modules: what is not installed it may answer for
        (downloaded / f"{name}.py").unlink()
    result = command(downloaded, "check", "method=mine", "hydra.searchpath=[file://.]")
    assert result.returncode == 0 and "method Mine" in result.stdout, result.stderr + result.stdout
    assert marks(downloaded) == []


def test_a_name_that_an_installed_module_has_is_named(downloaded):
    (downloaded / "method").mkdir()
    (downloaded / "method" / "mine.yaml").write_text("_target_: datasets.Mine\n")
    result = command(downloaded, "check", "method=mine", "hydra.searchpath=[file://.]")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"{downloaded / 'datasets.py'} is hidden by " in result.stderr
    assert "give your module a name that no installed one has" in result.stderr
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


@pytest.mark.parametrize("template", [None, "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% include 'x' %}"])
def test_a_downloaded_model_runs_nothing(downloaded, template):
    """What transformers could be talked into: auto_map of model and tokenizer, a generate of the folder's own."""
    model = shutil.copytree(ROOT / "robot_forgetting" / "weights" / "qwen-nano", downloaded / "model")
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
    result = command(downloaded, "evaluate", *TEXT, "episodes=2", f"policy.checkpoint={model}")
    assert marks(downloaded) == []
    assert "Traceback" not in result.stderr
    assert result.returncode == (0 if template is None else 2), result.stderr


@pytest.mark.parametrize(
    "arguments",
    [("report", "run", "output=page.html"), ("list", "--config-dir", "run"), ("list", "hydra.searchpath=[file://run]"),
     ("evaluate", "--config-dir", "run", *TEXT, "episodes=2"), ("evaluate", "task=push_cube", "checkpoint=run")],
    ids=lambda arguments: "-".join(arguments[:2]),
)  # fmt: skip
def test_a_downloaded_run_names_nothing_that_is_built(downloaded, arguments):
    """Its config.yaml is read as plain values, or as nothing at all."""
    folder = downloaded / "run"
    (folder / "planted.py").write_text(TRAP)
    text = (folder / "config.yaml").read_text()
    assert "_target_: robot_forgetting." in text
    bait = text.replace("_target_: robot_forgetting.", "_target_: planted.") + "hydra:\n  searchpath: [file://model]\n"
    (folder / "config.yaml").write_text(bait + "again: {_target_: os.system, command: touch planted.py.was-run}\n")
    (folder / "task").mkdir()
    (folder / "task" / "other.yaml").write_text("_target_: planted.Task\n")
    result = command(downloaded, *arguments)
    assert marks(downloaded) == [] and "Traceback" not in result.stderr
    assert result.returncode in (0, 2), result.stderr


def test_settings_beside_the_data_do_not_change_the_page(downloaded):
    """Matplotlib reads a `matplotlibrc` of the working folder: this one would run LaTeX and paint in red."""
    usual = command(downloaded, "report", "run", "run", "output=usual.html")
    (downloaded / "matplotlibrc").write_text("backend: module://planted\ntext.usetex: True\nfigure.facecolor: red\n")
    result = command(downloaded, "report", "run", "run", "output=page.html")
    assert (usual.returncode, result.returncode) == (0, 0), usual.stderr + result.stderr
    page, expected = (re.findall(r"<svg.*?</svg>", (downloaded / name).read_text(), re.S) for name in PAGES)
    assert page == expected and page
    assert marks(downloaded) == []


def test_every_python_that_is_started_takes_the_safe_path():
    """`python -c` and `python -m` put the working folder first; -P and -I do not."""
    started = re.compile(r"\[[^\[\]]*(?:sys\.executable|python)\b[^\[\]]*\"-[cm]\"[^\[\]]*\]", re.S)
    commands = [
        match for file in (ROOT / "robot_forgetting").rglob("*.py") for match in started.findall(file.read_text())
    ]
    assert len(commands) >= 3 and [text for text in commands if '"-P"' not in text and '"-I"' not in text] == []
