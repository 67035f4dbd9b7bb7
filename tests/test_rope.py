"""Rotary positions against `transformers`, against complex multiplication, and against geometry in float64."""

import math

import pytest
import torch
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding, apply_rotary_pos_emb

from sigma_book.rope import half_split_order, rotary_angles, rotate

HEAD_DIMS = (2, 4, 10, 72, 128, 256)
POSITIONS = torch.tensor([[0, 1, 2, 3, 17, 255, 256, 8191], [5, 5, 4, 1, 0, 0, 900, 2]])  # order and repeats are free


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reference_angles(positions: torch.Tensor, head_dim: int, theta: float, like: torch.Tensor):
    rope = {"rope_type": "default", "rope_theta": theta}
    config = GemmaConfig(head_dim=head_dim, hidden_size=head_dim, num_attention_heads=1, rope_parameters=rope)
    return GemmaRotaryEmbedding(config)(like, positions)


def exact(vectors: torch.Tensor, positions: torch.Tensor, theta: float) -> torch.Tensor:
    """Half-split rotation in float64, written as a multiplication of complex numbers."""
    head_dim = vectors.shape[-1]
    speed = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turn = torch.polar(torch.ones((), dtype=torch.float64), positions.double()[:, None, :, None] * speed)
    first, second = vectors.double().chunk(2, dim=-1)
    turned = torch.complex(first, second) * turn
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("theta", (10_000.0, 500.0, 1e6))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_equals_transformers(head_dim, theta):
    query, key = torch.randn(2, 3, 8, head_dim), torch.randn(2, 1, 8, head_dim)
    angles = rotary_angles(POSITIONS, head_dim, theta)
    cosine, sine = reference_angles(POSITIONS, head_dim, theta, query)
    assert torch.equal(angles[0][:, 0], cosine[..., : head_dim // 2])  # the same float32 steps: bit for bit
    assert torch.equal(angles[1][:, 0], sine[..., : head_dim // 2])
    expected_query, expected_key = apply_rotary_pos_emb(query, key, cosine, sine)
    torch.testing.assert_close(rotate(query, *angles), expected_query, rtol=1e-6, atol=1e-6)  # sums of two products
    torch.testing.assert_close(rotate(key, *angles), expected_key, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_equals_rotation_in_float64(head_dim):
    vectors = torch.randn(2, 3, 8, head_dim)
    turned = rotate(vectors, *rotary_angles(POSITIONS, head_dim))
    # an angle of up to 8,191 radians is known to 8191 * 2**-23 in float32, about 1e-3; near the start to 1e-6
    error = (turned - exact(vectors, POSITIONS, 10_000.0)).abs() / vectors.abs().max()
    assert error.max() < 2e-3
    assert error[:, :, 1:4].max() < 1e-6


@pytest.mark.parametrize("shift", (1, 37, 4000))
def test_scores_depend_on_the_difference_only(shift):
    query, key = torch.randn(2, 4, 1, 256), torch.randn(2, 4, 1, 256)
    size = (query.norm(dim=-1) * key.norm(dim=-1))[..., None]

    def scores(query_at: int, key_at: int) -> torch.Tensor:
        turned = (
            rotate(vector, *rotary_angles(torch.full((2, 1), place), 256))
            for vector, place in ((query, query_at), (key, key_at))
        )
        return torch.matmul(next(turned), next(turned).transpose(-1, -2))

    for query_at, key_at in ((9, 9), (20, 3), (3, 20)):
        moved = scores(query_at + shift, key_at + shift)
        assert ((moved - scores(query_at, key_at)).abs() / size).max() < 1e-4  # rounding of angles up to 4,020
    assert ((scores(20, 3) - scores(20, 4)).abs() / size).max() > 1e-3  # and on the difference they do depend


def test_lengths_are_kept_and_position_zero_turns_nothing():
    vectors = torch.randn(2, 3, 8, 64)
    turned = rotate(vectors, *rotary_angles(POSITIONS, 64))
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1))
    assert torch.equal(turned[0, :, 0], vectors[0, :, 0])
    pairs = turned.unflatten(-1, (2, 32)).norm(dim=-2)
    torch.testing.assert_close(pairs, vectors.unflatten(-1, (2, 32)).norm(dim=-2))  # each pair (i, i + Dh/2) for itself


def test_first_and_last_pair_turn_at_the_speeds_of_the_paper():
    cosine, sine = rotary_angles(torch.tensor([[1]]), 256)
    assert math.isclose(math.atan2(sine[0, 0, 0, 0], cosine[0, 0, 0, 0]), 1.0, rel_tol=1e-6)
    assert math.isclose(math.atan2(sine[0, 0, 0, -1], cosine[0, 0, 0, -1]), 10_000 ** (-254 / 256), rel_tol=1e-5)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_sixteen_bits_go_in_and_come_out_but_the_turn_is_in_float32(dtype):
    vectors = torch.randn(2, 3, 8, 64).to(dtype)
    angles = rotary_angles(POSITIONS, 64)
    assert angles[0].dtype == angles[1].dtype == torch.float32
    turned = rotate(vectors, *angles)
    assert turned.dtype == dtype
    assert torch.equal(turned, rotate(vectors.float(), *angles).to(dtype))  # one rounding, at the end


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_integer_positions_of_any_width(dtype):
    assert torch.equal(rotary_angles(POSITIONS.to(dtype), 32)[1], rotary_angles(POSITIONS, 32)[1])


def test_float32_whatever_the_default_dtype():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        cosine, sine = rotary_angles(POSITIONS, 32)
    finally:
        torch.set_default_dtype(before)
    expected = rotary_angles(POSITIONS, 32)
    assert torch.equal(cosine, expected[0]) and torch.equal(sine, expected[1])


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_permutation_between_the_layouts(head_dim):
    vectors = torch.randn(2, 3, 8, head_dim)
    cosine, sine = rotary_angles(POSITIONS, head_dim)
    neighbours = torch.view_as_complex(vectors.unflatten(-1, (-1, 2)).contiguous())  # 0 with 1, 2 with 3, ...
    interleaved = torch.view_as_real(neighbours * torch.complex(cosine, sine)).flatten(-2)
    order = half_split_order(head_dim)
    assert sorted(order.tolist()) == list(range(head_dim))
    torch.testing.assert_close(rotate(vectors[..., order], cosine, sine), interleaved[..., order], rtol=1e-6, atol=1e-6)
    if head_dim > 2:  # without the permutation the two layouts disagree
        assert (rotate(vectors, cosine, sine) - interleaved).abs().max() > 0.1


def test_odd_head_dim_is_refused():
    with pytest.raises(ValueError, match="odd head_dim 7"):
        rotary_angles(POSITIONS, 7)
