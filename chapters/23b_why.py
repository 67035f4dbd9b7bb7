# ---
# jupyter:
#   jupytext:
#     formats: py:percent
#     notebook_metadata_filter: -jupytext.text_representation
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why did it say that?
#
# *Which patches did an answer token look at, and may we believe what a map shows?*
#
# **You build** a map of evidence for each token of an answer. **You need** chapters 03 (attention), 04 (the tower) and
# 10 (the whole). **Exports** the module `sigma_book.why`.

# %%
# | export
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from sigma_book.fast import FastPaliGemma
from sigma_book.generation import AnswerText
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import Batch, Processor, load_image
from sigma_book.projector import prefix_mask
from sigma_book.rope import rotary_angles

# %%
import random
from dataclasses import replace

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sigma_book import generate, load
from sigma_book.attention import split_heads
from sigma_book.rope import rotate
from sigma_book.style import ANSWER, GREY, PICTURE, PROMPT, check, save, use_style
from sigma_book.world import Scene, Thing, ask, caption, draw_scene, make_scene

use_style()
model = load()
SIDE, PATCH = 8, 14  # the pocket model sees 8 x 8 patches of 14 pixels

# %% [markdown]
# ## The picture
#
# A scene, a question, an answer of one token. The model has 64 patches to look at. Which of them made it say so?
#
# In this world we know which ones should: those of the thing that was asked about. Its box is drawn below.

# %%
scene = make_scene(80_000_028)
picture, prompt = draw_scene(scene), "answer en what colour is the triangle?"
asked = next(thing for thing in scene.things if thing.shape == "triangle")
answer = generate(picture, prompt, model=model)
assert answer == asked.colour == "orange"


def show(axis, picture, weights=None, box=None, title="") -> None:
    """A picture under its grid of patches; the more weight a patch has, the brighter it stays."""
    axis.imshow(picture)
    if weights is None:
        for edge in range(0, SIDE * PATCH + 1, PATCH):
            axis.plot([edge - 0.5] * 2, [-0.5, 111.5], color="0.7", lw=0.6)
            axis.plot([-0.5, 111.5], [edge - 0.5] * 2, color="0.7", lw=0.6)
    else:
        dark = 0.85 * (1 - (weights / weights.max()).clamp(min=0))
        veil = torch.cat([torch.zeros(SIDE, SIDE, 3), dark[..., None]], dim=-1)
        axis.imshow(veil.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1))
        row, column = divmod(int(weights.argmax()), SIDE)
        axis.add_patch(Rectangle((column * PATCH, row * PATCH), 13, 13, fill=False, ec=PROMPT, lw=2))
    if box is not None:
        top, left, bottom, right = box
        outline = {
            "xy": (left - 0.5, top - 0.5),
            "width": right - left,
            "height": bottom - top,
            "fill": False,
            "lw": 1.2,
        }
        if weights is not None:
            axis.add_patch(Rectangle(**outline, ec="black"))  # seen on bright patches, the dashes on dark ones
        axis.add_patch(Rectangle(**outline, ec="black" if weights is None else "white", ls="--"))
    axis.set_title(title, fontsize=9)
    axis.axis("off")


figure, axis = plt.subplots(figsize=(2.8, 2.8))
show(axis, picture, box=asked.box, title=f"{prompt.removeprefix('answer en ')} {answer}")
save(figure, "23b_question")

# %% [markdown]
# *Figure: a drawn scene of five things under a grid of 8 by 8 patches. A dashed box marks the orange triangle, whose
# colour was asked for.*
#
# ## Cover and ask again, by hand
#
# The plainest way to find out: cover one patch, ask again, and see how much surer or less sure the model is. Do that for
# all 64.
#
# First, what is "sure"? The answer came because its score was above all others. How far above is its **lead**: the score
# of *orange*, minus the best score of any other token. If the lead falls below zero, the answer changes.


# %%
@torch.no_grad()
def leads_of(pictures: list, prompt: str, answer: str) -> torch.Tensor:
    """The lead of an answer's first token, for each of several pictures: (N,)."""
    batch = model.processor.prepare(pictures, [prompt] * len(pictures), [answer] * len(pictures))
    column = int((batch.token_type_ids[0] == 0).sum())  # of the first token of the answer
    features = model.encode_images(batch.pixel_values)
    hidden_states = model.hidden_states(batch.input_ids, features, batch.attention_mask, batch.token_type_ids)
    scores = model.logits(hidden_states[:, column - 1])  # (N, V), at the place that predicts it
    said = int(batch.input_ids[0, column])
    others = torch.cat([scores[:, :said], scores[:, said + 1 :]], dim=1)
    return scores[:, said] - others.amax(1)


def lead_of(picture, prompt: str, answer: str) -> float:
    return leads_of([picture], prompt, answer).item()


def cover(picture, patches: list[int], colour: tuple[int, int, int]):
    """A copy of a picture with some patches painted over."""
    covered = picture.copy()
    for patch in patches:
        row, column = divmod(patch, SIDE)
        covered.paste(colour, (column * PATCH, row * PATCH, (column + 1) * PATCH, (row + 1) * PATCH))
    return covered


def covered_leads(scene: Scene, prompt: str, answer: str) -> torch.Tensor:
    """The lead with each patch covered in turn: (P,)."""
    picture = draw_scene(scene)
    return leads_of([cover(picture, [patch], scene.background) for patch in range(SIDE**2)], prompt, answer)


sure = lead_of(picture, prompt, answer)
by_covering = (sure - covered_leads(scene, prompt, answer)).reshape(SIDE, SIDE)
print(f"lead {sure:.1f}; the patch that matters most takes {by_covering.max():.1f} of it")

# %% [markdown]
# This is the honest way: it asks what *would* happen, and makes it happen. It costs one reading for each patch: 64 here, 256
# for PaliGemma at 224 pixels, 4,096 at 896, and again for each token of the answer. We want the same at the price of a few.
#
# ## What it looked at
#
# Attention has weights between 0 and 1, made for looking. Why not just draw them?
#
# The token that says *orange* is predicted at the last column of the prompt. In each layer's weights, averaged over the
# heads, we take the row of that column, and draw the part of it that falls on the picture.
#
# The model does not give its weights out. So we hang a *pre-hook* on each attention module: a function that PyTorch calls
# with the module's input, just before its `forward`. From that input we compute the weights again.


# %%
class Reading(NamedTuple):
    """One reading, with what went on inside."""

    lead: torch.Tensor  # of the answer's first token, a scalar with its graph
    column: int  # the place that predicts it
    streams: list[torch.Tensor]  # (1, P, Dv): the picture's tokens before each block of the tower, and projected
    vision: list[torch.Tensor]  # (P, P) for each block of the tower: who looks at whom, mean over heads
    decoder: list[torch.Tensor]  # (T, T) for each block of the decoder


def weights_of(query: torch.Tensor, key: torch.Tensor, scale: float, mask=None) -> torch.Tensor:
    scores = query @ key.transpose(-2, -1) * scale  # (1, H, T, T)
    scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1)[0].mean(0).detach()


def read(picture, prompt: str, answer: str) -> Reading:
    batch = model.processor.prepare([picture], [prompt], [answer])
    streams, vision, decoder = [], [], []

    def watch_tower(module, given):
        query, key = (split_heads(part(given[0]), module.num_heads) for part in (module.q_proj, module.k_proj))
        vision.append(weights_of(query, key, query.shape[-1] ** -0.5))

    def watch_decoder(module, given):
        hidden_states, angles, mask, _ = given
        query = rotate(split_heads(module.q_proj(hidden_states), module.num_heads), *angles)
        key = rotate(split_heads(module.k_proj(hidden_states), module.num_kv_heads), *angles)
        key = key.repeat_interleave(module.num_heads // module.num_kv_heads, 1)
        decoder.append(weights_of(query, key, module.scale, mask))

    tower, blocks = model.vision_tower.encoder.layers, model.language_model.layers
    hooks = [
        block.register_forward_pre_hook(lambda module, given: streams.append(given[0].requires_grad_()))
        for block in tower
    ]
    hooks += [block.self_attn.register_forward_pre_hook(watch_tower) for block in tower]
    hooks += [block.self_attn.register_forward_pre_hook(watch_decoder) for block in blocks]
    try:
        streams_out = model.encode_images(batch.pixel_values)
        hidden = model.hidden_states(batch.input_ids, streams_out, batch.attention_mask, batch.token_type_ids)
    finally:
        for hook in hooks:
            hook.remove()
    column = int((batch.token_type_ids[0] == 0).sum()) - 1
    scores, said = model.logits(hidden[0, column]), int(batch.input_ids[0, column + 1])
    lead = scores[said] - torch.cat([scores[:said], scores[said + 1 :]]).max()
    return Reading(lead, column, [*streams, streams_out], vision, decoder)


reading = read(picture, prompt, answer)
assert abs(reading.lead.item() - sure) < 1e-3
over_picture = [layer[reading.column, : SIDE**2].reshape(SIDE, SIDE) for layer in reading.decoder]
print("share of the look that goes to the picture:", [f"{weights.sum():.0%}" for weights in over_picture])

# %% [markdown]
# A token looks in every layer, and each layer mixes what it looked at into it (Abnar and Zuidema 2020, "Quantifying Attention
# Flow in Transformers"). What a late layer looks at is no longer patch 12, but patch 12 with whatever patch 12 had looked at
# before. **Rollout** follows this back. It takes each token to be half itself (the plus of chapter 04) and half what it
# looked at. So a block mixes tokens by $\tfrac12(A + I)$, and all blocks together by the product.
#
# $$ R = M_L \cdots M_2 M_1, \qquad M_l = \tfrac{1}{2}(A_l + I) $$
#
# $A_l$ are the weights of block $l$, mean over heads. The decoder's rollout ends at the projected patches; multiplied by the
# tower's, it ends at the patches as they enter the tower.


# %%
def rollout(layers: list[torch.Tensor]) -> torch.Tensor:
    mixed = torch.eye(len(layers[0]))
    for weights in layers:
        mixed = (weights + torch.eye(len(weights))) / 2 @ mixed
    return mixed  # (T, T): row t is what token t is made of


to_features = rollout(reading.decoder)[reading.column, : SIDE**2]  # (P,)
to_patches = to_features @ rollout(reading.vision)
assert torch.allclose(rollout(reading.decoder).sum(-1), torch.ones(len(reading.decoder[0])), atol=1e-5)

# %% [markdown]
# ## The slope instead of the step
#
# Covering a patch changes its token a lot. Ask for less: if the token changed a *little*, which way would the lead go, and
# how steeply? That slope is the gradient, and one pass backwards gives it for all patches at once.
#
# Let $x_p$ be the token of patch $p$ and $\tilde x$ an ordinary token: number by number, the median over the picture's
# patches, which is mostly background. To first order, making $x_p$ ordinary costs
#
# $$ \ell(x) - \ell(x \text{ with } x_p = \tilde x) \;\approx\; \sum_d g_{pd}\,(x_{pd} - \tilde x_d),
# \qquad g = \frac{\partial \ell}{\partial x} $$
#
# $\ell$ is the lead. This is *gradient times input*, with the ordinary token as zero. The sum may cancel: a token leans on
# some of its numbers and is pushed back by others. We keep the length of the products in place of their sum:
#
# $$ w_p = \big\lVert\, g_p \odot (x_p - \tilde x) \,\big\rVert $$
#
# That is a choice, and choices are measured below. So is another one: *which* token of the patch? The tower makes a new one
# in each block. Before the first it knows its own 14 x 14 pixels and nothing else; behind the last it may stand for anything
# the tower chose to write there.


# %%
def length_map(stream: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    return (gradient * (stream - stream.median(1, keepdim=True).values))[0].norm(dim=-1)  # (P,)


def all_maps(reading: Reading) -> dict[str, torch.Tensor]:
    """A map (P,) for each way of looking."""
    gradients = torch.autograd.grad(reading.lead, reading.streams)
    with torch.no_grad():
        features = rollout(reading.decoder)[reading.column, : SIDE**2]
        maps = {
            f"attention, layer {i + 1}": layer[reading.column, : SIDE**2] for i, layer in enumerate(reading.decoder)
        }
        maps["rollout to the features"] = features
        maps["rollout to the patches"] = features @ rollout(reading.vision)
        for depth, (stream, gradient) in enumerate(zip(reading.streams, gradients)):
            product = gradient * (stream - stream.median(1, keepdim=True).values)
            maps[f"sum, before block {depth + 1}"] = product[0].sum(-1).abs()
            maps[f"length, before block {depth + 1}"] = length_map(stream, gradient)
            maps[f"gradient alone, before block {depth + 1}"] = gradient[0].norm(dim=-1)
    return {name.replace("before block 5", "projected"): weights for name, weights in maps.items()}


maps = all_maps(reading)
shown = ["attention, layer 4", "rollout to the features", "length, projected", "length, before block 2"]
figure, axes = plt.subplots(1, 5, figsize=(10.4, 2.4))
show(axes[0], picture, by_covering.clamp(min=0), asked.box, "covering each patch")
for axis, name in zip(axes[1:], shown):
    show(axis, picture, maps[name].reshape(SIDE, SIDE), asked.box, name)
save(figure, "23b_ways")
star = next(thing for thing in scene.things if thing.shape == "star")
down, along = (PATCH * place + PATCH / 2 for place in divmod(int(by_covering.argmax()), SIDE))
assert star.box[0] <= down < star.box[2] and star.box[1] <= along < star.box[3]

# %% [markdown]
# *Figure: the same scene five times; patches are darker the less weight they have, and the top patch is framed. The maps are
# made by covering each patch, by attention in the last layer, by rollout, and by the gradient at the projected tokens and
# before block 2 of the tower. Attention frames a patch of empty background; rollout and gradient frame a patch at the
# triangle; covering frames one at the foot of the star.*
#
# The first map is a surprise. Covering is honest about what it does, and what it does is to make a picture that nobody drew.
# Perhaps a star with its foot cut off is a little more like a triangle, and it is blue. So even this is no truth to measure
# by.
#
# ## Which one is right?
#
# One picture proves nothing. So: fifty scenes, a question about a colour in each, only answers that are right. A way
# scores if its top patch lies on the thing that was asked about. There are two ways to count that, and we use both:
# the patch **touches** the thing's box, or, more strictly, its **middle** is inside of it.


# %%
def colour_questions(first_seed: int, count: int) -> list[tuple[Scene, str, Thing]]:
    """Scenes with a colour question each: the prompt, and the thing that it asks about."""
    rows, seed = [], first_seed
    while len(rows) < count:
        scene = make_scene(seed)
        question = ask(scene, "colour", random.Random(seed))
        if question is not None:
            shape = question.prompt.split()[-1].rstrip("?")
            rows.append((scene, question.prompt, next(thing for thing in scene.things if thing.shape == shape)))
        seed += 1
    return rows


def right_ones(rows: list) -> list:
    said = generate([draw_scene(scene) for scene, _, _ in rows], [prompt for _, prompt, _ in rows], model=model)
    return [row for row, text in zip(rows, said) if text == row[2].colour]


def lies_on(patch: int, box: tuple[int, int, int, int]) -> tuple[bool, bool]:
    """Whether a patch touches a box, and whether its middle lies inside."""
    y, x = (PATCH * place for place in divmod(patch, SIDE))
    top, left, bottom, right = box
    touches = y < bottom and y + PATCH > top and x < right and x + PATCH > left
    return touches, top <= y + PATCH / 2 < bottom and left <= x + PATCH / 2 < right


def share(flags: list[bool]) -> float:
    return sum(flags) / len(flags)


tries = right_ones(colour_questions(62_000_000, 50))
hits: dict[str, list] = {}
for scene, prompt, thing in tries:
    for name, weights in all_maps(read(draw_scene(scene), prompt, thing.colour)).items():
        hits.setdefault(name, []).append(lies_on(int(weights.argmax()), thing.box))
for scene, prompt, thing in tries[:8]:  # covering is slow: eight must do
    falls = lead_of(draw_scene(scene), prompt, thing.colour) - covered_leads(scene, prompt, thing.colour)
    hits.setdefault("covering (8 scenes)", []).append(lies_on(int(falls.argmax()), thing.box))
any_patch = [lies_on(patch, thing.box) for _, _, thing in tries for patch in range(SIDE**2)]
table = {"any patch": tuple(map(share, zip(*any_patch)))} | {
    name: tuple(map(share, zip(*got))) for name, got in hits.items()
}
print(f"{len(tries)} right answers{'':>22} touches  middle")
for name, (touches, middle) in table.items():
    print(f"{name:<38} {touches:>6.0%} {middle:>8.0%}")

# %% [markdown]
# Read it from the top. **Attention** in layers 2 and 3 does worse than a patch chosen blindly. What the answer needs may come
# by way of the prompt, whose tokens have read the picture before (the prefix sees itself both ways). **Rollout** to the
# features follows such detours, and touches the thing nearly always, though its middle is on it in little more than half of
# the answers. The **gradient** finds it at every depth when we take the length, less often when we take the sum.
# **Covering**, at the bottom, finds it less often than the length does at any depth, perhaps for the reason we saw.
#
# Before blocks 1, 2 and 3 the length does about equally well on both counts together; we ship the one between.

# %%
attention = [table[f"attention, layer {layer}"][0] for layer in (1, 2, 3, 4)]
chosen = table["length, before block 2"]
assert max(attention[1:3]) < table["any patch"][0] < max(attention) < 0.6
assert table["rollout to the features"][0] > 0.9 and 0.5 < table["rollout to the features"][1] < 0.6
assert all(table[f"length{name[3:]}"][0] > both[0] for name, both in table.items() if name.startswith("sum"))
assert table["covering (8 scenes)"][0] < min(both[0] for name, both in table.items() if name.startswith("length"))
assert sum(chosen) > max(sum(both) for both in table.values()) - 0.08  # of 2
touches, middle = table["length, projected"]
assert touches > 0.95 and touches - middle > 1 / 3  # at the rim

# %% [markdown]
# ## Where the evidence goes
#
# The gradient gives a map at every depth, and the maps differ. That is not a fault of the method: the tower itself moves
# what it knows.

# %%
depths = [*(f"before block {number}" for number in (1, 2, 3, 4)), "projected"]
figure, axis = plt.subplots(figsize=(5.8, 2.8))
for place, (name, colour) in enumerate((("touches the thing", PICTURE), ("middle on the thing", ANSWER))):
    values = [100 * table[f"length, {depth}"][place] for depth in depths]
    axis.plot(depths, values, color=colour, marker="o", ms=4)
    axis.annotate(name, (4, values[-1]), xytext=(8, 0), textcoords="offset points", va="center", color=colour)
axis.axhline(100 * table["any patch"][0], color=GREY, ls="--", lw=1)
axis.annotate(
    "any patch touches", (0, 100 * table["any patch"][0]), xytext=(0, 4), textcoords="offset points", color="0.4"
)
axis.set(ylim=(0, 104), xlim=(-0.2, 5.6), ylabel="top patch, % of answers")
axis.set_xticks(range(5), [depth.replace("before ", "before\n") for depth in depths], fontsize=8)
save(figure, "23b_depth")

# %% [markdown]
# *Figure: two lines over five depths of the tower. The share of top patches that touch the thing stays high all the way; the
# share whose middle lies on it is high before blocks 1 to 3, and falls at the end of the tower. A dashed line, far below
# both, is the share of all patches that touch the thing.*
#
# Near the pixels the top patch is on the thing, with its middle. At the end of the tower it still touches the thing, but in
# more than a third of the answers it lies at the rim: the tower has let a patch at the edge, partly empty, speak for the
# whole. A token of the tower is a place to write, and what is written there need not be about that place. So read a map of
# late tokens with care; that is also why the version below looks early.
#
# ## The version one would ship
#
# Any model, any answer, any number of tokens. What it takes:
#
# - The lead is taken for each token of the answer, at the place that predicts it, with the answer before it as it was said.
# - The first quarter of the tower runs without a graph. The map is taken before the next block: the second of the pocket
#   model's four, the seventh of PaliGemma's 27. We measured the pocket model; that a quarter is right for 27 is a guess.
# - Each block keeps only what it was given, and is read again on the way back (`checkpoint`), so memory does not grow with
#   what a block holds inside.
# - Several tokens may make one character, as in chapter 11. They are explained together: their leads are added.


# %%
# | export
class Look(NamedTuple):
    """What one token of an answer rests on.

    Parameters
    ----------
    text : str
        What the token says. Tokens that make one character together are one look; joined, the texts are the answer.
    weights : torch.Tensor
        (side, side) in float32 on the CPU, row 0 on top: the share of the evidence in each patch of the picture,
        squeezed to a square. Nothing is below 0, and all sum to 1; all are 0 where the picture made no difference.
    """

    text: str
    weights: torch.Tensor


# %%
# | export
def explain(
    model: PaliGemma,
    image,
    prompt: str,
    answer: str,
    *,
    max_tokens: int = 128,
    given_up: threading.Event | None = None,
) -> list[Look]:
    """Which patches each token of an answer rests on: gradient times token, a quarter of the way up the tower.

    For each token of the answer, its lead is its score minus the best other score. The weight of a patch is the length
    of (gradient of the lead) * (patch - median patch), number by number, where patch is the token that enters block
    L // 4 of the vision tower.

    Parameters
    ----------
    model : PaliGemma
        As `load` gives it; training or frozen, in any dtype. Nothing in it is changed.
    image : path, bytes, array or PIL image
        One picture, as `load_image` takes it.
    prompt : str
        What was asked.
    answer : str
        What was said: by this model, or by anyone.
    max_tokens : int
        A longer answer is refused: each token costs two readings of everything.
    given_up : threading.Event, optional
        Once another thread has set it, no further token is begun.

    Returns
    -------
    list of Look
        In the order of the answer; those that were done, if it was given up.

    Raises
    ------
    ValueError
        If the answer is empty or longer than `max_tokens`; if prompt and answer do not fit the model's context; if the
        picture cannot be read, or a text contains `<image>`; if the model has no processor, or its maps give no
        gradient, or one that is not finite.
    FileNotFoundError, RuntimeError
        If there is no such picture, or it cannot be opened.

    Notes
    -----
    One reading to begin with; then for each token the blocks are read again and gone through backwards. Between
    blocks (P + T, D) numbers are kept for each, within one block whatever it needs: memory does not grow with the
    number of answer tokens beyond their place in the row.

    References
    ----------
    Shrikumar et al. 2017, "Learning Important Features Through Propagating Activation Differences", section 2.2, on
    gradient times input.
    """
    processor = getattr(model, "processor", None)
    if not isinstance(processor, Processor):
        raise ValueError("this model has no processor: take one from sigma_book.load, or set model.processor")
    if isinstance(model, FastPaliGemma):
        raise ValueError(_NO_WAY_BACK)
    batch, groups = _set_out(processor, image, prompt, answer, max_tokens, model.config.text.max_position_embeddings)
    batch = batch.to(model.device)
    with torch.inference_mode(False), torch.enable_grad():
        patches = _low_patches(model, batch.pixel_values)  # (1, P, Dv)
        hidden_states = _read_on(model, patches, batch)[0]  # (T, D)
        looks = []
        for text, places in groups:
            if given_up is not None and given_up.is_set():
                break
            lead = _lead(model.logits(hidden_states[places - 1]), batch.input_ids[0, places])
            looks.append(Look(text, _evidence(lead, patches, keep=len(looks) + 1 < len(groups))))
    return looks


# %% [markdown]
# The row is laid out as in training: picture, prompt, answer. The answer is cut into pieces that can be shown.


# %%
# | export
def _set_out(
    processor: Processor, image, prompt: str, answer: str, max_tokens: int, context: int
) -> tuple[Batch, list[tuple[str, torch.Tensor]]]:
    """The row of picture, prompt and answer, and for each piece of text the columns of its tokens."""
    if not isinstance(answer, str) or not answer:
        raise ValueError(f"the answer is {answer!r:.80}: expected the text that is to be explained")
    batch = processor.prepare([load_image(image)], [prompt], [answer])
    row = batch.input_ids[0, :-1]  # the end of the answer says nothing that can be shown
    first = int((batch.token_type_ids[0] == 0).sum())
    count = len(row) - first
    if count > max_tokens:
        raise ValueError(f"the answer has {count} tokens: at most {max_tokens} are explained, so give its beginning")
    if len(row) > context:
        raise ValueError(
            f"prompt and answer have {len(row)} tokens, the picture included: the model's context is {context} "
            f"tokens, so shorten one by {len(row) - context} or more"
        )
    pieces = answer_pieces(row[first:].tolist(), processor.tokenizer.decode)
    ends = torch.tensor([0, *(count for _, count in pieces)]).cumsum(0).tolist()
    columns = [torch.arange(first + start, first + end) for start, end in zip(ends, ends[1:])]
    fields = ("input_ids", "attention_mask", "token_type_ids")
    cut = Batch(*(getattr(batch, name)[:, :-1] for name in fields), batch.pixel_values)
    return cut, [(text, places) for (text, _), places in zip(pieces, columns)]


def answer_pieces(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> list[tuple[str, int]]:
    """The text of an answer as its tokens give it: pieces of text, and how many tokens each took.

    Tokens that hold parts of a character are taken together; a token without any text joins its neighbour.
    """
    text, pieces, waiting = AnswerText(decode), [], 0
    for token in tokens:
        text.push(token)
        waiting += 1
        if piece := text.take():
            pieces.append((piece, waiting))
            waiting = 0
    text.finish()
    if waiting:
        rest = text.take()
        if rest or not pieces:
            pieces.append((rest, waiting))
        else:
            pieces[-1] = (pieces[-1][0], pieces[-1][1] + waiting)
    return pieces


# %% [markdown]
# Then the reading, in two parts: without a graph up to the quarter, with one from there. The second part is the model's
# own `forward`, block by block.


# %%
# | export
def _low_patches(model: PaliGemma, pixel_values: torch.Tensor) -> torch.Tensor:
    """The tokens of a picture as they enter block L // 4 of the tower: (1, P, Dv), cut off from what was before."""
    tower = model.vision_tower
    with torch.no_grad():
        patches = tower.embeddings(pixel_values)
        for block in tower.encoder.layers[: len(tower.encoder.layers) // 4]:
            patches = block(patches)
    return patches.clone().requires_grad_()


def _read_on(model: PaliGemma, patches: torch.Tensor, batch: Batch) -> torch.Tensor:
    """From there to the hidden states (1, T, D). A block keeps what it was given, and is read again on the way back."""
    tower, decoder = model.vision_tower, model.language_model
    for block in tower.encoder.layers[len(tower.encoder.layers) // 4 :]:
        patches = checkpoint(block, patches, use_reentrant=False)
    features = model.multi_modal_projector(tower.post_layernorm(patches))
    hidden_states = model.embed(batch.input_ids, features)
    angles = rotary_angles(batch.attention_mask.long().cumsum(-1), decoder.config.head_dim, decoder.config.rope_theta)
    masks = {window: prefix_mask(batch.attention_mask, batch.token_type_ids, window) for window in decoder.windows()}
    for index, block in enumerate(decoder.layers):
        mask = masks[decoder.config.window(index)]
        hidden_states = checkpoint(block, hidden_states, angles, mask, None, use_reentrant=False)
    return decoder.norm(hidden_states)


_NO_WAY_BACK = "no gradient reaches the picture: load the model without quantize and compile"


def _lead(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """How far the scores (N, V) of these tokens (N,) are above the best of the others, summed."""
    said = tokens[:, None]
    others = logits.scatter(1, said, -torch.inf)
    return (logits.gather(1, said)[:, 0] - others.amax(1)).float().sum()


def _evidence(lead: torch.Tensor, patches: torch.Tensor, keep: bool) -> torch.Tensor:
    """Shares of the patches (1, P, Dv) in a lead: (side, side). `keep` keeps the graph for the next token."""
    reached = lead.requires_grad
    if reached:
        (gradient,) = torch.autograd.grad(lead, patches, retain_graph=keep)
        reached = bool(gradient.any())
    if not reached:
        raise ValueError(_NO_WAY_BACK)
    patches = patches.detach()[0].float()  # (P, Dv)
    weights = (gradient[0].float() * (patches - patches.median(0).values)).norm(dim=-1).cpu()  # (P,)
    if not weights.isfinite().all():
        raise ValueError("the gradient is not finite: the numbers overflow, so load the model in bfloat16 or float32")
    total = weights.sum()
    side = round(len(weights) ** 0.5)
    return (weights / total if total > 0 else weights).reshape(side, side)


# %% [markdown]
# A web page wants lists and not tensors.


# %%
# | export
def looks_as_json(looks: Sequence[Look]) -> dict:
    """Looks in the form that the demo page takes: `{"side": n, "tokens": [{"text": ..., "weights": [[...]]}]}`."""
    tokens = [
        {"text": text, "weights": [[round(w, 6) for w in row] for row in weights.tolist()]} for text, weights in looks
    ]
    return {"side": len(looks[0].weights) if looks else 0, "tokens": tokens}


# %% [markdown]
# ## Proof
#
# `explain` gives the map above, which came from the model's own reading, where no memory was saved. (`tests/test_why.py` does
# the same for Gemma 2 and odd sizes, and once without any autograd: each number of each patch is shifted a little, and the
# scores are read again.)

# %%
(look,) = explain(model, picture, "answer en what colour is the triangle?", answer)
plain = maps["length, before block 2"]
torch.testing.assert_close(look.weights.flatten(), (plain / plain.sum()).detach(), rtol=1e-3, atol=1e-6)
assert look.text == "orange"

# %% [markdown]
# The number that counts comes from two hundred scenes on which nothing was chosen.

# %%
unseen = right_ones(colour_questions(72_000_000, 200))
found = []
for scene, prompt, thing in unseen:
    (look,) = explain(model, draw_scene(scene), prompt, thing.colour)
    found.append((scene, prompt, thing, look.weights, *lies_on(int(look.weights.argmax()), thing.box)))
touches, middle = share([row[4] for row in found]), share([row[5] for row in found])
assert len(unseen) > 190 and touches > 0.9 and middle > 0.85
print(
    f"{len(unseen)} right answers: top patch touches the thing in {touches:.1%}, its middle lies on it in {middle:.1%}"
)

# %% [markdown]
# ### Cover what it points at
#
# Boxes tell where the evidence *should* be. A model may look elsewhere and be right for a wrong reason, and a map that shows so
# would be the better one. So a second test asks the model itself: cover the four top patches, and see whether the answer
# changes. Four others, drawn at random, are the comparison.

# %%
rng = random.Random(0)
kinds = {"by the map": lambda row: row[3].flatten().topk(4).indices.tolist()}
kinds["at random"] = lambda row: rng.sample(range(SIDE**2), 4)
changed = {}
for name, choose in kinds.items():
    pictures = [cover(draw_scene(row[0]), choose(row), row[0].background) for row in found]
    said = generate(pictures, [row[1] for row in found], model=model)
    changed[name] = share([text != row[2].colour for text, row in zip(said, found)])
assert 0.4 < changed["by the map"] < 0.5 and changed["by the map"] > 5 * changed["at random"]
print({name: f"{value:.0%} of answers changed" for name, value in changed.items()})

# %% [markdown]
# So the map names patches that the answer hangs on. Still, more than half of the answers stay as they were. Perhaps the
# patches of the thing that are left are often enough.
#
# ## A look inside
#
# A caption has many tokens, and each has a map of its own.

# %%
scene = make_scene(80_000_016)
said = generate(draw_scene(scene), "caption en", model=model)
looks = explain(model, draw_scene(scene), "caption en", said)
assert said == caption(scene) and "".join(look.text for look in looks) == said
figure, axes = plt.subplots(2, 6, figsize=(10.4, 3.9))
for axis, look in zip(axes.flat, looks):
    show(axis, draw_scene(scene), look.weights, title=look.text.strip())
for axis in axes.flat:
    axis.axis("off")
save(figure, "23b_caption")

# %% [markdown]
# *Figure: eleven maps of one scene, for the tokens "a yellow heart, a blue circle and a black triangle". For each colour
# word and each shape word the framed patch lies on that thing or at its rim.*
#
# Now a case where it fails: the answer is right, and the top patch does not even touch the thing.

# %%
missed = [row for row in found if not row[4]]
assert len(missed) >= 2
figure, axes = plt.subplots(1, 2, figsize=(4.6, 2.6))
for axis, (scene, _, thing, weights, *_) in zip(axes, missed):
    show(axis, draw_scene(scene), weights, thing.box, f"{thing.shape}: {thing.colour}")
for axis in axes:
    axis.axis("off")
save(figure, "23b_missed")
print(f"{len(missed)} of {len(found)} missed")

# %% [markdown]
# *Figure: two scenes with right answers whose framed top patch lies outside of the dashed box of the thing asked about.
# In both the frame is at the rim of another thing or on empty ground.*
#
# ## What a map cannot tell
#
# **It is not a cause.** The map says where the lead is steep. It does not say that the model used that patch as we would.
#
# **A model of noise has maps too** (Adebayo et al. 2018, "Sanity Checks for Saliency Maps"). We fill the decoder with noise,
# and leave the tower as it is. The answer means nothing now. Still the top patch touches the thing that was asked about more
# often than a patch chosen blindly does: background is near the median token, so it gets next to no weight whatever the
# gradient says. Part of every map says where things are, and only the rest says which of them. Scenes of four and five things
# keep the two apart, since whoever guesses among the things is right once in four or five times.

# %%
torch.manual_seed(0)
noise = load()
with torch.no_grad():
    for name, parameter in noise.language_model.named_parameters():
        if parameter.dim() == 2 and "embed" not in name:
            parameter.copy_(torch.randn_like(parameter) * parameter.std())
crowded = [row for row in found if len(row[0].things) >= 4][:40]
on_thing = {"trained": [], "noise": []}
for scene, prompt, thing, weights, *_ in crowded:
    (look,) = explain(noise, draw_scene(scene), prompt, thing.colour)
    for name, grid in (("trained", weights), ("noise", look.weights)):
        on_thing[name].append(lies_on(int(grid.argmax()), thing.box)[0])
on_thing = {name: share(flags) for name, flags in on_thing.items()}
print(f"{len(crowded)} scenes of four or five things:", {name: f"{value:.0%}" for name, value in on_thing.items()})
blind = share([lies_on(patch, thing.box)[0] for _, _, thing, *_ in crowded for patch in range(SIDE**2)])
assert on_thing["trained"] > 0.85 and 0.5 > on_thing["noise"] > blind

# %% [markdown]
# **"No" rests on nothing.** *Is there a red star? no.* Which patch is that about? The map must sum to 1, so it shows something
# all the same.

# %%
question = "answer en is there a red star?"
assert generate(picture, question, model=model) == "no"
(look,) = explain(model, picture, question, "no")
assert abs(look.weights.sum() - 1) < 1e-5
print(f"the top patch has {look.weights.max():.0%} of the weight, an even share would be {1 / SIDE**2:.0%}")

# %% [markdown]
# **Tokens are not words.** A loc token's lead is over the neighbouring bins: the map of `<loc0120>` says why 120 and not 121.
#
# ## The page
#
# `sigma-book serve` shows all this at `/`: choose a picture, ask, see the answer come, point at a token. The page sends
# the picture, the prompt and the answer to `/explain`, and darkens the patches as the figures above do. It is three files
# of HTML, CSS and JavaScript in `sigma_book/static/`, with no build step and nothing fetched from anywhere else. The
# scenes it offers are this world's, painted four times as large.


# %%
def enlarged(scene: Scene, zoom: int) -> Scene:
    things = tuple(replace(thing, box=tuple(zoom * edge for edge in thing.box)) for thing in scene.things)
    return replace(scene, things=things, size=zoom * scene.size)


large = draw_scene(enlarged(make_scene(80_000_016), zoom=4))
assert large.size == (448, 448)
assert generate(large, "caption en", model=model) == caption(make_scene(80_000_016))
form = looks_as_json(looks)
assert form["side"] == SIDE and form["tokens"][1]["text"] == " yellow"

# %% [markdown]
# ## The bill
#
# For an answer of $n$ tokens: one reading, then for each token one more reading (the blocks again) and one pass back. A pass
# back costs about as much as a reading here, since only the tokens' gradients are needed and not the weights'. So about
# $1 + 2n$ readings; covering takes $P \cdot n$. Torch counts the multiplications.


# %%
class CountFlops(TorchDispatchMode):
    """Adds up the operations of matrix products, forwards and backwards."""

    total = 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        if (count := flop_registry.get(operation.overloadpacket)) is not None:
            self.total += count(*arguments, **(options or {}), out_val=result)
        return result


def flops_of(work: Callable[[], object]) -> int:
    with CountFlops() as counter:
        work()
    return counter.total


scene = make_scene(80_000_016)
one_reading = flops_of(lambda: lead_of(draw_scene(scene), "caption en", "a"))
costs = {}
for said in ("a", "a yellow heart, a"):
    tokens = len(model.processor.tokenizer.encode(said))
    costs[tokens] = flops_of(lambda said=said: explain(model, draw_scene(scene), "caption en", said)) / one_reading
    assert abs(costs[tokens] / (1 + 2 * tokens) - 1) < 0.2
for tokens, cost in costs.items():
    print(f"{tokens} tokens: {cost:.1f} readings; by covering {SIDE**2 * tokens}")

# %% [markdown]
# Memory: what enters each block, $T \times D$ numbers each, and the inside of one block. For the 3B model at 224 pixels in
# float32, with 300 tokens in the row, beside the weights:


# %%
def kept_megabytes(tokens: int, patches: int, inside_of: int) -> float:
    """What enters 18 decoder blocks and 27 - 6 tower blocks, and the gate, up and product of `inside_of` blocks."""
    entering = 18 * tokens * 2048 + 21 * patches * 1152
    return 4 * (entering + inside_of * 3 * tokens * 16384) / 1e6


with_checkpoints, without = kept_megabytes(300, 256, inside_of=1), kept_megabytes(300, 256, inside_of=18)
assert with_checkpoints < without / 8
print(f"{with_checkpoints:.0f} MB, without checkpoints {without:,.0f} MB or more")
print(f"at 896 pixels {kept_megabytes(4140, 4096, 1) / 1e3:.1f} GB and {kept_megabytes(4140, 4096, 18) / 1e3:.1f} GB")

# %% [markdown]
# ## Your turn
#
# **1.** ★ Two tokens, two blocks. In each block both tokens give weight `a` to the other and `1 - a` to themselves. Write
# `two_blocks(a)`: the share of token 0 in token 0 after two blocks of $M = \tfrac12(A + I)$.


# %%
def two_blocks(a: float) -> float: ...


check(two_blocks, ((0.0,), 1.0), ((1.0,), 0.5), ((0.5,), 0.625))

# %% [markdown]
# **2.** ★★ Write `hit_rate(weights, boxes)`: the share of maps (N, 8, 8) whose top patch touches its box
# `(top, left, bottom, right)`, in pixels of patches of 14.


# %%
def hit_rate(weights: torch.Tensor, boxes: list[tuple[int, int, int, int]]) -> float: ...


one_each = torch.eye(64)[[0, 63, 10]].reshape(3, 8, 8)
check(
    hit_rate,
    ((one_each, [(0, 0, 10, 10), (100, 100, 112, 112), (14, 28, 20, 34)]), 1.0),
    ((one_each, [(20, 20, 30, 30), (100, 100, 112, 112), (28, 28, 40, 40)]), 1 / 3),
    ((one_each, [(0, 0, 40, 40), (80, 80, 112, 112), (0, 0, 40, 40)]), 1.0),
)

# %% [markdown]
# **3.** ★★ For a lead that is a plain weighted sum of all numbers of all tokens, $\ell = \sum_{pd} v_{pd}\,x_{pd}$, the first
# order is exact. Write `exact_fall(v, x, p)`: how much the lead falls when token `p` is replaced by the median token.


# %%
def exact_fall(v: torch.Tensor, x: torch.Tensor, p: int) -> float: ...


slopes, tokens = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]]), torch.tensor([[1.0, 0.0], [2.0, 4.0], [5.0, 1.0]])
check(exact_fall, ((slopes, tokens, 0), -3.0), ((slopes, tokens, 1), 3.0), ((slopes, tokens, 2), 9.0))

# %% [markdown]
# **4.** ★★★ Write `smooth(map_of, pixels, noises)`: the mean of the maps that `map_of` gives for the pixels with each of
# several noises added. Then let `map_of` call `explain`, on the scenes of `found`. Does the share of top patches on the thing
# rise, and is it worth so many times the cost?


# %%
def smooth(map_of: Callable, pixels: torch.Tensor, noises: list[torch.Tensor]) -> torch.Tensor: ...


one = torch.ones(2)
check(smooth, ((torch.square, torch.tensor([1.0, 2.0]), [one, -one, 0 * one]), torch.tensor([5 / 3, 14 / 3])))

# %% [markdown]
# Next: your own pictures. `sigma-book serve` waits for them.
