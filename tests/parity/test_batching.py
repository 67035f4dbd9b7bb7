"""The engine against `transformers`: requests in company get the tokens that the reference gives each of them alone."""

import threading
from contextlib import closing

import pytest
import torch
from transformers import AutoModelForImageTextToText

from sigma_book.assemble import load
from sigma_book.batching import Engine

PROMPTS = ["caption en", "", "how many red stars are there?", "detect circle ; heart", "x y", "is there a blue ring?"]
GEMMA_2 = {
    "four_norms": True,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 5,  # shorter than every prompt, and than the answers
    "layer_types": ("sliding_attention", "full_attention"),
}


@pytest.mark.parametrize("options", [{}, GEMMA_2, {"tie_word_embeddings": True}], ids=["gemma", "gemma 2", "tied"])
def test_the_tokens_of_the_reference(tmp_path, make_tiny, pictures, options):
    folder = make_tiny(tmp_path / "model", seed=1, **options)
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model, heard = load(folder, device="cpu"), []
    with closing(Engine(model, max_rows=3, prefill_tokens=30)) as engine:
        for number, (picture, prompt) in enumerate(zip(pictures, PROMPTS)):
            tokens, over = [], threading.Event()

            def listen(event, tokens=tokens, over=over):
                if event.token is not None:
                    tokens.append(event.token)
                if event.finish is not None:
                    over.set()

            engine.submit(picture, prompt, listen, max_new_tokens=8 + 5 * number)
            heard.append((tokens, over))
        assert all(over.wait(60) for _, over in heard)
    for number, (picture, prompt) in enumerate(zip(pictures, PROMPTS)):
        batch = model.processor.prepare([picture], [prompt])
        given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        given |= {"pixel_values": batch.pixel_values, "token_type_ids": batch.token_type_ids}
        output = reference.generate(**given, do_sample=False, max_new_tokens=8 + 5 * number)
        assert heard[number][0] == output[0, batch.input_ids.shape[1] :].tolist()
