"""The vision tower against `transformers` and torch; the sigmoid loss against loops and torch's cross-entropy."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

from sigma_book.siglip import SiglipBlock, SiglipConfig, SiglipMLP, SiglipVisionTower, sigmoid_loss

SIZES = [
    {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28},
    {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 42},
    {"hidden_size": 30, "intermediate_size": 17, "num_hidden_layers": 5, "num_attention_heads": 5, "image_size": 70},
]
SO400M = SiglipConfig(1152, 4304, 27, 16, image_size=224, patch_size=14)


def twins(sizes: dict, seed: int = 0, **options) -> tuple[SiglipVisionTower, SiglipVisionModel]:
    """Our tower and that of transformers, with the same random weights, the norms' and biases' included."""
    config = SiglipVisionConfig(**sizes, patch_size=14, vision_use_head=False, **options)
    theirs = SiglipVisionModel(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * random)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * random)
            else:
                parameter.copy_(random / parameter[0].numel() ** 0.5)
    ours = SiglipVisionTower(SiglipConfig(**sizes, patch_size=14, **options))
    state = {name.removeprefix("vision_model."): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith("position_ids")})
    return ours, theirs


@pytest.mark.parametrize("sizes", SIZES)
def test_tower_equals_transformers(sizes):
    ours, theirs = twins(sizes)
    pictures = torch.rand(2, 3, sizes["image_size"], sizes["image_size"]) * 2 - 1
    with torch.no_grad():
        expected = theirs(pictures).last_hidden_state
        error = (ours(pictures) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5  # float32 rounds at 6e-8; a few hundred sums and up to five blocks stand between


def test_the_norms_epsilon_is_read():
    """Dark, flat pictures make small tokens: there epsilon shows."""
    sizes = SIZES[0]
    pictures = torch.zeros(1, 3, 28, 28)
    features = {}
    for eps in (1e-6, 1.0):
        ours, theirs = twins(sizes, layer_norm_eps=eps)
        with torch.no_grad():
            features[eps] = ours(pictures)
            torch.testing.assert_close(features[eps], theirs(pictures).last_hidden_state, rtol=1e-5, atol=1e-5)
    assert (features[1e-6] - features[1.0]).abs().max() > 0.01


def test_gradients_equal_transformers():
    ours, theirs = twins(SIZES[1])
    pictures = torch.rand(2, 3, 42, 42) * 2 - 1
    target = torch.randn(2, 9, 36)
    for features in (ours(pictures), theirs(pictures).last_hidden_state):
        (features * target).sum().backward()
    expected = {name.removeprefix("vision_model."): parameter.grad for name, parameter in theirs.named_parameters()}
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, parameter in ours.named_parameters():
        # k_proj.bias has a gradient of zero in theory, so the yardstick is the whole tower's largest
        assert (parameter.grad - expected[name]).abs().max() <= 1e-5 * largest, name


def test_mlp_bends_with_the_tanh_form():
    mlp = SiglipMLP(2, 1)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.zero_()
        mlp.fc1.weight[0, 0] = 1
        mlp.fc2.weight[0, 0] = 1
    for x in (-3.0, -2.0, -0.5, 0.0, 0.7, 2.3):
        tanh = x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        assert mlp(torch.tensor([x, 0.0]))[0].item() == pytest.approx(tanh, abs=1e-6)
    exact = -2.3 * 0.5 * math.erfc(2.3 / math.sqrt(2))  # the tanh form lies 4.5e-4 from it: 1e-6 tells them apart
    assert abs(mlp(torch.tensor([-2.3, 0.0]))[0].item() - exact) > 1e-4


def test_a_block_that_adds_nothing_passes_its_tokens_on():
    block = SiglipBlock(SiglipConfig(24, 40, 1, 2, image_size=28, patch_size=14))
    with torch.no_grad():
        for layer in (block.self_attn.out_proj, block.mlp.fc2):
            layer.weight.zero_()
            layer.bias.zero_()
    tokens = torch.randn(2, 5, 24)
    assert torch.equal(block(tokens), tokens)


def test_defaults_are_those_of_transformers():
    ours, theirs = SiglipConfig(), SiglipVisionConfig()
    for field in SiglipConfig.__dataclass_fields__:
        assert getattr(ours, field) == getattr(theirs, field), field


def test_so400m_has_412_million_parameters_and_the_shapes_of_transformers():
    with torch.device("meta"):
        ours = SiglipVisionTower(SO400M)
        theirs = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=1152,
                intermediate_size=4304,
                num_hidden_layers=27,
                num_attention_heads=16,
                image_size=224,
                patch_size=14,
                vision_use_head=False,
            )
        )
    shapes = {name: parameter.shape for name, parameter in ours.named_parameters()}
    assert sum(shape.numel() for shape in shapes.values()) == 412_442_352
    assert shapes == {name.removeprefix("vision_model."): p.shape for name, p in theirs.named_parameters()}
    assert SO400M.num_patches == 256


def features(count: int, seed: int, width: int = 8) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize(("scale", "bias"), [(1.0, 0.0), (10.0, -10.0), (30.0, -5.0)])
def test_loss_equals_the_loops(scale, bias):
    images, texts = features(5, 0), features(5, 1)
    total = 0.0
    for i in range(5):
        for j in range(5):
            score = scale * float(images[i].double() @ texts[j].double()) + bias
            total += math.log1p(math.exp(-score if i == j else score))
    ours = sigmoid_loss(images, texts, torch.tensor(scale), torch.tensor(bias))
    assert ours.item() == pytest.approx(total / 5, rel=1e-5)  # float32 against float64


@pytest.mark.parametrize("count", [1, 4, 9])
def test_loss_equals_torchs_cross_entropy_for_any_matches(count):
    images, texts = features(6, 0), features(count, 1)
    matches = torch.rand(6, count, generator=torch.Generator().manual_seed(2)) < 0.4
    expected = F.binary_cross_entropy_with_logits(7 * images @ texts.T - 3, matches.float(), reduction="sum") / 6
    ours = sigmoid_loss(images, texts, torch.tensor(7.0), torch.tensor(-3.0), matches)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_loss_in_pieces_adds_up():
    images, texts = features(6, 0), features(6, 1)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)
    whole = sigmoid_loss(images, texts, scale, bias)
    same = torch.eye(6, dtype=torch.bool)
    parts = [sigmoid_loss(images, texts[i : i + 2], scale, bias, same[:, i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)


def test_hopeless_scores_give_a_finite_loss_and_gradient():
    scale = torch.tensor(1000.0, requires_grad=True)
    loss = sigmoid_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]), scale, torch.tensor(0.0))
    loss.backward()
    assert loss.item() == pytest.approx(1000.0)
    assert scale.grad.item() == pytest.approx(1.0)


def test_matching_vectors_cost_less_than_swapped_ones():
    images = torch.eye(4)
    scale, bias = torch.tensor(20.0), torch.tensor(-10.0)
    assert sigmoid_loss(images, images, scale, bias) < 1e-3
    assert sigmoid_loss(images, images.roll(1, 0), scale, bias) > 19
