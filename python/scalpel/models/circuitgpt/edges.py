"""The edge list of a :class:`scalpel.CircuitGPT`: every non-zero weight of every matrix, as a table.

Nodes are named after hooks: ``0.attn.act_in:12`` → ``0.attn.q:5``. Other nodes are ``token:ID``, ``position:P`` and
``logits:ID``. Where positions are concatenated, there is also ``position_embedding:C``: after its norm, that channel
enters every ``act_in`` as channel d_model + C.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...hooks.adapters import check_unadapted
from .core import CircuitCore

if TYPE_CHECKING:
    import pandas

COLUMNS = ("src", "dst", "weight", "layer", "param")


@dataclass(frozen=True)
class EdgeTable:
    """Edges in columns, ordered by parameter, then by row and column of its matrix.

    Each name is held once and edges hold codes, so that an edge takes about 18 bytes. ``src_code`` and ``dst_code``
    index ``nodes``, and ``param_code`` indexes ``params``. ``layer`` is -1 for the embeddings, the head and the bigram
    table. Biases and norm weights connect no two nodes, so they are no edges.
    """

    nodes: NDArray[np.object_]
    params: NDArray[np.object_]
    src_code: NDArray[np.int32]
    dst_code: NDArray[np.int32]
    weight: NDArray[Any]
    layer: NDArray[np.int16]
    param_code: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.weight)

    @cached_property
    def src(self) -> NDArray[np.object_]:
        """Names of the nodes where edges begin (number of edges,)."""
        return self.nodes[self.src_code]

    @cached_property
    def dst(self) -> NDArray[np.object_]:
        """Names of the nodes where edges end (number of edges,)."""
        return self.nodes[self.dst_code]

    @cached_property
    def param(self) -> NDArray[np.object_]:
        """Names of the parameters, as in the state dict (number of edges,)."""
        return self.params[self.param_code]

    def to_dict(self) -> dict[str, NDArray[Any]]:
        """Give the columns by name: src, dst, weight, layer, param."""
        return {name: getattr(self, name) for name in COLUMNS}

    def to_pandas(self) -> "pandas.DataFrame":
        """Convert to a DataFrame, whose columns of names are categorical; needs pandas."""
        import pandas

        def named(codes: NDArray[Any], names: NDArray[np.object_]) -> Any:
            return pandas.Categorical.from_codes(codes, categories=list(names))

        return pandas.DataFrame(
            {
                "src": named(self.src_code, self.nodes),
                "dst": named(self.dst_code, self.nodes),
                "weight": self.weight,
                "layer": self.layer,
                "param": named(self.param_code, self.params),
            }
        )

    def to_parquet(self, path: str | Path) -> None:
        """Write the table as a parquet file; needs pandas and a parquet engine (pyarrow)."""
        self.to_pandas().to_parquet(path)


@torch.no_grad()
def edges(model: CircuitCore) -> EdgeTable:
    """List all non-zero entries of the model's matrices: :meth:`scalpel.CircuitGPT.edges`.

    Where the head is tied to the embedding, the same entries stand twice, once for each use.
    """
    check_unadapted(model, "the weights alone are not its edges")
    names: list[NDArray[np.object_]] = []
    starts: dict[str, int] = {}

    def code(hook: str, width: int) -> int:
        """Get the code of a hook's channel 0; the codes of the other channels follow."""
        if hook not in starts:
            starts[hook] = sum(map(len, names))
            names.append(np.array([f"{hook}:{channel}" for channel in range(width)], dtype=object))
        return starts[hook]

    params: list[str] = []
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in ("src", "dst", "weight", "layer", "param")}
    for param, layer, matrix, src_hook, dst_hooks in _matrices(model):
        # Every matrix is (out, in): its rows are destinations, divided evenly among the hooks that they feed.
        out, width = matrix.shape
        channels = out // len(dst_hooks)
        dst_start = np.concatenate([code(hook, channels) + np.arange(channels) for hook in dst_hooks])
        places = matrix.nonzero().cpu()
        rows, cols = places[:, 0].numpy(), places[:, 1].numpy()
        columns["src"].append((code(src_hook, width) + cols).astype(np.int32))
        columns["dst"].append(dst_start[rows].astype(np.int32))
        columns["weight"].append(_numpy(matrix[matrix != 0]))
        columns["layer"].append(np.full(len(rows), layer, dtype=np.int16))
        columns["param"].append(np.full(len(rows), len(params), dtype=np.int32))
        params.append(param)
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return EdgeTable(
        nodes=np.concatenate(names),
        params=np.array(params, dtype=object),
        src_code=joined["src"],
        dst_code=joined["dst"],
        weight=joined["weight"],
        layer=joined["layer"],
        param_code=joined["param"],
    )


def _matrices(model: CircuitCore) -> Iterator[tuple[str, int, Tensor, str, tuple[str, ...]]]:
    """Yield (parameter, layer, matrix (out, in), source hook, destination hooks) of every matrix."""
    first = model.hook_names[0]
    added = model.config.d_pos_emb is None
    yield "transformer.wte.weight", -1, model.transformer.wte.weight.T, "token", (first,)
    yield (
        "transformer.wpe.weight",
        -1,
        model.transformer.wpe.weight.T,
        "position",
        (first if added else "position_embedding",),
    )
    for i, block in enumerate(model.transformer.h):
        at, attn, mlp = f"transformer.h.{i}", f"{i}.attn", f"{i}.mlp"
        qkv = (f"{attn}.q", f"{attn}.k", f"{attn}.v")
        yield f"{at}.attn.c_attn.weight", i, block.attn.c_attn.weight, f"{attn}.act_in", qkv
        yield f"{at}.attn.c_proj.weight", i, block.attn.c_proj.weight, f"{attn}.y", (f"{attn}.resid_delta",)
        yield f"{at}.mlp.c_fc.weight", i, block.mlp.c_fc.weight, f"{mlp}.act_in", (f"{mlp}.post_act",)
        yield (
            f"{at}.mlp.c_proj.weight",
            i,
            block.mlp.c_proj.weight,
            f"{mlp}.post_act",
            (f"{mlp}.resid_delta",),
        )
    yield "lm_head.weight", -1, model.lm_head.weight, "final_resid", ("logits",)
    if model.bigram_table is not None:
        yield "bigram_table", -1, model.bigram_table.T, "token", ("logits",)


def _numpy(values: Tensor) -> NDArray[Any]:
    values = values.detach().cpu()
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
