"""Circuits: which nodes a task needs, what connects them, and whether they are more than an artefact."""

from .ablations import node_hooks
from .effects import Effects, ablation_effects
from .graph import CircuitGraph, circuit_graph
from .masks import Schedule
from .prune import prune
from .result import Measured, Pruning, SeedCircuit
from .task import TASKS, CannotDoTask, Task, bracket_counting

__all__ = [
    "TASKS",
    "CannotDoTask",
    "CircuitGraph",
    "Effects",
    "Measured",
    "Pruning",
    "Schedule",
    "SeedCircuit",
    "Task",
    "ablation_effects",
    "bracket_counting",
    "circuit_graph",
    "node_hooks",
    "prune",
]
