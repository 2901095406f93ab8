"""The positions argument of scalpel.jacobian, and which ends have a path between them."""

import pytest
import torch

from circuitgpt_cases import build, one_thread, tokens  # noqa: F401
from scalpel import jacobian
from scalpel.hooks.names import hook_names
from scalpel.reference.jacobian import jacobian_dense

EXACT = 1e-9


@pytest.mark.parametrize(
    "given,chosen",
    [
        (None, range(7)),
        (3, [3]),
        (-1, [6]),
        (torch.tensor(2), [2]),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, -2), [6, 4, 2, 0]),
        ([5, 0, -3], [5, 0, 4]),
        (range(1, 3), [1, 2]),
        (torch.tensor([1, 4]), [1, 4]),
    ],
)
def test_positions_are_columns_and_rows_of_the_whole(given, chosen) -> None:
    model = build("sink")
    ids = tokens(model)
    whole = jacobian(model, ids, "0.resid_in", "1.mlp.act_in")
    W = whole.to_dense().reshape(*whole.target_shape, *whole.source_shape)
    chosen = list(chosen)
    both = jacobian(model, ids, "0.resid_in", "1.mlp.act_in", given)
    assert both.source_shape == (2, len(chosen), 12)
    expected = W[:, chosen][:, :, :, :, chosen]
    torch.testing.assert_close(both.to_dense(), expected.reshape(both.shape), rtol=EXACT, atol=1e-12)
    pair = jacobian(model, ids, "0.resid_in", "1.mlp.act_in", ([0, 1], given))
    if max(chosen) > 1:
        torch.testing.assert_close(
            pair.to_dense(), W[:, chosen][:, :, :, :, [0, 1]].reshape(pair.shape), rtol=EXACT, atol=1e-12
        )


@pytest.mark.parametrize(
    "positions,error,words",
    [
        (7, ValueError, "source position 7 is outside the text of 7 tokens; allowed: -7 to 6"),
        ((0, -8), ValueError, "target position -8"),
        ([], ValueError, "no token"),
        (slice(5, 2), ValueError, "no token"),
        ([1, 1], ValueError, "twice"),
        ([1, -6], ValueError, "twice"),
        ((1, 2, 3), ValueError, "pair"),
        (1.0, TypeError, "positions are 1.0"),
        ("1", TypeError, "positions are '1'"),
        ([True], TypeError, "hold True"),
        (True, TypeError, "positions are True"),
    ],
)
def test_bad_positions(positions, error, words: str) -> None:
    model = build("plain")
    with pytest.raises(error, match=words):
        jacobian(model, tokens(model), positions=positions)


@pytest.mark.parametrize(
    "source,target,positions",
    [
        ("final_resid", "0.resid_in", None),
        ("1.resid_in", "0.mlp.post_act", None),
        ("0.attn.k", "0.attn.q", None),
        ("0.attn.q", "0.attn.v", None),
        ("0.resid_in", "logits", (3, 2)),
        ("0.resid_in", "logits", ([5, 6], slice(0, 5))),
        ("0.attn.q", "0.attn.y", (1, 2)),  # a query affects only its own token
        ("1.resid_mid", "logits", (1, 2)),  # after the last attention, tokens are independent
        ("0.mlp.post_act", "0.mlp.post_act", (1, 2)),
    ],
)
def test_no_path(source: str, target: str, positions) -> None:
    model = build("topk_everywhere")
    with pytest.raises(ValueError, match="no path"):
        jacobian(model, tokens(model), source, target, positions)
    if source in hook_names(2)[: hook_names(2).index(target) if target != "logits" else None]:
        assert not jacobian_dense(model, tokens(model), source, target, positions).any()


def test_the_wiring_is_the_one_that_the_gradients_show() -> None:
    """Pairs of hooks and tokens raise an error exactly where the dense twin is zero (no entry is zero by chance)."""
    model = build("plain")
    ids = tokens(model, 1, 3)
    names = hook_names(2)[:12]
    for i, source in enumerate(names):
        for target in names[i:]:
            D = jacobian_dense(model, ids, source, target).reshape(
                3, -1, 3, jacobian(model, ids, source, source, 0).shape[1]
            )
            for s in range(3):
                for t in range(3):
                    linked = bool(D[t, :, s].any())
                    try:
                        jacobian(model, ids, source, target, (s, t))
                    except ValueError:
                        assert not linked or (s == 0 == t and "attn" in source), (source, target, s, t)
                    else:
                        # Token 0 has a single key, so its softmax is constant: the path exists, and its derivative is
                        # zero.
                        assert linked or (t == 0 and ".attn." in source), (source, target, s, t)
