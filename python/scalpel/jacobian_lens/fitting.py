"""Fitting a Jacobian lens: the mean of the matrices of many prompts, with its error, kept in a folder as it grows."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .._integers import integer
from .._resume import WayOut, Work
from ..jacobians.precision import plain_tensors
from .fits.bar import Bar
from .fits.folder import FILE, PIECES, alone_in, stored_width
from .fits.prompts import length_of, mark_of, read_prompts
from .fits.share import Share
from .fits.subject import Subject
from .fits.sums import Adding, Sums
from .lens import JacobianLens
from .provenance import about_of, key_of
from .sweeps.hooks import Layer
from .words import Words, words_of

__all__ = ["fit"]

_WAY_OUT = WayOut("lens", "give another folder", "fresh=True to fit anew there")


def fit(
    model: nn.Module | str | Path,
    prompts: Any,
    *,
    layers: Iterable[Layer] | Layer = "all",
    target: Layer | None = None,
    skip_first: int = 16,
    max_tokens: int = 128,
    targets: str = "after",
    estimator: str = "jacobian",
    precision: str | None = None,
    tolerance: float | None = None,
    folder: str | Path | None = None,
    shard: bool = False,
    progress: bool | Callable[[int], None] = True,
    tokenizer: Any = None,
    probes: Tensor | None = None,
    fresh: bool = False,
) -> JacobianLens:
    """Fit a Jacobian lens: for each layer, the mean Jacobian of the last residual stream with respect to that layer's.

    The matrix of layer l is J̄_l = E[1/|V| Σ_{t in V} Σ_{t' in V, t' ≥ t} ∂h_target[t'] / ∂h_l[t]], a mean over prompts,
    with V the prompt's tokens after the first ``skip_first`` and without the last. It carries what layer l writes to
    where the model's own unembedding can read it (Gurnee et al. 2026, "Verbalizable Representations Form a Global
    Workspace in Language Models", and the code published with it). Nothing is trained.

    Args:
        model: A :class:`scalpel.CircuitGPT`; a decoder of transformers, which goes through rules where it is of a
            family that has them; or any other nn.Module, through autograd. The path of a folder of safetensors is
            fitted with one layer in memory at a time.
        prompts: Strings, token ids, the path of a file, or an iterable of these. A text file is cut into stretches of
            ``max_tokens`` tokens; a .jsonl file has a prompt in each line. Prompts of fewer than ``skip_first`` + 2
            tokens are left out, with a warning.
        layers: The layers whose outputs are the sources: "all" for each layer before the target, a number from 0 or
            several, or paths of modules.
        target: The layer whose output is the target, before the final norm; None for the last one. Negative numbers
            count from the last.
        skip_first: How many tokens at the beginning of each prompt don't count, from the first real token.
        max_tokens: The most tokens of a prompt; what is longer is cut.
        targets: "after" sums over a token's own position and all later ones of the target, as published. "same" takes
            the token's own position alone, by random signs, which are unbiased and add to the error.
        estimator: "jacobian"; or "relevance", whose backward pass holds the norms' denominators constant, takes f(x)/x
            as the slope of an activation f, and gives each factor of a gated product half of the gradient.
        precision: None, or "bfloat16" for matrix products in bfloat16 with float32 sums.
        tolerance: Stop when the relative error of every layer is at most this; None reads all prompts.
        folder: Where the state is kept after each prompt, with the sums mapped into memory. A call that was stopped at
            whatever moment goes on from there, and gives the same bits as one that wasn't.
        shard: Whether this is one process of a torch.distributed job, whose processes share the prompts. Each returns
            the lens of all prompts.
        progress: Whether to show a bar on a terminal, or a function that is called with the number of prompts read.
        tokenizer: The tokenizer for strings, where the model has none of its own: one of transformers or of
            tokenizers, or a path.
        probes: (probes, width) vectors h, or (layers, probes, width), whose J_p h is kept for each prompt, so that
            :meth:`scalpel.JacobianLens.probe_intervals` needs no prompt again.
        fresh: Whether to remove what an earlier fit left in ``folder``, and to begin again.

    Returns:
        The lens, with the model attached to it.

    Raises:
        ValueError: An option or a layer is unknown, no prompt is long enough, a matrix isn't finite, or ``folder``
            holds another lens.
        RuntimeError: ``shard`` is set, and there is no torch.distributed job; or another fit is adding to ``folder``.

    Example:
        >>> import scalpel, torch
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> texts = ["x = [1, 2, [3, 4], 5]", "y = [[1], 2, [3]]"]
        >>> lens = scalpel.jacobian_lens.fit(model, texts, skip_first=2, progress=False)
        >>> lens.n_prompts, lens.J[0].shape == (model.config.d_model,) * 2
        (2, True)
    """
    if integer(max_tokens, "max_tokens") < 1:
        raise ValueError(f"max_tokens is {max_tokens}; it must be 1 or more")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance is {tolerance}; it must be a positive number, such as 0.05")
    if max_tokens < integer(skip_first, "skip_first") + 2:
        raise ValueError(
            f"max_tokens is {max_tokens} and skip_first {skip_first}, so no prompt is long enough: allow "
            f"{skip_first + 2} tokens or more"
        )
    share = Share.of_job() if shard else Share()
    if tolerance is not None and share.world > 1 and isinstance(model, str | Path):
        raise ValueError(
            "tolerance= with shard=True needs a model in memory, since processes that stream a folder read prompts "
            "ahead: leave one of them out"
        )
    subject = Subject(
        model,
        layers,
        target=target,
        skip_first=skip_first,
        targets=targets,
        estimator=estimator,
        precision=precision,
    )
    words = words_of(model, tokenizer)
    about = about_of(subject, max_tokens)
    if folder is None:
        return _fitted(subject, share, None, prompts, words, about, max_tokens, tolerance, progress, probes)
    own = share.folder(Path(folder).expanduser())
    with alone_in(own):
        key = {**key_of(about), "layers": list(subject.layers), "share": [share.rank, share.world]}
        key |= {} if probes is None else {"probes": mark_of(probes).hex()}
        work = Work(own, FILE, key, _WAY_OUT, pieces=PIECES, fresh=fresh)
        return _fitted(subject, share, work, prompts, words, about, max_tokens, tolerance, progress, probes)


def _fitted(
    subject: Subject,
    share: Share,
    work: Work | None,
    prompts: Any,
    words: Words | None,
    about: dict[str, Any],
    max_tokens: int,
    tolerance: float | None,
    progress: bool | Callable[[int], None],
    probes: Tensor | None,
) -> JacobianLens:
    """Read the prompts, and make a lens of what was summed."""
    skip_first = subject.options["skip_first"]
    with plain_tensors(), Bar(progress, prompts) as bar:
        fitting = _Fitting(subject, share, work, probes, tolerance, bar)
        fitting.read(read_prompts(prompts, words, max_tokens))
        sums = share.merged(fitting.sums)
    count, digest, skipped = fitting.corpus()
    if sums is None or not sums.n:
        raise ValueError(
            f"no prompt counts: {count} were read, and {skipped} had fewer than {skip_first + 2} tokens, which "
            f"skip_first={skip_first} asks for; give longer prompts, or a smaller skip_first"
        )
    if skipped:
        warnings.warn(
            f"{skipped} of {count} prompts have fewer than {skip_first + 2} tokens, and were left out",
            stacklevel=3,
        )
    about |= {
        "corpus_sha256": digest,
        "prompts_read": count,
        "prompts_left_out": skipped,
        "stopped": fitting.stopped,
    }
    if work is not None:
        work.note(about=about)
    return JacobianLens.from_sums(sums, about, None if subject.folder is not None else subject.model, words)


class _Fitting:
    """Reads prompts and adds their matrices, until they end or the errors are small enough."""

    def __init__(
        self,
        subject: Subject,
        share: Share,
        work: Work | None,
        probes: Tensor | None,
        tolerance: float | None,
        bar: Bar,
    ) -> None:
        self._subject, self._share, self._work = subject, share, work
        self._probes, self._tolerance, self._bar = probes, tolerance, bar
        self.count, self.digest = 0, hashlib.sha256()
        self._short: list[int] = []  # the prompts that don't count
        self._digests: dict[int, str] = {}  # of all prompts up to that one
        self._ahead: set[int] = set()  # the prompts that were read and aren't in the sums yet
        self._shortest = subject.options["skip_first"] + 2
        self.stopped: dict[str, Any] | None = None
        self.sums: Sums | None = None
        if work is not None and (width := stored_width(work)) is not None:
            self.sums = self._new(width)

    def read(self, prompts: Iterator[Any]) -> None:
        """Read the prompts, ``world`` at a time, one for each process."""
        adding: Adding | None = None
        waiting: list[int] = []  # complete, while rows of others are still missing

        def see(number: int, layer: Any, first: int, rows: Tensor) -> None:
            nonlocal adding
            if self.sums is None:
                self.sums = self._new(rows.shape[1])
            adding = self.sums.begin(number) if adding is None else adding
            adding.add(layer, first, rows, prompt=number, probes=self._probes_of(layer))

        for finished in self._subject.rows(self._counted(prompts), see):
            waiting += finished
            if adding is None or len(waiting) < len(adding.norms):
                continue
            assert self.sums is not None
            self.sums.commit(adding, self._digests[max(waiting)])
            self._ahead -= set(waiting)
            self._bar.errors(self.sums.errors())
            adding, waiting = None, []
            if self._share.world == 1 and self._precise():
                break

    def _counted(self, prompts: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """The prompts that count, fall to this process and aren't in the sums yet, with their numbers."""
        begun = 0 if self.sums is None else self.sums.read
        begin = max(self._share.gathered(self._share.rounds(begun)))
        for rounds, few in enumerate(_batched(prompts, self._share.world), start=1):
            for prompt in few:
                number = self._note(prompt, begun)
                if number >= begun and self._share.mine(number):
                    if length_of(prompt) >= self._shortest:
                        self._ahead.add(number)
                        yield number, prompt
                    elif self.sums is not None and not self._ahead:  # else a run that goes on would leave these out
                        self.sums.pass_over(self.count, self._digests[number])
                self._bar.step()
            if (rounds == begin or (self._share.world > 1 and rounds > begin)) and self._precise():
                return
        if begun > self.count:
            raise ValueError(
                f"there are {self.count} prompts, and the folder's lens was made of the first {begun} of more: give "
                "the same prompts, another folder, or fresh=True"
            )

    def _note(self, prompt: Any, begun: int) -> int:
        """Count a prompt that was read, and return its number."""
        number, self.count = self.count, self.count + 1
        self.digest.update(mark_of(prompt))
        self._digests[number] = self.digest.hexdigest()
        if length_of(prompt) < self._shortest:
            self._short.append(number)
        if self.count == begun and self.sums is not None and self._digests[number] != self.sums.digest:
            raise ValueError(
                f"the first {begun} prompts are not those that the folder's lens was made of: give the same prompts, "
                "another folder, or fresh=True"
            )
        return number

    def corpus(self) -> tuple[int, str, int]:
        """How many prompts the lens is of, their digest, and how many of them don't count.

        A fit that stops at its tolerance has read prompts of a streamed model ahead, which are none of them.
        """
        count, digest = self.count, self.digest.hexdigest()
        if self.stopped is not None and self.sums is not None and self._share.world == 1:
            count, digest = self.sums.read, self.sums.digest
        return count, digest, sum(number < count for number in self._short)

    def _probes_of(self, layer: Any) -> Tensor | None:
        if self._probes is None or self._probes.dim() == 2:
            return self._probes
        return self._probes[self._subject.layers.index(layer)]

    def _new(self, width: int) -> Sums:
        probes, layers = self._probes, self._subject.layers
        if probes is not None and (
            probes.dim() not in (2, 3)
            or probes.shape[-1] != width
            or (probes.dim() == 3 and len(probes) != len(layers))
        ):
            raise ValueError(
                f"probes has shape {tuple(probes.shape)}; allowed: (probes, {width}), or ({len(layers)}, probes, "
                f"{width}) for vectors of each layer's own"
            )
        if self._work is not None and self._work.notes.get("width") != width:
            self._work.note(width=width)
        return Sums(layers, width, self._work, 0 if probes is None else probes.shape[-2])

    def _precise(self) -> bool:
        """Whether the error of every layer is within the tolerance; a NaN never is."""
        if self._tolerance is None:
            return False
        errors = self._share.errors(self.sums)
        if not errors or not all(error <= self._tolerance for error in errors):
            return False
        worst = max(range(len(errors)), key=errors.__getitem__)
        last = self._subject.layers[worst]
        self.stopped = {"tolerance": self._tolerance, "last_layer": last, "error": errors[worst]}
        return True


def _batched(prompts: Iterator[Any], size: int) -> Iterator[list[Any]]:
    few: list[Any] = []
    for prompt in prompts:
        few.append(prompt)
        if len(few) == size:
            yield few
            few = []
    if few:
        yield few
