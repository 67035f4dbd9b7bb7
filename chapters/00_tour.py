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
# # The tour
#
# *A picture and a question go in, an answer comes out. What happens in between?*
#
# **You build** nothing yet: you watch. **You need** Python, and a little linear algebra.
# **Exports** nothing. Every later chapter builds one of the parts that you see here.

# %%
import matplotlib.pyplot as plt
import torch

from sigma_book import generate, load
from sigma_book.locate import draw_boxes, parse
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig, count_parameters
from sigma_book.style import check, draw_tokens, save, use_style
from sigma_book.world import draw_scene, make_scene

use_style()

# %% [markdown]
# ## The answer first
#
# Here is a picture. We ask for a caption. (PaliGemma is asked in short commands that it was taught: first the task, then the
# language. `caption en` is a caption in English, `answer en ...` a question, and `detect ...` asks where a thing is.)

# %%
picture = draw_scene(make_scene(5))
answer = generate(picture, "caption en")
answer

# %% [markdown]
# One more question, and one that is answered with places instead of words.

# %%
star = generate(picture, "answer en what colour is the star?")
boxes = generate(picture, "detect red star")
print(star)
print(boxes)

found, _ = parse(boxes, picture.height, picture.width)
figure, (left, right) = plt.subplots(1, 2, figsize=(5.6, 3.0))
left.imshow(picture)
left.set_title(",\n".join(answer.split(", ", 2)), fontsize=8)
large = picture.resize((448, 448), 0)
found_large, _ = parse(boxes, 448, 448)
right.imshow(draw_boxes(large, found_large))
right.set_title("detect red star", fontsize=9)
for axis in (left, right):
    axis.axis("off")
save(figure, "00_answer")
plt.show()

# %% [markdown]
# *Figure: left, a drawn scene with the caption that the model wrote; right, the same scene with the box it drew around
# the red star.*
#
# The model that answered is small. It lies inside this package, and it knows only this world of coloured shapes. But it
# is a real PaliGemma, with every part of the one that Google published in 2024, and in the same file format. Give
# `load` the folder of the large one, and the same functions answer with that.
#
# PaliGemma is a *vision-language model*: eyes (called SigLIP), a linear map in the middle, and a voice (called Gemma).
# Let us follow the picture through.
#
# ## 1. Pixels become patches
#
# The picture is scaled to the size the model knows, its numbers are brought to the range from -1 to 1, and it is cut into
# squares of 14 x 14 pixels.

# %%
model = load()
processor = model.processor
batch = processor.prepare([picture], ["caption en"])
print(
    "pixels:",
    tuple(batch.pixel_values.shape),
    "from",
    batch.pixel_values.min().item(),
    "to",
    batch.pixel_values.max().item(),
)
with torch.no_grad():
    patches = model.vision_tower.embeddings(batch.pixel_values)
print("patches:", tuple(patches.shape))

# %% [markdown]
# 64 patches, each a vector of 128 numbers. (The large model makes 256 patches of 1,152 numbers.) Chapters 01 and 02.
#
# ## 2. Patches look at each other
#
# A patch alone sees a bit of red. To know that it belongs to a star it must look around. That is *attention*, and a stack
# of it is the vision tower. Chapters 03 and 04.

# %%
with torch.no_grad():
    features = model.vision_tower(batch.pixel_values)
print("features:", tuple(features.shape))

# %% [markdown]
# ## 3. Features become words
#
# The voice reads vectors of another width: one for each token of text. One linear map brings the features there. From now
# on the picture is a row of words that nobody ever wrote. Chapter 09.

# %%
with torch.no_grad():
    image_tokens = model.multi_modal_projector(features)
print("image tokens:", tuple(image_tokens.shape))

table = model.language_model.embed_tokens.weight
vectors = {
    word: table[processor.tokenizer.encode(f" {word}")[0]] for word in ("red", "blue", "star", "circle", "heart")
}
star_box = next(thing.box for thing in make_scene(5).things if thing.shape == "star")
row, column = ((star_box[0] + star_box[2]) // 2 // 14, (star_box[1] + star_box[3]) // 2 // 14)
patch = image_tokens[0, row * 8 + column]
for word, vector in vectors.items():
    print(f"the star's patch and the word {word:7s}: {torch.cosine_similarity(patch, vector, dim=0).item():+.2f}")

# %% [markdown]
# The patch in the middle of the red star resembles the words "red" and "star" more than the others.
#
# ## 4. The prompt becomes tokens
#
# Text is cut into pieces, and each piece has a number. In front stand 64 places for the picture. Chapter 11.

# %%
ids = batch.input_ids[0].tolist()
pieces = [processor.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
shown = [*pieces[:3], "...", *pieces[63:]]
print(len(ids), "tokens:", " | ".join(repr(piece) for piece in shown))

figure, axis = plt.subplots(figsize=(7, 0.9))
row = ["pic", "pic", "...", "pic", "bos", "caption", "en", "\\n"] + answer.split()[:4]
draw_tokens(axis, row, ["picture"] * 4 + ["prompt"] * 4 + ["answer"] * 4)
save(figure, "00_row")
plt.show()

# %% [markdown]
# *Figure: the row that the voice reads: picture tokens in blue, then the prompt in orange, then the answer in green, as
# it is written.* The book keeps these three colours.
#
# ## 5. The voice reads, then writes
#
# The voice is a *decoder*. It reads picture and prompt at once, every token seeing every other. For the last place it gives
# a score to each token of the vocabulary. Chapters 05 to 10.

# %%
with torch.no_grad():
    caches = model.language_model.new_caches(1, len(ids) + 40)
    scores = model.prefill(batch.input_ids, model.encode_images(batch.pixel_values), batch.attention_mask, caches)
print("scores:", tuple(scores.shape))
chances, tokens = scores[0].softmax(-1).topk(4)
for chance, token in zip(chances, tokens, strict=True):
    print(f"{processor.tokenizer.decode([token.item()])!r}: {chance:.1%}")

# %% [markdown]
# The best token is appended, the model takes one more step, and so on until it says *end*. What later tokens will need of
# those already read is kept (their *keys* and *values*, chapter 03), so a step costs one token and not the whole row.
# Chapters 07 and 13.

# %%
mask, words = batch.attention_mask, []
with torch.no_grad():
    while (token := scores.argmax(-1)).item() != processor.tokenizer.eos_id and len(words) < 40:
        words.append(token.item())
        mask = torch.cat((mask, mask.new_ones(1, 1)), dim=1)
        scores = model.decode(token[:, None], mask, caches)
assert processor.tokenizer.decode(words) == answer
len(words)

# %% [markdown]
# The loop of six lines gives the very answer from the top of the page.
#
# ## The large one, in numbers
#
# The same classes at the size that Google published, built without memory, and counted.

# %%
text = {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18}
text |= {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257_216}
vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
vision |= {"image_size": 224, "patch_size": 14}
with torch.device("meta"):
    whole = PaliGemma(
        PaliGemmaConfig.from_dict({"model_type": "paligemma", "text_config": text, "vision_config": vision})
    )
table = {
    name: (count_parameters(part), count_parameters(getattr(whole, name))) for name, part in model.named_children()
}
print(f"{'part':24s}{'pocket':>12s}{'PaliGemma 3B':>16s}")
for name, (small, big) in table.items():
    print(f"{name:24s}{small:12,}{big:16,}")
small, big = count_parameters(model), count_parameters(whole)
print(f"{'all':24s}{small:12,}{big:16,}")
assert big == 2_923_466_480

# %% [markdown]
# Nearly three billion numbers: 5.85 GB in 16 bits. Six sevenths of them are voice.

# %%
gigabytes = 2 * big / 1e9
assert round(gigabytes, 2) == 5.85
share = table["language_model"][1] / big
assert abs(share - 6 / 7) < 0.01

# %% [markdown]
# ## The map
#
# | part | chapters | builds |
# |---|---|---|
# | | 01 | a world where every answer is known |
# | **See** | 02 to 04 | patches, attention, the vision tower |
# | **Speak** | 05 to 08 | positions, shared heads, memory, the decoder |
# | **Sum** | 09 to 14 | where the two meet, the whole, files, answers, boxes and masks |
# | **Teach** | 15 to 20 | data, the loop, a whole model from nothing, adapters, four bits, scores |
# | **Ship** | 21 to 23 | speed, many questions at once, many machines, a service |
#
# Each chapter is one Python module of the package, built cell by cell: a question, a picture, the plainest version that
# works, the formula, the version one would ship, and a proof that the two agree with each other and with code that
# nobody here wrote. At the end of each wait exercises: you replace the three dots, run the cell, and it answers at once.
# The more stars, the harder. Here are three to try.
#
# ## Your turn
#
# **1.** ★ How many patches of 14 x 14 pixels has a picture of `size` x `size` pixels?


# %%
def patches_of(size: int) -> int: ...


check(patches_of, ((112,), 64), ((224,), 256), ((448,), 1024))

# %% [markdown]
# **2.** ★ How many gigabytes do so many parameters take, with `bits` bits for each?


# %%
def gigabytes_of(parameters: int, bits: int) -> float: ...


check(gigabytes_of, ((big, 16), 5.846933), ((big, 4), 1.461733))

# %% [markdown]
# **3.** ★★ How many tokens does the voice read before its first word? There are the patches of a picture, one token for
# the beginning, `words` tokens of prompt, and one for the end of the line.


# %%
def tokens_read(size: int, words: int) -> int: ...


check(tokens_read, ((112, 2), len(ids)), ((224, 5), 263))

# %% [markdown]
# Next: something to look at.
