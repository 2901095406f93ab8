"""The report: one folder with a page that opens from disk and the numbers behind it."""

from .page import Suite, write_report

__all__ = ["Suite", "write_report"]
