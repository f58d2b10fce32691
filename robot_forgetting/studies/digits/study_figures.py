"""How the study's figures look: colours that colour-blind eyes tell apart, markers and dashes for a grey print."""

from __future__ import annotations

from collections.abc import Sequence

from robot_forgetting.report.figures import INK, Colours
from robot_forgetting.studies.digits.study_runs import Study

# Okabe and Ito's palette. A method has its colour, marker and dash in every figure; no two share all three.
STYLES = {
    "grpo": ("#0072B2", "o", "-"),
    "grpo_kl": ("#56B4E9", "P", "--"),
    "sft_1": ("#D55E00", "s", "-."),
    "sft_2": ("#E69F00", "^", ":"),
    "sft_oracle": ("#009E73", "D", (0, (6, 2))),
    "sft_oracle_soft": ("#009E73", "d", (0, (1, 1))),
    "reinforce_1_0": ("#CC79A7", "v", "--"),
    "simpo": (INK, "X", ":"),
    "sft_teacher": ("#CC79A7", "<", "-"),
    "sft_kl": ("#E69F00", "p", (0, (1, 1))),
    "self_sft": ("#E69F00", ">", "--"),
    "iterative_sft": ("#009E73", "h", "-."),
}
OTHERS = [("#CC79A7", "*", "-"), (INK, "1", "--"), ("#56B4E9", "2", "-."), ("#009E73", "3", ":")]
PROCESSES = {
    "expectation_maximisation": ("EM (alternating projections)", "#0072B2", "-"),
    "natural_policy_gradient": ("natural policy gradient", "#009E73", "--"),
    "policy_gradient_plain": ("plain softmax policy gradient", "#D55E00", "-."),
    "sft_oracle": ("SFT, oracle's labels", INK, ":"),
    "sft_one_label": ("SFT, one label", "#CC79A7", (0, (6, 2))),
    "sft_three_labels": ("SFT, three labels", "#E69F00", (0, (1, 1))),
}
NEW, PRIOR = "accuracy on ParityMNIST (new task)", "accuracy on FashionMNIST (prior task)"


def style(method: str, known: Sequence[str] = ()) -> tuple:
    """(colour, marker, dash)."""
    if method in STYLES:
        return STYLES[method]
    unknown = [name for name in known if name not in STYLES]
    return OTHERS[unknown.index(method) % len(OTHERS)] if method in unknown else OTHERS[0]


class Styles(Colours):
    """Colours and markers of the page's methods, as in its figures."""

    def colour(self, method: str) -> str:
        return style(method, self.methods)[0]

    def marker(self, method: str) -> str:
        return style(method, self.methods)[1]


def process_name(process: str) -> str:
    return PROCESSES[process][0] if process in PROCESSES else process.replace("_", " ")


def curve(axis, curve: Sequence[dict], **options) -> None:
    axis.plot([row["new"] for row in curve], [row["prior"] for row in curve], linewidth=1.8, **options)


def bases(axis, study: Study):
    bases = {(p["seed"], p["base_new"], p["base_prior"]) for p in study.points}
    x, y = [b for _, b, _ in sorted(bases, key=str)], [b for _, _, b in sorted(bases, key=str)]
    return axis.plot(x, y, color=INK, marker="*", markersize=11, linestyle="none", label="base policy", zorder=4)[0]


def limits(axis, points: Sequence[dict], study: Study) -> None:
    x = [p["new"] for p in points] + [p["base_new"] for p in study.points]
    y = [p["prior"] for p in points] + [p["base_prior"] for p in study.points]
    pad_x, pad_y = 0.03 * (max(x) - min(x)) + 0.004, 0.04 * (max(y) - min(y)) + 0.004
    axis.set(xlim=(min(x) - pad_x, max(x) + pad_x), ylim=(min(y) - pad_y, max(y) + pad_y))
