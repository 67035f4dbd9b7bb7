"""Patches against torch's convolution and the SigLIP embedding of `transformers`."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import SiglipVisionConfig
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from sigma_book.patches import PatchEmbeddings, patchify
from sigma_book.world import draw_scene, make_scene

# Sums of a few hundred products of size 1, in float32: two orders of summation differ by some 1e-6.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(("size", "patch", "channels"), [(28, 14, 3), (30, 5, 1), (56, 14, 3), (9, 3, 4), (14, 14, 3)])
def test_patches_are_the_crops_in_reading_order(size, patch, channels):
    pictures = torch.randn(2, channels, size, size)
    patches = patchify(pictures, patch)
    side = size // patch
    assert patches.shape == (2, side * side, channels * patch * patch)
    for place in range(side * side):
        top, left = place // side * patch, place % side * patch
        crop = pictures[:, :, top : top + patch, left : left + patch]
        assert torch.equal(patches[:, place], crop.reshape(2, -1))  # moved, not computed: equal bit for bit


def test_a_drawn_scene_is_cut_as_pillow_cuts_it():
    drawn = draw_scene(make_scene(5))
    patches = patchify(torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None].float(), 14)
    for place in (0, 9, 36, 63):
        top, left = place // 8 * 14, place % 8 * 14
        crop = np.array(drawn.crop((left, top, left + 14, top + 14))).transpose(2, 0, 1).reshape(-1)
        assert np.array_equal(patches[0, place].numpy(), crop)


def test_fold_undoes_the_cut():
    pictures = torch.randn(3, 3, 42, 42)
    assert torch.equal(F.fold(patchify(pictures, 14).transpose(1, 2), 42, kernel_size=14, stride=14), pictures)


@pytest.mark.parametrize(("height", "width"), [(28, 30), (30, 28), (13, 14), (29, 29)])
def test_a_picture_that_does_not_divide_is_an_error(height, width):
    with pytest.raises(ValueError, match=rf"{height} x {width}.*14"):
        patchify(torch.zeros(1, 3, height, width), 14)


@pytest.mark.parametrize(("size", "patch", "width", "channels"), [(28, 14, 24, 3), (56, 14, 33, 3), (20, 4, 7, 1)])
def test_embeddings_equal_convolution_plus_table(size, patch, width, channels):
    embed = PatchEmbeddings(size, patch, width, channels)
    pictures = torch.randn(2, channels, size, size)
    expected = embed.patch_embedding(pictures).flatten(2).transpose(1, 2) + embed.position_embedding.weight
    torch.testing.assert_close(embed(pictures), expected, **CLOSE)


@pytest.mark.parametrize(("size", "width"), [(28, 24), (112, 36)])
def test_embeddings_equal_transformers(size, width):
    reference = SiglipVisionEmbeddings(SiglipVisionConfig(image_size=size, patch_size=14, hidden_size=width))
    embed = PatchEmbeddings(size, 14, width)
    ours = {name for name, _ in embed.named_parameters()}
    assert ours == {name for name, _ in reference.named_parameters()}
    embed.load_state_dict({name: tensor for name, tensor in reference.state_dict().items() if name in ours})
    pictures = torch.rand(3, 3, size, size) * 2 - 1
    torch.testing.assert_close(embed(pictures), reference(pictures), **CLOSE)


@pytest.mark.parametrize(("size", "tokens"), [(112, 64), (224, 256), (448, 1024), (896, 4096)])
def test_token_counts(size, tokens):
    with torch.device("meta"):
        embed = PatchEmbeddings(size, 14, 8)
        assert embed(torch.empty(1, 3, size, size)).shape == (1, tokens, 8)


def test_another_size_is_an_error_that_names_both():
    with pytest.raises(ValueError, match=r"28 x 28.*\b42\b.*\b56\b"):
        PatchEmbeddings(28, 14, 8)(torch.zeros(1, 3, 42, 56))


def test_pictures_take_the_dtype_of_the_weights():
    embed = PatchEmbeddings(28, 14, 8).to(torch.bfloat16)
    assert embed(torch.zeros(1, 3, 28, 28)).dtype == torch.bfloat16


def test_gradients_reach_every_weight():
    embed = PatchEmbeddings(28, 14, 8)
    embed(torch.randn(1, 3, 28, 28)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in embed.parameters())
