"""Every case of the table, on every target, against its twin in reference/."""

import numpy as np
import pytest
import torch

import scalpel
from cases import CASES, COMPILED_FOR, Case, interesting_ks
from scalpel import _core, reference


def calls(op: str, target: str) -> int:
    compiled_for, count = _core.kernel_calls()[op][target]
    # The target is read from the macros that the compiler predefined for the kernel's file.
    assert compiled_for == COMPILED_FOR.get((op, target), target)
    return count


@pytest.mark.parametrize("case", [c for c in CASES if "topk" in c.op], ids=str)
def test_topk_case(case: Case, target: str) -> None:
    x = torch.randn(case.shape).to(case.dtype)
    before = calls("topk", target)
    expect_call = False
    for k in interesting_ks(case.shape[-1]):
        expect_call |= 0 < k < case.shape[-1] and x.numel() > 0
        ours = getattr(scalpel, case.op)(x, k)
        twin = getattr(reference, case.op)(x, k)
        assert tuple(ours.shape) == twin.shape
        assert np.array_equal(ours.double().numpy(), twin.astype(np.float64))
    assert (calls("topk", target) > before) == expect_call


@pytest.mark.parametrize("case", [c for c in CASES if "topk" not in c.op], ids=str)
def test_covariance_case(case: Case, target: str) -> None:
    x = (torch.randn(case.shape) * 2 + 1).to(case.dtype)
    center = case.op == "covariance"
    before = calls("covariance", target)
    ours = scalpel.StreamingCovariance(case.shape[-1], center=center).update(x)
    twin = reference.moments(x, center)
    assert ours.count == twin.rows
    for value, expected, tolerance in (
        (ours.mean, twin.mean, 1e-13),
        (ours.covariance(), twin.covariance, case.tolerance),
        (ours.mean, twin.mean, 1e-13),  # by the kernel, once the rows have been folded in
    ):
        np.testing.assert_allclose(value.numpy(), expected, rtol=0, atol=tolerance * np.abs(expected).max())
    assert calls("covariance", target) > before
