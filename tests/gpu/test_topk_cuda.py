"""TopK on a GPU gives the bits of the CPU on the same hard rows; without a GPU, the stand-in does."""

import pytest
import torch

import scalpel
from cases import CASES, DTYPES, Case, hard_rows, interesting_ks
from cuda_stand_in import Gpu

OPS = ("topk_mask", "keep_topk", "topk_indices")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Widths for one warp per row, one block per row, rows partly in shared memory, and rows that fit neither.
WIDTHS = [1, 31, 32, 33, 100, 512, 600]
WIDE = [1025, 2048, 4099]
VERY_WIDE = [(20000, torch.float32), (65536, torch.bfloat16), (33000, torch.float64)]
ONLY_ON_A_GPU = [(65536, torch.float32), (100003, torch.float32), (300000, torch.float16), (1 << 20, torch.float64)]


def poisoned(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like.view(BITS[like.element_size()]), 77).view(like.dtype)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    bits = BITS[expected.element_size()]
    return torch.equal(found.cpu().contiguous().view(bits), expected.contiguous().view(bits))


def check(x: torch.Tensor, k: int, by: str, device: str, expected: dict[str, torch.Tensor] | None = None) -> None:
    """Check the three ops to the bit, with outputs that start as garbage."""
    for op in OPS:
        right = CPU[op](x, k, by) if expected is None else expected[op]
        there = x.to(device)
        out = poisoned(right).to(device)
        getattr(scalpel, op)(there, k, by, out=out)
        assert same(out, right), (op, x.dtype, tuple(x.shape), k, by)


def on_the_cpu(op: str):
    from scalpel import _core
    from scalpel import topk as ops
    from scalpel._native import memory_of

    def run(x: torch.Tensor, k: int, by: str) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty(ops._result_shape(op, x, k), dtype=ops._result_dtype(op, x))
        getattr(_core, op)(memory_of(x), k, by == "value", memory_of(out), 1)
        return out

    return run


CPU = {op: on_the_cpu(op) for op in OPS}


@pytest.mark.parametrize("case", [case for case in CASES if case.op in OPS and case.shape[-1] < 5000], ids=str)
def test_the_table_of_cases(case: Case, gpu: Gpu) -> None:
    # On the stand-in a row takes milliseconds, and twelve are two blocks of warps, of which one is not full.
    x = torch.randn(case.shape).to(case.dtype)[: 40 if gpu.real else 12]
    for k in interesting_ks(x.shape[-1]):
        check(x, k, "magnitude", gpu.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_hard_rows(dtype: torch.dtype, gpu: Gpu) -> None:
    for width in WIDTHS:
        x = torch.stack(list(hard_rows(width, dtype).values()))
        for by in ("magnitude", "value"):
            for k in {1, width // 3, width} - {0}:
                check(x, k, by, gpu.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
def test_wide_hard_rows(dtype: torch.dtype, gpu: Gpu) -> None:
    rows = ["normal", "all equal", "repeated threshold", "everything", "all nan"]
    for width in WIDE:
        x = torch.stack([hard_rows(width, dtype)[name] for name in rows])
        check(x, width // 4, "magnitude", gpu.device)
        check(x, width // 4, "value", gpu.device)


@pytest.mark.parametrize(("width", "dtype"), VERY_WIDE, ids=str)
def test_rows_beyond_the_registers(width: int, dtype: torch.dtype, gpu: Gpu) -> None:
    x = torch.stack([torch.randn(width), torch.randint(-9, 9, (width,)).float()]).to(dtype)
    check(x, width // 5, "magnitude", gpu.device)


def wide_rows(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows whose keys are spread out, in a tail, of few values, of one value, and the largest and smallest of all."""
    normal = torch.randn(width)
    tail = torch.where(torch.rand(width) < 1e-3, normal * 1e4, normal)
    rows = [normal, tail, torch.randint(-9, 9, (width,)).float(), torch.ones(width), torch.zeros(width)]
    special = normal.clone()
    special[:: width // 7], special[3 :: width // 5] = torch.nan, -torch.inf
    return torch.stack([*rows, special]).to(dtype)


@pytest.mark.parametrize(
    ("width", "dtype"), [(21001, torch.float32), (40000, torch.bfloat16), (8200, torch.float64)], ids=str
)
def test_rows_beyond_a_little_shared_memory(
    width: int, dtype: torch.dtype, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gpu.real:
        pytest.skip("a GPU's shared memory isn't chosen; test_rows_beyond_shared_memory has wider rows")
    monkeypatch.setenv("HOST_CUDA_SHARED", str(51 * 1024))
    x = wide_rows(width, dtype)
    for k, by in ((1, "value"), (width // 5, "magnitude"), (width - 1, "value")):
        check(x, k, by, gpu.device)


@pytest.mark.parametrize(("width", "dtype"), ONLY_ON_A_GPU, ids=str)
def test_rows_beyond_shared_memory(width: int, dtype: torch.dtype, cuda: torch.device) -> None:
    x = wide_rows(width, dtype)
    for k in (1, width // 5, width - 1):
        check(x, k, "magnitude", "cuda")
        check(x, k, "value", "cuda")


@pytest.mark.parametrize("width", [64, 100, 2000])
def test_unaligned_and_strided_rows(width: int, gpu: Gpu) -> None:
    wide = torch.randn(3, 4, 2, width + 5).to(gpu.device)
    for x in (wide[..., 1 : 1 + width], wide[:, ::2, :, 5:], wide.transpose(0, 2)[..., :width], wide[:, :, 0, 3:]):
        k = x.shape[-1] // 3
        for op in OPS:
            assert same(getattr(scalpel, op)(x, k), CPU[op](x.cpu(), k, "magnitude"))
    out = torch.zeros(2, 4, 3, width + 3, device=gpu.device)[..., 2 : 2 + width]
    x = wide.transpose(0, 2)[..., :width]
    scalpel.keep_topk(x, 7, out=out)
    assert same(out, CPU["keep_topk"](x.cpu(), 7, "magnitude"))


def test_in_place(gpu: Gpu) -> None:
    for width in (48, 3000):
        x = torch.randn(4, width)
        expected = CPU["keep_topk"](x, width // 4, "magnitude")
        there = x.to(gpu.device)
        scalpel.keep_topk(there, width // 4, out=there)
        assert same(there, expected)


def test_errors_are_the_cpus(gpu: Gpu) -> None:
    x = torch.randn(3, 8, device=gpu.device)
    with pytest.raises(ValueError, match="0 <= k <= width"):
        scalpel.keep_topk(x, 9)
    with pytest.raises(TypeError, match="allowed: float16"):
        scalpel.keep_topk(x.int(), 2)
    with pytest.raises(ValueError, match="has shape"):
        scalpel.keep_topk(x, 2, out=torch.empty(3, 7, device=gpu.device))
    with pytest.raises(ValueError, match="several elements in one place"):
        scalpel.keep_topk(x, 2, out=torch.empty(1, 8, device=gpu.device).expand(3, 8))
    wide = torch.randn(3, 9, device=gpu.device)
    with pytest.raises(ValueError, match="overlaps x"):
        scalpel.keep_topk(wide[:, :8], 2, out=wide[:, 1:])


# ---- only on a real GPU ---------------------------------------------------------------------------


def test_derivatives(cuda: torch.device) -> None:
    x = torch.randn(5, 70, device=cuda, requires_grad=True)
    scalpel.keep_topk(x, 9).square().sum().backward()
    mask = scalpel.topk_mask(x.detach(), 9)
    assert torch.equal(x.grad, torch.where(mask, 2 * x.detach(), 0))


def test_on_streams_that_are_not_the_default(cuda: torch.device) -> None:
    """Each call waits for a slow product on its own stream; a call on the wrong stream would read its input too
    early.
    """
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for seed, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            g = torch.Generator(device=cuda).manual_seed(seed)
            x = torch.randn(2048, 2048, device=cuda, generator=g)
            for _ in range(8):
                x = x @ x / 45.0
            found.append((x, scalpel.keep_topk(x, 100)))
    torch.cuda.synchronize()
    for x, kept in found:
        assert same(kept, CPU["keep_topk"](x.cpu(), 100, "magnitude"))


def test_captured_in_a_graph(cuda: torch.device) -> None:
    x = torch.randn(64, 1000, device=cuda)
    out, mask = torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)
    scalpel.keep_topk(x, 30, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scalpel.keep_topk(x, 30, out=out)
        scalpel.topk_mask(x, 30, out=mask)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert same(out, CPU["keep_topk"](x.cpu(), 30, "magnitude")) and same(
            mask, CPU["topk_mask"](x.cpu(), 30, "magnitude")
        )


def test_more_than_two_to_the_31_elements(cuda: torch.device) -> None:
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of the GPU's memory")
    rows, width = (1 << 31) // 1024 + 3, 1024
    x = torch.zeros(rows, width, dtype=torch.bfloat16, device=cuda)
    x[-1] = torch.randn(width, device=cuda).bfloat16()
    kept = scalpel.keep_topk(x, 10)
    assert same(kept[-1:], CPU["keep_topk"](x[-1:].cpu(), 10, "magnitude"))
    assert int(kept[:-1].count_nonzero()) == 0


def test_on_another_device(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(5, 300, device="cuda:1")
    assert same(scalpel.keep_topk(x, 9), CPU["keep_topk"](x.cpu(), 9, "magnitude"))
    assert torch.cuda.current_device() == 0
