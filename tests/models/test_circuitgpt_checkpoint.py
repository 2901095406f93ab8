"""Checkpoints: identical bits after saving and loading, the hub's format, and refusals that name the cause."""

import json
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from circuitgpt_cases import BASE, CASES, build, one_thread, tokens  # noqa: F401
from scalpel import CircuitGPT
from scalpel.models.circuitgpt.checkpoint import CheckpointError, save_pretrained
from scalpel.models.circuitgpt.config import CircuitGPTConfig
from scalpel.models.weight_files import write_weights


def write(folder, config, weights, config_name="beeg_config.json"):
    """A public folder whose contents have not been checked."""
    folder.mkdir(exist_ok=True)
    (folder / config_name).write_text(json.dumps(config))
    torch.save(weights, folder / "final_model.pt")
    return folder


@pytest.fixture
def public(tmp_path):
    """Write the public folder of a case, with changed config fields and weights."""

    def make(name="sink", drop=(), change=(), **config):
        model = build(name, torch.float32)
        weights = {key: value for key, value in model.state_dict().items() if key not in drop}
        weights |= dict(change)
        fields = {key: value for key, value in (BASE | CASES[name] | config).items() if value is not ...}
        return write(tmp_path / "model", fields, weights)

    return make


@pytest.mark.parametrize("name", CASES)
def test_what_was_saved_loads_with_equal_bits(name, tmp_path):
    dtype = (torch.float32, torch.float64)[len(name) % 2]
    model = build(name, dtype)
    model.save_pretrained(tmp_path / "saved")
    again = CircuitGPT.from_pretrained(tmp_path / "saved")
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == dtype for key in before)
    ids = tokens(model)
    assert torch.equal(model(ids), again(ids))
    assert again.config.to_public_dict() == model.config.to_public_dict()
    assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tied_unembed
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert not again.training and not again.card


def test_the_file_is_a_plain_state_dict_with_zeros_that_compress(tmp_path):
    wide = CircuitGPT(CircuitGPTConfig(**BASE | {"d_model": 120, "d_mlp": 400}))
    with torch.no_grad():
        for parameter in wide.parameters():
            if parameter.dim() == 2:
                parameter.mul_(torch.rand(parameter.shape) < 0.02)
    sizes = {}
    for compress in (True, False):
        save_pretrained(wide, tmp_path, compress=compress)
        sizes[compress] = (tmp_path / "final_model.pt").stat().st_size
        stored = torch.load(tmp_path / "final_model.pt", weights_only=True)
        assert all(torch.equal(stored[key], value) for key, value in wide.state_dict().items())
    assert sizes[True] < sizes[False] / 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beeg_config.json", "final_model.pt"]


def test_equal_weights_give_equal_bytes_and_keep_sharing(tmp_path):
    model = build("tied", torch.float32)
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        write_weights(dict(model.state_dict()), folder / "x.pt")
    assert (tmp_path / "a" / "x.pt").read_bytes() == (tmp_path / "b" / "x.pt").read_bytes()
    loaded = torch.load(tmp_path / "a" / "x.pt", weights_only=True)
    assert loaded["lm_head.weight"].data_ptr() == loaded["transformer.wte.weight"].data_ptr()


def test_a_view_is_saved_without_the_tensor_behind_it(tmp_path):
    write_weights({"x": torch.zeros(1000, 1000)[:2]}, tmp_path / "x", compress=False)
    assert (tmp_path / "x").stat().st_size < 20_000


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    model = build("plain", torch.float32)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = build("plain", torch.float32, seed=5)

    def full(*_, **__):
        raise OSError("full")

    monkeypatch.setattr("scalpel.models.circuitgpt.checkpoint.write_weights", full)
    with pytest.raises(OSError, match="full"):
        other.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_that_diverged_and_cards_that_are_no_json_are_not_saved(tmp_path):
    model = build("plain", torch.float32)
    model.card = {"seed": object()}
    with pytest.raises(CheckpointError, match="card"):
        model.save_pretrained(tmp_path / "out")
    model.card = {}
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="lm_head"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_travels_and_a_stale_one_goes(tmp_path):
    model = build("plain", torch.float32)
    model.card = {"recipe": "none", "seed": 3}
    model.save_pretrained(tmp_path)
    (tmp_path / "mine.txt").write_text("stays")
    assert CircuitGPT.from_pretrained(tmp_path).card == {"recipe": "none", "seed": 3}
    build("plain", torch.float32).save_pretrained(tmp_path)
    assert CircuitGPT.from_pretrained(tmp_path).card == {}
    assert (tmp_path / "mine.txt").read_text() == "stays"


# The hub's format.


def hub_folder(folder, model, how):
    folder.mkdir()
    extra = {"unembed_rank": None, "afrac_ste": False, "model_type": "circuitgpt", "architectures": ["X"]}
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | extra))
    (folder / "modeling.py").write_text("raise SystemExit('code from a checkpoint ran')")
    weights = {f"circuit_model.{key}": value.clone() for key, value in model.state_dict().items()}
    if how == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    elif how == "safetensors":
        if model.config.tied_unembed:
            del weights["circuit_model.lm_head.weight"]
        save_file(weights, folder / "model.safetensors")
    else:
        names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(weights)}
        for name in set(names.values()):
            save_file({key: weights[key] for key in weights if names[key] == name}, folder / name)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize("how", ["bin", "safetensors", "sharded"])
@pytest.mark.parametrize("name", ["tied", "like_csp_yolo2"])
def test_the_hubs_format_loads(name, how, tmp_path):
    model = build(name, torch.float32)
    again = CircuitGPT.from_pretrained(hub_folder(tmp_path / "hub", model, how))
    ids = tokens(model)
    assert torch.equal(model(ids), again(ids))
    again.save_pretrained(tmp_path / "public")  # saved in the public format, without the hub's fields
    fields = json.loads((tmp_path / "public" / "beeg_config.json").read_text())
    assert not fields.keys() & {"unembed_rank", "afrac_ste", "model_type", "architectures"}


def test_a_hub_id_fetches_data_only(tmp_path, monkeypatch):
    folder = hub_folder(tmp_path / "hub", build("tied", torch.float32), "bin")
    asked = {}

    def download(repo, **options):
        asked.update(options, repo=repo)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    CircuitGPT.from_pretrained("owner/some-model", revision="abc", local_files_only=True)
    assert asked["repo"] == "owner/some-model" and asked["revision"] == "abc" and asked["local_files_only"]
    assert not any("py" in pattern or pattern == "*" for pattern in asked["allow_patterns"])


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(CheckpointError, match="no route"):
        CircuitGPT.from_pretrained("owner/some-model")


def test_shards_are_checked(tmp_path):
    folder = hub_folder(tmp_path / "hub", build("plain", torch.float32), "sharded")
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    for change, says in (
        ({"circuit_model.lm_head.weight": "../secret.bin"}, "not in"),
        ({"circuit_model.lm_head.weight": "absent.safetensors"}, "absent.safetensors"),
        ({"circuit_model.more": "model-0.safetensors"}, "circuit_model.more"),
    ):
        index.write_text(json.dumps({"weight_map": names | change}))
        with pytest.raises(CheckpointError, match=says):
            CircuitGPT.from_pretrained(folder)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="object"):
        CircuitGPT.from_pretrained(folder)


# Harmless differences are ignored, with a warning.


def test_old_configs_and_harmless_keys_load_with_notes(public):
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(12, 12).tril().view(1, 1, 12, 12) for i in range(2)}
    folder = public(
        "plain",
        drop=["final_logits_bias"],
        change=masks,
        d_mlp=...,
        n_mlp=20,
        flash=False,
        use_tied_aux_matrix=False,
        some_new_switch=False,
    )
    model = CircuitGPT.from_pretrained(folder)
    notes = " ".join(model.card["notes"])
    assert model.config.d_mlp == 20 and torch.equal(model.final_logits_bias, torch.zeros(13))
    assert "some_new_switch" in notes and "final_logits_bias" in notes and "causal-mask" in notes
    model.save_pretrained(folder)
    assert CircuitGPT.from_pretrained(folder).card["notes"] == model.card["notes"]


def test_a_shared_sink_is_every_heads_sink(public):
    key = "transformer.h.0.attn.attn_imp.sink_logit"
    model = CircuitGPT.from_pretrained(public("sink", change={key: torch.tensor([0.7])}))
    assert torch.equal(model.state_dict()[key], torch.full((3,), 0.7))
    assert any("shared" in note for note in model.card["notes"])


def test_dtype_is_float32_unless_asked_or_stored_wider(public, tmp_path):
    folder = public("plain")
    assert CircuitGPT.from_pretrained(folder).dtype == torch.float32
    assert CircuitGPT.from_pretrained(folder, dtype=torch.float64).final_logits_bias.dtype == torch.float64
    half = build("plain", torch.float32).bfloat16()
    half.save_pretrained(tmp_path / "half")
    again = CircuitGPT.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.float32
    assert torch.equal(again.lm_head.weight, half.lm_head.weight.float())
    big = public("plain", change={"final_logits_bias": torch.full((13,), 1e6)})
    with pytest.raises(CheckpointError, match=r"final_logits_bias.*too large"):
        CircuitGPT.from_pretrained(big, dtype=torch.float16)
    with pytest.raises(ValueError, match="floating point"):
        CircuitGPT.from_pretrained(folder, dtype=torch.int32)
    with pytest.raises(TypeError, match="dtype is 'float32'"):
        CircuitGPT.from_pretrained(folder, dtype="float32")


# Configurations that cannot be honoured are refused.

WTE, QKV = "transformer.wte.weight", "transformer.h.1.attn.c_attn.weight"
SINK = "transformer.h.1.attn.attn_imp.sink_logit"
POISONED = torch.zeros(36, 12)
POISONED[3, 4] = torch.nan
REFUSED = {
    "missing": ({"drop": [QKV]}, QKV),
    "missing_sink": ({"drop": [SINK]}, "sink_logit"),
    "missing_table": ({"enable_bigram_table": True}, "bigram_table"),
    "missing_position_norm": (
        {"name": "positions_concatenated", "drop": ["transformer.h.0.ln_p1.weight"]},
        "ln_p1",
    ),
    "extra": ({"change": {"transformer.h.2.ln_1.weight": torch.ones(12)}}, r"transformer\.h\.2\.ln_1"),
    "extra_bias": ({"change": {"lm_head.bias": torch.ones(13)}}, r"lm_head\.bias.*no such bias"),
    "extra_table": ({"change": {"bigram_table": torch.ones(13, 13)}}, "enable_bigram_table"),
    "sink_without_config": ({"sink": ...}, "silently change"),
    "position_norms_without_config": ({"name": "positions_concatenated", "d_pos_emb": ...}, "d_pos_emb"),
    "not_a_causal_mask": ({"change": {"transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12)}}, "causal"),
    "mask_of_another_shape": ({"change": {"transformer.h.0.attn.bias": torch.ones(12, 12).tril()}}, "causal"),
    "shape": ({"change": {QKV: torch.ones(36, 13)}}, r"\(36, 13\).*\(36, 12\)"),
    "sink_shape": ({"change": {SINK: torch.ones(2)}}, r"sink_logit.*\(2,\).*\(3,\)"),
    "nan": ({"change": {QKV: POISONED}}, r"c_attn.*1 values.*\(3, 4\)"),
    "infinite": (
        {"change": {"final_logits_bias": torch.full((13,), torch.inf)}},
        "final_logits_bias.*13 values",
    ),
    "integers": ({"change": {QKV: torch.ones(36, 12, dtype=torch.int64)}}, "int64"),
    "sparse": ({"change": {QKV: torch.ones(36, 12).to_sparse()}}, "explicit zeros|zeros included"),
    "not_a_tensor": ({"change": {"step": 3}}, "'step'"),
    "nested": ({"change": {"optimizer": {"x": torch.ones(2)}}}, "'optimizer'"),
    "tied_but_different": ({"tied_unembed": True}, "tied_unembed"),
    "some_prefixed": ({"change": {"circuit_model.lm_head.weight": torch.ones(13, 12)}}, "circuit_model"),
    "unknown_field": ({"rotary": True}, "rotary"),
    "field_of_unpublished_code": ({"mup": True}, "mup"),
    "rank": ({"unembed_rank": 16}, "unembed_rank"),
    "location": ({"afrac": 0.5, "afrac_loctypes": "attn_in,attn_z"}, "attn_z"),
    "locations_as_a_list": ({"afrac": 0.5, "afrac_loctypes": ["attn_in"]}, "afrac_loctypes.*a text"),
    "locations_null": ({"afrac": 0.5, "afrac_loctypes": None}, "afrac_loctypes.*a text"),
    "fraction": ({"afrac": 1.5}, "afrac"),
    "fraction_text": ({"afrac": "0.5"}, "afrac"),
    "activation": ({"activation_type": "silu"}, "silu"),
    "switch_as_text": ({"sink": "false"}, "sink"),
    "width_text": ({"d_head": "4"}, "d_head"),
    "width_zero": ({"d_pos_emb": 0}, "d_pos_emb"),
    "two_widths": ({"n_mlp": 24}, "d_mlp"),
    "sinusoids_nowhere": ({"sinusoidal_cat_pos_emb": True}, "d_pos_emb"),
    "heads": ({"n_head": 5}, "n_head"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_cannot_be_honoured_is_refused(name, public):
    change, says = REFUSED[name]
    with pytest.raises(CheckpointError, match=says):
        CircuitGPT.from_pretrained(public(**change))


class _Malice:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("wrap", ["alone", "among_weights", "old_format", "bare_pickle", "hub"])
def test_a_pickle_that_would_run_code_is_refused_unread(wrap, tmp_path, monkeypatch):
    # The environment variable that makes torch trust files must have no effect.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    trap = tmp_path / "created-by-the-checkpoint"
    weights = dict(build("plain", torch.float32).state_dict()) | {"evil": _Malice(trap)}
    folder = write(tmp_path / "model", BASE, {}, "config.json" if wrap == "hub" else "beeg_config.json")
    path = folder / "final_model.pt"
    if wrap == "bare_pickle":
        path.write_bytes(pickle.dumps(weights, protocol=2))
    elif wrap == "hub":
        path.unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        value = _Malice(trap) if wrap == "alone" else weights
        torch.save(value, path, _use_new_zipfile_serialization=wrap != "old_format")
    with pytest.raises(CheckpointError, match="not executed"):
        CircuitGPT.from_pretrained(folder)
    assert not trap.exists()
    if wrap == "alone":  # confirms that the trap works
        torch.load(path, weights_only=False).close()
        assert trap.exists()


def test_damaged_files_are_refused(public, tmp_path):
    folder = public("plain")
    path = folder / "final_model.pt"
    whole = path.read_bytes()
    for damage in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"final_model\.pt"):
            CircuitGPT.from_pretrained(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        CircuitGPT.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(whole)
    with pytest.raises(CheckpointError, match="safetensors"):
        CircuitGPT.from_pretrained(folder)
    (folder / "beeg_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        CircuitGPT.from_pretrained(folder)
    (folder / "beeg_config.json").unlink()
    with pytest.raises(CheckpointError, match="beeg_config"):
        CircuitGPT.from_pretrained(folder)


def test_a_record_changed_in_the_archive_is_noticed(tmp_path):
    build("plain", torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "final_model.pt"
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.compress_size)
    raw[entry.header_offset + 100 + entry.compress_size // 2] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged"):
        CircuitGPT.from_pretrained(tmp_path)


def test_a_source_that_is_nothing_says_what_there_is(tmp_path):
    (tmp_path / "file.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file"):
        CircuitGPT.from_pretrained(tmp_path / "file.pt")
    for source in ("no-such-model", tmp_path / "absent", "/absent/folder"):
        with pytest.raises(CheckpointError, match="shipped model"):
            CircuitGPT.from_pretrained(source)


def test_loading_draws_nothing_at_random(public):
    folder = public("like_csp_yolo2")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    CircuitGPT.from_pretrained(folder)
    assert torch.equal(torch.rand(3), expected)
