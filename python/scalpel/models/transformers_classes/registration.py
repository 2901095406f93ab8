"""Adding CircuitGPT to transformers' Auto classes, and to TransformerLens.

Each function is called once, with the module that it extends, when somebody has imported that module;
``import scalpel`` arranges it. Nothing here is imported before.
"""

import functools
from types import ModuleType
from typing import Any

__all__ = ["register_config", "register_lens", "register_model", "register_tokenizer"]

# Options that say where and how to look for files, which a folder that is already here needs not.
_OF_THE_HUB = (
    "cache_dir",
    "code_revision",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def register_config(module: ModuleType) -> None:
    """Let ``AutoConfig`` read the configuration of a CircuitGPT, in the public layout too.

    A folder in the public layout has no ``config.json``, and transformers looks for no other file. So its
    ``from_pretrained`` is wrapped: it asks first whether this is such a folder.
    """
    from .configuration import CircuitGPTHubConfig, public_fields_in

    auto = module.AutoConfig
    auto.register(CircuitGPTHubConfig.model_type, CircuitGPTHubConfig, exist_ok=True)
    of_transformers = auto.from_pretrained.__func__
    if getattr(of_transformers, "knows_circuitgpt", False):
        return  # this library was imported before, and reloaded

    @functools.wraps(of_transformers)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        fields = public_fields_in(pretrained_model_name_or_path, options.get("subfolder", ""))
        if fields is None:
            return of_transformers(cls, pretrained_model_name_or_path, **options)
        options = {name: value for name, value in options.items() if name not in _OF_THE_HUB}
        return CircuitGPTHubConfig.from_dict(fields, name_or_path=str(pretrained_model_name_or_path), **options)

    from_pretrained.knows_circuitgpt = True  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(from_pretrained)


def register_lens(module: ModuleType) -> None:
    """Let TransformerLens's ``boot_transformers`` know the architecture.

    It has entry points for that, and this library has one. But up to version 4.3 ``boot_transformers`` looks into a
    table of its own before it asks for them.
    """
    from .lens_adapter import CircuitGPTAdapter

    module.SUPPORTED_ARCHITECTURES.setdefault("CircuitGPTForCausalLM", CircuitGPTAdapter)


def register_model(module: ModuleType) -> None:
    """Let ``AutoModelForCausalLM`` load a CircuitGPT."""
    from .configuration import CircuitGPTHubConfig
    from .modeling import CircuitGPTForCausalLM

    module.AutoModelForCausalLM.register(CircuitGPTHubConfig, CircuitGPTForCausalLM, exist_ok=True)


def register_tokenizer(module: ModuleType) -> None:
    """Let ``AutoTokenizer`` read the tokenizer of a CircuitGPT."""
    from .configuration import CircuitGPTHubConfig
    from .tokenizer import CircuitGPTTokenizer

    module.AutoTokenizer.register(CircuitGPTHubConfig, fast_tokenizer_class=CircuitGPTTokenizer, exist_ok=True)
