"""The edge list has every non-zero weight once per use, under the right names."""

import numpy as np
import pytest
import torch

from circuitgpt_cases import CASES, build, one_thread  # noqa: F401


def pruned(name):
    model = build(name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.dim() == 2:
                tensor.mul_(torch.rand(tensor.shape, generator=generator) < 0.2)
    return model


@pytest.mark.parametrize("name", CASES)
def test_count_and_values_are_those_of_the_matrices(name):
    model = pruned(name)
    table = model.edges()
    matrices = {key: value for key, value in model.state_dict().items() if value.dim() == 2}
    assert len(table) == sum(int(torch.count_nonzero(value)) for value in matrices.values())
    assert set(table.params) == set(matrices)
    for key, value in matrices.items():
        ours = np.sort(table.weight[table.param == key])
        np.testing.assert_array_equal(ours, np.sort(value[value != 0].numpy()))
    assert len(set(table.nodes)) == len(table.nodes)


def rebuilt(table, param, src, dst, shape):
    """Rebuild the matrix (out, in) from the names of one source hook and one destination hook."""
    matrix = np.zeros(shape)
    for s, d, w, p in zip(table.src, table.dst, table.weight, table.param, strict=True):
        (a, i), (b, j) = s.rsplit(":", 1), d.rsplit(":", 1)
        if p == param and a == src and b == dst:
            matrix[int(j), int(i)] = w
    return matrix


@pytest.mark.parametrize("name", ["narrow_heads", "positions_concatenated", "bigram_buffer"])
def test_names_lead_back_to_the_weights(name):
    model = pruned(name)
    table, config, block = model.edges(), model.config, model.transformer.h[1]
    at, d_attn = "transformer.h.1", config.d_attn
    for i, letter in enumerate("qkv"):
        part = block.attn.c_attn.weight[i * d_attn : (i + 1) * d_attn]
        ours = rebuilt(table, f"{at}.attn.c_attn.weight", "1.attn.act_in", f"1.attn.{letter}", part.shape)
        np.testing.assert_array_equal(ours, part.detach().numpy())
    first = "position_embedding" if config.d_pos_emb else "0.resid_in"
    for param, src, dst, matrix in (
        (f"{at}.attn.c_proj.weight", "1.attn.y", "1.attn.resid_delta", block.attn.c_proj.weight),
        (f"{at}.mlp.c_fc.weight", "1.mlp.act_in", "1.mlp.post_act", block.mlp.c_fc.weight),
        (f"{at}.mlp.c_proj.weight", "1.mlp.post_act", "1.mlp.resid_delta", block.mlp.c_proj.weight),
        ("transformer.wte.weight", "token", "0.resid_in", model.transformer.wte.weight.T),
        ("transformer.wpe.weight", "position", first, model.transformer.wpe.weight.T),
        ("lm_head.weight", "final_resid", "logits", model.lm_head.weight),
        *([("bigram_table", "token", "logits", model.bigram_table.T)] if config.enable_bigram_table else []),
    ):
        ours = rebuilt(table, param, src, dst, matrix.shape)
        np.testing.assert_array_equal(ours, matrix.detach().numpy())
    layers = {param: set(table.layer[table.param == param]) for param in table.params}
    assert layers[f"{at}.mlp.c_fc.weight"] == {1} and layers["lm_head.weight"] == {-1}


def test_pandas_and_dict_agree():
    table = pruned("sink").edges()
    frame, columns = table.to_pandas(), table.to_dict()
    assert list(frame.columns) == list(columns) == ["src", "dst", "weight", "layer", "param"]
    for name, column in columns.items():
        assert (frame[name].to_numpy() == column).all()
