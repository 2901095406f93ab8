"""The Jacobian of one hook of a model with respect to another, as an operator.

:func:`jacobian` chooses a pass (:mod:`.choosing`), which runs once and is kept as a trace (:mod:`.trace`). The rules of
the model's sublayers turn the trace into products with tangents (:mod:`.lanes`, :mod:`.rows`), and the products become
an operator (:mod:`.operator`). A model without rules is differentiated by ``torch.func`` (:mod:`.derivative`).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..hooks.masks import MaskWatch
from ..hooks.positions import select, split_pair
from ..hooks.wiring import check_path
from .choosing import pass_between
from .derivative import Derivative
from .ends import End, check_numbers
from .errors import explained
from .operator import Jacobian, Product
from .passes import CircuitPass, Pass
from .precision import no_autocast, plain_tensors
from .rows.decoder_pass import DecoderPass
from .trace import Products, See, Trace, has_rules, products_of, trace_of

Target = str | Callable[[Tensor], Tensor] | tuple[str, Callable[[Tensor], Tensor]]
Function = Callable[[Tensor], Tensor]


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
    """Make the Jacobian of the value at ``target`` with respect to the value at ``source``, at one input.

    This call computes the primal, once. Products with tangents are computed when they are requested.

    The tangent is added just after the source hook: after its AbsTopK, unmasked, and after any ablation there, while
    every path that doesn't pass the hook is held fixed. The target is the value that its hook records. A TopK or ReLU
    keeps the support that it has at the primal. ``source == target`` is the identity.

    The Jacobian is that of the model with the ablations, interventions and forward hooks that are active at this call.
    The ablations of a CircuitGPT may have ended by the time a product is taken. If a weight, a buffer, a module, an
    adapter of PEFT or a module's forward hook has changed by then, the product raises RuntimeError, since it would not
    belong to the primal.
    The model runs in evaluation mode, and uncompiled; its training flags, parameters, buffers and gradients stay as
    they are. The experts of a mixture of experts, which transformers computes in one grouped product, are computed one
    after another, without copies of their weights. Where the model applies the attention mask, a padded text has the
    same values as the text alone: if padding comes first, positions start after it.

    A CircuitGPT or one of the transformers models below, on one device and without module hooks, has rules of its own
    for its sublayers; in these, a padding query, which may read no key, attends to nothing. Any other model, input or
    module path is differentiated with PyTorch's math attention backend, and one warning says so. The rules of a decoder
    are used only after the model's own forward pass has agreed with them on a few tokens of the text.

    RMSNorm is differentiated as its formula says, in the dtype of the residual stream. transformers computes it in
    float32 even in a float64 model, so the values and derivatives of such a model differ from these by a relative error
    of about 1e-7. Scalpel keeps float64, which finite differences and small singular values need. Models that have no
    rules here are differentiated as they compute.

    Args:
        model: A :class:`scalpel.CircuitGPT`, whose hooks are those of ``model.hook_names`` and, as a target,
            ``"logits"``. Or one of transformers' GPT-2, GPT-NeoX, Llama, Mistral, Qwen2 and Qwen3
            (``...ForCausalLM``, ``GPT2LMHeadModel``), whose hooks have the same names (q and k before their norm and
            rotation; GPT-NeoX in parallel has no ``resid_mid``). Both also take TransformerLens's names
            (``blocks.0.hook_resid_pre``, with the heads side by side) and the module paths of these values. The
            transformers models may lack the output matrix (``LlamaModel``), and then have no logits, or be wrapped by
            PEFT, ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` or accelerate. Or any other
            nn.Module, whose hooks are module paths: ``"name"`` is the module's output and ``"name:in"`` its input (its
            first tensor if there are several, in the first run if the module runs several times); ``""`` is the model
            itself, and ``"logits"`` is the model's output or its ``logits``.
        input_ids: (B, L) integers, or a batch as transformers' tokenizers give it: a mapping with ``input_ids`` and,
            optionally, ``attention_mask`` and ``position_ids``. For an nn.Module also any tensor, a tuple of
            arguments, or a mapping of keyword arguments.
        source: The hook where tangents are added.
        target: A hook; or a pair (hook, function), where the function is applied to the value recorded there, at the
            target positions; or a function alone, which gets the logits, (B, Lt, vocab). Where there are rules, the
            weights of attention are a target, too: ``"0.attn.pattern"`` (``"blocks.0.attn.hook_pattern"``) has a row
            for each query, which the target positions choose, and in it the weights of all heads side by side.
            ``J.primal.unflatten(-1, (heads, L)).transpose(1, 2)`` has TransformerLens's axes.
        positions: The positions along axis 1: None for all tokens, an int (its axis stays, with size 1), a slice or a
            list of ints, for both source and target; or a tuple of two, one for each. Negative ones count from the end.
        attention_mask: The batch's mask, where ``input_ids`` doesn't contain it.
        position_ids: The batch's positions, where ``input_ids`` doesn't contain them.
        precision: ``"bfloat16"`` computes a transformers model's matrix products with tangents in bfloat16, while all
            else, including the primal, stays float32 (relative error about 1e-2). A bfloat16 model always does so. A
            CPU without instructions for bfloat16 multiplies the bfloat16 weights in float32, which is faster there.

    Returns:
        The operator: ``source_shape`` (B, Ls, width), ``target_shape`` (B, Lt, width, vocab or heads * L) or the
        function's, dtype and device of the value at the source.

    Raises:
        ValueError: For an unknown hook, a position outside the text, a NaN in the primal, or where no path leads from
            the source to the target (the target comes first, or it or its positions don't read the source).
        TypeError: For a source or target whose values are not floating-point numbers.
        NotImplementedError: Where the model has an operation that cannot be differentiated forward; it is named.

    Example:
        >>> import scalpel, torch
        >>> model = scalpel.CircuitGPT.from_pretrained("bracket-mini")
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> J = scalpel.jacobian(model, ids, "0.resid_in", "final_resid", positions=-1)
        >>> J.source_shape == J.target_shape == (1, 1, model.config.d_model)
        True
        >>> J.jvp(torch.ones(2, *J.source_shape)).shape == (2, *J.target_shape)
        True
        >>> scalpel.jacobian(model, ids, "0.resid_in", "1.attn.pattern", positions=-1).target_shape  # 8 heads, 4 keys
        torch.Size([1, 1, 32])
    """
    hook, function = _read_target(target)
    if precision not in (None, "bfloat16"):
        raise ValueError(f"precision is {precision!r}; allowed: None, 'bfloat16'")
    extra_inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
    with plain_tensors():
        run = pass_between(model, input_ids, extra_inputs, source, hook, precision)
        return _jacobian_of(run, split_pair(positions), function)


def jacobians_between(
    model: nn.Module,
    input_ids: Any,
    hooks: Sequence[str],
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    see: See | None = None,
    see_mask: MaskWatch | None = None,
) -> list[Jacobian]:
    """Make the Jacobians from each of ``hooks`` to the next, at all positions, as :func:`jacobian` would.

    A model that has rules of its own runs once for all of them, and calls ``see`` and ``see_mask`` in that run, as
    :func:`.trace.trace_of` describes. A model without rules never calls them.
    """
    extra_inputs = {"attention_mask": attention_mask, "position_ids": position_ids}
    with plain_tensors():
        runs: list[Pass] = []
        for ends in pairwise(hooks):
            run = runs[0].between(*ends) if runs else None
            runs.append(run or pass_between(model, input_ids, extra_inputs, *ends))
        trace = None
        if all(map(has_rules, runs)) and _in_order(runs):
            trace = trace_of(runs[0], [runs[0].source, *(run.target for run in runs)], see, see_mask)
        return [_jacobian_of(run, (None, None), None, trace) for run in runs]


def _in_order(runs: list[Any]) -> bool:
    """Whether each pass ends at the hook where the next one begins, and later in the model than it starts."""
    names = [runs[0].source, *(run.target for run in runs)]
    indices = [runs[0].hooks.index(name) for name in names]
    return indices == sorted(set(indices)) and all(run.target == following.source for run, following in pairwise(runs))


def _jacobian_of(run: Pass, wanted: tuple[Any, Any], function: Function | None, trace: Trace | None = None) -> Jacobian:
    """Make the operator of a pass at the positions ``wanted``.

    ``trace``: a primal to use if it can be cut at both hooks of the pass; by default the pass is run.
    """
    if isinstance(run, (CircuitPass, DecoderPass)):
        at = (select(wanted[0], run.length, "source"), select(wanted[1], run.length, "target"))
        check_path(run.hooks, run.source, run.target, at, run.allowed)
        if has_rules(run):
            if trace is None or not trace.has(run.source, run.target):
                trace = trace_of(run, [run.source, run.target])
            products = products_of(trace, run, at, function)
            return _operator(run, products, function, _guarded(run, products.push), _guarded(run, products.pull))
    derivative = Derivative(run, wanted, function)
    return _operator(run, derivative, function, derivative.push, derivative.pull)


def _operator(run: Pass, products: Products, function: Function | None, push: Product, pull: Product) -> Jacobian:
    """Make the operator from its products forward and back, after checking the primal for NaN."""
    for name, value in ((run.source, products.source), (run.target, products.primal)):
        check_numbers(value, name)
    return Jacobian(
        push,
        pull,
        End(run, run.source, products.at[0], None, products.source),
        End(run, run.target, products.at[1], function, products.primal),
    )


def _guarded(run: Pass, product: Product) -> Product:
    """Wrap a product by the rules so that it raises an error if the model has changed since the primal."""

    def guarded(tangents: Tensor) -> Tensor:
        run.check_unchanged()
        with plain_tensors(), torch.no_grad(), no_autocast(), explained(run):
            return product(tangents)

    return guarded


def _read_target(target: Any) -> tuple[str, Function | None]:
    """Return the hook of the target and the function of its value, which may be None."""
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
