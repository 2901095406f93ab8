"""The Jacobian of one hook of a model with respect to another, as an operator.

One function; the operator that it gives is :class:`scalpel.jacobians.operator.Jacobian`. Products come from the
rules of a model's own sublayers where there are some (circuit, dense), else from ``torch.func``: ``vmap(jvp)``
forward, ``vmap(vjp)`` backward, in chunks of tangents that bound the memory.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap

from ..models.circuitgpt import CircuitGPT
from .circuit import CircuitProducts
from .decoder_pass import DecoderPass, decoder_pass, module_paths
from .dense import DenseProducts
from .hooks import CircuitPass, ModulePass, Pass
from .operator import End, Jacobian, check_floating, finished
from .positions import Selected, add_at, check_path, describe, read_at, select, split_pair
from .precision import no_autocast
from .trace import has_products

Target = str | Callable[[Tensor], Tensor] | tuple[str, Callable[[Tensor], Tensor]]

_CHUNK_BYTES = 1 << 30  # what one chunk of tangents may take at its peak, about
_announced = False


def jacobian(
    model: nn.Module,
    input_ids: Any,
    source: str = "0.resid_in",
    target: Target = "final_resid",
    positions: Any = None,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    precision: str | None = None,
) -> Jacobian:
    """How the value at ``target`` moves with the value at ``source``, to first order, at one input.

    ``model``: a :class:`scalpel.CircuitGPT`, whose hooks are those of ``model.hook_names`` and, as a target,
    ``"logits"``; or one of transformers' GPT-2, GPT-NeoX, Llama, Mistral, Qwen2 and Qwen3 (``...ForCausalLM``,
    ``GPT2LMHeadModel``), whose hooks have the same names (q and k before their norm and rotation; GPT-NeoX in
    parallel has no ``resid_mid``). Both also take TransformerLens's names (``blocks.0.hook_resid_pre``; the heads
    side by side) and the module paths of these values. Or any other nn.Module, whose hooks are module paths:
    ``"name"`` is the module's output and ``"name:in"`` its input (the first tensor, where there are several; the
    first run, where it runs several times; ``""`` is the model itself), ``"logits"`` the model's output or its
    ``logits``.
    ``input_ids``: (B, L) integers, or a batch as transformers' tokenizers give it (a mapping with
    ``input_ids`` and, optionally, ``attention_mask`` and ``position_ids``, which may also stand beside it).
    For an nn.Module also any tensor, a tuple of arguments, or a mapping of keyword arguments.
    ``target``: a hook; or a pair (hook, function), the function being applied to the value recorded there, at
    the target positions; or a function alone, which is given the logits, (B, Lt, vocab).
    ``positions``: None for all tokens, an int (its axis stays, of size 1), a slice or a list of ints, for
    source and target alike; a tuple of two gives each its own. Negative ones count from the end. They choose
    along axis 1.
    ``precision``: ``"bfloat16"`` takes a transformers model's matrix products with tangents in bfloat16 (all
    else, the primal too, stays float32; relative error about 1e-2); of a bfloat16 model they are anyway.

    The tangent is added just after the source hook: after its AbsTopK, unmasked, and after any ablation
    there, while every path that doesn't pass the hook is held fixed. The target is the value that its hook
    records. A TopK or ReLU keeps the support that it has at the primal. ``source == target`` is the identity.
    The ablations, interventions and forward hooks that are active count: of a CircuitGPT those at this call,
    also when they have been left by the time a product is taken; of another nn.Module the hooks it has when a
    product is taken. The model runs in evaluation mode; its training flags, parameters and gradients stay as
    they are.

    Gives a :class:`Jacobian`: ``source_shape`` (B, Ls, width), ``target_shape`` (B, Lt, width or vocab) or
    the function's, dtype and device of the value at the source; nothing is computed but the primal, once.

    A CircuitGPT or one of those transformers models, on one device and without module hooks, goes through rules of
    its own for its sublayers; there a padding query, which may read nothing, attends to nothing. Any other model,
    input or module path is differentiated with the math attention backend, announced by one warning.

    Raises ValueError for an unknown hook, a position outside the text, no path from source to target (the
    target comes first, does not read the source, or its positions cannot), a NaN in the primal; TypeError for
    a source or target that isn't of floating point; NotImplementedError, naming the operation, where the
    model has one that cannot be differentiated forward.
    """
    hook, function = _read_target(target)
    wanted = split_pair(positions)
    if precision not in (None, "bfloat16"):
        raise ValueError(f"precision is {precision!r}; allowed: None, 'bfloat16'")
    with _plain_tensors():
        beside = {"attention_mask": attention_mask, "position_ids": position_ids}
        run: Pass | None = None
        reason = "a CircuitGPT has none of that precision"
        if isinstance(model, CircuitGPT):
            circuit = CircuitPass(model, input_ids, attention_mask, position_ids, source, hook)
            at = _checked_ends(circuit, wanted)
            if precision is None and has_products(model):
                return _by_rules(circuit, CircuitProducts, at, function)
            run = circuit
        elif isinstance(model, nn.Module):
            with torch.no_grad(), no_autocast():
                decoder = decoder_pass(model, input_ids, beside, source, hook, precision)
            if isinstance(decoder, DecoderPass):
                return _by_rules(decoder, DenseProducts, _checked_ends(decoder, wanted), function)
            reason = decoder
            if precision is None:
                given = {name: value for name, value in beside.items() if value is not None}
                run = ModulePass(model, input_ids, given, *module_paths(model, source, hook, reason))
        else:
            raise TypeError(f"model is {type(model).__name__}; it must be a CircuitGPT or another torch.nn.Module")
        if precision is not None or run is None:
            raise ValueError(f"precision={precision!r} needs the rules of a transformers model, and {reason}")
        if not isinstance(model, CircuitGPT):
            _announce(model)
        return _Derivative(run, wanted, function).operator()


def _checked_ends(run: CircuitPass | DecoderPass, wanted: tuple[Any, Any]) -> tuple[Selected, Selected]:
    """The positions, where a path leads from one end to the other."""
    at = (select(wanted[0], run.length, "source"), select(wanted[1], run.length, "target"))
    check_path(run.hooks, run.source, run.target, at, run.allowed)
    return at


def _by_rules(
    run: Pass, rules: Callable[..., Any], at: tuple[Selected, Selected], function: Callable[[Tensor], Tensor] | None
) -> Jacobian:
    """Through the rules of the model's own sublayers."""
    with torch.no_grad(), no_autocast(), explained(run):
        products = rules(run, at, function)
    for name, value in ((run.source, products.source), (run.target, products.primal)):
        _check_numbers(value, name)

    def checked(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def go(tangents: Tensor) -> Tensor:
            run.check_weights()
            with _plain_tensors(), torch.no_grad(), no_autocast(), explained(run):
                return product(tangents)

        return go

    return Jacobian(
        checked(products.push),
        checked(products.pull),
        End(run, run.source, at[0], None, products.source),
        End(run, run.target, at[1], function, products.primal),
    )


class _Derivative:
    """The map from a tangent at the source to the target, and the operator made of its derivatives."""

    def __init__(self, run: Pass, wanted: tuple[Any, Any], function: Callable[[Tensor], Tensor] | None) -> None:
        self.run = run
        self.wanted = wanted
        self.function = function
        self.at: tuple[Selected, Selected] = (None, None)

    def operator(self) -> Jacobian:
        """One pass: the primal and, where the wiring isn't known, a random tangent that looks for a path."""
        at_source: list[Tensor] = []
        probe = isinstance(self.run, ModulePass)

        def enter(value: Tensor) -> Tensor:
            check_floating(value, self.run.source)
            self.at = (_select(self.wanted[0], value, "source"), None)
            at_source.append(read_at(value, self.at[0]).detach().clone())  # a later layer may work in place
            if not probe:
                return value
            generator = torch.Generator().manual_seed(0)
            tangent = torch.randn(at_source[0].shape, generator=generator, dtype=torch.float32, device="cpu")
            dual = forward_ad.make_dual(torch.zeros_like(at_source[0]), tangent.to(at_source[0]))
            return add_at(value, dual, self.at[0])

        with torch.no_grad(), forward_ad.dual_level(), explained(self.run):
            recorded = self.run.run(enter)
            self.at = (self.at[0], _select(self.wanted[1], recorded, "target"))
            dual = forward_ad.unpack_dual(self._finished(recorded, at_source[0].dtype))
            if probe:
                self._check_probe(dual.tangent)
        self.source = at_source[0]
        self.primal = dual.primal.detach().clone()
        for name, value in ((self.run.source, self.source), (self.run.target, self.primal)):
            _check_numbers(value, name)
        bytes_each = self.run.tangent_size(self.source, self.primal) * self.source.element_size()
        self.chunk = max(1, _CHUNK_BYTES // max(1, bytes_each))
        return Jacobian(
            self.push,
            self.pull,
            End(self.run, self.run.source, self.at[0], None, self.source),
            End(self.run, self.run.target, self.at[1], self.function, self.primal),
        )

    def push(self, tangents: Tensor) -> Tensor:
        """(T, *source) → (T, *target): T tangents beside one primal."""
        self.run.check_weights()
        zero = torch.zeros_like(self.source)
        with _plain_tensors(), torch.no_grad(), explained(self.run):
            return vmap(lambda tangent: jvp(self._moved, (zero,), (tangent,))[1], chunk_size=self.chunk)(tangents)

    def pull(self, cotangents: Tensor) -> Tensor:
        """(T, *target) → (T, *source): one pass forward, T of them back."""
        self.run.check_weights()
        with _plain_tensors(), torch.no_grad(), explained(self.run):
            back = vjp(self._moved, torch.zeros_like(self.source))[1]
            return vmap(lambda cotangent: back(cotangent)[0], chunk_size=self.chunk)(cotangents)

    def _moved(self, delta: Tensor) -> Tensor:
        recorded = self.run.run(lambda value: add_at(value, delta, self.at[0]))
        return self._finished(recorded, delta.dtype)

    def _finished(self, recorded: Tensor, dtype: torch.dtype) -> Tensor:
        return finished(read_at(recorded, self.at[1]), self.function, self.run.target, dtype)

    def _check_probe(self, tangent: Tensor | None) -> None:
        ends = f"from {self.run.source!r} to {self.run.target!r}"
        if tangent is None:
            raise ValueError(f"no path {ends}: the target does not read the source. Choose a target further on")
        if self.at != (None, None) and not bool(tangent.any()):
            raise ValueError(
                f"no path {ends}: nothing added at {describe(self.at[0])} of the source moves "
                f"{describe(self.at[1])} of the target. Under causal attention, choose later target positions"
            )


def _read_target(target: Any) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    if isinstance(target, str):
        return target, None
    if callable(target):
        return "logits", target
    if isinstance(target, tuple) and len(target) == 2 and isinstance(target[0], str) and callable(target[1]):
        return target[0], target[1]
    raise TypeError(
        f"target is {target!r}; it must be a hook's name, a pair (hook, function of its value), "
        "or a function of the logits"
    )


def _select(wanted: Any, value: Tensor, side: str) -> Selected:
    if wanted is None:
        return None
    if value.dim() < 3:
        raise ValueError(
            f"positions need a {side} value (batch, tokens, width); it has shape {tuple(value.shape)}: "
            "leave positions at None"
        )
    return select(wanted, value.shape[1], side)


def _check_numbers(value: Tensor, name: str) -> None:
    bad = value.isnan()
    if bool(bad.any()):
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"the primal holds {int(bad.sum())} NaN at {name!r}, the first at index {first}: a Jacobian "
            "there has no meaning. Look for NaN in the weights, the inputs or an intervention"
        )


def _announce(model: nn.Module) -> None:
    global _announced
    if not _announced:
        _announced = True
        warnings.warn(
            f"scalpel.jacobian differentiates {type(model).__name__} through torch.func with the math "
            "attention backend: exact, but slower and larger than a fused one (said once)",
            stacklevel=3,
        )


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Out of inference mode, whose tensors cannot be differentiated."""
    with torch.inference_mode(False):
        yield


@contextmanager
def explained(run: Pass) -> Iterator[None]:
    """Errors of the derivative machinery, with the hooks named and the operation that is the cause."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        ends = f"between {run.source!r} and {run.target!r}"
        named = re.search(r"forward AD with (\S+) that does not support it", str(error))
        if named:
            raise NotImplementedError(
                f"the forward pass {ends} uses {named.group(1)}, which PyTorch cannot differentiate forward: "
                "choose hooks that don't enclose it, or replace the operation"
            ) from error
        if "forward mode AD" in str(error) or "functorch" in str(error) or "vmap" in str(error):
            raise NotImplementedError(
                f"the forward pass {ends} cannot be differentiated for many tangents at once: {error}"
            ) from error
        raise
