"""Names of hooks: their order, other names of the same values, and the error for an unknown name."""

import pytest

from scalpel.hooks.names import (
    check_no_pattern,
    hook_named,
    hook_names,
    is_pattern,
    known_hook,
    module_path,
    with_patterns,
)

PATHS = {
    "resid_in": "h.{i}:in",
    "attn.q": "h.{i}.q",
    "resid_mid": "h.{i}.ln_2:in",
    "mlp.post_act": "h.{i}.down:in",
    "after": "h.{i}",
    "final_resid": "ln_f:in",
}


def test_a_layer_has_eleven_hooks_and_ten_where_attention_and_mlp_are_parallel() -> None:
    plain, parallel = hook_names(3), hook_names(3, parallel=True)
    assert len(plain) == 34 and plain[0] == "0.resid_in" and plain[-1] == parallel[-1] == "final_resid"
    assert [name for name in plain if not name.endswith(".resid_mid")] == parallel
    assert hook_names(0) == ["final_resid"]


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("1.attn.q", "1.attn.q"),
        ("blocks.1.attn.hook_q", "1.attn.q"),
        ("h.1.q", "1.attn.q"),
        ("blocks.0.hook_resid_pre", "0.resid_in"),
        ("blocks.0.hook_resid_post", "1.resid_in"),
        ("blocks.1.hook_resid_post", "final_resid"),
        ("h.0", "1.resid_in"),
        ("h.1", "final_resid"),
        ("ln_f:in", "final_resid"),
        ("h.2.q", None),
        ("logits", None),
    ],
)
def test_each_name_of_a_value_means_the_same_hook(name: str, hook: str | None) -> None:
    for as_source in (True, False):
        assert hook_named(name, PATHS, hook_names(2), as_source) == hook


def test_the_second_norms_input_is_resid_mid_as_a_target_alone() -> None:
    hooks = hook_names(2)
    assert hook_named("h.0.ln_2:in", PATHS, hooks, as_source=False) == "0.resid_mid"
    assert hook_named("h.0.ln_2:in", PATHS, hooks, as_source=True) is None
    assert module_path("0.resid_mid", PATHS, hooks) == "h.0.ln_2:in"
    assert module_path("0.resid_mid", PATHS, hooks, as_source=True) == "0.resid_mid"
    assert hook_named("blocks.0.hook_resid_mid", PATHS, hook_names(2, parallel=True), as_source=False) is None


def test_a_path_is_found_by_any_name_and_a_hook_without_one_keeps_its_own() -> None:
    hooks = hook_names(2)
    for name in ("1.resid_in", "blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", "h.0"):
        assert module_path(name, PATHS, hooks) == "h.1:in"
    for name in ("final_resid", "blocks.1.hook_resid_post", "h.1"):
        assert module_path(name, PATHS, hooks) == "ln_f:in"
    assert module_path("0.attn.k", PATHS, hooks) == "0.attn.k"  # no module computes this value
    assert module_path("h.0.other", PATHS, hooks) == "h.0.other"


def test_an_unknown_name_is_told_what_is_near() -> None:
    known_hook("0.attn.q", hook_names(2), "source", "a model")
    with pytest.raises(ValueError, match=r"unknown source '0\.atn\.q' for a model.*'0\.attn\.q'"):
        known_hook("0.atn.q", hook_names(2), "source", "a model")
    with pytest.raises(ValueError, match=r"'0\.resid_in'"):  # no name is similar, so the message lists the first ones
        known_hook("zzz", hook_names(2), "target", "a model")
    with pytest.raises(TypeError, match="hook is 3"):
        known_hook(3, hook_names(2), "hook", "a model")


@pytest.mark.parametrize("parallel", [False, True])
def test_attention_weights_follow_v_and_are_in_no_list_of_hooks(parallel: bool) -> None:
    hooks = hook_names(12, parallel)
    listed = with_patterns(hooks)
    assert [name for name in listed if not is_pattern(name)] == hooks
    patterns = [name for name in listed if is_pattern(name)]
    assert patterns == [f"{i}.attn.pattern" for i in range(12)]
    for name in patterns:
        before, after = listed[listed.index(name) - 1], listed[listed.index(name) + 1]
        assert (before, after) == (name.replace("pattern", "v"), name.replace("pattern", "y"))
        lens = f"blocks.{name.partition('.')[0]}.attn.hook_pattern"
        assert hook_named(lens, PATHS, listed, as_source=False) == name
        assert hook_named(lens, PATHS, hooks, as_source=False) is None
        with pytest.raises(ValueError, match=f"'{after}'.*'{before}'"):
            check_no_pattern(name)
    for name in hooks:
        check_no_pattern(name)
