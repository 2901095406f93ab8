"""The Jacobian of one hook of a model with respect to another, as an operator.

One function; the operator that it gives is :class:`scalpel.jacobians.operator.Jacobian`. Products come from the
rules of a model's own sublayers where there are some (circuit, dense), else from ``torch.func``: ``vmap(jvp)``
forward, ``vmap(vjp)`` backward, in chunks of tangents that bound the memory.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap

from ..hooks.modules import as_written
from ..hooks.positions import Selected, add_at, describe, read_at, select, split_pair
from ..hooks.running import ALONE
from ..hooks.wiring import check_path
from ..models.circuitgpt.model import CircuitGPT
from .lanes.products import CircuitProducts
from .lanes.trace import has_products
from .operator import End, Jacobian, check_floating, finished
from .passes import CircuitPass, ModulePass, Pass
from .precision import no_autocast
from .rows.decoder_pass import DecoderPass, decoder_pass, module_paths
from .rows.products import DenseProducts

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
    The ablations, interventions and forward hooks that are active at this call count. The ablations of a CircuitGPT
    may have been left by the time a product is taken. Where a weight, a buffer, a module or a module's forward hook
    has been changed by then, the product raises RuntimeError, since it would not belong to the primal. The model runs
    in evaluation mode, and as it was written where it was compiled; its training flags, parameters, buffers and
    gradients stay as they are. Where the model heeds the mask, a padded text has the values that it has alone: where
    padding comes first, positions start behind it.

    RMSNorm is differentiated as the formula says, in the dtype of the residual stream. transformers computes it in
    float32 in a float64 model too, so that model's own derivatives, and its values, differ from ours by about 1e-7 of
    their size. We keep float64, since that is what a float64 model is asked for, and what finite differences and
    small singular values need. Models that have no rules here are differentiated as they compute.

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
    if precision not in (None, "bfloat16"):
        raise ValueError(f"precision is {precision!r}; allowed: None, 'bfloat16'")
    beside = {"attention_mask": attention_mask, "position_ids": position_ids}
    with _plain_tensors():
        run = _pass_between(model, input_ids, beside, source, hook, precision)
        return _operator(run, split_pair(positions), function)


def jacobians_between(
    model: nn.Module,
    input_ids: Any,
    hooks: Sequence[str],
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> list[Jacobian]:
    """The Jacobians from each of ``hooks`` to the next, at all positions: those of :func:`jacobian`, of one forward
    pass instead of one for each where the model has rules of its own."""
    beside = {"attention_mask": attention_mask, "position_ids": position_ids}
    with _plain_tensors():
        runs = [_pass_between(model, input_ids, beside, *ends, None) for ends in pairwise(hooks)]
        rules = {_rules_of(run) for run in runs}
        trace = None
        if None not in rules and _in_order(runs):
            with torch.no_grad(), no_autocast(), explained(runs[0]):
                trace = next(iter(rules)).trace_of(runs[0], [runs[0].source, *(run.target for run in runs)])
        return [_operator(run, (None, None), None, trace) for run in runs]


def _pass_between(
    model: nn.Module, input_ids: Any, beside: dict[str, Any], source: str, hook: str, precision: str | None
) -> Pass:
    """A pass of the kind that the model has rules for, or one that torch.func goes through."""
    model = as_written(model)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; it must be a CircuitGPT or another torch.nn.Module")
    needs = f"precision={precision!r} needs the rules of a transformers model, and "
    if isinstance(model, CircuitGPT):
        if precision is not None:
            raise ValueError(f"{needs}a CircuitGPT has none of that precision")
        return CircuitPass(model, input_ids, beside["attention_mask"], beside["position_ids"], source, hook)
    with torch.no_grad(), no_autocast():
        decoder = decoder_pass(model, input_ids, beside, source, hook, precision)
    if isinstance(decoder, DecoderPass):
        return decoder
    if precision is not None:
        raise ValueError(f"{needs}{decoder}")
    given = {name: value for name, value in beside.items() if value is not None}
    return ModulePass(model, input_ids, given, *module_paths(model, source, hook, decoder))


def _rules_of(run: Pass) -> Any:
    """The class of products that goes through the rules of the model's own sublayers; None where there are none."""
    if isinstance(run, DecoderPass):
        return DenseProducts
    return CircuitProducts if isinstance(run, CircuitPass) and has_products(run._frozen) else None


def _in_order(runs: list[Any]) -> bool:
    """Whether each pass ends where the next begins, further on in the model."""
    names = [runs[0].source, *(run.target for run in runs)]
    places = [runs[0].hooks.index(name) for name in names]
    return places == sorted(set(places)) and all(a.target == b.source for a, b in pairwise(runs))


def _operator(
    run: Pass, wanted: tuple[Any, Any], function: Callable[[Tensor], Tensor] | None, trace: Any = None
) -> Jacobian:
    """The operator of a pass; ``trace``: a primal that is there already and was cut at both of its ends."""
    rules = _rules_of(run)
    if isinstance(run, (CircuitPass, DecoderPass)):
        at = (select(wanted[0], run.length, "source"), select(wanted[1], run.length, "target"))
        check_path(run.hooks, run.source, run.target, at, run.allowed)
        if rules is not None:
            return _by_rules(run, rules, at, function, trace)
    if isinstance(run, ModulePass):
        _announce(run.model)
    return _Derivative(run, wanted, function).operator()


def _by_rules(
    run: Pass,
    rules: Callable[..., Any],
    at: tuple[Selected, Selected],
    function: Callable[[Tensor], Tensor] | None,
    trace: Any,
) -> Jacobian:
    """Through the rules of the model's own sublayers."""
    with torch.no_grad(), no_autocast(), explained(run):
        products = rules(run, at, function, trace)
    for name, value in ((run.source, products.source), (run.target, products.primal)):
        _check_numbers(value, name)

    def checked(product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def go(tangents: Tensor) -> Tensor:
            run.check_unchanged()
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

        with ALONE, torch.no_grad(), forward_ad.dual_level(), explained(self.run):
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
        self.run.check_unchanged()
        zero = torch.zeros_like(self.source)
        with ALONE, _plain_tensors(), torch.no_grad(), explained(self.run):
            if self.run.offloaded:
                return torch.stack([self._pushed_alone(zero, tangent) for tangent in tangents])
            return vmap(lambda tangent: jvp(self._moved, (zero,), (tangent,))[1], chunk_size=self.chunk)(tangents)

    def pull(self, cotangents: Tensor) -> Tensor:
        """(T, *target) → (T, *source): one pass forward, T of them back."""
        self.run.check_unchanged()
        with ALONE, _plain_tensors(), torch.no_grad(), explained(self.run):
            if self.run.offloaded:
                return self._pulled_alone(cotangents)
            back = vjp(self._moved, torch.zeros_like(self.source))[1]
            return vmap(lambda cotangent: back(cotangent)[0], chunk_size=self.chunk)(cotangents)

    # Weights that are loaded while a layer runs can't be inside a transform of torch.func, which would take them for
    # values that are differentiated. One tangent or cotangent at a time needs no transform.

    def _pushed_alone(self, zero: Tensor, tangent: Tensor) -> Tensor:
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(self._moved(forward_ad.make_dual(zero, tangent))).tangent
        return torch.zeros_like(self.primal) if moved is None else moved

    def _pulled_alone(self, cotangents: Tensor) -> Tensor:
        with torch.enable_grad():
            delta = torch.zeros_like(self.source, requires_grad=True)
            moved = self._moved(delta)
            found = [torch.autograd.grad(moved, delta, each, retain_graph=True)[0] for each in cotangents]
        return torch.stack(found)

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
        if "saved tensor hooks" in str(error) or "custom autograd.Function" in str(error):
            raise NotImplementedError(
                f"the forward pass {ends} holds a function with a backward pass of its own, as activation "
                "checkpointing is, and torch.func can't go through it: switch checkpointing off, or choose hooks that "
                f"don't enclose it ({error})"
            ) from error
        if "forward mode AD" in str(error) or "functorch" in str(error) or "vmap" in str(error):
            raise NotImplementedError(
                f"the forward pass {ends} cannot be differentiated for many tangents at once: {error}"
            ) from error
        raise
