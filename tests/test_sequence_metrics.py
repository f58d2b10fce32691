"""Metrics of a sequence: an example whose numbers LIBERO's and mammoth's own functions give too."""

from __future__ import annotations

import pytest

from robot_forgetting.metrics.sequence import sequence_metrics

BASE = [0.1, 0.2, 0.0]
AFTER = [[0.8, 0.3, 0.1], [0.5, 0.9, 0.2], [0.6, 0.7, 0.6]]
CURVES = [[0.1, 0.5, 0.8, 0.7], [0.3, 0.9, 0.6, 0.9], [0.2, 0.2, 0.6, 0.4]]
SINGLE = [[0.1, 0.4, 0.6, 0.8], [0.2, 0.5, 0.7, 0.8], [0, 0.1, 0.3, 0.6]]
FROM_R = {
    "acc": 0.633333, "bwt": -0.2, "bwt_trace": -0.133333, "nbt_hu": 0.2, "nbt_zhu": [0.25, 0.2], "nbt_libero": 0.15,
    "fwt_zero_shot": 0.15, "forgetting_cw": 0.133333, "forgetting_mammoth": 0.2, "forgetting_cora": 0.157407,
    "transfer_cora": 0.148148,
}  # fmt: skip
FROM_CURVES = {"fwt_libero": 0.566667, "auc_libero": 0.558333}
FROM_SINGLE = {"transfer_cw": 0.159420, "transfer_cw_tasks": [0.095238, 0.277778, 0.133333]}


@pytest.mark.parametrize(
    "given, expected",
    [((), FROM_R), ((CURVES,), FROM_R | FROM_CURVES), ((CURVES, SINGLE), FROM_R | FROM_CURVES | FROM_SINGLE)],
)
def test_an_example_by_hand(given, expected):
    found = sequence_metrics(BASE, AFTER, *given)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_one_task():
    found = sequence_metrics([0.25], [[0.5]], [[0.25, 0.75, 0.5]])
    assert found == {
        "acc": 0.5, "forgetting_cw": 0.0, "bwt_trace": 0.0, "nbt_libero": 0.0, "fwt_libero": 1.75 / 3,
        "auc_libero": 1.75 / 3,
    }  # fmt: skip


def test_what_is_never_solved_and_what_is_solved_at_once():
    found = sequence_metrics([0, 1], [[0, 1], [0, 1]], [[0, 0], [1, 1]], [[0, 0], [1, 1]])
    assert found["forgetting_cora"] == found["transfer_cora"] == found["transfer_cw"] == 0
    assert found["transfer_cw_tasks"] == [0, None]


def test_another_shape():
    with pytest.raises(ValueError, match="R must be 2 x 2 for 2 tasks, not 1 x 2"):
        sequence_metrics([0, 0], [[1, 1]])
