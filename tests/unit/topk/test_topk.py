"""topk_mask, keep_topk and topk_indices are exact on hard rows on every target, and errors say what to do."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import scalpel
from cases import DTYPES, hard_rows, interesting_ks
from scalpel import _core, reference

WIDTHS = range(301)
# In rows longer than 384, the k-th largest is estimated from a sample of 64, and then from a sample of the rest.
WIDE = [383, 384, 385, 511, 512, 513, 1000, 1023, 1024, 1025, 4095, 4096, 4097]
BY = ("magnitude", "value")


def masks_of(x: torch.Tensor, by: str, ks: list[int]) -> dict[int, np.ndarray]:
    """The masks of the twin for several k, computed with a single sort."""
    order = reference.topk_order(x, by)
    masks = {k: np.zeros(order.shape, dtype=np.bool_) for k in ks}
    for k, mask in masks.items():
        np.put_along_axis(mask, order[..., :k], True, axis=-1)
    return masks


@cache
def rows_and_twins(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, dict[tuple[str, int], np.ndarray]]:
    """The hard rows of a width, and the twin's mask for each interesting k."""
    x = torch.stack(list(hard_rows(width, dtype).values()))
    return x, {(by, k): mask for by in BY for k, mask in masks_of(x, by, interesting_ks(width)).items()}


def check_all(x: torch.Tensor, k: int, by: str, mask: np.ndarray) -> None:
    """Check the three ops against one mask; kept values must be equal to the bit."""
    assert np.array_equal(scalpel.topk_mask(x, k, by).numpy(), mask)
    indices = scalpel.topk_indices(x, k, by)
    assert indices.dtype == torch.int64
    assert np.array_equal(indices.numpy(), np.nonzero(mask)[-1].reshape(*x.shape[:-1], k))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    kept = scalpel.keep_topk(x, k, by).view(bits).numpy()
    assert np.array_equal(kept, np.where(mask, x.view(bits).numpy(), 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_hard_rows(dtype: torch.dtype, target: str) -> None:
    for width in WIDTHS:
        x, twins = rows_and_twins(width, dtype)
        for (by, k), mask in twins.items():
            check_all(x, k, by, mask)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_wide_hard_rows(dtype: torch.dtype, target: str) -> None:
    for width in WIDE:
        x, twins = rows_and_twins(width, dtype)
        for (by, k), mask in twins.items():
            check_all(x, k, by, mask)


def test_the_rows_before_do_not_matter(target: str) -> None:
    # The kernel guesses the cut of a row from the rows before it; these rows make the guess fail in every way.
    for dtype, width in ((torch.float32, 600), (torch.bfloat16, 900), (torch.float64, 130), (torch.float16, 450)):
        x, twins = rows_and_twins(width, dtype)
        order = torch.randint(len(x), (400,))
        for (by, k), mask in twins.items():
            check_all(x[order], k, by, mask[order])


def test_rows_of_any_scale(target: str) -> None:
    x = torch.randn(300, 500) * 10.0 ** torch.randint(-30, 30, (300, 1))
    for by in BY:
        for k, mask in masks_of(x, by, [1, 30, 125, 499]).items():
            check_all(x, k, by, mask)


@pytest.mark.parametrize("op", ["keep_topk", "topk_mask"])
def test_outputs_larger_than_the_caches(op: str, target: str) -> None:
    # Outputs of 32 MiB or more are written past the caches, which requires aligned addresses.
    rows, width = (8300, 1013) if op == "keep_topk" else (33200, 1013)
    dtype = torch.float32 if op == "keep_topk" else torch.float16
    x = torch.randn(rows, width, dtype=torch.float32).to(dtype)
    out = torch.empty(rows + 1, width + 3, dtype=dtype if op == "keep_topk" else torch.bool)[1:, 1:-2]
    assert out.numel() * out.element_size() >= 32 << 20
    f = getattr(scalpel, op)
    f(x, 200, out=out)
    for begin in range(0, rows, 4000):
        assert torch.equal(out[begin : begin + 4000], f(x[begin : begin + 4000], 200))


@given(
    x=hnp.arrays(st.sampled_from([np.float32, np.float64, np.float16]), hnp.array_shapes(max_dims=3, max_side=9)),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_any_array(x: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, x.shape[-1]))
    by = data.draw(st.sampled_from(BY))
    for name in [t["name"] for t in _core.targets() if t["supported"]]:
        _core.force_target(name)
        mask = scalpel.topk_mask(x, k, by)
        assert isinstance(mask, np.ndarray)
        assert np.array_equal(mask, reference.topk_mask(x, k, by))
        assert np.array_equal(scalpel.topk_indices(x, k, by), reference.topk_indices(x, k, by))
        kept = scalpel.keep_topk(x, k, by)
        assert kept.dtype == x.dtype
        assert kept.tobytes() == np.where(mask, x, x.dtype.type(0)).tobytes()
    _core.force_target("")


def test_nan_payload_and_sign_of_zero_survive() -> None:
    bits = torch.tensor([0x7FC01234, -0x80000000, 0x3F800000], dtype=torch.int64).to(torch.int32)
    assert torch.equal(scalpel.keep_topk(bits.view(torch.float32), 3).view(torch.int32), bits)
    assert torch.equal(scalpel.keep_topk(bits.view(torch.float32), 2).view(torch.int32)[[0, 2]], bits[[0, 2]])


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_same_bits_for_any_thread_count(threads: int) -> None:
    x = torch.randn(300, 257).round(decimals=1)
    expected = scalpel.topk_mask(x, 40)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(scalpel.topk_mask(x, 40), expected)
    finally:
        torch.set_num_threads(before)


STRIDED = {
    "rows apart": lambda x: x[:, :, :7],
    "transposed": lambda x: x.transpose(0, 1),
    "last dim apart": lambda x: x[..., ::2],
    "last dim moved": lambda x: x.movedim(-1, 0),
    "expanded": lambda x: x[:1].expand(5, -1, -1),
    "offset": lambda x: x[1:, 2:, 3:],
    "a dimension of one between": lambda x: x.flatten().as_strided((3, 1, 2, 4), (9, 9, 5, 1)),
    "one column": lambda x: x[..., :1],
}


@pytest.mark.parametrize("view", STRIDED.values(), ids=STRIDED.keys())
def test_any_strides(view, target: str) -> None:
    x = view(torch.randn(4, 6, 10))
    for k in interesting_ks(x.shape[-1]):
        check_all(x, k, "magnitude", reference.topk_mask(x, k))
        array = x.numpy()
        assert np.array_equal(scalpel.keep_topk(array, k), scalpel.keep_topk(x, k).numpy())


def test_numpy_arrays_of_every_kind() -> None:
    x = np.random.default_rng(0).normal(size=(5, 8))
    expected = reference.topk_mask(x, 3)
    frozen = x.copy()
    frozen.flags.writeable = False
    packed = np.zeros(5, dtype=[("tag", "i1"), ("row", "f8", 8)])  # unaligned rows
    packed["row"] = x
    for given_x in (x, frozen, x.astype(">f8"), packed["row"]):
        assert np.array_equal(scalpel.topk_mask(given_x, 3), expected)
    assert np.array_equal(scalpel.topk_mask(x[::-1, ::-1], 3), reference.topk_mask(x[::-1, ::-1], 3))


def test_arrays_that_speak_dlpack() -> None:
    xp = pytest.importorskip("array_api_strict")
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    array = xp.asarray(x)
    for op in ("topk_mask", "keep_topk", "topk_indices"):
        f = getattr(scalpel, op)
        result = f(array, 3)
        assert type(result) is type(array)
        assert np.array_equal(np.from_dlpack(result), f(x, 3))
    out = xp.zeros((5, 8), dtype=xp.float32)
    assert scalpel.keep_topk(array, 3, out=out) is out
    assert np.array_equal(np.from_dlpack(out), scalpel.keep_topk(x, 3))

    class Bare:
        """Supports DLPack but belongs to no library that could take back a result."""

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options):
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    tensor = torch.randn(5, 8, dtype=torch.bfloat16)
    assert torch.equal(scalpel.keep_topk(Bare(tensor), 3), scalpel.keep_topk(tensor, 3))
    with pytest.raises(TypeError, match="x is int64"):
        scalpel.topk_mask(Bare(torch.arange(4)), 2)
    frozen = np.zeros((5, 8), dtype=np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out must be writeable"):
        scalpel.keep_topk(array, 3, out=frozen)
    with pytest.raises(TypeError, match="masked array"):
        scalpel.topk_mask(np.ma.masked_array(x), 3)
    with pytest.raises(TypeError, match="out is a list.*DLPack"):
        scalpel.topk_mask(Bare(tensor), 2, out=[])


def test_out() -> None:
    x = torch.randn(4, 6, 9)
    strided = torch.empty(4, 6, 20)[..., 5:14]
    mask, index = torch.empty(4, 6, 9, dtype=torch.bool), torch.empty(4, 6, 3, dtype=torch.int64)
    assert scalpel.keep_topk(x, 3, out=strided) is strided
    assert torch.equal(strided, scalpel.keep_topk(x, 3))
    assert scalpel.topk_mask(x, 3, out=mask) is mask
    assert scalpel.topk_indices(x, 3, out=index) is index
    assert torch.equal(mask, strided != 0)
    assert torch.equal(index.flatten(), mask.nonzero()[:, -1])
    array = np.empty((4, 6, 9), dtype=np.float32)
    assert scalpel.keep_topk(x.numpy(), 3, out=array) is array
    assert np.array_equal(array, strided.numpy())


def test_out_may_be_laid_out_in_any_order() -> None:
    x = torch.randn(4, 6, 9)
    expected = scalpel.keep_topk(x, 3)
    interleaved = torch.empty(40 * 9).as_strided((2, 3, 9), (27, 18, 1))  # not nested, yet without overlap
    for like, want in ((torch.empty(6, 4, 9).transpose(0, 1), expected), (interleaved, expected[:2, :3])):
        assert torch.equal(scalpel.keep_topk(x[: want.shape[0], : want.shape[1]], 3, out=like), want)
    for out in (torch.empty(9, 4, 6).movedim(0, -1), torch.empty(4, 6, 18)[..., ::2]):  # all dimensions except the last
        assert torch.equal(scalpel.keep_topk(x, 3, out=out), expected)
    strided = np.empty((4, 6, 18), dtype=np.float32)[..., ::2]
    assert np.array_equal(scalpel.keep_topk(x.numpy(), 3, out=strided), expected.numpy())
    backwards = np.empty((4, 6, 9), dtype=np.float32)[::-1]
    assert np.array_equal(scalpel.keep_topk(x.numpy(), 3, out=backwards), expected.numpy())


def test_in_place(target: str) -> None:
    for k in (0, 2, 9):
        x = torch.randn(5, 9)
        expected = scalpel.keep_topk(x, k)
        assert torch.equal(scalpel.keep_topk(x, k, out=x), expected)


def test_abs_topk_layer() -> None:
    x = torch.randn(3, 8)
    layer = scalpel.AbsTopK(2)
    assert torch.equal(layer(x), scalpel.keep_topk(x, 2))
    assert repr(layer) == "AbsTopK(k=2)"
    assert list(layer.state_dict()) == []
    with pytest.raises(ValueError, match="k is -1"):
        scalpel.AbsTopK(-1)
    with pytest.raises(TypeError, match=r"k is 2\.0 of type float"):
        scalpel.AbsTopK(2.0)  # type: ignore[arg-type]


X = torch.randn(3, 8)
ERRORS = {
    "k too large": (lambda: scalpel.topk_mask(X, 9), ValueError, "k is 9.*width 8"),
    "k negative": (lambda: scalpel.topk_indices(X, -1), ValueError, "k is -1.*width 8"),
    "k too large, numpy": (lambda: scalpel.topk_indices(X.numpy(), 9), ValueError, "k is 9.*width 8"),
    "k negative, numpy": (lambda: scalpel.topk_indices(X.numpy(), -1), ValueError, "k is -1.*width 8"),
    "k too large, out": (
        lambda: scalpel.keep_topk(X, 9, out=torch.empty(3, 8)),
        ValueError,
        "k is 9.*width 8",
    ),
    "k beyond int64": (
        lambda: scalpel.topk_mask(X.numpy(), 2**70),
        ValueError,
        "k is 1180591620717411303424",
    ),
    "k a float": (lambda: scalpel.topk_mask(X, 2.0), TypeError, "k is 2.0 of type float"),
    "k a bool": (lambda: scalpel.topk_mask(X, True), TypeError, "k is True of type bool"),
    "k a numpy bool": (lambda: scalpel.topk_mask(X, np.True_), TypeError, "integer"),
    "k a tensor": (lambda: scalpel.topk_mask(X, torch.tensor(2)), TypeError, "k is tensor.*integer"),
    "k an array": (lambda: scalpel.topk_mask(X, np.array(2)), TypeError, "k is array.*integer"),
    "k None": (lambda: scalpel.topk_mask(X, None), TypeError, "k is None"),
    "by": (lambda: scalpel.topk_mask(X, 2, by="abs"), ValueError, "by is 'abs'.*'magnitude', 'value'"),
    "list": (lambda: scalpel.topk_mask([1.0], 1), TypeError, "x is a list.*torch tensor, a numpy array"),
    "no dimension": (lambda: scalpel.topk_mask(torch.tensor(1.0), 0), ValueError, "no dimension"),
    "no dimension, numpy": (lambda: scalpel.topk_mask(np.array(1.0), 0), ValueError, "no dimension"),
    "integers": (lambda: scalpel.topk_mask(X.long(), 2), TypeError, "x is int64; allowed: float16"),
    "complex": (lambda: scalpel.topk_mask(X.to(torch.complex64), 2), TypeError, "x is complex64; allowed"),
    "numpy integers": (lambda: scalpel.topk_mask(np.arange(4), 2), TypeError, "x is int64; allowed"),
    "sparse": (lambda: scalpel.topk_mask(X.to_sparse(), 2), TypeError, "sparse"),
    "out dtype": (
        lambda: scalpel.keep_topk(X, 2, out=X.double()),
        TypeError,
        r"out .* is float64; it must be float32",
    ),
    "out shape": (
        lambda: scalpel.keep_topk(X, 2, out=torch.empty(3, 7)),
        ValueError,
        r"shape \(3, 7\); it must be \(3, 8\)",
    ),
    "index shape": (
        lambda: scalpel.topk_indices(X, 2, out=torch.empty(3, 8, dtype=torch.int64)),
        ValueError,
        r"shape \(3, 8\); it must be \(3, 2\)",
    ),
    "out a tensor for an array": (
        lambda: scalpel.keep_topk(X.numpy(), 2, out=X),
        TypeError,
        "out is a Tensor.*numpy array",
    ),
    "out an array for a tensor": (
        lambda: scalpel.keep_topk(X, 2, out=X.numpy()),
        TypeError,
        "out is a ndarray.*tensor",
    ),
    "out expanded": (
        lambda: scalpel.keep_topk(X, 2, out=torch.empty(1, 8).expand(3, 8)),
        ValueError,
        "several elements in one place",
    ),
    "out whose rows overlap": (
        lambda: scalpel.topk_mask(X, 2, out=torch.zeros(12, dtype=torch.bool).as_strided((3, 8), (2, 1))),
        ValueError,
        "several elements in one place",
    ),
    "out of no dtype": (
        lambda: scalpel.topk_mask(X, 2, out=torch.zeros(3, 8, dtype=torch.int32)),
        TypeError,
        r"out \(the mask\) is int32; it must be bool",
    ),
    "meta, out shape": (
        lambda: scalpel.keep_topk(X.to("meta"), 2, out=torch.empty(3, 7, device="meta")),
        ValueError,
        r"shape \(3, 7\); it must be \(3, 8\)",
    ),
    "out overlaps": (
        lambda: scalpel.keep_topk(Y := torch.randn(4, 8)[:3], 2, out=Y.as_strided((3, 8), (8, 1), 8)),
        ValueError,
        "overlaps x in memory",
    ),
    "meta, out on cpu": (
        lambda: scalpel.keep_topk(X.to("meta"), 2, out=torch.empty(3, 8)),
        ValueError,
        "x is on meta, out on cpu",
    ),
}


def test_x_and_out_may_lie_between_each_other() -> None:
    both = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    x, out = both[:, :8], both[:, 8:]
    expected = scalpel.keep_topk(x.clone(), 3)
    assert torch.equal(scalpel.keep_topk(x, 3, out=out), expected)
    every_other = torch.randn(64, 16)
    before = every_other[1::2].clone()
    assert torch.equal(scalpel.keep_topk(before, 3), scalpel.keep_topk(every_other[1::2], 3, out=every_other[::2]))
    assert torch.equal(every_other[1::2], before)
    with pytest.raises(ValueError, match="overlaps x in memory"):
        scalpel.keep_topk(both[:, :8], 3, out=both[:, 7:15])


def test_as_many_dimensions_as_torch_and_numpy_have() -> None:
    x = torch.randn((2, 3, *[1] * 21, 5), generator=torch.Generator().manual_seed(0))
    expected = scalpel.keep_topk(x.reshape(6, 5), 2).reshape(x.shape)
    assert torch.equal(scalpel.keep_topk(x, 2), expected)
    assert np.array_equal(scalpel.keep_topk(x.numpy(), 2), expected.numpy())


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


def test_a_tensor_elsewhere_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise ImportError("as in a build without nvcc")

    monkeypatch.setattr("scalpel._native.cuda_core", absent)

    class OnCuda(torch.Tensor):
        device = torch.device("cuda", 0)  # as a GPU tensor would report

    with pytest.raises(ValueError, match=r"x is on cuda:0.*CPU only.*x\.cpu\(\)"):
        scalpel.keep_topk(torch.randn(3, 8).as_subclass(OnCuda), 2)
    with pytest.raises(ValueError, match=r"x is on cuda:0.*x\.cpu\(\)"):
        scalpel.StreamingCovariance(8).update(torch.randn(3, 8).as_subclass(OnCuda))


def test_meta_tensors_have_shapes() -> None:
    x = torch.empty(3, 8, device="meta", dtype=torch.bfloat16)
    assert scalpel.topk_indices(x, 2).shape == (3, 2)
    assert scalpel.keep_topk(x, 2).dtype == torch.bfloat16
    assert scalpel.topk_mask(x, 2).dtype == torch.bool
    out = torch.empty(3, 8, device="meta", dtype=torch.bfloat16)
    assert scalpel.keep_topk(x, 2, out=out) is out
