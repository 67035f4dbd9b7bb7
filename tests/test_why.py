"""Which patches an answer rests on: the maps against plain autograd and finite differences, and where the world knows."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sigma_book.assemble import POCKET, generate, load
from sigma_book.processor import Processor, Tokenizer
from sigma_book.why import Look, answer_pieces, explain, looks_as_json
from sigma_book.world import ask, caption, draw_scene, make_scene

GEMMA_2 = {
    "four_norms": True,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 4.0,
    "sliding_window": 3,
    "layer_types": ("sliding_attention", "full_attention"),
}


@pytest.fixture(scope="module")
def pocket():
    return load(device="cpu")


def plain_maps(model, image, prompt: str, answer: str) -> np.ndarray:
    """The same in the plainest way: the model's own reading with nothing saved on memory, one backward for each token."""
    batch = model.processor.prepare([image], [prompt], [answer])
    layers = model.vision_tower.encoder.layers
    entering = []
    hook = layers[len(layers) // 4].register_forward_pre_hook(
        lambda module, given: entering.append(given[0].detach().requires_grad_()) or (entering[0],)
    )
    logits = model(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids)[0]
    hook.remove()
    maps = []
    for column in (batch.labels[0] != -100).nonzero()[:-1, 0].tolist():  # without the end
        scores = logits[column - 1]
        said = int(batch.input_ids[0, column])
        rival = max((score, token) for token, score in enumerate(scores.tolist()) if token != said)[1]
        (gradient,) = torch.autograd.grad(scores[said] - scores[rival], entering[0], retain_graph=True)
        gradient, tokens = gradient[0].double().numpy(), entering[0][0].detach().double().numpy()  # (P, Dv)
        ordinary = np.sort(tokens, axis=0)[(len(tokens) - 1) // 2]
        weights = np.sqrt((gradient**2 * (tokens - ordinary) ** 2).sum(axis=1))
        maps.append((weights / weights.sum()).reshape(int(len(tokens) ** 0.5), -1))
    return np.stack(maps)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6, "num_hidden_layers": 3},
        GEMMA_2,
        GEMMA_2
        | {"num_hidden_layers": 5, "layer_types": ("sliding_attention", "full_attention") * 2 + ("sliding_attention",)},
    ],
)
def test_the_maps_are_those_of_plain_autograd(make_tiny, tmp_path, pictures, options):
    model = load(make_tiny(tmp_path / "model", **options), device="cpu")
    looks = explain(model, pictures[1], "caption en", "a red star")
    wanted = plain_maps(model, pictures[1], "caption en", "a red star")
    assert [look.weights.shape for look in looks] == [(2, 2)] * 3
    # float32 sums in another order (blocks one by one, scores for some places only): a few units in the sixth place
    np.testing.assert_allclose(torch.stack([look.weights for look in looks]).numpy(), wanted, rtol=2e-4, atol=1e-6)


def test_the_maps_of_the_pocket_model_are_those_of_plain_autograd(pocket, pictures):
    answer = generate(pictures[2], "caption en", model=pocket)
    looks = explain(pocket, pictures[2], "caption en", answer)
    assert "".join(look.text for look in looks) == answer
    weights = torch.stack([look.weights for look in looks])
    assert weights.shape[1:] == (8, 8) and weights.dtype == torch.float32 and (weights >= 0).all()
    torch.testing.assert_close(weights.sum((1, 2)), torch.ones(len(looks)))
    wanted = plain_maps(pocket, pictures[2], "caption en", answer)
    # gradients through 8 blocks in float32: a thousandth of a share of at least a millionth
    np.testing.assert_allclose(weights.numpy(), wanted, rtol=1e-3, atol=1e-6)


def test_no_autograd_at_all(make_tiny, tmp_path, pictures):
    """Finite differences: shift each number of each patch a little and read the scores again."""
    model = load(make_tiny(tmp_path / "model"), device="cpu").double()
    batch = model.processor.prepare([pictures[0]], ["caption en"], ["star"])
    with torch.no_grad():
        tokens = model.vision_tower.embeddings(batch.pixel_values.double())  # one block: its quarter is block 0
        said = int(batch.input_ids[0, -2])

        def lead(patches: torch.Tensor) -> float:
            tower = model.vision_tower
            features = model.multi_modal_projector(tower.post_layernorm(tower.encoder(patches)))
            hidden = model.hidden_states(batch.input_ids, features, batch.attention_mask, batch.token_type_ids)
            scores = model.logits(hidden[0, -3])
            return float(scores[said] - torch.cat([scores[:said], scores[said + 1 :]]).max())

        step = 3e-3
        slopes = torch.zeros_like(tokens)
        for place in np.ndindex(*tokens.shape):
            up, down = tokens.clone(), tokens.clone()
            up[place] += step
            down[place] -= step
            slopes[place] = (lead(up) - lead(down)) / (2 * step)
    weights = (slopes[0] * (tokens[0] - tokens[0].median(0).values)).norm(dim=-1)
    (look,) = explain(model, pictures[0], "caption en", "star")
    # the norms count in float32 whatever the model's dtype: scores are off by 1e-6, slopes by 1e-6 / step
    torch.testing.assert_close(look.weights.flatten(), (weights / weights.sum()).float(), rtol=5e-3, atol=1e-3)


def test_nothing_in_the_model_changes(pocket, pictures):
    model = load(device="cpu").requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = explain(model, pictures[0], "caption en", "a red star")
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(False)
    frozen = explain(model, pictures[0], "caption en", "a red star")
    with torch.inference_mode():
        inferred = explain(model, pictures[0], "caption en", "a red star")
    with torch.no_grad():
        quiet = explain(model.train(), pictures[0], "caption en", "a red star")
    for other in (frozen, inferred, quiet):
        assert all(torch.equal(one.weights, two.weights) for one, two in zip(wanted, other, strict=True))
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "nf4", "dtype": "float32"}])
def test_sixteen_and_four_bits(pocket, options):
    scene = make_scene(80_000_016)
    exact = explain(pocket, draw_scene(scene), "caption en", caption(scene))
    rough = explain(load(device="cpu", **options), draw_scene(scene), "caption en", caption(scene))
    for one, two in zip(exact, rough, strict=True):
        assert two.weights.dtype == torch.float32
        assert abs(two.weights.sum().item() - 1) < 1e-5
        even = one.weights.mean()  # nearer than a map that says nothing
        assert (one.weights - two.weights).abs().sum() < 0.5 * (one.weights - even).abs().sum()


def test_memory_does_not_grow_with_what_blocks_hold(pocket, pictures):
    """Bytes that autograd keeps of one reading, weights left out; what enters the blocks is held by the checkpoints."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in pocket.parameters()}
    answer = "a red star and a green ring"
    batch = pocket.processor.prepare([pictures[0]], ["caption en"], [answer])

    def kept_by(work) -> int:
        kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

        def count(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            work()
        return sum(storage.nbytes() for storage in kept.values())

    plain = kept_by(
        lambda: pocket(batch.input_ids, batch.pixel_values.requires_grad_(), batch.attention_mask, batch.token_type_ids)
    )
    ours = kept_by(lambda: explain(pocket, pictures[0], "caption en", answer))
    assert plain > 5 * ours


ANSWERS = [
    "é",
    "日本 star",
    "😀",
    "a\nb",
    "  two  spaces ",
    "<loc0010><loc0020><loc0300><loc0400> red star",
    "ﬁ",
    "\ufffd",
    "\u200b",
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_words_joined_are_the_answer(pocket, pictures, answer):
    looks = explain(pocket, pictures[0], "caption en", answer)
    tokenizer = pocket.processor.tokenizer
    assert "".join(look.text for look in looks) == tokenizer.decode(tokenizer.encode(answer))
    assert all(look.text for look in looks) and all(look.weights.isfinite().all() for look in looks)
    if answer.startswith("<loc"):
        assert [look.text for look in looks] == ["<loc0010>", "<loc0020>", "<loc0300>", "<loc0400>", " red", " star"]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30))
@settings(max_examples=80, deadline=None)
def test_pieces_of_any_text(text):
    tokenizer = Tokenizer.from_folder(POCKET)
    tokens = tokenizer.encode(text)
    pieces = answer_pieces(tokens, tokenizer.decode)
    assert "".join(piece for piece, _ in pieces) == tokenizer.decode(tokens)
    assert sum(count for _, count in pieces) == len(tokens)
    assert all(count > 0 for _, count in pieces)


def test_tokens_without_text_join_a_neighbour(pocket):
    tokenizer = pocket.processor.tokenizer
    star, silent = tokenizer.encode(" star"), tokenizer.bos_id
    assert answer_pieces([silent, *star, *star, silent], tokenizer.decode) == [(" star", 2), (" star", 2)]
    assert answer_pieces([silent], tokenizer.decode) == [("", 1)]
    looks = explain(pocket, draw_scene(make_scene(1)), "caption en", "<bos>")
    assert [look.text for look in looks] == [""]


def test_a_picture_of_one_colour_gives_a_map_that_is_finite(pocket):
    looks = explain(pocket, Image.new("RGB", (50, 20), "white"), "caption en", "a red star")
    assert all(look.weights.isfinite().all() for look in looks)


def test_bad_input_is_a_sentence(pocket, tiny_model, pictures, tmp_path):
    picture = pictures[0]
    for answer in ("", None, 5, ["red"]):
        with pytest.raises(ValueError, match="expected the text that is to be explained"):
            explain(pocket, picture, "caption en", answer)
    with pytest.raises(ValueError, match="at most 4 are explained"):
        explain(pocket, picture, "caption en", "a red star and a ring", max_tokens=4)
    assert len(explain(pocket, picture, "caption en", "a red star and", max_tokens=4)) == 4
    with pytest.raises(ValueError, match="context is 96 tokens, so shorten one by"):
        explain(tiny_model, picture, "star " * 95, "a red star")
    with pytest.raises(ValueError, match="<image>"):
        explain(pocket, picture, "caption <image>", "red")
    with pytest.raises(ValueError, match="<image>"):
        explain(pocket, picture, "caption", "red <image>")
    with pytest.raises(ValueError, match="lone surrogate"):
        explain(pocket, picture, "caption", "red \ud800")
    with pytest.raises(ValueError, match="a picture is a path"):
        explain(pocket, [picture, picture], "caption", "red")
    with pytest.raises(FileNotFoundError, match="no such file"):
        explain(pocket, tmp_path / "none.png", "caption", "red")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="broken.png"):
        explain(pocket, tmp_path / "broken.png", "caption", "red")
    bare = load(device="cpu")
    del bare.processor
    with pytest.raises(ValueError, match="no processor"):
        explain(bare, picture, "caption", "red")


def test_the_context_counts_to_the_last_token(tiny_model, pictures):
    """A row that just fits is explained; one more token is told."""
    processor: Processor = tiny_model.processor
    used = len(processor.prepare([pictures[0]], ["caption en"], [" star"]).input_ids[0]) - 1
    room = 96 - used
    assert len(explain(tiny_model, pictures[0], "caption en", " star" * (1 + room))) == 1 + room
    with pytest.raises(ValueError, match="shorten one by 1 or more"):
        explain(tiny_model, pictures[0], "caption en", " star" * (2 + room))


def test_maps_without_gradient_are_told(tiny_folder, pictures):
    """As kernels in whole numbers have none: all of them, or those of attention alone."""
    model = load(tiny_folder, device="cpu")
    project = model.multi_modal_projector.forward
    model.multi_modal_projector.forward = lambda features: project(features).detach()
    with pytest.raises(ValueError, match="no gradient reaches the picture"):
        explain(model, pictures[0], "caption en", "red")
    model.multi_modal_projector.forward = lambda features: project(features) * float("inf")
    with pytest.raises(ValueError, match="not finite"):
        explain(model, pictures[0], "caption en", "red")
    model = load(tiny_folder, device="cpu")
    for block in model.language_model.layers:
        attend = block.self_attn.forward
        block.self_attn.forward = lambda *given, attend=attend: attend(*given).detach()
    with pytest.raises(ValueError, match="no gradient reaches the picture"):
        explain(model, pictures[0], "caption en", "red")


@pytest.mark.parametrize("options", [{"compile": True}, {"quantize": "int8"}], ids=str)
def test_models_made_for_speed_are_told(tiny_folder, pictures, options):
    with pytest.raises(
        ValueError, match="no gradient reaches the picture: load the model without quantize and compile"
    ):
        explain(load(tiny_folder, device="cpu", **options), pictures[0], "caption en", "red")


def test_what_is_given_up_begins_no_further_token(tiny_model, pictures):
    answer = "a red star"
    looks = explain(tiny_model, pictures[0], "caption en", answer)
    asked = iter([False, False, True])
    some = explain(tiny_model, pictures[0], "caption en", answer, given_up=SimpleNamespace(is_set=lambda: next(asked)))
    assert [look.text for look in some] == [look.text for look in looks[:2]]


def test_json_form(pocket, pictures):
    looks = explain(pocket, pictures[0], "caption en", "a red star")
    form = json.loads(json.dumps(looks_as_json(looks)))
    assert form["side"] == 8 and [token["text"] for token in form["tokens"]] == ["a", " red", " star"]
    for look, token in zip(looks, form["tokens"], strict=True):
        np.testing.assert_allclose(token["weights"], look.weights.numpy(), atol=5e-7)
    assert looks_as_json([]) == {"side": 0, "tokens": []}
    assert looks_as_json([Look("x", torch.zeros(1, 1))]) == {"side": 1, "tokens": [{"text": "x", "weights": [[0.0]]}]}


def colour_questions(count: int, first_seed: int):
    seed, rows = first_seed, []
    while len(rows) < count:
        scene = make_scene(seed)
        question = ask(scene, "colour", random.Random(seed))
        if question is not None:
            shape = question.prompt.split()[-1].rstrip("?")
            rows.append((scene, question, next(thing for thing in scene.things if thing.shape == shape)))
        seed += 1
    return rows


@pytest.mark.slow
def test_the_top_patch_lies_on_the_object(pocket):
    """Scenes that neither training nor the chapter, which asserts the same of two hundred others, has seen."""
    rows = colour_questions(60, 71_000_000)
    said = generate([draw_scene(scene) for scene, *_ in rows], [q.prompt for _, q, _ in rows], model=pocket)
    right = touches = centred = 0
    for (scene, question, thing), answer in zip(rows, said, strict=True):
        if answer != question.answer:
            continue
        right += 1
        (look,) = explain(pocket, draw_scene(scene), question.prompt, answer)
        row, column = divmod(int(look.weights.argmax()), 8)
        top, left, bottom, far = thing.box
        touches += 14 * row < bottom and 14 * row + 14 > top and 14 * column < far and 14 * column + 14 > left
        centred += top <= 14 * row + 7 < bottom and left <= 14 * column + 7 < far
    assert right >= 55
    assert touches >= 0.9 * right, f"{touches} of {right}"
    assert centred >= 0.8 * right, f"{centred} of {right}"


@pytest.mark.slow
def test_another_answer_has_another_map(pocket):
    """The map belongs to the word: in a caption each colour points at its own thing more often than at the others."""
    near = far = 0
    for seed in range(71_500_000, 71_500_030):
        scene = make_scene(seed)
        kinds = [thing.kind for thing in scene.things]
        if len(kinds) < 2 or len(set(kinds)) < len(kinds):
            continue
        looks = explain(pocket, draw_scene(scene), "caption en", caption(scene))
        words = [look.text.strip() for look in looks]
        for thing in scene.things:
            place = next(i for i in range(len(words) - 1) if words[i] == thing.colour and words[i + 1] == thing.shape)
            row, column = divmod(int(looks[place].weights.argmax()), 8)
            hit = [
                t
                for t in scene.things
                if 14 * row < t.box[2]
                and 14 * row + 14 > t.box[0]
                and 14 * column < t.box[3]
                and 14 * column + 14 > t.box[1]
            ]
            near += thing in hit
            far += bool(hit) and thing not in hit
    assert near > 5 * far, (near, far)
    assert near + far > 20
