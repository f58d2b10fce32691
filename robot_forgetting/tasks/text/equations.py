"""Chemical equations as text: whether two say the same reaction with the same balance."""

from __future__ import annotations

import re
from fractions import Fraction

ARROW = re.compile(r"\s*(?:<?[-=]+>|⟶|→|⇌|⇄|\\(?:long)?(?:right|leftright)arrow|\\rightleftharpoons|=)\s*")
STATE = re.compile(r"\((?:aq|s|l|g)\)")
TERM = re.compile(r"(\d+/\d+|\d+(?:\.\d+)?)?\s*[*·]?\s*(\S.*)")
# Charges carry a plus too: {+}, ^{2+}, [..]+ stay whole because sides are cut at pluses with space around them first.
PLUS = re.compile(r"\s\+\s")
DIGITS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
LATEX = re.compile(r"\\(?:text|mathrm|ce)\{([^{}]*)\}")

LONGEST = 2000  # characters; what is longer is no equation, and the patterns' steps grow with the square of it

Side = dict[str, Fraction]


def same_equation(one: str, other: str) -> bool:
    """Whether both are the same equation: order of the terms, states of matter and a common factor do not matter."""
    first, second = parse_equation(one), parse_equation(other)
    if first is None or second is None or [set(side) for side in first] != [set(side) for side in second]:
        return False
    ratios = {side[term] / twin[term] for side, twin in zip(first, second, strict=True) for term in side}
    return len(ratios) == 1


def parse_equation(text: str) -> tuple[Side, Side] | None:
    """'2H2 + O2 = 2H2O' as ({'H2': 2, 'O2': 1}, {'H2O': 2}); None where the text is no single equation."""
    text = " ".join(text.split())
    if len(text) > LONGEST:
        return None
    text = LATEX.sub(r"\1", text.translate(DIGITS)).replace("$", "").replace("_", "").strip().rstrip(".")
    sides = [_parse_side(part) for part in ARROW.split(text)]
    return (sides[0], sides[1]) if len(sides) == 2 and all(sides) else None


def _parse_side(text: str) -> Side | None:
    terms = PLUS.split(text) if PLUS.search(text) else re.split(r"\+(?![^{(\[]*[})\]])(?=\S)", text)
    side: Side = {}
    for term in terms:
        match = TERM.fullmatch(STATE.sub("", term).strip())
        if match is None or not re.fullmatch(r"[A-Za-z\[({][^\s,;:=]*", formula := match[2].strip()):
            return None
        try:
            count = Fraction(match[1] or 1)
        except (ZeroDivisionError, ValueError):  # or thousands of digits
            return None
        if count <= 0:
            return None
        formula = formula.replace("·", "*").replace("^", "")
        side[formula] = side.get(formula, Fraction(0)) + count
    return side
