"""Reports: a folder with a page that a browser opens from disk, and the numbers behind it."""

from ..experiments.suite import Suite
from .page import write_report

__all__ = ["Suite", "write_report"]
