"""Calling a function of ours once somebody has imported a module of another package.

Scalpel adds classes to the registries of transformers, and tells torch's compiler about its ops. Both may be imported
after Scalpel or not at all. Importing them here would cost every user seconds, so a finder waits for their modules and
calls the function after they have run.
"""

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["WaitingFinder", "when_imported"]

Then = str  # "module:function", which is imported when it is due


class WaitingFinder:
    """Finds the modules that are waited for, as the other finders do, and lets their loaders call a function at last.

    Like the finder of moved modules it derives from no class of importlib.abc, whose import would take longer than all
    else that ``import scalpel`` does.
    """

    def __init__(self, awaited: Mapping[str, Then]) -> None:
        self.awaited = dict(awaited)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders have for a module that is waited for, and None for every other module."""
        then = self.awaited.get(fullname)
        if then is None:
            return None
        for finder in sys.meta_path:
            if isinstance(finder, WaitingFinder) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = _ThenLoader(spec.loader, then)  # type: ignore[assignment]
                return spec
        return None


class _ThenLoader:
    """A loader that calls a function after the module has run; everything else is the loader's that it stands for."""

    def __init__(self, loader: Any, then: Then) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module with its own loader, which it keeps, and call the function."""
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _call(self._then, module)


def when_imported(awaited: Mapping[str, Then]) -> None:
    """Call each function with its module once that has been imported: at once for those that already are.

    Args:
        awaited: From the full name of a module to the function that is called with it, written ``"module:function"``
            and imported only then. If it fails, a warning says so and the import goes on, since whoever imports the
            module may not need Scalpel for it.

    Example:
        >>> import wave
        >>> when_imported({"wave": "builtins:repr"})
    """
    later = {}
    for name, then in awaited.items():
        module = sys.modules.get(name)
        if module is None:
            later[name] = then
        else:
            _call(then, module)
    if later:
        sys.meta_path.insert(0, WaitingFinder(later))


def _call(then: Then, module: ModuleType) -> None:
    home, _, function = then.partition(":")
    try:
        getattr(import_module(home), function)(module)
    except Exception as error:  # of any kind: the module itself is fine, and its importer must not be the one to suffer
        warnings.warn(
            f"Scalpel could not make itself known to {module.__name__}: {type(error).__name__}: {error}. Loading a "
            "CircuitGPT with scalpel.CircuitGPT.from_pretrained is not affected",
            RuntimeWarning,
            stacklevel=2,
        )
