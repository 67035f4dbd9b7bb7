"""big_vision's `.npz` checkpoints: random ones, made from our state dicts by the inverse of the published layout.

The real files are behind a licence. What stands here is the layout as big_vision's programs define it; tensors are compared
bit by bit.
"""

import json
import math
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from sigma_book import generate, load
from sigma_book.assemble import POCKET
from sigma_book.cli import main
from sigma_book.gemma import GemmaConfig
from sigma_book.npz import load_npz, read_npz_config, read_npz_header
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Tokenizer
from sigma_book.siglip import SiglipConfig

ROWS = 1850  # of the embedding in the file: the pocket tokenizer's <image> is the first that is added
GEMMA_2 = {
    "four_norms": True,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
}


def make_model(kind: str, seed: int = 0) -> PaliGemma:
    """Odd sizes, all different where they may be."""
    vision = SiglipConfig(24, 37, 3, 4, image_size=15, patch_size=5)
    sizes = {"gemma": (22, 31, 2, 3, 1, 8), "equal heads": (22, 31, 2, 3, 3, 8)}
    sizes |= {"gemma2": (22, 31, 3, 4, 2, 8), "gemma2, equal heads": (22, 31, 1, 2, 2, 8)}
    options = {}
    if "gemma2" in kind:
        layers = sizes[kind][2]
        alternating = ("sliding_attention", "full_attention", "sliding_attention")[:layers]
        options = GEMMA_2 | {"query_pre_attn_scalar": 8, "layer_types": alternating}
    text = GemmaConfig(*sizes[kind], vocab_size=ROWS + 64, **options)
    tokenizer = Tokenizer.from_folder(POCKET)
    ids = (tokenizer.image_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    model = PaliGemma(PaliGemmaConfig(vision, text, *ids)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return model


def to_npz(model: PaliGemma, rows: int = ROWS) -> dict[str, np.ndarray]:
    """The inverse, written from the published layout, array by array, in einsum's letters."""
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    eyes, voice = model.config.vision, model.config.text

    def layers(pattern):
        found = [state[pattern.format(n)] for n in range(100) if pattern.format(n) in state]
        return np.stack(found)

    h, d = eyes.num_attention_heads, eyes.hidden_size
    tower = "vision_tower.encoder.layers.{}."
    block = "params/img/Transformer/encoderblock"
    arrays = {
        "params/img/embedding/kernel": np.einsum("dchw->hwcd", state["vision_tower.embeddings.patch_embedding.weight"]),
        "params/img/embedding/bias": state["vision_tower.embeddings.patch_embedding.bias"],
        "params/img/pos_embedding": state["vision_tower.embeddings.position_embedding.weight"].reshape(1, -1, d),
        f"{block}/LayerNorm_0/scale": layers(tower + "layer_norm1.weight"),
        f"{block}/LayerNorm_0/bias": layers(tower + "layer_norm1.bias"),
        f"{block}/LayerNorm_1/scale": layers(tower + "layer_norm2.weight"),
        f"{block}/LayerNorm_1/bias": layers(tower + "layer_norm2.bias"),
        f"{block}/MlpBlock_0/Dense_0/kernel": np.einsum("lfd->ldf", layers(tower + "mlp.fc1.weight")),
        f"{block}/MlpBlock_0/Dense_0/bias": layers(tower + "mlp.fc1.bias"),
        f"{block}/MlpBlock_0/Dense_1/kernel": np.einsum("ldf->lfd", layers(tower + "mlp.fc2.weight")),
        f"{block}/MlpBlock_0/Dense_1/bias": layers(tower + "mlp.fc2.bias"),
        "params/img/Transformer/encoder_norm/scale": state["vision_tower.post_layernorm.weight"],
        "params/img/Transformer/encoder_norm/bias": state["vision_tower.post_layernorm.bias"],
        "params/img/head/kernel": state["multi_modal_projector.linear.weight"].T,
        "params/img/head/bias": state["multi_modal_projector.linear.bias"],
        "params/llm/embedder/input_embedding": state["language_model.embed_tokens.weight"][:rows],
        "params/llm/final_norm/scale": state["language_model.norm.weight"],
    }
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for theirs, ours in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        weight = layers(f"{tower}self_attn.{ours}.weight")
        weight = weight.reshape(len(weight), h, d // h, d)
        arrays[f"{attention}/{theirs}/kernel"] = np.einsum("lhkd->ldhk", weight)
        arrays[f"{attention}/{theirs}/bias"] = layers(f"{tower}self_attn.{ours}.bias").reshape(-1, h, d // h)
    weight = layers(tower + "self_attn.out_proj.weight")
    arrays[f"{attention}/out/kernel"] = np.einsum("ldhk->lhkd", weight.reshape(len(weight), d, h, d // h))
    arrays[f"{attention}/out/bias"] = layers(tower + "self_attn.out_proj.bias")

    layer, llm = "language_model.layers.{}.", "params/llm/layers"
    wide, narrow, a = voice.num_attention_heads, voice.num_key_value_heads, voice.head_dim
    q, k, v = (layers(f"{layer}self_attn.{x}_proj.weight") for x in "qkv")
    q = np.einsum("lhkd->lhdk", q.reshape(len(q), wide, a, -1))
    k, v = (np.einsum("lhkd->lhdk", x.reshape(len(x), narrow, a, -1)) for x in (k, v))
    if wide == narrow:
        arrays[f"{llm}/attn/qkv_einsum/w"] = np.stack([q, k, v], axis=1)
    else:
        arrays[f"{llm}/attn/q_einsum/w"] = q
        arrays[f"{llm}/attn/kv_einsum/w"] = np.stack([k, v], axis=1)
    o = layers(layer + "self_attn.o_proj.weight")
    arrays[f"{llm}/attn/attn_vec_einsum/w"] = np.einsum("ldhk->lhkd", o.reshape(len(o), -1, wide, a))
    gate, up = (layers(f"{layer}mlp.{x}_proj.weight") for x in ("gate", "up"))
    arrays[f"{llm}/mlp/gating_einsum"] = np.einsum("jlfd->ljdf", np.stack([gate, up]))
    arrays[f"{llm}/mlp/linear"] = np.einsum("ldf->lfd", layers(layer + "mlp.down_proj.weight"))
    arrays[f"{llm}/pre_attention_norm/scale"] = layers(layer + "input_layernorm.weight")
    if voice.four_norms:
        arrays[f"{llm}/post_attention_norm/scale"] = layers(layer + "post_attention_layernorm.weight")
        arrays[f"{llm}/pre_ffw_norm/scale"] = layers(layer + "pre_feedforward_layernorm.weight")
        arrays[f"{llm}/post_ffw_norm/scale"] = layers(layer + "post_feedforward_layernorm.weight")
    else:
        arrays[f"{llm}/pre_ffw_norm/scale"] = layers(layer + "post_attention_layernorm.weight")
    return arrays


KINDS = ["gemma", "equal heads", "gemma2", "gemma2, equal heads"]


@pytest.fixture
def write(tmp_path):
    """Write arrays as a checkpoint with a tokenizer beside it."""

    def write_npz(arrays, name="model.npz", tokenizer="tokenizer.json", save=np.savez):
        save(tmp_path / name, **arrays)
        if tokenizer:
            shutil.copy(POCKET / tokenizer, tmp_path)
        return tmp_path / name

    return write_npz


def assert_same(found: PaliGemma, expected: PaliGemma, dtype=torch.float32) -> None:
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == dtype and ours[name].is_contiguous()
        rows = ROWS if name.endswith("embed_tokens.weight") else len(tensor)
        assert ours[name].shape == tensor.shape and torch.equal(ours[name][:rows], tensor[:rows].to(dtype)), name
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tokenizer.model"])
def test_every_tensor_comes_back(write, kind, save, tokenizer):
    model = make_model(kind)
    path = write(to_npz(model), tokenizer=tokenizer, save=save)
    assert read_npz_config(path) == model.config
    assert_same(load_npz(path, "cpu"), model)


def test_the_rows_that_are_added_never_win(write):
    model = make_model("gemma")
    rows = load_npz(write(to_npz(model)), "cpu").language_model.embed_tokens.weight
    hidden = torch.randn(500, rows.shape[1], generator=torch.Generator().manual_seed(1))
    scores = hidden @ rows.T
    assert (scores.argmax(-1) < ROWS).all()
    torch.testing.assert_close(
        scores[:, ROWS:], scores[:, :ROWS].mean(-1, keepdim=True).expand(-1, 64), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16", "auto"])
def test_sixteen_bits(write, stored, wanted, monkeypatch):
    """numpy has no bfloat16: such arrays come as two bytes without a meaning."""
    monkeypatch.setattr("sigma_book.weights.has_bfloat16_units", lambda: True)
    model = make_model("gemma2").to(getattr(torch, stored))
    arrays = {}
    for name, array in to_npz(model.float()).items():
        tensor = torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, stored))
        arrays[name] = tensor.view(torch.int16).numpy().view("V2") if stored == "bfloat16" else tensor.numpy()
    path = write(arrays)
    assert read_npz_header(path)["params/img/head/bias"][1] == ("V2" if stored == "bfloat16" else "f2")
    kept = "bfloat16" if stored == "bfloat16" else "float32"  # CPUs are slow at float16
    dtype = getattr(torch, kept if wanted == "auto" else wanted)
    assert_same(load_npz(path, "cpu", wanted), model.to(getattr(torch, stored)).to(dtype), dtype)


def test_names_without_params(write):
    model = make_model("gemma")
    arrays = {name.removeprefix("params/"): array for name, array in to_npz(model).items()}
    assert_same(load_npz(write(arrays), "cpu"), model)


def test_what_stands_beside_the_parameters_is_left_alone(write):
    """A checkpoint of a run holds the optimizer's state too."""
    model = make_model("gemma")
    arrays = to_npz(model) | {"opt/0/mu/img/head/bias": np.zeros(3, np.float32), "step": np.zeros(())}
    assert_same(load_npz(write(arrays), "cpu"), model)


def test_fortran_order_is_a_detail(write):
    model = make_model("gemma")
    arrays = {name: np.asfortranarray(array) for name, array in to_npz(model).items()}
    assert_same(load_npz(write(arrays), "cpu"), model)


def test_through_the_front_door(write, pictures, capsys, tmp_path):
    """`load`, `generate` and the command line take the file, and answer as the same model in our own layout does."""
    from sigma_book.processor import Processor
    from sigma_book.weights import save_model

    original = load_npz(write(to_npz(make_model("gemma2"))), "cpu")
    path = tmp_path / "model.npz"
    save_model(original, tmp_path / "ours")
    Processor(Tokenizer.from_folder(POCKET), 15, 9).save(tmp_path / "ours")
    expected = generate(pictures[:3], "caption en", model=tmp_path / "ours", max_new_tokens=8)
    model = load(path, device="cpu")
    assert generate(pictures[:3], "caption en", model=model, max_new_tokens=8) == expected
    assert generate(pictures[:3], "caption en", model=path, max_new_tokens=8) == expected
    pictures[0].save(tmp_path / "scene.png")
    asked = ["generate", str(tmp_path / "scene.png"), "caption en", "--model", str(path), "--max-new-tokens", "8"]
    assert main(asked) == 0
    assert capsys.readouterr().out == expected[0] + "\n"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert load(path, device="cpu").stop_ids == [1, 7]


@pytest.mark.parametrize("kind", ["gemma", "gemma2, equal heads"])
def test_missing_arrays_are_named(write, kind):
    arrays = to_npz(make_model(kind))
    for name in arrays:
        if kind == "gemma2, equal heads" and name.endswith("post_attention_norm/scale"):
            continue  # without it the file is of Gemma 1, which has no place for the other post norm
        path = write({other: array for other, array in arrays.items() if other != name})
        expected = name.removeprefix("params/")
        expected = expected.replace("qkv_einsum", "q_einsum")  # without the one, the two are looked for
        with pytest.raises(ValueError, match=f"{path}.*lacks .*{expected}"):
            load_npz(path, "cpu")


@pytest.mark.parametrize("kind", ["gemma", "gemma2, equal heads"])
def test_wrong_shapes_are_told(write, kind):
    """Each axis of each array, one longer: some array is named, with what it has and what was expected."""
    arrays = to_npz(make_model(kind))
    rng = np.random.default_rng(0)
    places = [(name, axis) for name, array in arrays.items() for axis in range(array.ndim)]
    for number in rng.permutation(len(places))[:25]:
        name, axis = places[number]
        if name.endswith("input_embedding") and axis == 0:
            continue  # any number of words is fine
        wrong = np.concatenate([arrays[name], np.take(arrays[name], [0], axis)], axis)
        path = write(arrays | {name: wrong})
        with pytest.raises(ValueError, match="has the shape .* expected|do not make up|expected a square"):
            load_npz(path, "cpu")
    path = write(arrays | {"params/img/head/bias": np.zeros((1, 22), np.float32)})
    with pytest.raises(ValueError, match=r"params/img/head/bias has the shape \[1, 22\], expected \[22\]"):
        load_npz(path, "cpu")


def test_unknown_arrays_are_named(write):
    arrays = to_npz(make_model("gemma")) | {"params/llm/layers/mlp/extra": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match="holds llm/layers/mlp/extra, for which PaliGemma has no place"):
        load_npz(write(arrays), "cpu")


def test_no_pickle_is_read(write):
    arrays = to_npz(make_model("gemma")) | {"params/img/head/bias": np.array([{"run": "me"}], dtype=object)}
    with pytest.raises(ValueError, match="params/img/head/bias holds Python objects"):
        load_npz(write(arrays), "cpu")


def test_other_dtypes(write):
    arrays = to_npz(make_model("gemma"))
    arrays["params/img/head/bias"] = arrays["params/img/head/bias"].astype(np.float64)
    with pytest.raises(ValueError, match="params/img/head/bias is float64: expected float32, float16"):
        load_npz(write(arrays), "cpu")


def test_the_tokenizer_must_lie_beside_it(write):
    path = write(to_npz(make_model("gemma")), tokenizer=None)
    with pytest.raises(FileNotFoundError, match="without its tokenizer: put tokenizer.model or tokenizer.json"):
        load(path)


def test_files_of_two_models_are_noticed(write):
    arrays = to_npz(make_model("gemma"))
    arrays["params/llm/embedder/input_embedding"] = arrays["params/llm/embedder/input_embedding"][:1000]
    with pytest.raises(ValueError, match="1000 rows of words, but <image> is token 1850"):
        load_npz(write(arrays), "cpu")


def test_files_that_are_no_checkpoint(write, tmp_path, capsys):
    shutil.copy(POCKET / "tokenizer.json", tmp_path)
    whole = write(to_npz(make_model("gemma"))).read_bytes()
    path = tmp_path / "bad.npz"
    for content in (b"", b"not a zip", whole[:1000], whole[: len(whole) // 2], whole[:-10]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="bad.npz is no .npz file that can be read"):
            load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("params/img/head/bias.npy", b"no array")
    with pytest.raises(ValueError, match="bad.npz is no .npz"):
        load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "absent.npz")
    np.savez(path, weights=np.zeros(3))
    with pytest.raises(ValueError, match="lacks img/embedding/kernel, .* and .* more: expected a PaliGemma"):
        load(path)
    assert main(["generate", str(path), "x", "--model", str(path)]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_byte_in_the_numbers(write, seed):
    path = write(to_npz(make_model("gemma")))
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        members = [info for info in archive.infolist() if info.file_size > 1000]
    info = members[seed % len(members)]
    raw[info.header_offset + 500 + 37 * seed] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"{path}: array .* is damaged|Bad CRC-32"):
        load_npz(path, "cpu")


PEAK = """
import resource, sys, torch
from pathlib import Path
from sigma_book.npz import load_npz

def held(key):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))

torch.set_num_threads(1)
load_npz(sys.argv[1], "cpu")  # what code and buffers take, with a tiny model
before = held("VmRSS")
model = load_npz(sys.argv[2], "cpu", sys.argv[3])
print((held("VmHWM") - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1.3), pytest.param("bfloat16", 1.7, marks=pytest.mark.slow)])
def test_never_two_copies(write, tmp_path, dtype, bound):
    """The largest array, here two fifths of all as in the 3B model, and its turned copy stand in memory while little else
    does. Converted to 16 bits the model is half as large as the file, so that array weighs as much as 0.8 of it."""
    vision = SiglipConfig(64, 128, 1, 2, image_size=28, patch_size=14)
    text = GemmaConfig(256, 2048, 18, 4, 1, 64, vocab_size=30_000 + 64)
    torch.manual_seed(0)
    model = PaliGemma(PaliGemmaConfig(vision, text, 1850)).requires_grad_(False)
    arrays = to_npz(model, rows=30_000)
    tiny = write(to_npz(make_model("gemma")), "tiny.npz")
    largest = max(array.nbytes for array in arrays.values()) / sum(array.nbytes for array in arrays.values())
    assert 0.35 < largest < 0.55
    command = [sys.executable, "-c", PEAK, str(tiny), str(write(arrays, "large.npz")), dtype]
    peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"{dtype}: {peak:.2f} times the model")
    assert peak < bound


@pytest.mark.parametrize(
    ("width", "mlp", "layers", "heads", "kv", "head_dim", "scale"),
    [(2304, 9216, 26, 8, 4, 256, 256), (3584, 14336, 42, 16, 8, 256, 256), (4608, 36864, 46, 32, 16, 128, 144)],
)
def test_the_real_sizes(monkeypatch, tmp_path, width, mlp, layers, heads, kv, head_dim, scale):
    """PaliGemma 2's three sizes, from shapes alone: no file of that size is written."""
    from sigma_book import npz

    tower, llm = "params/img/Transformer/encoderblock", "params/llm/layers"
    attention = f"{tower}/MultiHeadDotProductAttention_0"
    shapes = {
        "params/img/embedding/kernel": (14, 14, 3, 1152),
        "params/img/embedding/bias": (1152,),
        "params/img/pos_embedding": (1, 1024, 1152),
        **{f"{tower}/LayerNorm_{n}/{x}": (27, 1152) for n in (0, 1) for x in ("scale", "bias")},
        f"{tower}/MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
        f"{tower}/MlpBlock_0/Dense_0/bias": (27, 4304),
        f"{tower}/MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
        f"{tower}/MlpBlock_0/Dense_1/bias": (27, 1152),
        **{f"{attention}/{x}/kernel": (27, 1152, 16, 72) for x in ("query", "key", "value")},
        **{f"{attention}/{x}/bias": (27, 16, 72) for x in ("query", "key", "value")},
        f"{attention}/out/kernel": (27, 16, 72, 1152),
        f"{attention}/out/bias": (27, 1152),
        **{f"params/img/Transformer/encoder_norm/{x}": (1152,) for x in ("scale", "bias")},
        "params/img/head/kernel": (1152, width),
        "params/img/head/bias": (width,),
        "params/llm/embedder/input_embedding": (257152, width),
        f"{llm}/attn/q_einsum/w": (layers, heads, width, head_dim),
        f"{llm}/attn/kv_einsum/w": (layers, 2, kv, width, head_dim),
        f"{llm}/attn/attn_vec_einsum/w": (layers, heads, head_dim, width),
        f"{llm}/mlp/gating_einsum": (layers, 2, width, mlp),
        f"{llm}/mlp/linear": (layers, mlp, width),
        **{
            f"{llm}/{norm}/scale": (layers, width)
            for norm in ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")
        },
        "params/llm/final_norm/scale": (width,),
    }
    monkeypatch.setattr(npz, "read_npz_header", lambda path: {k: (v, np.dtype("V2")) for k, v in shapes.items()})
    shutil.copy(POCKET / "tokenizer.json", tmp_path)
    config = read_npz_config(tmp_path / "large.npz")
    assert config.vision == SiglipConfig(1152, 4304, 27, 16, image_size=448, patch_size=14)
    assert (config.text.vocab_size, config.text.query_pre_attn_scalar) == (257216, scale)
    assert config.text.layer_types[:2] == ("sliding_attention", "full_attention")
    with torch.device("meta"):
        model = PaliGemma(config)
    assert sum(math.prod(shape) for shape in shapes.values()) + 64 * width == sum(
        parameter.numel() for parameter in model.parameters()
    )
