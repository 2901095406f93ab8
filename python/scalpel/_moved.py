"""Old names of modules that have moved: each still imports, as the module at its new place, with a warning.

The table holds what README, an example or a package's ``__init__`` once showed, and the modules of classes that a user
may have pickled. A name is looked up here only after Python has found no module of that name, so that importing what
exists costs nothing. Old modules that are packages today (``models.circuitgpt``, ``guard``) are not in the table; such
a package exports what the module of its name held.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "MovedModuleFinder", "install"]

# The old name and the new one, both below "scalpel.".
MOVED = {
    "bench": "cli.bench",
    "circuits.pruning": "circuits.result",
    "cli_models": "cli.models",
    "cli_show": "cli.show",
    "experiments.agreement": "experiments.brackets.agreement",
    "experiments.calibration": "experiments.brackets.calibration",
    "experiments.causes": "experiments.brackets.causes",
    "experiments.circuit": "experiments.machine.circuit",
    "experiments.constructed": "experiments.brackets.constructed",
    "experiments.critical": "experiments.brackets.critical",
    "experiments.dilution": "experiments.brackets.dilution",
    "experiments.dilution_laws": "experiments.brackets.dilution_laws",
    "experiments.distractors": "experiments.brackets.distractors",
    "experiments.guard": "experiments.brackets.guard",
    "experiments.laws": "experiments.brackets.laws",
    "experiments.minimal_simulator": "experiments.brackets.minimal_simulator",
    "guard_crossings": "guard.crossings",
    "jacobians.lyapunov": "jacobians.depth.lyapunov",
    "models.ablation": "models.circuitgpt.ablation",
    "models.attention": "models.circuitgpt.attention",
    "models.checkpoint": "models.circuitgpt.checkpoint",
    "models.config": "models.circuitgpt.config",
    "models.decoder": "models.decoders.decoder",
    "models.edges": "models.circuitgpt.edges",
    "models.families": "models.decoders.families",
    "models.generation": "models.circuitgpt.generation",
    "models.gpt2": "models.decoders.gpt2",
    "models.gpt_neox": "models.decoders.gpt_neox",
    "models.hooks": "models.circuitgpt.recording",
    "models.llama": "models.decoders.llama",
    "models.logit_attribution": "models.circuitgpt.logit_attribution",
    "models.scope": "hooks.scope",
    "ops": "topk",
    "reference_jacobian": "reference.jacobian",
    "reference_lanes": "reference.lanes",
    "reference_semigroup": "reference.semigroup",
    "report.analysis_pictures": "report.pictures.analysis_pictures",
    "report.figures": "report.pictures.figures",
    "semigroup.extraction.extraction": "semigroup.extraction.result",
    "training.corpus": "tasks.corpus",
}

_PACKAGE = __name__.partition(".")[0]


class MovedModuleFinder:
    """Finds a module by its old name and loads the module at the new one, which is the same object under both.

    It keeps the protocols of a finder and of a loader without deriving from their classes: importlib.abc takes as long
    to import as everything else that ``import scalpel`` does.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of an old name of the table, and None for every other name."""
        new_name = _new_name(fullname)
        return None if new_name is None else ModuleSpec(fullname, self, origin=new_name)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """None: Python makes an empty module, which exec_module replaces."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of the new name in the place of the empty one that Python made for the old name.

        Raises ModuleNotFoundError where the new module needs a package that isn't installed.
        """
        old_name = module.__name__
        new_name = _new_name(old_name)
        if new_name is None:
            raise ModuleNotFoundError(f"No module named {old_name!r}", name=old_name)
        _warn_importer(f"{old_name} has moved: import {new_name} instead")
        # The import system takes what stands here after exec_module, and leaves its attributes as they are.
        sys.modules[old_name] = import_module(new_name)


def install() -> None:
    """Let Python ask the table for module names that no other finder knows. A second call changes nothing."""
    if not any(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedModuleFinder())


def _new_name(old_name: str) -> str | None:
    package, _, rest = old_name.partition(".")
    return f"{_PACKAGE}.{MOVED[rest]}" if package == _PACKAGE and rest in MOVED else None


def _warn_importer(message: str) -> None:
    """Warn at the line that imports: Python shows a DeprecationWarning only where the user's own code stands."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "importlib":
        frame = frame.f_back
    warnings.warn_explicit(
        message,
        DeprecationWarning,
        filename=frame.f_code.co_filename,
        lineno=frame.f_lineno,
        module=frame.f_globals.get("__name__", "<unknown>"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )
