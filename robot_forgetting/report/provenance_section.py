"""Which runs a page is made of, what went wrong in them, and what its words mean."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from robot_forgetting.report import words
from robot_forgetting.report.markup import Cell, Content, badge, bullets, definitions, folded, of, table, wrapped
from robot_forgetting.report.runs import BASE, Run
from robot_forgetting.report.section import GroupedRuns, Part, Section

SHOWN = 50  # crashed episodes on the page; the JSON file has all
SAID = {
    "policy": "Policy",
    "fingerprint": "Fingerprint of policy and tasks",
    "protocols": "Protocols of benchmarks",
    "chance": "Rate of guessing",
    "left_out": "Left out",
    "render": "Render option",
    "hardware": "Hardware",
    "versions": "Versions",
    "shipped": "Shipped",
}
HEAD = "run", "status", "method", "seed", "wall time", "peak memory of the main process", "episodes", "crashed"
RECORDED = ("verb", "seed", "decode", "fingerprint", "versions", "hardware", "render", "timings", "error")
ERROR = ("stage", "iteration", "task", "decode", "seed", "error")


class Provenance(Section):
    name, title, once = "provenance", "Provenance", True

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        crashed = [(run, row) for run in runs.all for row in run.episodes if row.get("error")]
        errors = [{"run": run.id, **{key: row.get(key) for key in ERROR}} for run, row in crashed]
        return {"runs": [_recorded(run) for run in runs.all], "errors": errors}

    def html(self, part: Part, figure: Markup) -> Content:
        decodes = sorted({text(run.state["decode"]) for run in part.runs if run.state.get("decode")})
        decode = "; ".join(decodes) or "not recorded"
        caption = f"The run folders this page was computed from. Decode: {decode}."
        errors = part.rows("errors")
        lines = [f"{row['run']}: {row['task']}, seed {row['seed']}, {row['decode']}: {row['error']}" for row in errors]
        more = [f"and {len(errors) - SHOWN} more in report.json"] * (len(errors) > SHOWN)
        crashed = f"{len(errors)} crashed episodes, counted as failures"
        folded_errors = folded(crashed, bullets([*lines[:SHOWN], *more]) if errors else "")
        return table(caption, HEAD, map(_line, part.runs)) + definitions(_distinct(part.runs)) + folded_errors


def _recorded(run: Run) -> dict:
    return {
        "run": run.id,
        "status": run.status,
        "policy": run.policy,
        "new_task": run.new_task,
        "method": run.method,
        "variant": run.variant,
        "shipped": run.shipped,
        "episodes": len(run.episodes),
        "copied_from": sorted({row["source"] for row in run.episodes if row.get("source")}),
        "last_checkpoint": list(run.final) if run.final else None,
        "peak_memory_bytes": run.state.get("peak_memory_bytes"),  # of the main process
    } | {key: run.state.get(key) for key in RECORDED}


def _line(run: Run) -> list:
    timings = {
        name: value for name, value in (run.state.get("timings") or {}).items() if isinstance(value, (int, float))
    }
    total = timings.get("total", sum(timings.values()) if timings else None)
    memory = run.state.get("peak_memory_bytes")
    status = Markup("{}").format(run.status)
    if run.status != "finished" and run.final:
        status += of(f"evaluated to iteration {run.final[1]}")
    wall = Markup("{}").format(words.duration(total))
    for name, value in timings.items():
        wall += of(f"{name} {words.duration(value)}") if name != "total" else ""
    return [
        Cell(Markup("{} {}").format(run.id, badge("shipped")) if run.shipped else run.id, "path"),
        status + wrapped(run.state.get("error")),
        run.state.get("verb") if run.method == BASE else run.variant,
        run.state.get("seed"),
        wall,
        f"{memory / 1e9:.1f} GB" if memory else "n/a",
        len(run.episodes),
        sum(bool(row.get("error")) for row in run.episodes),
    ]


def _distinct(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Versions, hardware and render options; said once where all runs agree, else with the runs they belong to."""
    result = []
    for key, title in SAID.items():
        found: dict[str, list[str]] = {}
        for run in runs:
            value = run.policy if key == "policy" else run.state.get(key)
            if value:
                found.setdefault(text(value), []).append(run.id)
        everywhere = len(found) == 1 and len(next(iter(found.values()))) == len(runs)
        lines = [value if everywhere else f"{value} ({words.some(ids)})" for value, ids in found.items()]
        result += [(title, lines)] if lines else []
    copied = sorted({row["source"] for run in runs for row in run.episodes if row.get("source")})
    return [*result, *[("Base episodes copied from", [", ".join(copied)])] * bool(copied)]


def text(value) -> str:
    """A value of run.json in words."""
    if isinstance(value, dict):
        return ", ".join(_field(key, item) for key, item in value.items() if item not in (None, [], {}))
    return ", ".join(map(text, value)) if isinstance(value, list) else str(value)


def _field(key: str, value) -> str:
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{key.removesuffix('_bytes')} {value / 1e9:.1f} GB"
    return f"{key} {text(value)}"


TERMS = {
    "Base policy, fine-tuned policy": "The policy before and after it is taught the new task.",
    "New, prior, held-out task": "The task that is taught; tasks the base policy could already do; a task that is only "
    "watched.",
    "Success": "Share of episodes that reach the goal in time; an episode that crashes counts as a failure. In "
    "brackets, here and everywhere, a 95 % interval: Wilson's for one policy's episodes on one task, for a mean over "
    "tasks their limits squared and added; Student's t over runs and initial states where several training seeds are "
    "averaged.",
    "Sampled, greedy": "Actions drawn from the policy's distribution, at the temperature that the table names "
    "(training rollouts: 1); or always the most likely one.",
    "Forgetting": "Base success minus fine-tuned success on a prior task, in points, on the same initial states "
    "(paired; Newcombe's interval for one run). Positive is a loss.",
    "Retention": "Fine-tuned success divided by base success. Its interval takes the two for independent and is "
    "therefore rather too wide.",
    "Forward, reverse KL": "How far the action distribution has moved: KL(base || fine-tuned) and KL(fine-tuned || "
    "base), in nats, exact over the action tokens; per token, or summed over the tokens of one decision (control "
    "step).",
    "Total variation, L2": "Half the summed absolute difference, and the Euclidean distance, of the two distributions, "
    "per token; at most 1 and 1.41.",
    "CKNNA, CKA": "Similarity of two sets of vectors for the same texts: whether texts that are close in one are close "
    "in the other (among the k nearest neighbours of each; in both sets, or in either), and whether all distances "
    "agree.",
    "States of": "Whose episodes supply the observations at which the two distributions are compared.",
    "± in the tables of distances": "One standard error, clustered by episode; over runs where there are several.",
    "Front": "The checkpoints that no other checkpoint of the method beats on both the new and the prior tasks.",
    "Matched comparison": "Two methods at the same new-task success: who learns less has less to forget.",
}


class Terms(Section):
    name, title, once = "terms", "Terms", True

    def html(self, part: Part, figure: Markup) -> Content:
        terms = dict(TERMS)
        if not part.rows("layers"):
            del terms["CKNNA, CKA"]
        return definitions(terms.items())
