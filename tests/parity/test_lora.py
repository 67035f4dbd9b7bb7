"""Adapters against `peft` over the `transformers` model: files in both directions, names, twenty steps.

Logits in float32 agree to 1e-5 of the largest (both sum in other orders; a wrong scale or a swapped module gives 1e-2).
Twenty steps of AdamW are compared in float64, to 1e-8. Both models compute norms, rotations and some softmaxes in float32
whatever their dtype is; there they are made to compute these in float64 too, so that rounding in the seventh digit, which
AdamW enlarges, neither hides nor excuses anything.
"""

import json
import re

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from sigma_book.lora import (
    DECODER_LINEARS,
    LoraConfig,
    LoraLinear,
    add_lora,
    find_linears,
    load_adapter,
    merge_lora,
    save_adapter,
    unmerge_lora,
)

TOLERANCE = 1e-5
CASES = [
    pytest.param(LoraConfig(rank=3, alpha=5), id="decoder"),
    pytest.param(LoraConfig(rank=4, alpha=7.5, use_rslora=True), id="rslora"),
    pytest.param(LoraConfig(rank=1, targets=("q_proj", "v_proj")), id="tower-too"),
    pytest.param(LoraConfig(rank=5, targets=r".*vision_tower.*\.(fc1|out_proj)"), id="tower-only"),
    pytest.param(LoraConfig(rank=2, targets=("multi_modal_projector.linear", "layers.1.mlp.up_proj")), id="ends"),
    pytest.param(LoraConfig(rank=64, dropout=0.3, targets=("down_proj",)), id="wider-than-the-model"),
]


def configuration(kind: str = "gemma") -> dict:
    text = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}
    text |= {"model_type": kind, "num_key_value_heads": 2, "head_dim": 10, "vocab_size": 150}
    text |= {"sliding_window": 5, "query_pre_attn_scalar": 12} if kind == "gemma2" else {}
    vision = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 12, "patch_size": 4, "vision_use_head": False}
    sizes = {"model_type": "paligemma", "image_token_index": 149, "hidden_size": 36, "projection_dim": 36}
    return sizes | {"text_config": text, "vision_config": vision}


@pytest.fixture(params=["gemma", "gemma2"])
def twins(request, make_twins):
    both = make_twins(configuration(request.param))
    both.redraw(seed=5)
    return both


def examples(twins, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two pictures, seven words behind each, the last two of which are the answer."""
    generator = torch.Generator().manual_seed(seed)
    patches = twins.ours.config.num_image_tokens
    words = torch.randint(4, 149, (2, 7), generator=generator)
    ids = torch.cat([torch.full((2, patches), 149), words], dim=1)
    return {
        "input_ids": ids,
        "pixel_values": twins.pictures(2, generator).to(dtype),
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (torch.arange(ids.shape[1]) >= ids.shape[1] - 2).long().expand_as(ids).contiguous(),
    }


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_same_logits(reference, ours, inputs, tolerance: float = TOLERANCE) -> torch.Tensor:
    expected, found = logits(reference, inputs), logits(ours, inputs)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    return found


def make_strong(model: torch.nn.Module, seed: int = 1) -> None:
    """Give every update something to say: B starts at zero, which any mistake would pass."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                gain = 0.3 if "lora_B" in name else parameter.shape[1] ** -0.5
                parameter.copy_(gain * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("config", CASES)
def test_peft_loads_what_we_write(twins, config, tmp_path, recwarn):
    inputs = examples(twins)
    before = logits(twins.ours, inputs)
    add_lora(twins.ours, config)
    assert torch.equal(logits(twins.ours, inputs), before)  # an update that was never taught changes nothing
    make_strong(twins.ours)
    save_adapter(twins.ours, tmp_path / "adapter", base="some/base")
    reference = peft.PeftModel.from_pretrained(twins.reference, tmp_path / "adapter").eval()
    assert not [str(note.message) for note in recwarn if "adapter key" in str(note.message)]
    theirs = {name.removesuffix(".lora_A.default") for name, _ in reference.named_modules() if "lora_A.d" in name}
    ours = {name for name, module in twins.ours.named_modules() if isinstance(module, LoraLinear)}
    assert {name.removeprefix("base_model.model.model.") for name in theirs} == ours
    after = assert_same_logits(reference, twins.ours.eval(), inputs)
    assert (after - before).abs().max() > 0.01 * before.abs().max()
    assert reference.peft_config["default"].base_model_name_or_path == "some/base"


@pytest.mark.parametrize("config", CASES)
def test_we_load_what_peft_writes(twins, config, tmp_path):
    inputs = examples(twins)
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
    )
    reference = peft.get_peft_model(twins.reference, settings).eval()
    make_strong(reference)
    reference.save_pretrained(tmp_path)
    load_adapter(twins.ours, tmp_path)
    assert_same_logits(reference, twins.ours, inputs)
    assert twins.ours.lora_config.scale == config.scale
    learning = [name for name, parameter in twins.ours.named_parameters() if parameter.requires_grad]
    assert learning and all("lora_" in name for name in learning)
    save_adapter(twins.ours, tmp_path / "again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_peft_s_narrowed_targets(twins, tmp_path):
    """All linear maps but some, in one layer only: the file says which, and what we write again says it too."""
    settings = peft.LoraConfig(
        r=2, target_modules=["q_proj", "up_proj", "fc1"], exclude_modules=r".*vision.*fc1", layers_to_transform=[1]
    )
    reference = peft.get_peft_model(twins.reference, settings).eval()
    make_strong(reference)
    reference.save_pretrained(tmp_path / "theirs")
    load_adapter(twins.ours, tmp_path / "theirs")
    inputs = examples(twins)
    assert_same_logits(reference, twins.ours, inputs)
    save_adapter(twins.ours, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(reference.unload(), tmp_path / "ours").eval()
    assert_same_logits(again, twins.ours, inputs)
    with_adapter = {name for name, module in again.named_modules() if hasattr(module, "lora_A")}
    assert len(with_adapter) == 3  # q_proj of both parts, and the decoder's up_proj


def test_what_is_left_out_means_peft_s_default(make_twins, tmp_path):
    twins, defaults = make_twins(configuration()), peft.LoraConfig(target_modules=["q_proj"])
    peft.get_peft_model(twins.reference, defaults).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({key: values[key] for key in ("peft_type", "target_modules")}))
    load_adapter(twins.ours, tmp_path)
    theirs = {"rank": defaults.r, "alpha": defaults.lora_alpha, "dropout": defaults.lora_dropout}
    assert twins.ours.lora_config == LoraConfig(**theirs, targets=("q_proj",), use_rslora=defaults.use_rslora)


def test_all_linear(twins, tmp_path):
    reference = peft.get_peft_model(twins.reference, peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    make_strong(reference)
    reference.save_pretrained(tmp_path)
    load_adapter(twins.ours, tmp_path)
    assert_same_logits(reference, twins.ours, examples(twins))


@pytest.mark.parametrize("spelling", ["hub", "transformers 4"])
def test_older_names(twins, spelling, tmp_path):
    """As transformers spelled its modules when many of the adapters on the hub were made."""
    add_lora(twins.ours, LoraConfig(rank=2, targets=("q_proj", "fc1")))
    make_strong(twins.ours)
    inputs = examples(twins)
    expected = logits(twins.ours, inputs)
    save_adapter(twins.ours, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        name = name.replace("model.vision_tower.", "model.vision_tower.vision_model.")
        if spelling == "hub":
            name = name.replace("base_model.model.model.", "base_model.model.")
            name = name.replace("language_model.layers", "language_model.model.layers")
        tensors[name] = tensor
    path.unlink()
    save_file(tensors, path)
    fresh = type(twins.ours)(twins.ours.config).eval()
    fresh.load_state_dict(twins.state_dict())
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh, inputs), expected)


@pytest.mark.parametrize("config", [CASES[0], CASES[3], CASES[4]])  # the last two have maps with a bias
def test_merged_is_peft_s_merged_and_unmerged_is_the_base(twins, config, tmp_path):
    inputs = examples(twins)
    add_lora(twins.ours, config)
    make_strong(twins.ours)
    save_adapter(twins.ours, tmp_path)
    adapted = logits(twins.ours, inputs)
    bits = {name: tensor.clone() for name, tensor in twins.ours.state_dict().items()}
    reference = peft.PeftModel.from_pretrained(twins.reference, tmp_path).eval().merge_and_unload()
    merge_lora(twins.ours)
    assert_same_logits(reference, twins.ours, inputs)
    theirs = {name.removeprefix("model."): tensor for name, tensor in reference.state_dict().items()}
    for name, tensor in twins.ours.state_dict().items():
        assert (theirs[name] - tensor).abs().max() <= 1e-6
    unmerge_lora(twins.ours)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in twins.ours.state_dict().items())
    assert torch.equal(logits(twins.ours, inputs), adapted)


def test_sixteen_bits_flow_as_in_peft(twins, tmp_path):
    """A bfloat16 base, a float32 adapter: the same casts at the same places, so one map gives the same bits, and logits
    agree to a bfloat16 step or two."""
    twins.ours.bfloat16(), twins.reference.bfloat16()
    add_lora(twins.ours, LoraConfig(rank=3, alpha=5))
    make_strong(twins.ours)
    assert all(p.dtype == torch.float32 for n, p in twins.ours.named_parameters() if "lora_" in n)
    save_adapter(twins.ours, tmp_path)
    reference = peft.PeftModel.from_pretrained(twins.reference, tmp_path).eval()
    assert all(p.dtype == torch.float32 for n, p in reference.named_parameters() if "lora_" in n)
    assert_same_logits(reference, twins.ours, examples(twins, dtype=torch.bfloat16), tolerance=0.03)
    rows = torch.randn(5, 36, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "language_model.layers.1.mlp.up_proj"
    with torch.no_grad():
        expected = reference.get_submodule(f"base_model.model.model.{name}")(rows)
        assert torch.equal(twins.ours.get_submodule(name)(rows), expected)


def rotations(hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference's cosines and sines for heads of 10, in float64; its own are rounded to float32 on the way."""
    speeds = 1.0 / 10_000.0 ** (torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    angles = position_ids[..., None].double() * speeds
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("targets", [DECODER_LINEARS, ("q_proj", "fc2", "linear")])
def test_twenty_steps_of_adamw(make_twins, kind, targets, tmp_path, monkeypatch):
    """From the same start: peft draws A, we read it from its file; then both walk twenty steps on twenty batches."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # norms and rotations too, in both
    twins = make_twins(configuration(kind), "eager" if kind == "gemma2" else "sdpa")
    for place, softmax in ((torch.nn.functional, torch.nn.functional.softmax), (torch.Tensor, torch.Tensor.softmax)):
        # the attention with softcaps asks for float32 as well, in both
        monkeypatch.setattr(place, "softmax", lambda x, dim, dtype=None, softmax=softmax: softmax(x, dim))
    twins.redraw(seed=5)
    twins.reference.double(), twins.ours.double()
    monkeypatch.setattr(twins.reference.model.language_model.rotary_emb, "forward", rotations)
    assert twins.reference.model.language_model.layers[0].input_layernorm.weight.dtype == torch.float64
    torch.manual_seed(0)
    modules = targets if isinstance(targets, str) else list(targets)
    reference = peft.get_peft_model(twins.reference, peft.LoraConfig(r=3, lora_alpha=16, target_modules=modules))
    reference.save_pretrained(tmp_path)
    load_adapter(twins.ours, tmp_path)

    def name_of(theirs: str) -> str:
        return re.sub(r"\.(lora_[AB])\.default\.weight$", r".\1", theirs.removeprefix("base_model.model.model."))

    theirs = {name_of(name): p for name, p in reference.named_parameters() if p.requires_grad}
    ours = {name: p for name, p in twins.ours.named_parameters() if p.requires_grad}
    assert theirs.keys() == ours.keys() and all(p.dtype == torch.float64 for p in [*theirs.values(), *ours.values()])
    assert all(torch.equal(ours[name], parameter) for name, parameter in theirs.items())
    start = {name: parameter.detach().clone() for name, parameter in ours.items()}
    optimizers = [torch.optim.AdamW(list(part.values()), lr=0.01, weight_decay=0.01) for part in (theirs, ours)]
    reference.train(), twins.ours.train()
    for step in range(20):
        inputs = examples(twins, seed=step, dtype=torch.float64)
        labels = torch.where(inputs["token_type_ids"] == 1, inputs["input_ids"], -100)
        losses = reference(**inputs, labels=labels).loss, twins.ours.loss(**inputs, labels=labels)
        assert abs(losses[0].item() - losses[1].item()) <= 1e-8 * losses[0].item()
        for optimizer, loss in zip(optimizers, losses):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    moved = max((ours[name] - start[name]).abs().max().item() for name in ours)
    apart = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    print(f"twenty steps: moved by {moved:.3f}, apart by {apart:.1e}")
    assert moved > 0.05 and apart <= 1e-8
    for parameter in twins.ours.parameters():
        assert parameter.requires_grad or parameter.grad is None


NAMES = (
    "q_proj",
    "proj",
    "self_attn.q_proj",
    "layers.0.mlp.up_proj",
    "linear",
    "fc1",
    "layers.1",
    "nothing",
    "lm_head",
)
PATTERNS = (
    r".*q_proj",
    r".*\.(fc1|up_proj)",
    r"model\.language_model\..*",
    r"q_proj",
    DECODER_LINEARS,
    r".*lang.*o_proj",
)


@given(
    targets=st.one_of(st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True), st.sampled_from(PATTERNS))
)
@settings(max_examples=60, deadline=None)
def test_targets_mean_what_they_mean_to_peft(both_at_once, targets):
    settings = peft.LoraConfig(target_modules=targets)
    expected = {
        name.removeprefix("model.")
        for name, module in both_at_once.reference.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and check_target_module_exists(settings, name)
    }
    try:
        found = find_linears(both_at_once.ours, targets if isinstance(targets, str) else tuple(targets)).keys()
    except ValueError as error:
        assert "matches no linear map" in str(error)  # one of them matched nothing: an error here, silence there
        one_by_one = [targets] if isinstance(targets, str) else [[target] for target in targets]
        assert not all(
            any(
                check_target_module_exists(peft.LoraConfig(target_modules=one), name)
                for name, module in both_at_once.reference.named_modules()
                if isinstance(module, torch.nn.Linear) and name != "lm_head"
            )
            for one in one_by_one
        )
    else:
        assert found == expected


@pytest.fixture(scope="module")
def both_at_once():
    import transformers

    from sigma_book.paligemma import PaliGemma, PaliGemmaConfig

    class Pair:
        reference = transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(**configuration()))
        ours = PaliGemma(PaliGemmaConfig.from_dict(json.loads(reference.config.to_json_string())))

    return Pair
