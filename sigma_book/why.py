"""Why did it say that?

Which patches did an answer token look at, and may we believe what a map shows?

Tangled from chapters/23b_why.py: edit there, then run python -m sigma_book.tangle.
"""

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

__all__ = ["Look", "answer_pieces", "explain", "looks_as_json"]


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


def looks_as_json(looks: Sequence[Look]) -> dict:
    """Looks in the form that the demo page takes: `{"side": n, "tokens": [{"text": ..., "weights": [[...]]}]}`."""
    tokens = [
        {"text": text, "weights": [[round(w, 6) for w in row] for row in weights.tolist()]} for text, weights in looks
    ]
    return {"side": len(looks[0].weights) if looks else 0, "tokens": tokens}
