"""The report: one folder with a page that opens from disk and the numbers behind it."""

from .files import check_folder, replace_text
from .page import Suite, write_report

__all__ = ["Suite", "check_folder", "replace_text", "write_report"]
