"""Adapters: what add, merge, save and load do to a model, and what they say when something is wrong."""

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sigma_book import generate
from sigma_book.assemble import POCKET, load
from sigma_book.cli import main
from sigma_book.lora import (
    LoraConfig,
    LoraLinear,
    add_lora,
    find_linears,
    load_adapter,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from sigma_book.weights import save_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny_folder):
    return load(tiny_folder, device="cpu", dtype="float32")


def strengthen(model, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted(model):
    add_lora(model, LoraConfig(rank=4, alpha=8))
    strengthen(model)
    return model


@pytest.fixture
def adapter(adapted, tiny_folder, tmp_path):
    save_adapter(adapted, tmp_path / "adapter", base=tiny_folder)
    return tmp_path / "adapter"


def scores(model, pictures) -> torch.Tensor:
    batch = model.processor.prepare(pictures[:2], ["caption en", "what is it?"])
    with torch.no_grad():
        return model(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids)


def edit(folder, **changes) -> None:
    values = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(values | changes))


def rewrite(folder, change) -> None:
    tensors = change({name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()})
    (folder / WEIGHTS).unlink()
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_update_is_b_times_a_times_the_scale(rslora):
    """The naive product, written out, with a bias in the base."""
    torch.manual_seed(0)
    base = nn.Linear(7, 5)
    lora = LoraLinear(base, LoraConfig(rank=3, alpha=12, use_rslora=rslora))
    nn.init.normal_(lora.lora_B)
    inputs = torch.randn(2, 4, 7)
    whole = base.weight + (12 / (3**0.5 if rslora else 3)) * lora.lora_B @ lora.lora_A
    torch.testing.assert_close(lora(inputs), inputs @ whole.T + base.bias, rtol=1e-5, atol=1e-5)


def test_a_starts_as_peft_starts_it():
    """Kaiming with sqrt(5) is uniform up to 1 / sqrt(in_features)."""
    lora = LoraLinear(nn.Linear(400, 8), LoraConfig(rank=50))
    assert lora.lora_B.count_nonzero() == 0
    assert 0.99 / 20 < lora.lora_A.abs().max() <= 1 / 20
    assert lora.lora_A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.03)


def test_dropout_is_for_training_only():
    torch.manual_seed(0)
    lora = LoraLinear(nn.Linear(64, 8), LoraConfig(rank=2, dropout=0.5))
    nn.init.normal_(lora.lora_B)
    inputs = torch.randn(3, 64)
    assert not torch.equal(lora.train()(inputs), lora(inputs))
    assert torch.equal(lora.eval()(inputs), lora(inputs))
    base_only = lora.train().base(inputs)
    mean = lora(inputs.repeat(4000, 1)).view(4000, 3, 8).mean(0)
    torch.testing.assert_close(mean - base_only, lora.eval()(inputs) - base_only, rtol=0.2, atol=0.2)


def test_only_the_updates_learn(adapted, pictures):
    learning = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(learning) == 2 * 7 * 2 and all(
        ".lora_" in name and name.startswith("language_model") for name in learning
    )
    adapted.train()
    batch = adapted.processor.prepare(pictures[:2], ["caption en"] * 2, ["a star", "rings"])
    adapted.loss(
        batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids, batch.labels
    ).backward()
    for name, parameter in adapted.named_parameters():
        assert (parameter.grad is not None) == (name in learning)


def test_answers_with_a_cache_use_the_update(adapted, pictures, tiny_folder):
    """All at once and one token at a time give the same words, and other words than the base."""
    ask = {"max_new_tokens": 12, "return_logprobs": True}
    said = generate(pictures[0], "caption en", model=adapted, **ask)
    assert said.tokens != generate(pictures[0], "caption en", model=load(tiny_folder, device="cpu"), **ask).tokens
    batch = adapted.processor.prepare(pictures[:1], ["caption en"])
    ids = torch.cat([batch.input_ids, torch.tensor([said.tokens])], dim=1)
    types = torch.cat([batch.token_type_ids, torch.ones(1, len(said.tokens), dtype=torch.long)], dim=1)
    with torch.no_grad():
        at_once = adapted(ids, batch.pixel_values, torch.ones_like(ids), types)[0, -len(said.tokens) - 1 : -1]
    assert at_once.argmax(-1).tolist() == list(said.tokens)
    merge_lora(adapted)
    assert generate(pictures[0], "caption en", model=adapted, max_new_tokens=12) == said.text


def test_merge_saves_a_plain_model_and_unmerge_gives_back_the_bits(adapted, pictures, tmp_path):
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    expected = scores(adapted, pictures)
    merge_lora(adapted)
    torch.testing.assert_close(scores(adapted, pictures), expected, rtol=1e-4, atol=1e-4)
    save_model(adapted, tmp_path / "merged")
    adapted.processor.save(tmp_path / "merged")
    assert torch.equal(scores(load(tmp_path / "merged", device="cpu"), pictures), scores(adapted, pictures))
    unmerge_lora(adapted)
    after = adapted.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(scores(adapted, pictures), expected)


def test_sixteen_bit_bases_are_rounded_once(tiny_folder):
    model = load(tiny_folder, device="cpu", dtype="bfloat16")
    add_lora(model, LoraConfig(rank=3))
    strengthen(model)
    lora = model.language_model.layers[0].mlp.up_proj
    base = lora.base.weight.clone()
    exact = base.double() + lora.scale * lora.lora_B.double() @ lora.lora_A.double()
    merge_lora(model)
    merged = model.language_model.layers[0].mlp.up_proj.weight
    assert merged.dtype == torch.bfloat16
    assert ((merged.double() - exact).abs() <= exact.abs() * 2.0**-8).all()  # half a step of bfloat16
    unmerge_lora(model)
    assert torch.equal(model.language_model.layers[0].mlp.up_proj.base.weight, base)


def test_a_folder_comes_back_as_it_was(adapted, adapter, tiny_folder, pictures):
    for again in (load(tiny_folder, adapter=adapter, device="cpu"), load(adapter, device="cpu")):
        assert torch.equal(scores(again, pictures), scores(adapted, pictures))
        assert again.lora_config == adapted.lora_config and not again.training
    assert sorted(path.name for path in adapter.iterdir()) == [CONFIG, WEIGHTS]
    assert (adapter / WEIGHTS).stat().st_size < (tiny_folder / "model.safetensors").stat().st_size / 10


def test_an_adapter_s_folder_may_hold_a_config_of_its_base(adapted, adapter, tiny_folder, pictures):
    """As some training tools write it. Only where a whole model lies beside it, the model is meant."""
    shutil.copy(tiny_folder / "config.json", adapter)
    assert torch.equal(scores(load(adapter, device="cpu"), pictures), scores(adapted, pictures))
    for path in tiny_folder.iterdir():
        shutil.copy(path, adapter)
    assert not hasattr(load(adapter, device="cpu"), "lora_config")


def test_the_pocket_s_adapter_needs_no_path(tmp_path, picture_file, capsys, monkeypatch):
    model = load(device="cpu")
    add_lora(model, LoraConfig(rank=2, alpha=64))
    strengthen(model)
    save_adapter(model, tmp_path / "adapter")
    expected = generate(picture_file, "caption en", model=model, max_new_tokens=8)
    assert expected != generate(picture_file, "caption en", max_new_tokens=8)
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["--adapter", "adapter"],
        ["--model", "adapter"],
        ["--model", str(POCKET), "--adapter", "adapter"],
    ):
        assert main(["generate", str(picture_file), "caption en", "--max-new-tokens", "8", *arguments]) == 0
        assert capsys.readouterr().out == f"{expected}\n"
    assert generate(picture_file, "caption en", model=tmp_path / "adapter", max_new_tokens=8) == expected


def test_saving_again_replaces_and_a_failure_leaves_what_was_there(
    adapted, adapter, pictures, tiny_folder, monkeypatch
):
    old = (adapter / WEIGHTS).read_bytes()
    strengthen(adapted, seed=9)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, hard))  # as if the disk were full in mid file
    try:
        with pytest.raises(RuntimeError, match="cannot be written .*: check the room and the permissions"):
            save_adapter(adapted, adapter, base=tiny_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (adapter / WEIGHTS).read_bytes() == old
    assert [path.name for path in adapter.parent.iterdir() if path.name != "adapter"] == []
    save_adapter(adapted, adapter, base=tiny_folder)
    assert torch.equal(scores(load(adapter, device="cpu"), pictures), scores(adapted, pictures))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, "rank is 0: expected a whole number, 1 or more"),
        ({"rank": -3}, "rank is -3"),
        ({"rank": True}, "rank is True"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": "16"}, "alpha is '16'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"targets": ()}, r"targets is \(\)"),
        ({"targets": None}, "targets is None"),
        ({"targets": ("q_proj", 3)}, "targets is"),
        ({"use_rslora": 1}, "use_rslora is 1"),
    ],
)
def test_settings_out_of_range(values, words):
    with pytest.raises(ValueError, match=words):
        LoraConfig(**values)


@pytest.mark.parametrize(
    "targets", [("qproj",), ("q_proj", "lm_head"), ("embed_tokens",), "q_proj", ("norm",), r".*\.nothing"]
)
def test_a_target_that_matches_nothing(model, targets):
    wrong = targets if isinstance(targets, str) else targets[-1]
    with pytest.raises(ValueError) as error:
        add_lora(model, LoraConfig(targets=targets))
    text = str(error.value)
    assert repr(wrong) in text and "down_proj, fc1, fc2, gate_proj, k_proj, linear" in text
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_a_broken_expression(model):
    with pytest.raises(ValueError, match=r"'\*.q_proj\(' is not a regular expression"):
        add_lora(model, LoraConfig(targets="*.q_proj("))


def test_a_second_adapter_and_steps_out_of_order(model, adapter):
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_lora(model.language_model.norm)
    adapted = load(adapter, device="cpu")
    with pytest.raises(ValueError, match="has an adapter already"):
        add_lora(adapted, LoraConfig())
    with pytest.raises(ValueError, match="has an adapter already"):
        load_adapter(adapted, adapter)
    with pytest.raises(ValueError, match="nothing to undo"):
        unmerge_lora(adapted)
    merge_lora(adapted)
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_lora(adapted)
    with pytest.raises(ValueError, match="it is merged, call unmerge_lora first"):
        save_adapter(adapted, adapter.parent / "other")
    assert not (adapter.parent / "other").exists()


def test_a_model_with_an_adapter_is_not_saved_as_a_plain_one(adapted, tmp_path):
    with pytest.raises(ValueError, match="not a plain PaliGemma.*merge its adapter"):
        save_model(adapted, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def damage_truncate(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-7])


def first_name(tensors: dict, part: str) -> str:
    return next(name for name in tensors if f"lora_{part}" in name)


DAMAGES = {
    "cut": (damage_truncate, ValueError, "should be .* bytes long"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), FileNotFoundError, f"no {WEIGHTS} in"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), FileNotFoundError, f"no {CONFIG} in"),
    "no json": (lambda folder: (folder / CONFIG).write_text("{"), ValueError, "is not JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), ValueError, "expected a table"),
    "another kind": (lambda folder: edit(folder, peft_type="IA3"), ValueError, "peft_type is 'IA3': expected 'LORA'"),
    "dora": (lambda folder: edit(folder, use_dora=True), ValueError, "use_dora is True"),
    "more modules": (lambda folder: edit(folder, modules_to_save=["lm_head"]), ValueError, "modules_to_save is"),
    "biases": (lambda folder: edit(folder, bias="all"), ValueError, "bias is 'all'"),
    "pissa": (lambda folder: edit(folder, init_lora_weights="pissa"), ValueError, "init_lora_weights is 'pissa'"),
    "rank 0": (lambda folder: edit(folder, r=0), ValueError, "rank is 0"),
    "other rank": (lambda folder: edit(folder, r=5), ValueError, "has the shape"),
    "no targets": (lambda folder: edit(folder, target_modules=None), ValueError, "targets is None"),
    "base": (
        lambda folder: edit(folder, base_model_name_or_path=3),
        ValueError,
        "base_model_name_or_path is not a name",
    ),
    "b missing": (
        lambda folder: rewrite(folder, lambda t: {n: v for n, v in t.items() if n != first_name(t, "B")}),
        ValueError,
        "holds only lora_A of language_model",
    ),
    "module missing": (
        lambda folder: rewrite(folder, lambda t: {n: v for n, v in t.items() if "layers.1.mlp.up_proj" not in n}),
        ValueError,
        "lacks the update of language_model.layers.1.mlp.up_proj",
    ),
    "empty": (lambda folder: rewrite(folder, lambda t: {}), ValueError, "holds no update"),
    "unknown key": (
        lambda folder: rewrite(folder, lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}),
        ValueError,
        "lm_head.lora_A.weight, for which this model has no linear map",
    ),
    "integers": (
        lambda folder: rewrite(folder, lambda t: t | {first_name(t, "A"): t[first_name(t, "A")].int()}),
        ValueError,
        "is I32: expected",
    ),
}


@pytest.mark.parametrize("start", ["gaussian", "orthogonal", "eva", "mica"])
def test_where_plain_lora_began_does_not_matter(adapted, adapter, tiny_folder, pictures, start):
    """With these starts PEFT leaves the base as it is: the file alone says what the adapter adds."""
    edit(adapter, init_lora_weights=start)
    fresh = load(tiny_folder, device="cpu", dtype="float32")
    load_adapter(fresh, adapter)
    assert torch.equal(scores(fresh, pictures), scores(adapted, pictures))


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused_and_leave_the_model_alone(name, adapter, model, pictures):
    damage, kind, words = DAMAGES[name]
    fresh = load(json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"], device="cpu")
    before = scores(fresh, pictures)
    damage(adapter)
    with pytest.raises(kind, match=words) as error:
        load_adapter(fresh, adapter)
    assert "\n" not in str(error.value) and str(adapter) in str(error.value)
    assert torch.equal(scores(fresh, pictures), before)
    assert not any(isinstance(module, LoraLinear) for module in fresh.modules())


NEEDS_PEFT = {"use_dora": True, "lora_bias": True, "fan_in_fan_out": True, "modules_to_save": ["lm_head"]}
NEEDS_PEFT |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2}, "layer_replication": [[0, 2]]}
NEEDS_PEFT |= {"trainable_token_indices": [5], "target_parameters": ["weight"], "alora_invocation_tokens": [5]}
NEEDS_PEFT |= {"use_qalora": True, "use_bdlora": {"a": 1}, "arrow_config": {"a": 1}}
NEEDS_PEFT |= dict.fromkeys(("kasa_config", "velora_config", "monteclora_config"), {"a": 1})


def test_what_only_peft_can_do_is_refused(adapter, tiny_folder):
    fresh = load(tiny_folder, device="cpu")
    for key, value in NEEDS_PEFT.items():
        edit(adapter, **{key: value})
        with pytest.raises(ValueError, match=f"{key} is .* this adapter needs peft"):
            load_adapter(fresh, adapter)
        edit(adapter, **{key: None})
    load_adapter(fresh, adapter)


def test_an_adapter_of_layer_zero_alone(adapter, tiny_folder):
    """PEFT takes the number of one layer as well as a list of them."""
    edit(adapter, layers_to_transform=0)
    rewrite(adapter, lambda tensors: {name: value for name, value in tensors.items() if "layers.0." in name})
    model = load(tiny_folder, device="cpu", adapter=adapter)
    assert {".layers.0." in name for name, one in model.named_modules() if isinstance(one, LoraLinear)} == {True}


def test_an_adapter_for_another_model(adapter, make_tiny, tmp_path):
    narrower = load(make_tiny(tmp_path / "narrower", intermediate_size=40), device="cpu")
    with pytest.raises(
        ValueError, match=r"has the shape \[48, 4\], this model and r ask for \[40, 4\]: is the adapter for"
    ):
        load_adapter(narrower, adapter)
    shallower = load(make_tiny(tmp_path / "shallower", num_hidden_layers=1), device="cpu")
    with pytest.raises(ValueError, match="layers.1.*for which this model has no linear map: is the adapter for"):
        load_adapter(shallower, adapter)


def test_what_the_command_says(adapter, picture_file, tmp_path, capsys, tiny_folder):
    def said(*arguments: str) -> str:
        assert main(["generate", str(picture_file), "caption en", *arguments]) == 2
        out, err = capsys.readouterr()
        sentence = err[err.index("sigma-book: ") :]  # behind a progress bar, where loading is slow
        assert out == "" and sentence.count("\n") == 1
        return sentence

    assert "has the shape" in said("--adapter", str(adapter))  # the pocket is another model
    assert "expected the folder of an adapter" in said("--adapter", str(tiny_folder))
    assert "no such folder" in said("--adapter", str(tmp_path / "nowhere"))
    assert "is an adapter itself" in said("--model", str(adapter), "--adapter", str(adapter))
    assert "quantize is 'int3': expected 'nf4', 'int8' or 'int4'" in said("--quantize", "int3")
    edit(adapter, base_model_name_or_path="/gone/base")
    assert "was made for /gone/base" in said("--model", str(adapter))
    edit(adapter, base_model_name_or_path=None)
    assert "names no base model" in said("--model", str(adapter))
    edit(adapter, base_model_name_or_path=str(tiny_folder), revision="float16")  # a folder has no other revisions
    assert main(["generate", str(picture_file), "caption en", "--model", str(adapter), "--max-new-tokens", "1"]) == 0
    capsys.readouterr()
    edit(adapter, base_model_name_or_path="open/model")
    assert "was made for revision 'float16' of open/model: download that" in said("--model", str(adapter))
    assert "an adapter is a path or a hub id, got int" in str(pytest.raises(ValueError, load, adapter=3).value)


def test_names_are_found_by_their_ends(model):
    assert all(name.startswith("language_model") for name in find_linears(model, LoraConfig().targets))
    assert len(find_linears(model, LoraConfig().targets)) == 14
    assert len(find_linears(model, ("q_proj",))) == 3  # the tower's as well
    assert list(find_linears(model, ("layers.1.mlp.up_proj",))) == ["language_model.layers.1.mlp.up_proj"]
