"""Folders that `transformers` wrote, read by us, and folders that we wrote, read by `transformers`.

Tensors are compared bit by bit: reading and writing must not change a number. Logits in float32 are compared to 1e-5 of
the largest one, since both sides sum in different orders.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PaliGemmaConfig as ReferenceConfig
from transformers import PaliGemmaForConditionalGeneration

from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.weights import hub_name, load_model, our_name, read_config, read_header, save_model

TOLERANCE = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def configuration(kind: str, tied: bool) -> dict:
    text = {
        "model_type": kind,
        "hidden_size": 36,
        "intermediate_size": 50,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": 150,
    }
    text |= {"sliding_window": 5, "query_pre_attn_scalar": 12} if kind == "gemma2" else {}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 12,
        "patch_size": 4,
        "vision_use_head": False,
    }
    return {
        "model_type": "paligemma",
        "text_config": text,
        "vision_config": vision,
        "image_token_index": 149,
        "hidden_size": 36,
        "projection_dim": 36,
        "tie_word_embeddings": tied,
    }


CASES = [
    pytest.param((kind, tied), id=f"{kind}-{'tied' if tied else 'untied'}")
    for kind in ("gemma", "gemma2")
    for tied in (True, False)
]


@pytest.fixture(params=CASES)
def twins(request, make_twins):
    both = make_twins(configuration(*request.param))
    both.redraw(seed=5)
    return both


@pytest.fixture(params=list(DTYPES))
def dtype_name(request):
    return request.param


def respell(folder, rename) -> None:
    """Store each tensor of a folder's only weight file under another name."""
    path = folder / "model.safetensors"
    tensors = {rename(name): tensor.clone() for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def to_hub(name: str) -> str:
    """As the files on the hub spell it (`save_pretrained` of transformers 5 leaves out `vision_model.`)."""
    if name == "lm_head.weight":
        name = "language_model.lm_head.weight"
    return name.replace("vision_tower.", "vision_tower.vision_model.").replace(
        "vision_model.vision_model.", "vision_model."
    )


def to_new(name: str) -> str:
    """As newer transformers name their modules."""
    if "lm_head" in name:
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.").replace(".vision_model.", ".")


def assert_same_tensors(model, expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name
    assert not model.training


def assert_same_logits(reference, ours, pictures: int = 2) -> None:
    config = ours.config
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(4, 149, (pictures, 7), generator=generator)
    ids = torch.cat([torch.full((pictures, config.num_image_tokens), config.image_token_id), words], dim=1)
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.rand(pictures, 3, 12, 12, generator=generator) * 2 - 1,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": (torch.arange(ids.shape[1]) >= ids.shape[1] - 2).long().expand_as(ids).contiguous(),
    }
    with torch.no_grad():
        expected, found = reference(**inputs).logits, ours(**inputs)
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("spelling", ["as written", "hub", "new"])
def test_one_file(twins, dtype_name, spelling, tmp_path):
    twins.reference.to(DTYPES[dtype_name]).save_pretrained(tmp_path)
    rename = {"as written": None, "hub": to_hub, "new": to_new}[spelling]
    if rename:
        respell(tmp_path, rename)
    names = read_header(tmp_path / "model.safetensors")
    if spelling == "hub":
        assert any(name.startswith("vision_tower.vision_model.encoder.") for name in names)
        assert any(name.startswith("language_model.model.layers.") for name in names)
    if spelling == "new":
        assert all(
            name.startswith(
                ("model.vision_tower.e", "model.vision_tower.p", "model.multi", "model.language_model.", "lm_head.")
            )
            for name in names
        )
    dtype = DTYPES[dtype_name]
    assert_same_tensors(load_model(tmp_path, "cpu", dtype), twins.state_dict(), dtype)


def test_shards(twins, tmp_path):
    twins.reference.save_pretrained(tmp_path, max_shard_size="40kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    model = load_model(tmp_path, "cpu")
    assert_same_tensors(model, twins.state_dict(), torch.float32)
    assert_same_logits(twins.reference, model)


@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_conversion_is_torch_s(twins, dtype_name, wanted, tmp_path):
    twins.reference.to(DTYPES[dtype_name]).save_pretrained(tmp_path)
    assert_same_tensors(load_model(tmp_path, "cpu", wanted), twins.state_dict(), DTYPES[wanted])


def test_the_configuration_survives(twins, tmp_path):
    twins.reference.save_pretrained(tmp_path)
    assert read_config(tmp_path) == twins.ours.config
    save_model(twins.ours, tmp_path / "ours")
    assert read_config(tmp_path / "ours") == twins.ours.config


@pytest.mark.parametrize("max_shard_bytes", [5 * 10**9, 30_000])
def test_transformers_reads_what_we_wrote(twins, max_shard_bytes, tmp_path):
    folder = tmp_path / "ours"
    save_model(twins.ours, folder, max_shard_bytes=max_shard_bytes)
    assert (folder / "model.safetensors").exists() == (max_shard_bytes > 10**9)
    reference, notes = PaliGemmaForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    assert reference.dtype == torch.float32  # by config.json's dtype
    expected = twins.reference.state_dict()
    found = reference.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert_same_logits(reference.eval(), twins.ours)
    assert_same_logits(reference, load_model(folder, "cpu"))


def test_transformers_reads_sixteen_bits(twins, dtype_name, tmp_path):
    dtype = DTYPES[dtype_name]
    save_model(twins.ours, tmp_path / "ours", dtype=dtype)
    reference = PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert reference.dtype == dtype
    expected = twins.reference.state_dict()
    assert all(torch.equal(tensor, expected[name].to(dtype)) for name, tensor in reference.state_dict().items())


def test_the_hub_s_spelling_is_what_we_write(twins, tmp_path):
    twins.reference.save_pretrained(tmp_path / "theirs")
    respell(tmp_path / "theirs", to_hub)
    save_model(twins.ours, tmp_path / "ours")
    theirs, ours = (read_header(tmp_path / who / "model.safetensors") for who in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name]["shape"] == theirs[name]["shape"] for name in ours)


def test_our_file_is_a_safetensors_file(twins, dtype_name, tmp_path):
    """The library that defines the format reads what our writer wrote, bit by bit."""
    dtype = DTYPES[dtype_name]
    save_model(twins.ours, tmp_path / "ours", dtype=dtype)
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    expected = twins.ours.state_dict()
    assert {our_name(name) for name in tensors} == expected.keys()
    assert all(torch.equal(tensor, expected[our_name(name)].to(dtype)) for name, tensor in tensors.items())


def test_every_name_of_the_3b_model():
    """PaliGemma 3B's 603 or so tensors in both spellings lead to one place each, and back."""
    values = {
        "model_type": "paligemma",
        "text_config": {"hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8}
        | {"num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size": 257216},
        "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
        | {"num_hidden_layers": 27, "patch_size": 14, "model_type": "siglip_vision_model", "vision_use_head": False},
        "image_token_index": 257152,
        "projection_dim": 2048,
    }
    with torch.device("meta"):
        reference = PaliGemmaForConditionalGeneration(ReferenceConfig(**json.loads(json.dumps(values))))
        ours = PaliGemma(PaliGemmaConfig.from_dict(values))
    names = ours.state_dict().keys()
    theirs = {name for name in reference.state_dict() if name != "lm_head.weight"}  # tied
    assert {our_name(name) for name in theirs} == names
    assert {our_name(hub_name(name)) for name in names} == names
    assert len({hub_name(name) for name in names}) == len(names) == len(theirs)
