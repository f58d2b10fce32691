"""The forgetting law of the controlled study beside the paper's and the replication's."""

from __future__ import annotations

from collections.abc import Sequence

from robot_forgetting.errors import UserError
from robot_forgetting.metrics import law, published
from robot_forgetting.report import words

RESAMPLES = 200  # of what is slow
MAIN = "forward_kl|new"
# Names in the table of predictors, where they are not those of every page.
PREDICTORS = {
    "jensen_shannon": "Jensen-Shannon",
    "l2": "L2 of outputs",
    "activation_l1": "activation change, L1",
    "activation_l2": "activation change, L2",
    "cka": "CKA (linear)",
    "weight_fisher_l2": "weight change, Fisher L2",
    "weight_l1": "weight change, L1",
    "weight_l2": "weight change, L2",
    "weight_spectral": "weight change, spectral",
    "weight_sparsity": "weight change, sparsity",
    "weight_rank": "weight change, rank",
}
# Of the same weights by other rules: told in the table of precision, not as predictors.
OTHER_RULES = ("weight_effective_rank", "weight_sparsity_exact", "weight_sparsity_bfloat16")


class Law:
    """The fit of forgetting on forward KL and on its rivals over some methods. ``note`` says why there is none."""

    def __init__(self, points: Sequence[dict], methods: Sequence[str]):
        self.methods = methods
        used = [point for point in points if point["method"] in methods]
        self._recorded = [point["predictors"].keys() for point in used]
        self.points, self.note, self.rows = None, "", []
        if not used:
            self.note = "no checkpoint of these methods"
            return
        try:
            self.points = law.Points.from_rows(used)
        except UserError as error:
            self.note = str(error)
            return
        names = [name for name in self.points.predictors if name.partition("|")[0] not in OTHER_RULES]
        self.rows = [self._row(row) for row in law.predictor_rows(self.points, names)]

    def _row(self, row: dict) -> dict:
        name = row["predictor"]
        row = {**row, "label": PREDICTORS.get(name) or words.MEASURES.get(name, name.replace("_", " "))}
        key = f"{row['predictor']}|{row['inputs']}"
        if row["excluded"] and row["r2"] is not None and row["excluded"] == sum(key not in p for p in self._recorded):
            row["note"] = f"measured at {row['n']} checkpoints only"
        for name, theirs in published.published_r2(row["predictor"], row["inputs"]).items():
            row[name] = theirs and {"r2": theirs["r2"], "error": theirs["error"]}
            row[f"{name}_verdict"] = verdict(row, theirs)
        return row

    def row(self, predictor: str, inputs: str) -> dict | None:
        return next((row for row in self.rows if (row["predictor"], row["inputs"]) == (predictor, inputs)), None)

    @property
    def main(self) -> dict | None:
        return self.row(*MAIN.split("|"))

    @property
    def has_fit(self) -> bool:
        return self.main is not None and self.main["r2"] is not None

    @property
    def missing(self) -> str:
        """Why there is no fit; "" where there is one."""
        if self.has_fit:
            return ""
        return self.note or (self.main or {}).get("note") or "forward KL was not recorded at any checkpoint"

    def residual_rows(self) -> list[dict]:
        return law.residual_rows(self.points, MAIN) if self.has_fit else []

    def left_out_rows(self) -> list[dict]:
        """R^2 on each method of the law fitted on all others."""
        if not self.has_fit or len(self.methods) < 2:
            return []
        return law.leave_one_method_out(self.points, MAIN)

    def transfer_rows(self) -> list[dict]:
        """Does the law of the SFT methods predict RL, and the other way round?"""
        rl = [method for method in self.methods if method.startswith(("grpo", "reinforce"))]
        sft = [method for method in self.methods if method.startswith("sft") and method != "sft_teacher"]
        if not self.has_fit or not rl or not sft:
            return []
        return [
            {"from": "SFT", "to": "RL", **law.transfer(self.points, MAIN, sft, rl)},
            {"from": "RL", "to": "SFT", **law.transfer(self.points, MAIN, rl, sft)},
        ]


def verdict(row: dict, theirs: dict | None) -> str:
    """ "", "agrees", "lower", "higher" (our interval excludes their value), or "open" (no interval of ours)."""
    if theirs is None or theirs["r2"] is None:
        return ""
    if row["r2"] is None or row["low"] is None:
        return "open"
    if theirs["r2"] < row["low"]:
        return "higher"
    return "lower" if theirs["r2"] > row["high"] else "agrees"
