"""The object of a Jacobian lens: its matrices, what is known of them, its controls, mergers and files.

What is done with a lens and its model stands in :mod:`.in_use`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from .evaluating import controls
from .files import file, hub
from .files.merging import check_mergeable, merged_about, merged_means
from .fits.folder import sums_in
from .fits.sums import Means
from .in_use import LensInUse
from .matrices import Layer, widened

__all__ = ["JacobianLens"]


class JacobianLens(LensInUse):
    """For each layer l the mean Jacobian J_l of a model's last residual stream with respect to what the layer leaves.

    The model's own last norm and head on J_l h say which tokens the state h of layer l leads to on average. A lens
    comes from :func:`scalpel.jacobian_lens.fit`, from a file or from the hub. Reading and steering need the model: give
    it here, or to :meth:`attach`.

    Args:
        J: {layer: (width, width)}; a row is a dimension of the target. A layer is the number of a block, whose output
            is meant, or the path of a module. Matrices in other dtypes are given as float32 when they are asked for.
        n_prompts: The number of prompts that they are means over.
        error: {layer: relative error of the mean}; NaN where it isn't given.
        about: How the lens was made, as plain data. Two lenses that differ in it don't merge.
        sums: The sums that the matrices come from, with which a merger is exact.
        model: The model to attach.
        tokenizer: For a model that has none of its own.

    Attributes:
        J: {layer: (width, width)}, float32.
        error: {layer: relative error}.
        n_prompts: The number of prompts.
        source_layers: The layers, in order.
        d_model: The width.
        about: How the lens was made.

    Raises:
        ValueError: There is no matrix, or they aren't square of one width.

    Example:
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> lens = scalpel.JacobianLens({0: torch.eye(128)}, 1, model=model)
        >>> lens
        JacobianLens(1 layer of width 128, 1 prompt, error unknown, attached to CircuitGPT)
        >>> lens.readout("x = [[1", positions=[-1], k=5).jacobian.ranks.shape  # layers, tokens, 1
        torch.Size([1, 1, 1])
    """

    def __init__(
        self,
        J: Mapping[Any, Tensor],
        n_prompts: int,
        *,
        error: Mapping[Any, float] | None = None,
        about: Mapping[str, Any] | None = None,
        sums: Any = None,
        model: nn.Module | None = None,
        tokenizer: Any = None,
    ) -> None:
        layers = list(J)
        if not layers:
            raise ValueError("J has no matrix; a lens needs that of at least one layer")
        self.J: Mapping[Any, Tensor] = widened(J) if isinstance(J, dict) else J
        shapes = {tuple(matrix.shape) for matrix in J.values()} if isinstance(J, dict) else {tuple(J[layers[0]].shape)}
        shape = shapes.pop()
        if shapes or len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"J has matrices of shape {sorted({shape, *shapes})}; they must be square, of one width")
        self.error: dict[Any, float] = {layer: float((error or {}).get(layer, math.nan)) for layer in layers}
        self.n_prompts = int(n_prompts)
        self.source_layers: list[Layer] = layers
        self.d_model: int = shape[0]
        self.about: dict[str, Any] = dict(about or {})
        self.sums = sums
        if model is not None:
            self.attach(model, tokenizer, check=False)  # fit gives the model that it has used

    # ---- controls ------------------------------------------------------------------------------------

    def permuted(self, seed: int = 0) -> JacobianLens:
        """Return a control lens whose matrices have their rows in a random order.

        Args:
            seed: Of the orders, which differ from layer to layer.

        Returns:
            The control, attached to the same model.

        Example:
            >>> lens = scalpel.JacobianLens({0: torch.diag(torch.tensor([1.0, 2.0]))}, 1)
            >>> sorted(lens.permuted(seed=1).J[0].sum(1).tolist())
            [1.0, 2.0]
        """
        return self._control(controls.permuted(self.J, seed), "permuted", seed)

    def random(self, seed: int = 0) -> JacobianLens:
        """Return a control lens of Gaussian matrices with the same Frobenius norms.

        Args:
            seed: Of the entries.

        Returns:
            The control, attached to the same model.

        Example:
            >>> lens = scalpel.JacobianLens({0: 3 * torch.eye(4)}, 1)
            >>> round(float(lens.random().J[0].norm()), 5)
            6.0
        """
        return self._control(controls.random(self.J, seed), "random", seed)

    def deranged(self, seed: int = 0) -> JacobianLens:
        """Return a control lens in which each layer has the matrix of another layer.

        Args:
            seed: Of the exchange.

        Returns:
            The control, attached to the same model.

        Raises:
            ValueError: The lens has a single layer.

        Example:
            >>> lens = scalpel.JacobianLens({0: torch.eye(2), 1: 2 * torch.eye(2)}, 1)
            >>> lens.deranged().J[0][0, 0]
            tensor(2.)
        """
        return self._control(controls.deranged(self.J, seed), "deranged", seed)

    def _control(self, J: Mapping[Any, Tensor], kind: str, seed: int) -> JacobianLens:
        control = JacobianLens(J, self.n_prompts, about=self.about | {"control": kind, "seed": seed})
        control._attached = self._attached
        return control

    # ---- merging and files -----------------------------------------------------------------------

    def merge(self, *others: JacobianLens) -> JacobianLens:
        """Merge lenses that were fitted on other prompts, as if they had been fitted at once.

        Lenses of :func:`scalpel.jacobian_lens.fit` keep their sums, and their merger is exact. Of exports only means
        are known, rounded to the dtype of their files: the matrices are then means by the numbers of prompts, with a
        warning, and the errors are those that follow from each lens's own.

        Args:
            *others: The other lenses.

        Returns:
            A new lens, attached to the model of this one.

        Raises:
            ValueError: The lenses differ in their model, target, estimator or another of their settings.

        Example:
            >>> import warnings
            >>> one, two = (scalpel.JacobianLens({0: size * torch.eye(2)}, 1) for size in (1, 3))
            >>> with warnings.catch_warnings():
            ...     warnings.simplefilter("ignore")  # they don't say how they were fitted
            ...     merged = one.merge(two)
            >>> merged.n_prompts, merged.J[0][0, 0], merged.error[0]
            (2, tensor(2.), 0.5)
        """
        lenses = [self, *others]
        check_mergeable(lenses)
        about = merged_about([lens.about for lens in lenses])
        if all(lens.sums is not None for lens in lenses):
            merged = JacobianLens.from_sums(self.sums.merged([lens.sums for lens in others]), about)
        else:
            warnings.warn(
                "only the means of these lenses are known, in the precision of their files, so their merger is inexact",
                stacklevel=2,
            )
            J, n_prompts, error = merged_means(lenses)
            merged = JacobianLens(J, n_prompts, error=error, about=about)
        merged._attached = self._attached
        return merged

    @classmethod
    def from_sums(
        cls, sums: Any, about: Mapping[str, Any], model: nn.Module | None = None, tokenizer: Any = None
    ) -> Self:
        """Make a lens of the sums that :func:`scalpel.jacobian_lens.fit` keeps.

        Args:
            sums: The sums of matrices and of their squared norms.
            about: How they were made.
            model: The model to attach.
            tokenizer: For a model that has none of its own.

        Returns:
            The lens, whose matrices are computed from the sums when they are asked for.

        Example:
            >>> from scalpel.jacobian_lens.fits.sums import Sums
            >>> sums = Sums([0], 2)
            >>> with sums.adding() as prompt:
            ...     prompt.add(0, 0, torch.eye(2))
            >>> scalpel.JacobianLens.from_sums(sums, {}).n_prompts
            1
        """
        return cls(Means(sums), sums.n, error=sums.errors(), about=about, sums=sums, model=model, tokenizer=tokenizer)

    @classmethod
    def from_folder(cls, folder: str | Path, model: nn.Module | None = None, tokenizer: Any = None) -> Self:
        """Read the lens that a folder of :func:`scalpel.jacobian_lens.fit` holds, finished or not.

        Args:
            folder: The folder.
            model: The model to attach.
            tokenizer: For a model that has none of its own.

        Returns:
            The lens over the prompts that were done.

        Example:
            >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
            >>> texts = ["x = [1, 2, [3, 4], 5]", "y = [[1], 2, [3]]"]
            >>> _ = scalpel.jacobian_lens.fit(model, texts, skip_first=2, folder="lens", progress=False)
            >>> scalpel.JacobianLens.from_folder("lens").n_prompts
            2
        """
        lens = cls.from_sums(*sums_in(folder))
        return lens if model is None else lens.attach(model, tokenizer)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the lens in the published form, which other tools read, and beside it what that form lacks.

        Errors and what is known of the lens go to ``<path>.scalpel.json``, which is bound to the file by its SHA-256.
        Each file is replaced in one step.

        Args:
            path: The file; the published names end in ``_jacobian_lens.pt``.
            dtype: Of the matrices.

        Raises:
            ValueError: An entry is too large for the dtype.

        Example:
            >>> lens = scalpel.JacobianLens({0: torch.eye(2)}, 3, error={0: 0.25}, about={"estimator": "jacobian"})
            >>> lens.save("small_jacobian_lens.pt")
            >>> again = scalpel.JacobianLens.load("small_jacobian_lens.pt")
            >>> again.n_prompts, again.error, again.about["estimator"]
            (3, {0: 0.25}, 'jacobian')
        """
        file.write(Path(path).expanduser(), self.J, self.n_prompts, self.error, self.about, dtype)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None, tokenizer: Any = None) -> Self:
        """Read a lens in the published form, or a checkpoint of a fit with the published code.

        Nothing in the file is executed. Of a file of others the target, the corpus and the model aren't known, as far
        as it doesn't say them; if its last matrix is exactly the identity, ``about["identity_slot"]`` names that layer,
        which is the target.

        Args:
            path: The file.
            model: The model to attach.
            tokenizer: For a model that has none of its own.

        Returns:
            The lens.

        Raises:
            ValueError: The file is no lens, holds more than tensors and plain data, or maps between different widths.

        Example:
            >>> torch.save(
            ...     {"J": {0: torch.eye(2).half()}, "n_prompts": 9, "source_layers": [0], "d_model": 2}, "theirs.pt"
            ... )
            >>> scalpel.JacobianLens.load("theirs.pt").about
            {'identity_slot': 0}
        """
        stored = file.read(Path(path).expanduser())
        lens = cls(stored.J, stored.n_prompts, error=stored.error, about=stored.about)
        return lens if model is None else lens.attach(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        repo: str,
        filename: str | None = None,
        revision: str | None = None,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Self:
        """Load a lens from the Hugging Face hub.

        Args:
            repo: The hub id.
            filename: The file in it; by default the only one named ``*_jacobian_lens*.pt``.
            revision: A branch, tag or commit.
            model: The model to attach.
            tokenizer: For a model that has none of its own.
            **options: Those of ``huggingface_hub.hf_hub_download``, such as ``cache_dir`` and ``local_files_only``.

        Returns:
            The lens; its ``about["from"]`` says where it came from.

        Raises:
            ValueError: No file was named and there isn't exactly one, or as for :meth:`load`.

        Example:
            >>> load = scalpel.JacobianLens.from_pretrained
            >>> load("neuronpedia/jacobian-lens", "gpt2-small/jlens/Salesforce-wikitext/gpt2_jacobian_lens.pt")
            ... # doctest: +SKIP
        """
        path, beside, name = hub.fetched(repo, filename, revision, **options)
        stored = file.read(path, beside)
        about = stored.about | {"from": {"repo": repo, "filename": name, "revision": revision}}
        lens = cls(stored.J, stored.n_prompts, error=stored.error, about=about)
        return lens if model is None else lens.attach(model, tokenizer)

    # ---- copies and how it looks -----------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # A pickle holds the matrices, and neither the model nor sums that may lie in a folder.
        return vars(self) | {"J": dict(self.J), "sums": None, "_attached": None}

    def __copy__(self) -> JacobianLens:
        twin = JacobianLens(self.J, self.n_prompts, error=self.error, about=self.about, sums=self.sums)
        twin._attached = self._attached
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> JacobianLens:
        # The model is shared: a lens is about it, and doesn't own it.
        J = {layer: matrix.clone() for layer, matrix in self.J.items()}
        twin = JacobianLens(J, self.n_prompts, error=self.error, about=self.about, sums=self.sums)
        twin._attached = self._attached
        return twin

    def __repr__(self) -> str:
        known = [error for error in self.error.values() if not math.isnan(error)]
        errors = f"error up to {max(known):.2g}" if known else "error unknown"
        layers = f"{len(self.source_layers)} layer{'' if len(self.source_layers) == 1 else 's'}"
        prompts = f"{self.n_prompts} prompt{'' if self.n_prompts == 1 else 's'}"
        to = "" if self._attached is None else f", attached to {type(self._attached.model).__name__}"
        return f"JacobianLens({layers} of width {self.d_model}, {prompts}, {errors}{to})"
