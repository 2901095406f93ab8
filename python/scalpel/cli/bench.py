"""Ours against pure PyTorch: the answer is checked first, then all contenders are timed in one process.

Each case has three contenders: *ours*, the *peer* (the best way that plain PyTorch offers), and a *floor*:
work that no way to the answer can do without or, where no such bound is known, a yardstick that is named.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .._native import device_named

__all__ = ["CONTENDERS", "Case", "WrongAnswer", "cases", "environment", "run"]

Contender = Literal["ours", "peer", "floor"]
CONTENDERS: tuple[Contender, ...] = ("ours", "peer", "floor")

_SAMPLE_SECONDS = 0.01  # what one sample takes at least, so that the clock's grain doesn't matter


class WrongAnswer(RuntimeError):
    """Ours and the peer disagree; nothing was timed."""


@dataclass(frozen=True)
class Case:
    """One operation at one size.

    ``ours``, ``peer`` and ``floor`` take nothing and do the work once; ``check`` raises :class:`WrongAnswer`.
    The texts say what each of them is.
    """

    name: str
    shape: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    floor: Callable[[], Any]
    check: Callable[[], None]
    peer_is: str
    floor_is: str
    note: str = ""

    def contender(self, who: Contender) -> Callable[[], Any]:
        """The function of one contender."""
        function: Callable[[], Any] = getattr(self, who)
        return function


def cases(quick: bool = False, seed: int = 0, device: str = "cpu") -> list[Case]:
    """All cases, at sizes of use, or at small ones with ``quick``; on a device."""
    return [make(quick, seed, device) for make in (keep_topk, covariance_update, jacobian_jvp)]


def _drawn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def keep_topk(quick: bool = False, seed: int = 0, device: str = "cpu") -> Case:
    """scalpel.keep_topk against abs, topk and scatter; all three write to memory that is there already."""
    from ..topk import keep_topk as op

    rows, width, k = (64, 256, 32) if quick else (2048, 2048, 256)
    x = _drawn(torch.Generator().manual_seed(seed), rows, width).to(device)
    ours, theirs, copied, magnitude = (torch.empty_like(x) for _ in range(4))
    best = (
        torch.empty(rows, k, device=device, dtype=torch.float32),
        torch.empty(rows, k, dtype=torch.int64, device=device),
    )

    def peer() -> Tensor:
        torch.abs(x, out=magnitude)
        values, indices = torch.topk(magnitude, k, dim=-1, sorted=False, out=best)
        return theirs.zero_().scatter_(-1, indices, torch.gather(x, -1, indices, out=values))

    def check() -> None:
        # Random normal values have no ties here, so both must keep the same entries, to the bit.
        if not torch.equal(op(x, k, out=ours), peer()):
            differ = int((ours != theirs).sum())
            raise WrongAnswer(f"keep_topk and torch differ in {differ} of {x.numel()} entries; nothing was timed")

    return Case(
        "keep_topk",
        f"({rows}, {width}) float32, k = {k}",
        lambda: op(x, k, out=ours),
        peer,
        lambda: copied.copy_(x),
        check,
        "abs, topk (unsorted), gather, scatter_",
        "copy_ of x",
    )


def covariance_update(quick: bool = False, seed: int = 0, device: str = "cpu") -> Case:
    """StreamingCovariance.update against the bare product that plain torch would begin with."""
    from ..covariance import StreamingCovariance

    rows, dim = (512, 64) if quick else (4096, 2048)
    x = (_drawn(torch.Generator().manual_seed(seed), rows, dim) + 3.0).to(device)
    ours = StreamingCovariance(dim)
    product, half = (
        torch.empty(dim, dim, device=device, dtype=torch.float32),
        torch.empty(dim // 2, dim, device=device, dtype=torch.float32),
    )

    def check() -> None:
        fresh = StreamingCovariance(dim)
        for part in x.split(rows // 3):
            fresh.update(part)
        expected = torch.cov(x.double().T, correction=0)
        error = float((fresh.covariance() - expected).abs().max() / expected.abs().max())
        # Two deviations, their product and at most 128 sums of such in float32, each rounded by 2^-24 at most.
        if not error <= 131 * 2.0**-24:
            raise WrongAnswer(f"our covariance is {error:.1e} (relative) off the two-pass one; nothing was timed")

    return Case(
        "StreamingCovariance.update",
        f"({rows}, {dim}) float32 rows, float64 state",
        lambda: ours.update(x),
        lambda: torch.mm(x.T, x, out=product),
        lambda: torch.mm(x.T[: dim // 2], x, out=half),
        check,
        "XᵀX alone, in float32: no mean, no state",
        "half of XᵀX, which a symmetric product needs",
    )


def jacobian_jvp(quick: bool = False, seed: int = 0, device: str = "cpu") -> Case:
    """scalpel.jacobian's product with T tangents against vmap(jvp), on an untrained model with sparse weights."""
    from ..jacobians.entry import jacobian
    from ..models.circuitgpt.config import CircuitGPTConfig
    from ..models.circuitgpt.model import CircuitGPT

    width, layers, length, tangents, density = (32, 1, 8, 4, 0.2) if quick else (512, 2, 64, 16, 0.05)
    locations = "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out"
    config = CircuitGPTConfig(
        block_size=length,
        vocab_size=64,
        n_layer=layers,
        n_head=width // 16,
        d_model=width,
        rms_norm=True,
        sink=True,
        afrac=0.25,
        afrac_loctypes=locations,
    )
    model = CircuitGPT(config, seed=seed).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in model.transformer.h:
        for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            kept = torch.rand(linear.weight.shape, generator=generator, dtype=torch.float32, device="cpu") < density
            spread = (density * linear.in_features) ** -0.5
            linear.weight.copy_(_drawn(generator, *kept.shape) * kept * spread)
    model, ids = model.to(device), torch.randint(64, (1, length), generator=generator, device="cpu").to(device)
    operator = jacobian(model, ids, "0.resid_in", "final_resid")
    v = _drawn(generator, tangents, *operator.source_shape).to(device)

    def through_torch_func(model: CircuitGPT, tangent: Tensor) -> Tensor:
        def final(delta: Tensor) -> Tensor:
            values: list[Tensor] = []

            def add(value: Tensor, name: str) -> Tensor:
                return value + delta

            def keep(value: Tensor, name: str) -> None:
                values.append(value)

            model.run_with_hooks(ids, fwd_hooks=[("0.resid_in", add), ("final_resid", keep)])
            return values[0]

        at = torch.zeros_like(tangent[0])
        moved: Tensor = torch.func.vmap(lambda t: torch.func.jvp(final, (at,), (t,))[1])(tangent)
        return moved

    rows = (tangents + 1) * length
    block = model.transformer.h[0]
    products = []
    for linear in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
        x = torch.randn(rows, linear.in_features, device=device, dtype=torch.float32)
        products.append(
            (x, linear.weight.T, torch.empty(rows, linear.out_features, device=device, dtype=torch.float32))
        )

    def floor() -> None:
        for _ in range(layers):
            for x, weight, out in products:
                torch.mm(x, weight, out=out)

    def check() -> None:
        # In float64: in float32 a TopK near a tie may keep another entry than torch's order of sums does.
        double = copy.deepcopy(model).double()
        expected = through_torch_func(double, v[:2].double())
        product = jacobian(double, ids, "0.resid_in", "final_resid").jvp(v[:2].double())
        worst = float((product - expected).abs().max() / expected.abs().max())
        if not worst <= 1e-9:
            raise WrongAnswer(f"jvp is {worst:.1e} (relative) off vmap(jvp); nothing was timed")

    return Case(
        "jacobian(...).jvp",
        f"{tangents} tangents, {layers} layers of width {width}, {density:.0%} non-zero, {length} tokens, float32",
        lambda: operator.jvp(v),
        lambda: through_torch_func(model, v),
        floor,
        check,
        "torch.func.vmap(jvp)",
        f"the dense matrix products of {tangents + 1} forward passes",
        "Below the floor, because only non-zero weights and kept activations are visited.",
    )


def run(
    *,
    quick: bool = False,
    seed: int = 0,
    device: str = "cpu",
    progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Check, then time every case; gives plain data, as ``scalpel bench --json`` prints it.

    Per case: medians in milliseconds, ``speedup`` = peer / ours and ``over_floor`` = ours / floor (ratios of
    those medians), and the quartiles of peer / ours over the rounds. ``progress(what, done)``: from 0 to 1.
    ``device``: "cpu", or a GPU such as "cuda", whose times are those of calls one after the other until all is done.
    ValueError for a device that isn't there, or that no op runs on.
    Raises WrongAnswer, before anything is timed.
    """
    rounds = 5 if quick else 15
    report = progress or (lambda what, done: None)
    device_named(device)
    report("checking the answers", 0.0)
    with torch.no_grad():
        todo = cases(quick, seed, device)
        for case in todo:
            case.check()
        timings = []
        for i, case in enumerate(todo):
            report(f"timing {case.name}", i / len(todo))
            timings.append(_timed(case, rounds, device))
    report("done", 1.0)
    return {
        "quick": quick,
        "rounds": rounds,
        "seed": seed,
        "device": device,
        "cases": timings,
        "environment": environment(device),
    }


def _timed(case: Case, rounds: int, device: str) -> dict[str, Any]:
    repeats = {who: _repeats(case.contender(who), device) for who in CONTENDERS}
    times: dict[Contender, list[float]] = {who: [] for who in CONTENDERS}
    for turn in range(rounds):
        # They take turns, and each round starts with another one, so that a slow moment affects all of them alike.
        for who in CONTENDERS[turn % 3 :] + CONTENDERS[: turn % 3]:
            times[who].append(_seconds(case.contender(who), repeats[who], device))
    median = {who: statistics.median(times[who]) * 1e3 for who in CONTENDERS}
    ratios = [peer / ours for peer, ours in zip(times["peer"], times["ours"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "name": case.name,
        "shape": case.shape,
        "device": device,
        "peer": case.peer_is,
        "floor": case.floor_is,
        "note": case.note,
        "median_ms": median,
        "speedup": median["peer"] / median["ours"],
        "speedup_quartiles": [low, high],
        "over_floor": median["ours"] / median["floor"],
    }


def _seconds(function: Callable[[], Any], repeats: int, device: str) -> float:
    _wait_for(device)
    begun = time.perf_counter()
    for _ in range(repeats):
        function()
    _wait_for(device)
    return (time.perf_counter() - begun) / repeats


def _wait_for(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _repeats(function: Callable[[], Any], device: str) -> int:
    """How often to call it for one sample; the calls made to find out warm it up."""
    function()
    return max(1, round(_SAMPLE_SECONDS / max(_seconds(function, 2, device), 1e-7)))


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a figure depends on besides the code: versions, CPU target, threads, processor, GPU, load, BLAS."""
    import os
    import platform

    from .._info import show_config

    config = show_config()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        **{name: config[name] for name in ("version", "python", "torch", "compiler", "target", "threads", "parallel")},
        "machine": platform.machine(),
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "cores": os.cpu_count(),
        "load_average": load,
        "blas": torch.__config__.show().split("BLAS_INFO=")[-1].split(",")[0],
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        return ""
    return names[0] if names else ""
