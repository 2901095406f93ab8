"""J.to_scipy(): products with every kind of array against the dense matrix in float64, and what is refused."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator, eigs, gmres

import scalpel
from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from scalpel.jacobians.operator import Jacobian
from scalpel.reference.jacobian import jacobian_dense

WHERE = ("0.resid_in", "1.mlp.post_act", (slice(0, 3), [1, 3]))
EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture(scope="module")
def J() -> Jacobian:
    model = build("like_csp_yolo2")
    return scalpel.jacobian(model, tokens(model, 2, 4), *WHERE)


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    model = build("like_csp_yolo2")
    return jacobian_dense(model, tokens(model, 2, 4), *WHERE).numpy()


def complex_array(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    return rng.normal(size=shape) + 1j * rng.normal(size=shape)


def test_complex_vectors_keep_their_imaginary_part(J: Jacobian, dense: np.ndarray) -> None:
    A, (m, n) = J.to_scipy(), J.shape
    v, u, V, U = complex_array(n), complex_array(m), complex_array(n, 3), complex_array(m, 3)
    first = {
        "A @ v": (A @ v, dense @ v),
        "matvec of a column": (A.matvec(v[:, None]), dense @ v[:, None]),
        "matmat": (A.matmat(V), dense @ V),
        "no columns": (A @ V[:, :0], dense @ V[:, :0]),
        "rmatvec": (A.rmatvec(u), dense.T @ u),
        "rmatmat": (A.rmatmat(U), dense.T @ U),
        "A.H": (A.H @ u, dense.T @ u),
        "A.T": (A.T @ U, dense.T @ U),
        "transposed first": (J.T.to_scipy() @ u, dense.T @ u),
        "adjoint first": (J.H.to_scipy().rmatvec(v), dense @ v),
        "composed by us": ((J.T @ J).to_scipy() @ v, dense.T @ (dense @ v)),
        "composed by scipy": ((A.H @ A) @ v, dense.T @ (dense @ v)),
        "a complex multiple": ((2j * A) @ v, 2j * (dense @ v)),
        "its adjoint": ((2j * A).H @ u, -2j * (dense.T @ u)),
        "a sum": ((A + aslinearoperator(1j * dense)) @ v, (1 + 1j) * (dense @ v)),
    }
    for name, (got, want) in first.items():
        assert got.dtype == np.complex128 and got.shape == want.shape, name
        np.testing.assert_allclose(got, want, err_msg=name, **EXACT)
    assert A.dtype == np.float64


def test_a_part_that_is_infinite_leaves_the_other_alone(J: Jacobian, dense: np.ndarray) -> None:
    v = complex_array(J.shape[1])
    v.imag[0] = np.inf
    got = J.to_scipy() @ v
    np.testing.assert_allclose(got.real, dense @ v.real, **EXACT)
    assert not np.isfinite(got.imag[dense[:, 0] != 0]).any()


@pytest.mark.parametrize("kind", ["bool", "int8", "uint64", "float16", ">f8", "longdouble", "clongdouble", ">c16"])
def test_every_kind_of_number(J: Jacobian, dense: np.ndarray, kind: str) -> None:
    v = (np.arange(J.shape[1]) % 5).astype(kind)
    got = J.to_scipy() @ v
    assert got.dtype == (np.complex128 if v.dtype.kind == "c" else np.float64)
    np.testing.assert_allclose(got, dense @ v.astype(np.complex128), **EXACT)


def test_arrays_however_they_lie(J: Jacobian, dense: np.ndarray) -> None:
    n = J.shape[1]
    long = complex_array(2 * n)
    for v in (long.real[::-2], long[::-2], np.broadcast_to(long[0], n), list(long[:n]), torch.from_numpy(long[:n])):
        np.testing.assert_allclose(J.to_scipy() @ v, dense @ np.asarray(v), **EXACT)


def test_not_a_number_stays_where_the_matrix_reads_it(J: Jacobian, dense: np.ndarray) -> None:
    v = np.zeros(J.shape[1], dtype=complex)
    v.real[1] = np.nan
    got = J.to_scipy() @ v
    assert np.isnan(got.real[dense[:, 1] != 0]).all() and (dense[:, 1] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_precision_is_js(dtype: torch.dtype) -> None:
    model = build("like_csp_yolo2", dtype)
    J = scalpel.jacobian(model, tokens(model, 2, 4), *WHERE)
    dense, A, v = J.to_dense().double().numpy(), J.to_scipy(), complex_array(J.shape[1])
    wide = dtype == torch.float64
    assert A.dtype == (np.float64 if wide else np.float32)
    assert (A @ v.astype(np.complex64)).dtype == (A @ v).dtype == (np.complex128 if wide else np.complex64)
    assert (A @ v.real).dtype == A.dtype
    np.testing.assert_allclose(A @ v, dense @ v, rtol=0, atol=(1e-12 if wide else 1e-5) * np.abs(dense @ v).max())
    for huge in (np.full(J.shape[1], 1e39), np.full((J.shape[1], 2), 1e39j)):
        if wide:
            assert np.isfinite(A @ huge).all()
        else:
            with pytest.raises(ValueError, match="1e.39.*float32.*3.4.*e.38.*scale"):
                A @ huge
    assert np.isnan((A @ np.full(J.shape[1], np.nan))[dense.any(axis=1)]).all()  # this is not out of range


@pytest.mark.parametrize(
    ("entry", "kind"), [(1.5, object), (1.5j, object), ("1.5", str), ("2020-01-01", "datetime64[D]"), (b"1", bytes)]
)
def test_what_holds_no_numbers_is_refused(J: Jacobian, entry: object, kind: object) -> None:
    v = np.array([entry] * J.shape[1], dtype=kind)
    with pytest.raises(TypeError, match=rf"array of {v.dtype}.*real or complex numbers".replace("[", r"\[")):
        J.to_scipy() @ v
    with pytest.raises(TypeError, match="real or complex numbers"):
        J.T.to_scipy().rmatvec(v)


def square() -> tuple[Jacobian, np.ndarray]:
    model = build("plain")
    ids = tokens(model, 1, 1)
    return scalpel.jacobian(model, ids), jacobian_dense(model, ids, "0.resid_in", "final_resid", None).numpy()


def test_solvers_of_scipy_that_work_in_complex_numbers() -> None:
    J, dense = square()
    A, n, shift = J.to_scipy(), J.shape[0], 0.3 + 0.7j
    b = complex_array(n)
    shifted = A - shift * aslinearoperator(np.eye(n))
    solved, failed = gmres(shifted, b, rtol=1e-12, restart=n)
    assert not failed
    np.testing.assert_allclose(solved, np.linalg.solve(dense - shift * np.eye(n), b), rtol=1e-6, atol=1e-8)
    near = eigs(A, k=2, sigma=shift, v0=b.real)[0]  # solves with A - shift, by complex products
    every = np.linalg.eigvals(dense)
    nearest = every[np.abs(every - shift).argmin()]
    assert abs(nearest.imag) > 0.1  # one eigenvalue of a pair, which eigs returns complete
    np.testing.assert_allclose(np.sort_complex(near), [nearest.conj(), nearest], rtol=1e-6)
    values, vectors = eigs(A, k=3, v0=b.real)  # complex pairs, so a vector is checked with a complex product
    np.testing.assert_allclose(A @ vectors, vectors * values, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "product", ["J @ v", "J @ V", "J.T @ u", "J.H @ u", "J.jvp", "J.vjp", "(J.T @ J) @ v", "radius"]
)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_tensors_are_refused_and_told_how(J: Jacobian, product: str, dtype: torch.dtype) -> None:
    m, n = J.shape
    at_source, at_target = torch.ones(n, dtype=dtype), torch.ones(m, dtype=dtype)
    tangents = at_source.reshape(1, *J.source_shape)
    go = {
        "J @ v": lambda: J @ at_source,
        "J @ V": lambda: J @ at_source[:, None],
        "J.T @ u": lambda: J.T @ at_target,
        "J.H @ u": lambda: J.H @ at_target,
        "J.jvp": lambda: J.jvp(tangents),
        "J.vjp": lambda: J.vjp(at_target.reshape(1, *J.target_shape)),
        "(J.T @ J) @ v": lambda: (J.T @ J) @ at_source,
        "radius": lambda: J.validity_radius(tangents),
    }[product]
    with pytest.raises(TypeError, match=rf"{dtype}.*float64.*\.real.*\.imag.*to_scipy") as caught:
        go()
    assert f".to({J.dtype})" not in str(caught.value)  # this would drop the imaginary part
