"""Paths in the source tree."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent
TABLES = SUPPORT / "tables"
