"""The decoder against `transformers`: Gemma 1 and 2, part by part and whole, cached and not."""

import pytest
import torch
import transformers
from transformers.models.gemma.modeling_gemma import GemmaMLP, GemmaRMSNorm

from sigma_book.gemma import GeGLU, Gemma, GemmaConfig, RMSNorm, tied_logits

SIZES = {"hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 10, "vocab_size": 90}
TWO = {"query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "sliding_window": 5}
ALTERNATING = ("sliding_attention", "full_attention")
CASES = {
    "Gemma 1": (SIZES, None),
    "Gemma 1, one key/value head": (SIZES | {"num_key_value_heads": 1, "head_dim": 32}, None),
    "Gemma 1, slower turns, larger epsilon": (SIZES | {"rope_theta": 500.0, "rms_norm_eps": 0.1}, None),
    "Gemma 2": (SIZES, TWO),
    "Gemma 2, odd number of layers": (SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 4}, TWO),
    "Gemma 2, no caps, window of 1": (
        SIZES,
        TWO | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 1},
    ),
    "Gemma 2, window longer than the text": (SIZES | {"head_dim": 6}, TWO | {"sliding_window": 100}),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def configs(sizes: dict, two: dict | None) -> tuple:
    """Theirs and ours."""
    rope = {"rope_type": "default", "rope_theta": sizes.get("rope_theta", 10_000.0)}
    plain = {key: value for key, value in sizes.items() if key != "rope_theta"} | {"rope_parameters": rope}
    if two is None:
        return transformers.GemmaConfig(**plain, attn_implementation="eager"), GemmaConfig(**sizes)
    layer_types = (ALTERNATING * sizes["num_hidden_layers"])[: sizes["num_hidden_layers"]]
    theirs = transformers.Gemma2Config(**plain, **two, attn_implementation="eager")
    assert tuple(theirs.layer_types) == layer_types  # layer 0 slides
    return theirs, GemmaConfig(**sizes, **two, layer_types=layer_types, four_norms=True)


def twins(sizes: dict, two: dict | None, seed: int = 0, dtype: torch.dtype = torch.float32):
    their_config, our_config = configs(sizes, two)
    kind = transformers.GemmaForCausalLM if two is None else transformers.Gemma2ForCausalLM
    theirs, ours = kind(their_config).eval(), Gemma(our_config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            random = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * random if parameter.dim() == 1 else 1.5 * random / parameter.shape[1] ** 0.5)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    ours.load_state_dict(theirs.model.state_dict())  # strict: the names are those of the checkpoint
    return theirs, ours


def causal(length: int, window: int | None, real: torch.Tensor | None = None) -> torch.Tensor:
    back = torch.arange(length)[:, None] - torch.arange(length)
    allowed = ((back >= 0) & (back < (window or length)))[None, None]
    return allowed if real is None else allowed & real[:, None, None, :]


def our_logits(model: Gemma, ids: torch.Tensor) -> torch.Tensor:
    length = ids.shape[1]
    masks = {window: causal(length, window) for window in model.windows()}
    hidden = model(model.embed(ids), torch.arange(length).expand_as(ids), masks)
    return tied_logits(hidden, model.embed_tokens.weight, model.config.final_logit_softcapping)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name):
    theirs, ours = twins(*CASES[name])
    ids = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=torch.ones_like(ids)).logits
        error = (our_logits(ours, ids) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5  # the measure of the whole book: a hundred roundings of 6e-8


@pytest.mark.parametrize("name", CASES)
def test_cached_steps_equal_transformers_on_rows_of_different_lengths(name):
    """A prompt of 6 columns, the second row padded on the left, then one token at a time with our cache."""
    theirs, ours = twins(*CASES[name], seed=2)
    ids = torch.randint(0, 90, (2, 20), generator=torch.Generator().manual_seed(2))
    real = torch.ones(2, 20, dtype=torch.bool)
    real[1, :3] = False
    positions = (real.long().cumsum(-1) - 1).clamp(min=0)
    head, cap = ours.embed_tokens.weight, ours.config.final_logit_softcapping
    with torch.no_grad():
        expected = theirs(ids, attention_mask=real.long(), position_ids=positions).logits
        caches = ours.new_caches(2, 20)
        masks = {window: causal(6, window, real[:, :6]) for window in ours.windows()}
        found = [tied_logits(ours(ours.embed(ids[:, :6]), positions[:, :6], masks, caches), head, cap)]
        for place in range(6, 20):
            step = slice(place, place + 1)
            masks = {cache.window: real[:, cache.columns(place + 1)][:, None, None] for cache in caches}
            found.append(tied_logits(ours(ours.embed(ids[:, step]), positions[:, step], masks, caches), head, cap))
    difference = (torch.cat(found, dim=1) - expected)[real]
    assert difference.abs().max() / expected[real].abs().max() <= 1e-5


@pytest.mark.parametrize("name", ("Gemma 1", "Gemma 2"))
def test_gradients_equal_transformers_also_through_the_tied_table(name):
    theirs, ours = twins(*CASES[name], seed=3)
    ids = torch.randint(0, 90, (2, 11), generator=torch.Generator().manual_seed(3))
    target = torch.randn(2, 11, 90, generator=torch.Generator().manual_seed(4))
    (theirs(ids, attention_mask=torch.ones_like(ids)).logits * target).sum().backward()
    (our_logits(ours, ids) * target).sum().backward()
    expected = {key: parameter.grad for key, parameter in theirs.model.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - expected[key]).abs().max() <= 1e-5 * largest, key
    untouched = torch.ones(90, dtype=torch.bool)
    untouched[ids.flatten()] = False
    assert ours.embed_tokens.weight.grad[untouched].abs().max() > 0  # rows that no token took: they have it as a head


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("size", (1e-3, 1.0, 3e4))
def test_rms_norm_equals_transformers(dtype, size):
    """At 30,000 a square is beyond float16's reach, at 0.001 it is as small as epsilon."""
    ours, theirs = RMSNorm(24), GemmaRMSNorm(24)
    weight = 0.5 * torch.randn(24)
    ours.weight.data, theirs.weight.data = weight.to(dtype), weight.to(dtype)
    vectors = (size * torch.randn(3, 5, 24).clamp(-2, 2)).to(dtype)
    normal = ours(vectors)
    assert normal.dtype == dtype and normal.isfinite().all()
    if dtype is torch.float32:  # a few of the last bit
        torch.testing.assert_close(normal, theirs(vectors), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    else:  # one rounding, at the end: who rounds before the weight is at most two units off
        assert torch.equal(normal, theirs(vectors))


def test_a_fresh_norm_scales_nothing():
    vectors = torch.randn(7, 24)
    torch.testing.assert_close(RMSNorm(24)(vectors).square().mean(-1), torch.ones(7), rtol=1e-5, atol=1e-5)


def test_geglu_equals_transformers_and_is_not_swiglu():
    ours = GeGLU(12, 31)
    vectors = torch.randn(2, 5, 12) * 3
    for bend, same in (
        ("gelu_pytorch_tanh", True),
        ("gelu", True),
        ("silu", False),
    ):  # "gelu" in old files means tanh too
        theirs = GemmaMLP(transformers.GemmaConfig(hidden_size=12, intermediate_size=31, hidden_act=bend))
        theirs.load_state_dict(ours.state_dict())
        error = (ours(vectors) - theirs(vectors)).abs().max()
        assert (error < 1e-6) if same else (error > 1e-2), (bend, error)  # same steps, same numbers of size 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("hidden_size", (36, 192, 2048, 2304))
def test_embeddings_equal_transformers_in_each_dtype(hidden_size, dtype):
    """The factor sqrt(D) is rounded to the dtype first: 45.25, not 45.2548, for 2,048 in bfloat16."""
    sizes = SIZES | {"hidden_size": hidden_size, "num_hidden_layers": 1, "intermediate_size": 8}
    theirs, ours = twins(sizes, None, dtype=dtype)
    ids = torch.arange(90)[None]
    seen = {}
    theirs.model.layers[0].register_forward_pre_hook(lambda module, given: seen.update(first=given[0]))
    with torch.no_grad():
        theirs(ids, attention_mask=torch.ones_like(ids))
        assert torch.equal(ours.embed(ids), seen["first"])


@pytest.mark.parametrize(
    "option, value",
    (
        ("query_pre_attn_scalar", 5),
        ("attn_logit_softcapping", None),
        ("final_logit_softcapping", None),
        ("sliding_window", 2),
        ("layer_types", ("full_attention",) * 4),
    ),
)
def test_each_option_of_gemma_2_matters(option, value):
    """Otherwise the tests above would pass without it."""
    _, ours = twins(SIZES, TWO)
    _, config = configs(SIZES, TWO)
    changed = Gemma(GemmaConfig(**(vars(config) | {option: value})))
    changed.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 90, (2, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (our_logits(ours, ids) - our_logits(changed, ids)).abs().max() > 1e-3


def test_windows_and_caches_follow_the_layers():
    _, config = configs(SIZES, TWO)
    model = Gemma(config).to(torch.bfloat16)
    assert [config.window(layer) for layer in range(4)] == [5, None, 5, None]
    assert model.windows() == {5, None} and Gemma(GemmaConfig(**SIZES)).windows() == {None}
    caches = model.new_caches(3, 20)
    assert [tuple(cache.key.shape) for cache in caches] == [(3, 2, 5, 10), (3, 2, 20, 10)] * 2
    assert {cache.key.dtype for cache in caches} == {torch.bfloat16}


@pytest.mark.parametrize(
    "sizes, two",
    (
        ((2048, 16384, 18, 8, 1, 256, 257_216), None),
        ((2304, 9216, 26, 8, 4, 256, 257_216), {"query_pre_attn_scalar": 256, "sliding_window": 4096}),
        ((3584, 14336, 42, 16, 8, 256, 257_216), {"query_pre_attn_scalar": 256, "sliding_window": 4096}),
        ((4608, 36864, 46, 32, 16, 128, 257_216), {"query_pre_attn_scalar": 144, "sliding_window": 4096}),
    ),
    ids=("3B", "2-3B", "2-10B", "2-28B"),
)
def test_names_and_shapes_of_the_published_sizes(sizes, two):
    """On the meta device: nothing is allocated."""
    their_config, our_config = configs(dict(zip(SIZES_IN_ORDER, sizes, strict=True)), two)
    with torch.device("meta"):
        theirs = (transformers.GemmaModel if two is None else transformers.Gemma2Model)(their_config)
        ours = Gemma(our_config)
    expected = {key: tensor.shape for key, tensor in theirs.named_parameters()}
    assert {key: tensor.shape for key, tensor in ours.named_parameters()} == expected
    assert ours.layers[0].self_attn.scale == theirs.layers[0].self_attn.scaling


SIZES_IN_ORDER = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def test_soft_cap_of_the_last_scores():
    hidden, table = torch.tensor([[1000.0, 0.0], [0.1, 0.0], [-1000.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(
        tied_logits(hidden, table, 30.0)[:, 0], torch.tensor([30.0, 0.1, -30.0]), rtol=1e-4, atol=0
    )
    assert torch.equal(tied_logits(hidden, table)[:, 0], hidden[:, 0])
