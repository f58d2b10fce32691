"""The policy that a run left behind, as another command's: its settings from the run's records, its weights from the
run's checkpoint.

A record is data: what it names is composed from the yaml files of this machine, and only plain values are taken from
it. Which class is built, and everything else that is code (``_target_``), is the yaml's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from robot_forgetting.errors import UserError
from robot_forgetting.machine.progress import say
from robot_forgetting.policy import Policy
from robot_forgetting.records.checkpoints import load_weights, read_state, stage_of, trained_checkpoint
from robot_forgetting.records.run_folder import RunFolder

# Settings of a policy that change no result: where and how it is computed. They are the command's own.
COMPUTING = ("device", "name", "threads", "batch_rows", "gradient_checkpointing", "keep_base", "check_images",
             "sampler")  # fmt: skip


# ---- settings


@dataclass(frozen=True)
class RecordedPolicy:
    """run: the folder; name: the policy's yaml; config: the run's config.yaml, resolved"""

    run: str
    name: str
    config: Mapping

    @staticmethod
    def of(run: str | None) -> RecordedPolicy | None:
        """None without a run, and where its records do not say (a run that was not made by the command line)."""
        if run is None:
            return None
        folder, _ = opened(run)
        name, config = folder.run.get("policy"), folder.config()
        if not isinstance(name, str) or not isinstance(config.get("policy"), dict):
            return None
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name):
            raise UserError(f"{folder.path / 'run.json'} names no policy: {name!r}; restore it")
        return RecordedPolicy(str(run), name, config)

    def configuration(self, overrides: Sequence[str], compose: Callable):
        """The configuration of a command whose policy is the run's; ``UserError`` where the command contradicts it.

        overrides: the command's; ``compose`` makes of such a list something with a ``config``
        """
        typed = [text for text in overrides if re.match(r"[+~]*policy[.=]", text)]
        others = [text for text in overrides if text not in typed]
        choice = [f"policy={self.name}"]
        try:
            composed = compose([*others, *choice])
        except UserError as error:
            if not (getattr(error.__cause__, "missing_cfg_file", None) or "").startswith("policy/"):
                raise
            raise UserError(
                f"{self.run} was made with policy={self.name}, for which there is no yaml here; add its folder: "
                "'hydra.searchpath=[file://FOLDER]'"
            ) from error
        self._restore(composed.config)
        if typed:
            chosen = [text for text in typed if text.startswith("policy=")]
            asked = compose([*others, *([] if chosen else choice), *typed])
            self._settle(composed.config, asked.config, typed)
        return composed

    def _restore(self, config) -> None:
        """Gives the configuration's policy every value of the record that its yaml would not have given there.

        What the yaml takes from elsewhere (``${device}``, the length of the task's answers) stays so taken.
        """
        from omegaconf import OmegaConf

        around = {key: value for key, value in self.config.items() if key != "policy"}
        there = OmegaConf.create({**OmegaConf.to_container(config), **around})
        usual = dict(_leaves(OmegaConf.to_container(there.policy, resolve=True)))
        for key, value in _leaves(self.config["policy"]):
            if key.partition(".")[0] in COMPUTING or (key in usual and usual[key] == value):
                continue
            if key.rpartition(".")[2].startswith("_") or "${" in str(value):
                raise UserError(
                    f"{self.run} was made with policy.{key}={value}, which policy={self.name} does not say here; "
                    "a record's code is not run: correct the yaml, or leave checkpoint= out"
                )
            OmegaConf.update(config, f"policy.{key}", value, force_add=True)

    def _settle(self, config, asked, typed: Sequence[str]) -> None:
        """What the command says of the policy: refused where it contradicts the record, unless said with ``++``."""
        from omegaconf import OmegaConf

        wanted, given = (OmegaConf.to_container(one.policy, resolve=True) for one in (config, asked))
        contradictions = []
        for text in (text for text in typed if text != f"policy={self.name}"):
            path = text.lstrip("+~").partition("=")[0].removeprefix("policy").lstrip(".")
            for key, value in _leaves(_at(given, path), path):
                if text.startswith("++") or key.partition(".")[0] in COMPUTING:
                    OmegaConf.update(config, f"policy.{key}", value, force_add=True)
                elif _at(wanted, key) != value:
                    contradictions.append((key, _at(wanted, key), value))
            if contradictions and not path:
                raise UserError(
                    f"{self.run} was made with policy={self.name}, from which {text} differs (in "
                    f"{', '.join(key for key, _, _ in contradictions[:4])}); leave the policy out, it is taken from "
                    "the run's records"
                )
        if contradictions:
            key, there, here = contradictions[0]
            more = f" (and {len(contradictions) - 1} more)" if len(contradictions) > 1 else ""
            raise UserError(
                f"{self.run} was made with policy.{key}={_said(there)}, this command says {_said(here)}{more}; leave "
                f"the policy out, it is taken from the run's records, or write ++policy.{key}={_said(here)} to measure "
                "its weights otherwise on purpose"
            )


def check_settings(run: RunFolder, config: Mapping, key: str) -> None:
    """``UserError`` where a run's weights were trained in a policy with other settings than this command's.

    key: what the command calls the run
    """
    there, here = (one.get("policy") or {} for one in (run.config(), config))
    # An answer's length is the task's, and all weights that a seed draws are replaced.
    compared = (there.keys() & here.keys()) - {*COMPUTING, "max_new_tokens", "seed"}
    for name in sorted({leaf for one in (there, here) for leaf, _ in _leaves({k: one[k] for k in compared})}):
        if _at(there, name) != _at(here, name):
            raise UserError(
                f"{key}={run.path} was made with policy.{name}={_said(_at(there, name))}, this command says "
                f"{_said(_at(here, name))}; give both the same policy"
            )


def _leaves(value, path: str = "") -> Iterator[tuple[str, object]]:
    """Dotted keys and plain values of nested mappings."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, value


def _at(node, path: str):
    """The value at a dotted key; None where there is none."""
    for part in filter(None, path.split(".")):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _said(value) -> str:
    return "null" if value is None else str(value)


# ---- weights


def with_checkpoint(policy: Policy, run: str | None, *, trained: bool = False) -> dict:
    """Loads the fine-tuned weights of a run folder into its base policy, if asked; run: see ``opened``.

    trained: whether a run that was stopped before its last iteration is refused; otherwise it is said
    Returns what the policy now is: {"who", "checkpoint", "stage", "iteration", "trained_on"}, with a run also
    "checkpoint_state", for the records.
    """
    if run is None:
        return {"who": "base", "checkpoint": None, "stage": 0, "iteration": 0, "trained_on": []}
    folder, stage = opened(run)
    checkpoint = trained_checkpoint(folder, stage)
    state = checkpoint_state(folder, checkpoint)
    reason = _unfinished(state | {"stages": stage or state["stages"]})
    if trained and reason is not None:
        raise untrained(f"checkpoint={run}", reason)
    load_weights(policy, checkpoint)
    who = folder.run.get("method") or "fine_tuned"
    lora = getattr(policy, "lora", None)
    say(f"policy: {policy.name}{f' with lora {lora}' if lora else ''}, fine-tuned by {who} in {run}")
    if reason is not None:
        say(f"{run} {reason}: these are its weights of then, not those of a finished run")
    return {
        "who": who,
        "checkpoint": str(run),
        "stage": state["stage"],
        "iteration": state["iteration"],
        "trained_on": state["trained_on"],
        "checkpoint_state": state,
    }


def opened(run: str) -> tuple[RunFolder, int | None]:
    """The run folder that RUN names, and the stage, where it is RUN/checkpoints/stage_NN; else None: the last one."""
    path = Path(run)
    found = re.fullmatch(r"stage_(\d{2,9})", path.name) if path.parent.name == "checkpoints" else None
    return (RunFolder(path), None) if found is None else (RunFolder(path.parent.parent), int(found[1]))


def checkpoint_state(folder: RunFolder, checkpoint: Path) -> dict:
    """How far a run is, and all tasks its weights have seen.

    {"stage", "stages", "iteration", "iterations", "status", "trained_on"}
    """
    record, stage = folder.run, stage_of(checkpoint)
    before = (record.get("checkpoint_state") or {}).get("trained_on") or []
    learned = (record.get("roles") or {}).get("new", [])
    return {
        "stage": stage,
        "stages": max(1, len(record.get("sequence") or [])),
        "iteration": read_state(checkpoint)["iteration"],
        "iterations": record.get("iterations"),
        "status": folder.status,
        "trained_on": [*before, *(learned[:stage] if record.get("sequence") else learned)],
    }


def start_from(policy: Policy, checkpoint: str | None, config: Mapping) -> dict:
    """Makes the policy of ``checkpoint`` the base of a run, if asked; returns what ``with_checkpoint`` says of it.

    The runs that this one goes on from, or whose policy is its teacher, must be trained to their end: what they say
    may not change between two starts.
    """
    method = config.get("method")
    teacher = method.get("teacher_run") if isinstance(method, Mapping) else None
    if teacher is not None:
        check_settings(RunFolder(teacher), config, "method.teacher_run")
        check_trained(RunFolder(teacher), f"method.teacher_run={teacher}")
    started = with_checkpoint(policy, checkpoint, trained=True)
    if checkpoint is not None:
        policy.keep_as_base()
    return started


def check_trained(folder: RunFolder, said: str) -> None:
    """``UserError`` unless a run was trained to its last iteration."""
    reason = _unfinished(checkpoint_state(folder, trained_checkpoint(folder)))
    if reason is not None:
        raise untrained(said, reason)


def untrained(said: str, reason: str) -> UserError:
    return UserError(f"{said} {reason}; finish it first: the same command that made it continues it")


def _unfinished(state: dict) -> str | None:
    if state["stage"] == state["stages"] and (state["iterations"] is None or state["iteration"] >= state["iterations"]):
        return None
    stage = f"stage {state['stage']} of {state['stages']}, " if state["stages"] > 1 else ""
    return f"is at {stage}iteration {state['iteration']} of {state['iterations']} ({state['status']})"
