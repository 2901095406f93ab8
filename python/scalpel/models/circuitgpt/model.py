"""CircuitGPT: the core of a weight-sparse transformer together with everything that one does with such a model.

The forward pass stands in :mod:`.core`. Each method here is the short way to a function in a file of its own.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from . import ablation, checkpoint, edges, generation, logit_attribution, near_ties, recording
from .loaded import LoadedCore

__all__ = ["CircuitGPT"]


class CircuitGPT(LoadedCore):
    """A weight-sparse transformer (Gao et al. 2025, arXiv 2511.13653) whose every value and weight can be looked at.

    Build an untrained model from a configuration and a seed, or load one with :meth:`from_pretrained`. Parameter names
    are those of the public checkpoints.

    Args:
        config: Shape and variants of the model.
        seed: Seed of the initial weights. They are drawn on the CPU in float32 and then moved, so a seed gives the
            same weights on every device and, to rounding, in every dtype.
        device: Where the weights are, the CPU by default. ``"meta"`` gives the shapes alone: nothing is drawn and no
            memory is taken.
        dtype: Floating-point dtype of the weights, float32 by default. Torch's own defaults
            (``torch.set_default_device``, ``torch.set_default_dtype``, ``with torch.device(...)``) change neither
            device nor dtype.

    Raises:
        TypeError: ``dtype`` is not a torch.dtype.
        ValueError: ``dtype`` is not a floating-point dtype.

    Example:
        >>> import torch
        >>> from scalpel import CircuitGPT, CircuitGPTConfig
        >>> model = CircuitGPT(CircuitGPTConfig(vocab_size=10, n_layer=1, n_head=2, d_model=8), seed=0)
        >>> model(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 10])
    """

    def run_with_cache(
        self, input_ids: Tensor, names: recording.Names = ".*", stop_at: str | None = None, **inputs: Any
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        r"""Run the model and keep the values at some hooks.

        Args:
            input_ids: Token ids (B, L), integers.
            names: Which hooks to keep: a regular expression, matched from the start of a hook's name as ``re.match``
                does, a list of names, or a function from a name to whether it is kept. A list may also hold names of
                TransformerLens. The weights of attention, ``"0.attn.pattern"`` (``"blocks.0.attn.hook_pattern"``), are
                kept only if they are listed, or if the expression spells ``pattern``.
            stop_at: A hook after which nothing more is computed.
            **inputs: ``attention_mask`` and ``position_ids`` as in :meth:`forward`; ``fwd_hooks``, interventions as in
                :meth:`run_with_hooks`, made before a value is kept.

        Returns:
            The logits (B, L, vocab), or None if the pass was stopped, and {hook: value (B, L, width)} in the order of
            the forward pass. Attention weights are (B, L, n_head * L), those of a query's heads side by side:
            ``value.unflatten(-1, (n_head, L)).transpose(1, 2)`` is (B, n_head, queries, keys). A row sums to less than
            1 where there is a sink. A pass that shows them does without torch's fused kernels in that layer, so values
            after it differ by rounding. All values are the tensors that the model itself goes on with: they are taken
            after ablations and interventions, include rows at padding, and have their autograd history
            (``torch.no_grad()`` saves that memory). Do not change them in place.

        Raises:
            ValueError: A hook is unknown, a pattern or function picks none, or ``stop_at`` comes before a hook that is
                listed or before all hooks that are picked.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> ids, mask = model.tokenizer.batch(["[[1,2],3", "[4,5"])
            >>> logits, values = model.run_with_cache(ids, r"0\.attn\.[qk]", attention_mask=mask)
            >>> {name: tuple(value.shape) for name, value in values.items()}
            {'0.attn.k': (2, 7, 128), '0.attn.q': (2, 7, 128)}
            >>> _, values = model.run_with_cache(ids, ["0.attn.pattern"], attention_mask=mask)
            >>> values["0.attn.pattern"].unflatten(-1, (8, 7)).shape  # texts, queries, heads, keys
            torch.Size([2, 7, 8, 7])
        """
        return recording.run_with_cache(self, input_ids, names, stop_at, **inputs)

    def run_with_hooks(
        self, input_ids: Tensor, fwd_hooks: Sequence[tuple[str, Callable[..., Any]]], **inputs: Any
    ) -> Tensor:
        """Run the model with values changed at some hooks.

        Args:
            input_ids: Token ids (B, L), integers.
            fwd_hooks: Pairs (hook, function). ``function(value, name)`` returns the value to go on with, of the same
                shape and dtype on the same device, or None to leave it. Functions of one hook are called in their
                order, after ablations that are in force. At ``"0.attn.pattern"`` the value is the weights (B, L,
                n_head * L) that meet v, see :meth:`run_with_cache`; what is put at keys that the query may not read has
                no effect.
            **inputs: ``attention_mask`` and ``position_ids`` as in :meth:`forward`.

        Returns:
            The logits (B, L, vocab).

        Raises:
            ValueError: A hook is unknown, or a function returned a tensor of another shape, dtype or device.
            TypeError: A function returned something else than a tensor or None.

        Example:
            >>> import torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> ids, _ = model.tokenizer.batch(["[[1,2]"])
            >>> logits = model.run_with_hooks(ids, [("0.attn.y", lambda value, name: torch.zeros_like(value))])
            >>> torch.equal(logits, model(ids))
            False
        """
        return recording.run_with_hooks(self, input_ids, fwd_hooks, **inputs)

    def ablate(self, nodes: str | Sequence[str], kind: str = "mean", **options: Any) -> "ablation.Ablation[Self]":
        """Replace nodes of the model within a context.

        A replacement is made after the hook's own AbsTopK, and everything downstream is computed from it. The model is
        as before once the context is left. Contexts nest, and each can be entered again.

        Args:
            nodes: Channels of hooks (``"2.attn.v:2012"``) or whole hooks (``"2.attn.v"``).
            kind: ``"zero"``; ``"mean"``, each channel's mean over the real tokens of the reference; or ``"resample"``,
                at each token the values that the nodes have at one real token of the reference, the same token for all
                nodes, so that their joint distribution is kept.
            **options: ``reference``, the prompts that means and samples are taken from, run without any ablation:
                ``input_ids`` (B, L), a pair ``(input_ids, attention_mask)``, a mapping with these keys, or a list of
                prompts (texts or lists of ids). ``"mean"`` without a reference takes ``model.card["hook_means"]``.
                ``seed`` (0 by default), the seed of the samples.

        Returns:
            The context, which gives the model.

        Raises:
            ValueError: A hook, channel or kind is unknown, or a reference is needed and absent.

        Example:
            >>> import torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> ids, _ = model.tokenizer.batch(["[[1,2]"])
            >>> before = model(ids)
            >>> with model.ablate(["1.attn.v", "0.mlp.post_act:5"], kind="zero"):
            ...     torch.equal(model(ids), before)
            False
            >>> torch.equal(model(ids), before)
            True
        """
        return ablation.ablate(self, nodes, kind, **options)

    def logit_attribution(self, input_ids: Tensor, tokens: Any, **inputs: Any) -> "logit_attribution.LogitAttribution":
        """Split a logit into what each head, MLP and node contributes to it.

        The scale of the final norm and the masks of AbsTopK and ReLU are those of this run, so the parts add up to the
        logit exactly. Ablations that are in force count.

        Args:
            input_ids: Token ids (B, L), integers.
            tokens: A token, given as its id or as a text that is one token; or a pair (correct, wrong) for the
                difference of their logits.
            **inputs: ``position``, the column that is looked at, -1 by default; negative ones count back from the last
                real token of each row. ``attention_mask``, ``position_ids`` and ``fwd_hooks`` as in
                :meth:`run_with_cache`.

        Returns:
            The parts, in logits.

        Raises:
            ValueError: A text is not one token, an id is outside the vocabulary, or a column is not a real token.
            TypeError: A token is neither an int nor a text.

        Example:
            >>> import torch
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> ids, _ = model.tokenizer.batch(["[[1,2]"])
            >>> parts = model.logit_attribution(ids, ("]", ","))
            >>> parts.heads.shape  # prompts, layers, heads
            torch.Size([1, 2, 8])
            >>> torch.allclose(sum(parts.parts().values()), parts.total, atol=1e-4)
            True
        """
        return logit_attribution.logit_attribution(self, input_ids, tokens, **inputs)

    def edges(self) -> "edges.EdgeTable":
        """List every non-zero weight of every matrix as an edge between two nodes.

        Returns:
            A table with the columns src, dst, weight, layer and param. Nodes are named after hooks
            (``"0.attn.act_in:12"``); biases and norm weights connect no two nodes and are left out.

        Example:
            >>> edges = scalpel.CircuitGPT.from_pretrained("bracket-mini").edges()
            >>> len(edges) == len(edges.weight)
            True
            >>> edges.src[-1].partition(":")[0], edges.dst[-1].partition(":")[0]
            ('final_resid', 'logits')
        """
        return edges.edges(self)

    def near_ties(
        self, input_ids: Tensor, within: float = 1e-5, attention_mask: Tensor | None = None
    ) -> "list[near_ties.NearTie]":
        """List the places where a rounding difference below ``within`` can change what the model does.

        An AbsTopK keeps the k largest magnitudes of a token. Where the smallest magnitude that it keeps exceeds the
        largest that it drops by less than a rounding difference, another batch size, device or cached pass may keep the
        other entry, and all later values of the text may change by more than rounding. The same holds for the choice of
        the most likely token.

        Args:
            input_ids: Token ids (B, L), integers.
            within: The margin, in units of the value at the hook or of the logits, below which a place is listed.
            attention_mask: (B, L), 1 at real tokens. Padding is not listed.

        Returns:
            The near ties in the order of the forward pass, those of the logits last.

        Raises:
            ValueError: ``within`` is negative or not a number, or for the reasons of :meth:`forward`.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> ids, _ = model.tokenizer.batch(["[[1,2]"])
            >>> ties = model.near_ties(ids, within=0.01)
            >>> all(tie.margin < 0.01 for tie in ties), len(model.near_ties(ids, within=0))
            (True, 0)
        """
        return near_ties.near_ties(self, input_ids, within, attention_mask)

    def generate(self, input_ids: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue texts token by token.

        Keys and values of the tokens read so far are kept, so each step computes the new tokens alone. They take
        2 · n_layer · B · (L + ``max_new_tokens``) · n_head · d_head numbers of the model's dtype. Logits differ from
        those of whole passes by rounding, except where that rounding lets another entry through an AbsTopK;
        :meth:`near_ties` names the tokens at which that can happen.

        Args:
            input_ids: Token ids (B, L), integers.
            max_new_tokens: At most so many tokens are added.
            **options: ``temperature``, 0 by default, which takes the most likely token (of equals the lowest id);
                above 0 a token is drawn from the softmax of logits / temperature, among the ``top_k`` likeliest if
                that is given, with ``seed``. ``stop``, tokens (ids, or texts of one token) after which a row is done:
                it is then filled with its stop token. ``processors``, functions from (ids so far, logits (B, vocab))
                to the logits to go on with, such as :class:`scalpel.HoleGuard`. ``attention_mask`` (B, L), 1 at real
                tokens; padding must stand on the left. ``use_cache``: False runs the whole text at each step, as an
                intervention or a module hook that looks at several tokens needs; True insists on the cache. By default
                the cache is used where nothing in force may need the whole text.

        Returns:
            Token ids (B, L + n), n at most ``max_new_tokens``.

        Raises:
            ValueError: L + ``max_new_tokens`` exceeds the context, padding stands on the right, an option is out of its
                range, or ``use_cache`` is True and an intervention or a hook needs the whole text.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> ids, _ = model.tokenizer.batch(["[[1,2]"])
            >>> model.generate(ids, 3).shape[1] - ids.shape[1]
            3
        """
        return generation.generate(self, input_ids, max_new_tokens, **options)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> Self:
        """Load a model, in evaluation mode.

        Nothing that comes with a checkpoint is executed.

        Args:
            source: The name of a shipped model, a folder in the public or the hub's format, or a hub id
                (``"owner/name"``). A shipped name wins over a folder of that name; write ``"./name"`` for the folder.
            **options: ``dtype``, by default float32, or float64 where a weight is stored as float64; ``device``, by
                default the CPU; and ``revision``, ``cache_dir``, ``local_files_only``, ``token`` and ``force_download``
                as in huggingface_hub.

        Returns:
            The model, with its tokenizer and card where the checkpoint has them. What was harmless and passed over in
            loading is listed in ``model.card["notes"]``.

        Raises:
            CheckpointError: A key is missing or extra, a shape is wrong, a weight is not finite, or the configuration
                has a field that this model cannot express.
            TypeError: ``dtype`` is not a torch.dtype.
            ValueError: ``dtype`` is not a floating-point dtype.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> model.config.n_layer, model.config.d_model, model.training
            (2, 128, False)
        """
        return checkpoint.from_pretrained(cls, source, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the public format: ``beeg_config.json``, ``final_model.pt``, and tokenizer and card if there are any.

        Loading it again gives the same bits. Every file is complete on disk before the first takes its final name.

        Args:
            folder: Where to write; made if absent. Other files in it stay, but the tokenizer or card of an earlier
                model is removed if this model has none.

        Raises:
            CheckpointError: A weight is not finite, or the card cannot be written as JSON.
            OSError: The folder cannot be written.

        Example:
            >>> import tempfile
            >>> config = scalpel.CircuitGPTConfig(vocab_size=10, n_layer=1, n_head=2, d_model=8)
            >>> model = scalpel.CircuitGPT(config)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     model.save_pretrained(folder)
            ...     scalpel.CircuitGPT.from_pretrained(folder).config.d_model
            8
        """
        checkpoint.save_pretrained(self, folder)
