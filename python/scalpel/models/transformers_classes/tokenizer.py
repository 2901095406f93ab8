"""The tokenizer of a CircuitGPT as transformers knows tokenizers."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ..circuitgpt.checkpoint import CONFIG_FILES, read_config, shipped_models
from ..tokenizer import Tokenizer

__all__ = ["CircuitGPTTokenizer"]

# Names by which a vocabulary's special tokens are known, and what transformers calls them.
_ROLES = {
    "<|endoftext|>": "eos_token",
    "</s>": "eos_token",
    "<pad>": "pad_token",
    "<unk>": "unk_token",
}


class CircuitGPTTokenizer(PreTrainedTokenizerFast):
    """transformers' interface to the tokenizer of a checkpoint of a CircuitGPT.

    It splits text exactly as :class:`scalpel.models.tokenizer.Tokenizer` does and adds no special tokens. Besides a
    ``tokenizer.json`` it reads the public pair ``encoder.json`` and ``vocab.bpe``. Where the checkpoint names no
    padding token, a special token stands at padding, which no attention head reads.

    Example:
        >>> import scalpel
        >>> from scalpel.models.transformers_classes import CircuitGPTTokenizer
        >>> folder = scalpel.CircuitGPT.from_pretrained("bracket-mini").folder
        >>> tokenizer = CircuitGPTTokenizer.from_pretrained(folder)
        >>> tokenizer.decode(tokenizer("x = [1, 2")["input_ids"])
        'x = [1, 2'
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any) -> Any:  # noqa: D417
        """Read the tokenizer of a folder or a hub id.

        Args:
            pretrained_model_name_or_path: The folder or the hub id.
            **options: Those of transformers' ``from_pretrained``.

        Returns:
            The tokenizer.

        Raises:
            OSError: There is none.
        """
        source = str(pretrained_model_name_or_path)
        folder = shipped_models().get(source, Path(source)) / options.get("subfolder", "")
        if not folder.is_dir() or (folder / "tokenizer_config.json").is_file():
            return super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)
        config = read_config(folder)[1] if any((folder / name).is_file() for name in CONFIG_FILES) else None
        limit = {} if config is None else {"model_max_length": config.block_size}
        tokenizer = Tokenizer.from_folder(folder, *([] if config is None else [config.tokenizer_name]))
        if tokenizer is None:
            raise OSError(
                f"{folder} holds no tokenizer: no tokenizer.json, and no encoder.json with vocab.bpe that is known by "
                "its name"
            )
        return cls(
            tokenizer_object=tokenizer.inner,
            name_or_path=str(pretrained_model_name_or_path),
            **(_special_tokens(tokenizer) | limit | options),
        )


def _special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """What transformers should call the special tokens of a vocabulary that says only that they are special."""
    special = [token.content for token in tokenizer.inner.get_added_tokens_decoder().values() if token.special]
    roles = {_ROLES[token]: token for token in special if token in _ROLES}
    padding = tokenizer.inner.padding
    if padding is not None:
        roles["pad_token"] = padding["pad_token"]
    elif special and "pad_token" not in roles:
        roles["pad_token"] = roles.get("eos_token", special[0])
    return roles
