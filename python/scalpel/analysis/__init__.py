"""What a text does to a model's layers: spectra by layer and by depth, ranks, active fractions, margins."""

from .run import Analysis, analyze

__all__ = ["Analysis", "analyze"]
