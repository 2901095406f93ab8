"""The version, and what this build can do on this machine."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

__all__ = ["__version__", "show_config"]

__version__ = version("semigroup-scalpel")


class Config(dict[str, Any]):
    """A dict whose text is one "key: value" a line."""

    def __str__(self) -> str:
        width = max(map(len, self))
        return "\n".join(f"{key + ':':{width + 1}} {_text(value)}" for key, value in self.items())


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cuda() -> str:
    from ._native import cuda_core

    try:
        return f"{cuda_core().device_count()} devices"
    except ImportError:
        return "not built"
    except RuntimeError as error:
        return f"built; {error}"


def show_config() -> Config:
    """What this build is and uses here; ``print(scalpel.show_config())`` shows it.

    Keys: version, python, torch, compiler, targets_built, targets_supported, target (the one in use; set
    SCALPEL_TARGET to force another), threads, parallel, cuda.

    Raises ValueError when SCALPEL_TARGET names a target that can't run here.
    """
    import platform

    import torch

    from ._native import cpu_core

    targets = cpu_core.targets()
    return Config(
        version=__version__,
        python=platform.python_version(),
        torch=str(torch.__version__),
        compiler=cpu_core.compiler(),
        targets_built=[t["name"] for t in targets if t["built"]],
        targets_supported=[t["name"] for t in targets if t["supported"]],
        target=cpu_core.active_target(),
        threads=torch.get_num_threads(),
        parallel=cpu_core.parallel_backend(),
        cuda=_cuda(),
    )
