"""Device and dtype flow: everything runs where the weights are, in their dtype, with no tensor left on the CPU.

Fake tensors have a shape, a dtype and a device, but no values: an operation that mixes `cuda` and `cpu` raises, as on
the real device, and no GPU is needed. Autograd on fake `cuda` does not work in CPU builds, so training runs on `meta`.
"""

import ctypes
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sigma_book.fast import PackedLinear, prepare, static_step
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig

BATCH, WORDS, ROOM = 2, 6, 8


def config(kind: str, tied: bool = True) -> PaliGemmaConfig:
    sizes = {
        "model_type": kind,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 10,
        "vocab_size": 101,
    }
    if kind == "gemma2":
        sizes["sliding_window"] = 5
    vision = {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    return PaliGemmaConfig.from_dict(
        {
            "model_type": "paligemma",
            "image_token_index": 100,
            "tie_word_embeddings": tied,
            "text_config": sizes,
            "vision_config": vision,
        }
    )


@pytest.fixture
def cuda_guard():
    """Let fake `cuda` tensors be indexed in a CPU build of torch.

    Before it indexes a tensor, torch looks up how to make the tensor's device current. A CUDA build without a GPU has
    an entry that does nothing; a CPU build has none, and raises. `meta` has such an entry: it is lent to `cuda` here.
    """
    if torch.backends.cuda.is_built():
        yield
        return
    library = next((Path(torch.__file__).parent / "lib").glob("libc10.*"))
    entries = ctypes.c_void_p * 20
    guards = entries.in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # places of the two in c10::DeviceType, which is written into saved files and does not change
    before, guards[cuda] = guards[cuda], guards[meta]
    yield
    guards[cuda] = before


def on_meta(config: PaliGemmaConfig) -> PaliGemma:
    with torch.device("meta"):
        return PaliGemma(config)


def to_fake_cuda(model: PaliGemma, dtype: torch.dtype) -> PaliGemma:
    """Give a model built on meta fake tensors as weights. Call it inside `FakeTensorMode`."""
    weights = {key: torch.empty(value.shape, dtype=dtype, device="cuda") for key, value in model.named_parameters()}
    model.requires_grad_(False).load_state_dict(weights, assign=True)
    return model.eval()


def inputs(model: PaliGemma, device: str) -> tuple[torch.Tensor, ...]:
    """Ids, mask and pictures on a device: the second row is one token shorter, padded on the left."""
    image = [model.config.image_token_id] * model.config.num_image_tokens
    first = image + [2] + [7] * WORDS
    ids = torch.tensor([first, [0, *first[:-1]]], device=device)
    mask = (ids != 0).long()
    side = model.config.vision.image_size
    return ids, mask, torch.zeros(BATCH, 3, side, side, device=device)  # pictures come in float32


@torch.no_grad()
def check_inference(model: PaliGemma, device: str, dtype: torch.dtype) -> None:
    ids, mask, pixel_values = inputs(model, device)
    seen = []

    def look(tensor: torch.Tensor, shape: tuple[int, ...], wanted: torch.dtype = dtype) -> torch.Tensor:
        seen.append((tensor.device.type, tensor.dtype, tuple(tensor.shape)))
        assert seen[-1] == (device, wanted, shape)
        return tensor

    width, vocabulary = model.config.text.hidden_size, model.config.text.vocab_size
    features = look(model.encode_images(pixel_values), (BATCH, model.config.num_image_tokens, width))
    caches = model.language_model.new_caches(BATCH, ids.shape[1] + ROOM)
    logits = look(model.prefill(ids, features, mask, caches), (BATCH, vocabulary))
    for _ in range(ROOM):
        token = look(logits.argmax(-1, keepdim=True), (BATCH, 1), torch.int64)
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        logits = look(model.decode(token, mask, caches), (BATCH, vocabulary))
    for cache in caches:
        look(cache.key, tuple(cache.key.shape))
        look(cache.value, tuple(cache.value.shape))
        assert cache.columns().device.type == device
    assert len(seen) == 2 + 2 * ROOM + 2 * len(caches)
    look(model(ids, pixel_values, mask[:, : ids.shape[1]], torch.zeros_like(ids)), (*ids.shape, vocabulary))


KINDS = pytest.mark.parametrize("kind, tied", [("gemma", True), ("gemma", False), ("gemma2", True)])
DTYPES = pytest.mark.parametrize(
    "dtype",
    [  # what a GPU computes in; numbers of other sizes flow alike
        pytest.param(torch.float32, marks=pytest.mark.slow),
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
    ids=["fp32", "bf16", "fp16"],
)


@KINDS
@DTYPES
def test_inference_on_fake_cuda(kind, tied, dtype, cuda_guard):
    model = on_meta(config(kind, tied))
    with FakeTensorMode(), torch.no_grad():
        to_fake_cuda(model, dtype)
        assert model.device.type == "cuda"
        check_inference(model, "cuda", dtype)


@KINDS
@DTYPES
@pytest.mark.parametrize("static", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_prepared_model_on_fake_cuda(kind, tied, dtype, static, cuda_guard):
    """Fused maps, and the step that `torch.compile` is given; off the CPU nothing is packed."""
    model = on_meta(config(kind, tied))
    with FakeTensorMode(), torch.no_grad():
        ready = prepare(to_fake_cuda(model, dtype))
        assert ready.device.type == "cuda" and not any(isinstance(m, PackedLinear) for m in ready.modules())
        if static:
            ready.compiled_step = partial(static_step, ready)
        check_inference(ready, "cuda", dtype)


class AtOnce(ThreadPoolExecutor):
    """Makes each map in this thread: a fake mode is that of one thread, and torchao makes new tensors."""

    def submit(self, make, *given) -> Future:
        done = Future()
        done.set_result(make(*given))
        return done


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_few_bits_on_fake_cuda(quantize, cuda_guard, monkeypatch):
    """torchao's weights: of the decoder in four bits where its shapes suit, of tower and head in eight."""
    torchao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr("sigma_book.fast.ThreadPoolExecutor", AtOnce)
    model = on_meta(config("gemma"))
    with FakeTensorMode(), torch.no_grad():
        ready = prepare(to_fake_cuda(model, torch.bfloat16), quantize)
        held = {name: type(m.weight) for name, m in ready.named_modules() if isinstance(m, torch.nn.Linear)}
        del held["multi_modal_projector.linear"]  # it keeps its dtype
        decoder = ("self_attn.qkv_proj", "mlp.gate_proj", "mlp.up_proj")  # 48 and 40 columns divide into no groups
        for name, kind in held.items():
            in_four = quantize == "int4" and name.startswith("language_model") and name.endswith(decoder)
            assert kind is (torchao.Int4TilePackedTo4dTensor if in_four else torchao.Int8Tensor), name
        assert len(held) == 2 * 5 + 2 * 4 + 1
        check_inference(ready, "cuda", torch.bfloat16)


def test_fake_cuda_catches_a_tensor_left_on_the_cpu(cuda_guard):
    """Otherwise the test above would prove nothing."""
    model = on_meta(config("gemma"))
    with FakeTensorMode(), torch.no_grad():
        to_fake_cuda(model, torch.float32)
        ids, mask, pixel_values = inputs(model, "cuda")
        with pytest.raises(RuntimeError, match="device"):
            model(ids, pixel_values, mask.cpu(), torch.zeros_like(ids))
        forgotten = torch.zeros(model.config.text.hidden_size, device="cpu")
        model.language_model.norm.weight = torch.nn.Parameter(forgotten, requires_grad=False)
        with pytest.raises(RuntimeError, match="device"):
            model(ids, pixel_values, mask, torch.zeros_like(ids))


@KINDS
@DTYPES
def test_training_on_meta(kind, tied, dtype):
    model = on_meta(config(kind, tied)).to(dtype)
    ids, mask, pixel_values = inputs(model, "meta")
    types = torch.zeros_like(ids)
    loss = model.loss(ids, pixel_values, mask, types, ids)
    assert (loss.device.type, loss.dtype, loss.shape) == ("meta", torch.float32, ())
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.device.type, parameter.grad.dtype) == ("meta", dtype), name
        assert parameter.grad.shape == parameter.shape, name


@DTYPES
def test_the_same_flow_on_the_cpu_and_its_errors(dtype):
    """The real thing once, where there is no GPU: and here a wrong number of placeholders is an error."""
    torch.manual_seed(0)
    model = PaliGemma(config("gemma2")).to(dtype).eval()
    check_inference(model, "cpu", dtype)
    check_mismatch(model, "cpu")


def check_mismatch(model: PaliGemma, device: str) -> None:
    ids, mask, pixel_values = inputs(model, device)
    for count in (1, 3):
        pictures = pixel_values[:1].expand(count, -1, -1, -1)
        with torch.no_grad(), pytest.raises(ValueError, match="8 <image> tokens for"):
            model(ids, pictures, mask, torch.zeros_like(ids))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@KINDS
@DTYPES
def test_on_a_real_gpu(kind, tied, dtype):
    torch.manual_seed(0)
    model = PaliGemma(config(kind, tied)).to(device="cuda", dtype=dtype).eval()
    check_inference(model, "cuda", dtype)
    check_mismatch(model, "cuda")
    ids, mask, pixel_values = inputs(model, "cuda")
    types = torch.zeros_like(ids)
    types[:, -3:] = 1
    labels = torch.where(types == 1, ids, -100)
    loss = model.loss(ids, pixel_values, mask, types, labels)
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    if dtype == torch.float32:  # the same numbers as on the CPU; GPU sums run in another order
        tensors = [tensor.cpu() for tensor in (ids, pixel_values, mask, types, labels)]
        torch.testing.assert_close(loss.cpu(), model.cpu().loss(*tensors), rtol=1e-4, atol=1e-4)
