"""One self-contained HTML page, and a JSON file with its tables, from run folders alone."""

from __future__ import annotations

from robot_forgetting.report.page import write_report

__all__ = ["write_report"]
