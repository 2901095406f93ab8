"""What is done with a lens and the model that it is attached to: reading, steering and evaluating.

Each method is the short way to a function in a file of its own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn

from ..models.marks import model_mark
from . import interventions
from .attached.model import AttachedModel
from .evaluating import evaluation
from .matrices import Layer
from .reading import readout, readout_intervals, vectors
from .reading.intervals import Intervals
from .reading.readout import Readout

__all__ = ["LensInUse"]

_DIGEST = re.compile("[0-9a-f]{64}")  # other values are digests of a part of the weights


class LensInUse:
    """The part of :class:`scalpel.JacobianLens` that needs a model."""

    J: Mapping[Any, Tensor]
    error: dict[Any, float]
    n_prompts: int
    source_layers: list[Layer]
    d_model: int
    about: dict[str, Any]
    _attached: AttachedModel | None = None

    def attach(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        unembed: Callable[[Tensor], Tensor] | None = None,
        check: bool = True,
    ) -> Self:
        """Say which model the lens is of, so that it can be read and steered.

        Args:
            model: The model that the lens was fitted on, as :func:`scalpel.jacobian` takes it.
            tokenizer: For a model that has none of its own: one of transformers or of tokenizers, or the path of one.
            unembed: For a model whose last norm and head aren't known, a function from residual streams (rows, width)
                to logits (rows, vocab). Its attribute ``weight`` (vocab, width), if it has one, gives the vectors of
                tokens.
            check: Whether to compare the digest of the model's weights, config and modules with that of the model that
                the lens was fitted on, where that is known; a warning says that they differ. It reads all weights once.

        Returns:
            The lens itself.

        Raises:
            ValueError: The model lacks a layer of the lens.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> scalpel.JacobianLens({0: torch.eye(128)}, 1).attach(model).attached.layers
            2
        """
        attached = AttachedModel(model, tokenizer, unembed)
        for layer in self.source_layers:
            attached.place(layer)
        known = self.about.get("model_sha256")
        if check and isinstance(known, str) and _DIGEST.fullmatch(known) and model_mark(attached.inside) != known:
            warnings.warn(
                f"this {type(attached.inside).__name__} isn't the model that the lens was fitted on, by the digest of "
                "its weights, config and modules: readouts may mean nothing here. check=False passes over that",
                stacklevel=2,
            )
        self._attached = attached
        return self

    @property
    def attached(self) -> AttachedModel:
        """The model, with its tokenizer and the places of its layers.

        Raises:
            ValueError: There is none.
        """
        if self._attached is None:
            raise ValueError("this lens isn't attached to a model: call lens.attach(model) first")
        return self._attached

    # ---- reading ---------------------------------------------------------------------------------

    def readout(
        self, text: Any, layers: Any = None, positions: Any = None, k: int = 10, *, lens: str = "both"
    ) -> readout.Readout:
        """Read which tokens each layer of a text leads to.

        The logits are those of the model's own last norm and head on J_l h, or on h for the logit lens. J_l h is
        computed in float32, the norm and the head in the model's dtype. Of equal logits the lower id comes first.
        Interventions that are in force count.

        Args:
            text: A string, which loses the spaces at its end (the result says so); token ids (S,) or (1, S); or a batch
                of one text, whose mask may say that it is padded.
            layers: Layers of the lens, or its target, whose matrix is the identity; all of the lens by default.
            positions: Tokens, counted from the first real one, negative ones from the last: None for all, an int, a
                slice or a list.
            k: How many tokens to keep of each readout.
            lens: ``"jacobian"``, ``"logit"``, or ``"both"``.

        Returns:
            The likeliest tokens, and the rank of the model's own first choice.

        Raises:
            ValueError: For an unknown layer or position, a text without a token, or a model whose head isn't known.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> lens.readout("x = [[1, 2 ", k=3).jacobian.tokens.shape  # layers, tokens, k
            torch.Size([1, 9, 3])
        """
        return readout.readout(self, text, layers, positions, k, lens)

    def intervals(
        self,
        read: Readout,
        text: Any,
        prompts: Any,
        *,
        resamples: int = 200,
        seed: int = 0,
        progress: Callable[[int], None] | None = None,
    ) -> readout_intervals.ReadoutIntervals:
        """Compute how far a readout depends on the prompts that the lens was fitted on.

        The text's states go through the Jacobian of each of ``prompts``, which costs a forward pass of as many tangents
        as the readout has cells. Their scatter gives, by a bootstrap over prompts, the intervals of a mean over as many
        prompts as the lens has.

        Args:
            read: What :meth:`readout` gave.
            text: The same text.
            prompts: As :func:`scalpel.jacobian_lens.fit` takes them, of the kind that the lens was fitted on; two or
                more that are long enough.
            resamples: How often prompts are drawn.
            seed: Of the draws.
            progress: Called with the number of prompts done.

        Returns:
            95 % intervals of the listed logits, and of the rank of the model's own first choice.

        Raises:
            ValueError: Fewer than two prompts are long enough, the lens is a relevance lens or doesn't say its number
                of prompts, or the text is another.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> prompts = [torch.arange(i, i + 20)[None] for i in range(4)]
            >>> lens = scalpel.jacobian_lens.fit(model, prompts, skip_first=2, progress=False)
            >>> read = lens.readout("x = [[1", positions=-1, k=3)
            >>> lens.intervals(read, "x = [[1", prompts).logits.shape  # layers, positions, k, ends
            torch.Size([1, 1, 3, 2])
        """
        return readout_intervals.intervals_of(
            self, read, text, prompts, resamples=resamples, seed=seed, progress=progress
        )

    def probe_intervals(
        self, layer: Layer, tokens: Any, *, after: Any = None, resamples: int = 400, seed: int = 0
    ) -> Intervals:
        """Compute logits and ranks of tokens in the readouts of the vectors that a fit was given as ``probes=``.

        Args:
            layer: A layer of the lens.
            tokens: Ids, or texts that are one token each.
            after: For a model with a table of bigrams: the token at which each probe stands.
            resamples: How often prompts are drawn.
            seed: Of the draws.

        Returns:
            The logits and ranks of the mean over prompts with their 95 % intervals, each (probes, tokens). Ranks count
            from 1.

        Raises:
            ValueError: The lens comes from no fit with probes, or the layer or a token is unknown.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> prompts = [torch.arange(i, i + 20)[None] for i in range(4)]
            >>> h = torch.randn(2, 128)
            >>> lens = scalpel.jacobian_lens.fit(model, prompts, skip_first=2, probes=h, progress=False)
            >>> lens.probe_intervals(0, ["]", ","], after=["1", "["]).logits_low.shape  # probes, tokens
            torch.Size([2, 2])
        """
        return readout_intervals.intervals_of_probes(self, layer, tokens, after, resamples=resamples, seed=seed)

    def ranks(
        self, text: Any, tokens: Any, layers: Any = None, positions: Any = None, *, lens: str = "jacobian"
    ) -> Tensor:
        """Find the ranks of some tokens in the readouts of a text.

        Args:
            text: As for :meth:`readout`.
            tokens: Ids, or texts that are one token each.
            layers: As for :meth:`readout`.
            positions: As for :meth:`readout`.
            lens: ``"jacobian"`` or ``"logit"``.

        Returns:
            (layers, positions, tokens), int64, from 1.

        Raises:
            ValueError: As for :meth:`readout`, or for a text that is several tokens.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> lens.ranks("x = [[1", ["]", ","], positions=-1).shape
            torch.Size([1, 1, 2])
        """
        return readout.ranks(self, text, tokens, layers, positions, lens)

    def vector(self, token: Any, layer: Layer, *, norm_gain: bool = False) -> Tensor:
        """Return the direction of a token at a layer, J_lᵀ W[token] with the output matrix W.

        :func:`scalpel.jacobian_lens.token_vectors` computes it without a lens.

        Args:
            token: Its id, or its text.
            layer: A layer of the lens, or its target.
            norm_gain: Whether the last norm's gain g is a factor, J_lᵀ (g ⊙ W[token]).

        Returns:
            (width,), float32, or float64 for a model of that dtype.

        Raises:
            ValueError: For an unknown layer, or a text that is several tokens.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> torch.equal(lens.vector(5, 0), model.lm_head.weight[5])
            True
        """
        return vectors.vector(self, token, layer, norm_gain)

    # ---- changing the model ----------------------------------------------------------------------

    def steer(
        self, token: Any, strength: float, layers: Any, positions: Any = None, *, norm: Any = None
    ) -> interventions.Intervention:
        """Push the model's states in the direction of a token, inside a context.

        At each layer the unit vector of the token's direction, times the median norm of the states there, times
        ``strength`` is added. The median is over the real tokens of each text of the forward pass that is under way (of
        an even number, the lower of the two in the middle); of a step of generation with a cache that is the new token
        alone, so give ``norm`` where the same push is wanted at each.

        Args:
            token: An id or a text; or a vector (width,), or {layer: vector}.
            strength: The factor; negative ones push away, and 0 changes no bit.
            layers: Layers of the lens, or its target.
            positions: Which columns of the batch are changed, those in a cache counted too; negative ones count from
                the end: None for all, an int, a slice or a list.
            norm: A number, or {layer: number}, in place of the median norm.

        Returns:
            The context, which gives the model.

        Raises:
            ValueError: For an unknown layer or token, or a vector that is zero or of another width.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> ids, before = torch.tensor([[5, 6]]), model(torch.tensor([[5, 6]]))
            >>> with lens.steer("]", 2.0, layers=0):
            ...     bool((model(ids) != before).any())
            True
            >>> torch.equal(model(ids), before)
            True
        """
        return interventions.steer(self, token, strength, layers, positions, norm)

    def ablate(self, tokens: Any, layers: Any, positions: Any = None) -> interventions.Intervention:
        """Project the directions of tokens out of the model's states, inside a context.

        Directions are made orthonormal first, so what several of them share is removed once.

        Args:
            tokens: A token or several; or vectors (n, width), or {layer: vectors}.
            layers: As for :meth:`steer`.
            positions: As for :meth:`steer`.

        Returns:
            The context, which gives the model.

        Raises:
            ValueError: As for :meth:`steer`.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> with lens.ablate(["]", ","], layers=0):
            ...     _, values = model.run_with_cache(torch.tensor([[5, 6]]), ["1.resid_in"])
            >>> bool((values["1.resid_in"] @ lens.vector("]", 0)).abs().max() < 1e-4)
            True
        """
        return interventions.ablate(self, tokens, layers, positions)

    def swap(
        self, one: Any, other: Any, layers: Any, alpha: float = 1.0, positions: Any = None, *, clean: Any = None
    ) -> interventions.Intervention:
        r"""Exchange what the model's states have of two tokens, inside a context.

        With V the unit vectors of both directions as columns, c = V⁺ h and σ the exchange of two numbers, h becomes
        h + α V (σ(c) - c); for α = 1 that is the reflection that maps one vector on the other. At several layers a swap
        partly undoes what the one before it did. With ``clean``, h becomes h + α V (σ(c') - c) with the coordinates c'
        of an unmodified run of these texts, so that all layers are set to the same exchange.

        Args:
            one: A token, or a vector (width,), or {layer: vector}.
            other: The other one.
            layers: As for :meth:`steer`.
            alpha: The factor; 2 is what others call double strength, and 0 changes no bit.
            positions: As for :meth:`steer`.
            clean: The texts of the unmodified run: a string, ids (S,) or (B, S), or a batch, with the same columns as
                the pass that is changed. It is run when the context is entered.

        Returns:
            The context, which gives the model. It warns where the directions have a |cosine| of 0.99 or more.

        Raises:
            ValueError: As for :meth:`steer`, or where the |cosine| is 0.999 or more.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> ids = torch.tensor([[5, 6]])
            >>> with lens.swap("]", ",", layers=0), lens.swap("]", ",", layers=0):  # twice is not at all
            ...     twice = model(ids)
            >>> torch.allclose(twice, model(ids), atol=1e-4)
            True
        """
        return interventions.swap(self, one, other, layers, alpha, positions, clean)

    # ---- evaluation ----------------------------------------------------------------------------------

    def evaluate(
        self,
        items: Any,
        *,
        k: int | Sequence[int] = (1, 10, 100),
        layers: Any = None,
        band: Any = None,
        derangements: int = 100,
        seed: int = 0,
        read_at: str = "last",
    ) -> evaluation.Evaluation:
        """Count how often the lens shows what the model should think of, beside the logit lens and controls.

        The rules and intervals are defined in :mod:`scalpel.jacobian_lens.evaluating.evaluation`, and what is read of
        an item in :func:`scalpel.jacobian_lens.evaluating.items.read_items`. The model runs once for each item; all
        else reads its states. With derangements each layer is read with the matrices of the others, up to layers²
        readouts for each item, which is most of the work: name fewer layers where that is too much.

        Args:
            items: The path of a published file of items, or a list of mappings with prompt, intermediates and,
                optionally, name and target.
            k: The ranks up to which an intermediate counts as shown.
            layers: The layers that are read, by default all of the lens.
            band: The layers of the band, by default the middle half of these.
            derangements: How many random derangements of the layers the lens is compared with.
            seed: Of the controls and the bootstrap.
            read_at: ``"last"``, or ``"newline"`` for items about rhymes, which are read at the end of the first line.

        Returns:
            pass@k of the lens, the logit lens and the controls, with intervals by item.

        Raises:
            ValueError: For a wrong option, or items of which nothing can be scored.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
            >>> found = lens.evaluate([{"prompt": "x = [[1", "intermediates": ["]"]}], k=512, derangements=0)
            >>> found.passed["jacobian"]["minimum"][512].value
            1.0
        """
        return evaluation.evaluate(self, items, k, layers, band, derangements, seed, read_at)
