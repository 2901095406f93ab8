"""The version of the library, and what this build can do on this machine."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

__all__ = ["__version__", "show_config"]

__version__ = version("semigroup-scalpel")


class Config(dict[str, Any]):
    """A dict that prints as one "key: value" pair per line."""

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
    """Report what this build supports and which settings it uses on this machine.

    ``print(scalpel.show_config())`` shows one line per key.

    Returns:
        A dict with the keys version, python, torch, compiler, targets_built, targets_supported, target (the CPU target
        in use; the environment variable SCALPEL_TARGET forces another), threads, parallel and cuda.

    Raises:
        ValueError: If SCALPEL_TARGET names a target that cannot run on this machine.

    Example:
        >>> config = scalpel.show_config()
        >>> config["target"] in config["targets_supported"]
        True
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
