"""lm-eval as a library: found, without its progress bars and downloads."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from pathlib import Path

from robot_forgetting.errors import UserError
from robot_forgetting.tasks.sources import VARIABLE


def installed() -> Path:
    """lm-eval's folder of task configurations."""
    try:
        import lm_eval
    except ImportError:
        raise UserError("benchmarks need lm-eval: pip install 'robot-forgetting[llm]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Reports answers without any word, to which it cannot put a language; they are scored all the same.
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    return Path(lm_eval.__file__).parent / "tasks"


def punkt() -> bool:
    """Whether nltk has punkt_tab, also in $ROBOT_FORGETTING_DATA/nltk_data; lm-eval tries to download it on import."""
    import nltk

    root = os.environ.get(VARIABLE)
    folder = None if root is None else str(Path(root, "nltk_data").resolve())
    if folder is not None and folder not in nltk.data.path:
        nltk.data.path.append(folder)
    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


@contextlib.contextmanager
def quiet():
    """lm-eval's progress bars and those of `datasets` have no switch; the experiment shows its own."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        if shown:
            enable_progress_bar()
