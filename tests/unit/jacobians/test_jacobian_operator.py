"""The operator that scalpel.jacobian returns: products, transposes and compositions against the matrix."""

import sys
from contextlib import nullcontext

import pytest
import torch

import scalpel
from circuitgpt_cases import build, one_thread, tokens, torch_func  # noqa: F401
from scalpel.jacobians.operator import Jacobian
from scalpel.reference.jacobian import jacobian_dense

jacobian = scalpel.jacobian
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def model():
    return build("like_csp_yolo2")


@pytest.fixture(scope="module")
def ids(model):
    return tokens(model, 2, 4)


@pytest.fixture(scope="module")
def J(model, ids) -> Jacobian:
    return jacobian(model, ids, "0.resid_in", "1.mlp.post_act", (slice(0, 3), [1, 3]))


@pytest.fixture(scope="module")
def dense(model, ids) -> torch.Tensor:
    return jacobian_dense(model, ids, "0.resid_in", "1.mlp.post_act", (slice(0, 3), [1, 3]))


def test_attributes(J: Jacobian) -> None:
    assert J.source_shape == (2, 3, 12)
    assert J.target_shape == (2, 2, 20)
    assert J.shape == (80, 72)
    assert (J.dtype, J.device) == (torch.float64, torch.device("cpu"))
    assert J.T.shape == (72, 80)
    assert (J.T.source_shape, J.T.target_shape) == (J.target_shape, J.source_shape)
    assert "'0.resid_in'" in repr(J) and "(80, 72)" in repr(J)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 300])
# None: the native rules, which process one set of lanes at a time.
@pytest.mark.parametrize("chunk", [None, 1, 16, 1000])
def test_any_number_of_tangents_in_any_chunks(model, ids, dense, count: int, chunk: int | None) -> None:
    if chunk == 1 and count > 17:
        return
    with nullcontext() if chunk is None else torch_func(model):
        run = jacobian(model, ids, "0.resid_in", "1.mlp.post_act", (slice(0, 3), [1, 3]))
        if chunk is not None:
            run._push.__self__.chunk = chunk
        V = torch.randn(count, 2, 3, 12, dtype=torch.float64)
        U = torch.randn(count, 2, 2, 20, dtype=torch.float64)
        torch.testing.assert_close(run.jvp(V), (V.flatten(1) @ dense.T).reshape(count, 2, 2, 20), **EXACT)
        torch.testing.assert_close(run.vjp(U), (U.flatten(1) @ dense).reshape(count, 2, 3, 12), **EXACT)
        torch.testing.assert_close(run @ V.flatten(1).T, dense @ V.flatten(1).T, **EXACT)
        torch.testing.assert_close(run.T @ U.flatten(1).T, dense.T @ U.flatten(1).T, **EXACT)


def test_every_form_of_product(J: Jacobian, dense: torch.Tensor) -> None:
    v, u = torch.randn(72, dtype=torch.float64), torch.randn(80, dtype=torch.float64)
    V, U = torch.randn(72, 3, dtype=torch.float64), torch.randn(80, 3, dtype=torch.float64)
    for got, want in [
        (J @ v, dense @ v),
        (J @ V, dense @ V),
        (J @ V.T.contiguous().T, dense @ V),
        (J.T @ u, dense.T @ u),
        (J.T @ U, dense.T @ U),
        (J.H @ u, dense.T @ u),
        (J.T.T @ v, dense @ v),
        (J.to_dense(), dense),
        (J.T.to_dense(), dense.T),
        (J.T.jvp(u.reshape(1, 2, 2, 20)).flatten(), dense.T @ u),
        (J.T.vjp(v.reshape(1, 2, 3, 12)).flatten(), dense @ v),
        ((J.T @ J) @ v, dense.T @ (dense @ v)),
        ((J @ J.T) @ u, dense @ (dense.T @ u)),
        ((J.T @ J).to_dense(), dense.T @ dense),
    ]:
        torch.testing.assert_close(got, want, **EXACT)
    assert isinstance(J.T, Jacobian) and J.T.T is J and J.H.H is J


@pytest.mark.parametrize("case", ["plain", "topk_everywhere", "relu_residual", "positions_concatenated"])
@pytest.mark.parametrize("target", ["logits", "1.attn.q"])
def test_transpose_dot(case: str, target: str) -> None:
    model = build(case)
    J = jacobian(model, tokens(model), "0.attn.v", target)
    V = torch.randn(5, *J.source_shape, dtype=torch.float64)
    U = torch.randn(5, *J.target_shape, dtype=torch.float64)
    left, right = (J.jvp(V) * U).flatten(1).sum(1), (V * J.vjp(U)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("case", ["plain", "topk_everywhere", "like_csp_yolo2", "sinusoids_odd"])
def test_composition_law(case: str) -> None:
    model = build(case)
    ids = tokens(model)
    first, second = jacobian(model, ids, target="1.resid_in"), jacobian(model, ids, "1.resid_in")
    third, whole = jacobian(model, ids, "final_resid", "logits"), jacobian(model, ids, target="logits")
    chain = third @ second @ first
    assert isinstance(chain, Jacobian)
    assert (chain.shape, chain.source_shape, chain.target_shape) == (
        whole.shape,
        whole.source_shape,
        whole.target_shape,
    )
    assert torch.equal(chain.primal, whole.primal) and chain.dtype == torch.float64
    matrix = whole.to_dense()
    for each in (chain, third @ (second @ first), (first.T @ second.T @ third.T).T):
        torch.testing.assert_close(each.to_dense(), matrix, **EXACT)
    torch.testing.assert_close(chain.T.to_dense(), matrix.T, **EXACT)
    V = torch.randn(3, *chain.source_shape, dtype=torch.float64)
    torch.testing.assert_close(chain.jvp(V), whole.jvp(V), **EXACT)
    assert chain.jvp(V[:0]).shape == (0, *whole.target_shape)
    identity = jacobian(model, ids, "1.resid_in", "1.resid_in")
    torch.testing.assert_close((second @ identity @ first).to_dense(), (second @ first).to_dense(), **EXACT)
    torch.testing.assert_close(chain.spectrum(3), torch.linalg.svdvals(matrix)[:3], **EXACT)


def test_composition_at_positions() -> None:
    model = build("plain")
    ids = tokens(model)
    first = jacobian(model, ids, "0.resid_in", "1.resid_in", (0, [3, 1]))
    second = jacobian(model, ids, "1.resid_in", "final_resid", ([3, 1], -1))
    torch.testing.assert_close((second @ first).to_dense(), second.to_dense() @ first.to_dense(), **EXACT)
    for other in ([1, 3], None, 3):
        with pytest.raises(ValueError, match="J1 to end where J2 starts"):
            jacobian(model, ids, "1.resid_in", "final_resid", (other, -1)) @ first
    # Selecting all positions gives the same operator however it is written.
    said = jacobian(model, ids, "1.resid_in", "final_resid", (slice(None), None))
    assert (said @ jacobian(model, ids, target=("1.resid_in"), positions=(None, list(range(7))))).shape


def test_what_cannot_be_composed(model, ids) -> None:
    first, second = jacobian(model, ids, target="1.resid_in"), jacobian(model, ids, "1.resid_in")
    with pytest.raises(ValueError, match="'final_resid'.*'0.resid_in'"):
        first @ second
    with pytest.raises(ValueError, match="two models"):
        second @ jacobian(build("like_csp_yolo2"), ids, target="1.resid_in")
    with pytest.raises(ValueError, match="different model inputs"):
        second @ jacobian(model, (ids + 1) % 13, target="1.resid_in")
    with pytest.raises(ValueError, match="different model inputs"):
        second @ jacobian(model, ids, target="1.resid_in", attention_mask=torch.ones_like(ids))
    with pytest.raises(ValueError, match="function of '1.resid_in'"):
        second @ jacobian(model, ids, target=("1.resid_in", torch.sin))
    assert (second @ jacobian(model, ids.clone(), target="1.resid_in")).shape == first.shape  # equal values suffice


def test_errors_name_what_was_given_and_what_is_allowed(J: Jacobian) -> None:
    good = torch.zeros(2, 2, 3, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(2, 3, 12\); J.jvp takes \(T, 2, 3, 12\).*V\[None\]"):
        J.jvp(good[0])
    with pytest.raises(ValueError, match=r"J.vjp takes \(T, 2, 2, 20\)"):
        J.vjp(good)
    with pytest.raises(TypeError, match=r"torch.float32.*takes torch.float64"):
        J.jvp(good.float())
    with pytest.raises(ValueError, match="on meta; this Jacobian is on cpu"):
        J.jvp(good.to("meta"))
    with pytest.raises(TypeError, match="list"):
        J.jvp([1.0])
    with pytest.raises(ValueError, match=r"\(5,\); J of shape \(80, 72\) takes \(72,\) or \(72, T\)"):
        J @ torch.zeros(5, dtype=torch.float64)
    with pytest.raises(ValueError, match="takes"):
        J @ good
    with pytest.raises(TypeError, match="J @ int"):
        J @ 3


def test_a_chunk_is_at_least_one_and_shrinks_with_the_model(model, ids, monkeypatch) -> None:
    with torch_func(model):
        assert jacobian(model, ids)._push.__self__.chunk > 1
        monkeypatch.setattr(sys.modules["scalpel.jacobians.derivative"], "_CHUNK_BYTES", 1)
        J = jacobian(model, ids)
        assert J._push.__self__.chunk == 1
        assert J.jvp(torch.ones(3, *J.source_shape, dtype=J.dtype)).shape == (3, *J.target_shape)


def test_scipy(model, ids) -> None:
    from scipy.sparse.linalg import aslinearoperator, svds

    J = jacobian(model, ids, target="logits")
    A = J.to_scipy()
    D = J.to_dense().numpy()
    v, u = torch.randn(J.shape[1]).double().numpy(), torch.randn(J.shape[0]).double().numpy()
    assert A.shape == J.shape and A.dtype == D.dtype
    for got, want in [
        (A @ v, D @ v),
        (A.matvec(v[:, None]), (D @ v)[:, None]),
        (A.rmatvec(u), D.T @ u),
        (A.H @ u, D.T @ u),
        (A.T @ u, D.T @ u),
        (A.matmat(D.T), D @ D.T),
        (A.rmatmat(D), D.T @ D),
        ((A.H @ A) @ v, D.T @ (D @ v)),
        ((A + aslinearoperator(D)) @ v, 2 * (D @ v)),
    ]:
        torch.testing.assert_close(torch.from_numpy(got), torch.from_numpy(want), **EXACT)
    found = svds(A, k=5, return_singular_vectors=False, random_state=0)
    torch.testing.assert_close(torch.from_numpy(found[::-1].copy()), J.spectrum(5), rtol=1e-8, atol=1e-10)
    half = jacobian(build("like_csp_yolo2", torch.float32), ids).to_scipy()
    assert str(half.dtype) == "float32" and (half @ v[: half.shape[1]]).dtype == half.dtype
