"""The wiring between hooks, forwards and backwards."""

import pytest
import torch

from scalpel.hooks.names import hook_names, with_patterns
from scalpel.hooks.wiring import hook_of_mask, parents_of, tokens_moved, tokens_read

LENGTH = 4


@pytest.mark.parametrize("parallel", [False, True])
def test_what_a_target_reads_is_what_can_move_it(parallel: bool) -> None:
    hooks = [*with_patterns(hook_names(2, parallel)), "logits"]
    allowed = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    allowed[3, 0] = False
    for target in hooks:
        for end in range(LENGTH):
            read = tokens_read(hooks, target, (end,), allowed)
            for source in hooks[: hooks.index(target) + 1]:
                moves = [bool(tokens_moved(hooks, source, target, (t,), allowed)[0, end]) for t in range(LENGTH)]
                assert read[source][0].tolist() == moves if source in read else not any(moves)


def test_each_text_of_a_batch_has_its_own_mask() -> None:
    hooks = hook_names(1)
    allowed = torch.stack([torch.ones(LENGTH, LENGTH).tril(), torch.eye(LENGTH)]).bool()
    moved = tokens_moved(hooks, "0.attn.v", "final_resid", (0,), allowed)
    assert moved.tolist() == [[True] * LENGTH, [True] + [False] * (LENGTH - 1)]
    read = tokens_read(hooks, "final_resid", (LENGTH - 1,), allowed)["0.attn.v"]
    assert read.tolist() == [[True] * LENGTH, [False] * (LENGTH - 1) + [True]]


def test_attention_weights_read_a_query_and_the_keys_before_it() -> None:
    hooks = with_patterns(hook_names(1))
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    read = {name: tokens[0].tolist() for name, tokens in tokens_read(hooks, "0.attn.pattern", (2,), causal).items()}
    query, keys = [False, False, True, False], [True, True, True, False]
    assert read == {
        "0.attn.pattern": query,
        "0.attn.q": query,
        "0.attn.k": keys,
        "0.attn.act_in": keys,
        "0.resid_in": keys,
    }
    assert not tokens_moved(hooks, "0.attn.v", "0.attn.pattern", None, causal).any()


def test_every_hook_reads_earlier_ones_alone() -> None:
    for parallel in (False, True):
        hooks = [*with_patterns(hook_names(3, parallel)), "logits"]
        assert parents_of(hooks[0], hooks) == []
        for i, name in enumerate(hooks[1:], 1):
            parents = [parent for parent, _ in parents_of(name, hooks)]
            assert parents and all(hooks.index(parent) < i for parent in parents), name


def test_a_mask_on_the_residual_stream_makes_the_next_hook() -> None:
    hooks = hook_names(2)
    assert hook_of_mask("0.attn.q", hooks) == "0.attn.q"
    assert hook_of_mask("0.resid_post_attn", hooks) == "0.resid_mid"
    assert hook_of_mask("0.resid_post_mlp", hooks) == "1.resid_in"
    assert hook_of_mask("1.resid_post_mlp", hooks) == "final_resid"
