"""Handing a model over: the folder that `export` writes, as `transformers` and PEFT read it and vLLM's loader names it; and
whether an engine's prefix mask is found out through its own HTTP interface.

Scores agree to 1e-4 in float32: sums in another order. Greedy tokens are equal. vLLM itself is not run here.
"""

import json
import math
import re
import socketserver
import subprocess
import sys
import threading
from contextlib import ExitStack
from functools import partial

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from sigma_book import fleet, generate, load
from sigma_book.assemble import POCKET
from sigma_book.bulk import PREFIX_MASKS, EngineReport, answer_logprobs, ask_engine, compare_engine, prefix_types
from sigma_book.cli import main
from sigma_book.fleet import compare, export_model
from sigma_book.lora import LoraConfig, add_lora, save_adapter
from sigma_book.paligemma import PaliGemma
from sigma_book.projector import prefix_mask
from sigma_book.weights import load_model, save_model
from sigma_book.world import draw_scene, make_scene

GEMMA_2 = {
    "four_norms": True,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 5,
    "layer_types": ("sliding_attention", "full_attention"),
}
KINDS = {
    "gemma": {},
    "gemma, tied": {"tie_word_embeddings": True},
    "gemma, odd sizes": {"hidden_size": 24, "intermediate_size": 36, "num_attention_heads": 3, "head_dim": 6},
    "gemma 2": GEMMA_2 | {"tie_word_embeddings": True},
    "gemma 2, untied": GEMMA_2,
}
PROMPTS = ["caption en", "how many red stars are there?\nx", "detect circle ; heart <loc0001>", " é 漢 "]
TEXT_FILES = {"config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer.model"}
TEXT_FILES |= {"tokenizer_config.json"}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory, make_tiny):
    return make_tiny(tmp_path_factory.mktemp("tiny") / "model", seed=3, **KINDS[request.param])


def asked(processor, picture, prompt: str) -> dict:
    inputs = processor(images=picture, text=f"<image>{prompt}", return_tensors="pt")
    inputs.pop("labels", None)
    return inputs


def assert_transformers_agrees(out, ours, pictures) -> None:
    """Processor, scores and greedy tokens of the exported folder, read by the Auto classes and nothing else."""
    processor = AutoProcessor.from_pretrained(out)
    reference, notes = AutoModelForImageTextToText.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for picture, prompt in zip(pictures, PROMPTS):
        inputs = asked(processor, picture, prompt)
        batch = ours.processor.prepare([picture], [prompt])
        assert torch.equal(inputs["input_ids"], batch.input_ids)
        assert (inputs["pixel_values"] - batch.pixel_values).abs().max() <= 2 / 255 + 1e-6  # one grey level
        inputs["pixel_values"] = batch.pixel_values
        with torch.no_grad():
            theirs = reference(**inputs).logits
            mine = ours(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids)
            ids = reference.generate(**inputs, max_new_tokens=10, do_sample=False)[0, batch.input_ids.shape[1] :]
        torch.testing.assert_close(mine[:, -1], theirs[:, -1], rtol=1e-4, atol=1e-4)
        _, tokens, _ = generate(picture, prompt, model=ours, max_new_tokens=10, return_logprobs=True)
        assert tokens == ids.tolist()


def test_transformers_reads_what_export_wrote(folder, pictures, tmp_path):
    export_model(tmp_path / "out", model=folder)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == TEXT_FILES | {"model.safetensors"}
    assert_transformers_agrees(tmp_path / "out", load(folder, device="cpu"), pictures)


def test_the_pocket_model_keeps_its_sixteen_bits(pictures, tmp_path):
    export_model(tmp_path / "out")
    with (
        safe_open(POCKET / "model.safetensors", "pt") as one,
        safe_open(tmp_path / "out" / "model.safetensors", "pt") as two,
    ):
        assert set(one.keys()) == set(two.keys())
        assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())  # noqa: SIM118
        assert two.get_tensor("multi_modal_projector.linear.bias").dtype == torch.bfloat16
    assert_transformers_agrees(tmp_path / "out", load(), pictures)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_dtype_that_is_asked_for(dtype, tmp_path):
    export_model(tmp_path / "out", dtype=dtype)
    reference = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert str(reference.dtype) == f"torch.{dtype}"
    assert str(load_model(tmp_path / "out", "cpu", dtype).language_model.embed_tokens.weight.dtype) == f"torch.{dtype}"


def make_adapter(folder, out, targets=None):
    model = load(folder, device="cpu")
    add_lora(model, LoraConfig(rank=3, alpha=6, **({} if targets is None else {"targets": targets})))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_adapter(model, out, folder)
    return out


@pytest.mark.parametrize("alone", [False, True], ids=["base and adapter", "adapter alone"])
def test_an_adapter_merged_is_what_peft_computes_beside(alone, folder, pictures, tmp_path):
    adapter = make_adapter(folder, tmp_path / "adapter")
    if alone:  # the adapter's own file says what it was made for
        export_model(tmp_path / "out", model=adapter)
    else:
        export_model(tmp_path / "out", model=folder, adapter=adapter)
    base = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, adapter).eval()
    merged = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    plain = load(folder, device="cpu")
    for picture, prompt in zip(pictures, PROMPTS):
        inputs = asked(processor, picture, prompt)
        with torch.no_grad():
            beside, added = theirs(**inputs).logits, merged(**inputs).logits
        torch.testing.assert_close(added, beside, rtol=1e-4, atol=1e-4)
        batch = plain.processor.prepare([picture], [prompt])
        untouched = plain(batch.input_ids, batch.pixel_values, batch.attention_mask, batch.token_type_ids)
        assert (untouched - beside).abs().max() > 0.05  # the adapter does something
    assert_transformers_agrees(tmp_path / "out", load(tmp_path / "out", device="cpu"), pictures)


def test_several_stop_tokens_are_kept(tiny_folder, copy_folder, tmp_path):
    source = copy_folder(tiny_folder)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    export_model(tmp_path / "out", model=source)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 7]
    assert load(tmp_path / "out", device="cpu").stop_ids == [1, 7]
    reference = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert reference.generation_config.eos_token_id == [1, 7]


def test_stop_tokens_are_kept_by_a_run_too(tiny_folder, copy_folder, write_questions, tmp_path):
    source = copy_folder(tiny_folder)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    data = write_questions(tmp_path, train=4, test=0) / "train.jsonl"
    given = ["train", "--data", data, "--out", tmp_path / "run", "--model", source, "--max-steps", 1, "--device", "cpu"]
    assert main([str(part) for part in given]) == 0
    assert load(tmp_path / "run" / "final", device="cpu").stop_ids == [1, 7]


@pytest.mark.parametrize(
    "order", [(10**9, 40_000), (40_000, 10**9)], ids=["one file, then shards", "shards, then one file"]
)
def test_what_was_exported_before_is_not_read_again(order, tiny_folder, make_tiny, tmp_path, monkeypatch):
    """Weights of an export before would contradict the new ones: `load` and transformers look for one file first."""
    save = fleet.save_model
    for most, source in zip(order, (tiny_folder, make_tiny(tmp_path / "other", seed=9))):
        monkeypatch.setattr(fleet, "save_model", partial(save, max_shard_bytes=most))
        export_model(tmp_path / "out", model=source)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    wanted = load_model(source, "cpu").state_dict()
    assert all(
        torch.equal(tensor, wanted[name]) for name, tensor in load_model(tmp_path / "out", "cpu").state_dict().items()
    )
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    name = "language_model.embed_tokens.weight"
    assert torch.equal(theirs[f"model.{name}"], wanted[name])
    kept = {path.name for path in (tmp_path / "out").glob("model*")}
    assert ("model.safetensors" in kept) == (len(kept) == 1) == (most > 10**6)


def test_export_over_its_own_source_and_into_a_file(tiny_folder, copy_folder, tmp_path):
    source = copy_folder(tiny_folder)
    before = generate(draw_scene(make_scene(1)), "caption en", model=load(tiny_folder, device="cpu"), max_new_tokens=8)
    export_model(source, model=source)
    assert (
        generate(draw_scene(make_scene(1)), "caption en", model=load(source, device="cpu"), max_new_tokens=8) == before
    )
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        export_model(tmp_path / "file", model=tiny_folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export_model(tmp_path / "out", model=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        export_model(tmp_path / "out", model=tiny_folder, dtype="int8")
    assert not (tmp_path / "out").exists()


def test_the_command(tiny_folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sigma_book.cli",
        "export",
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(tiny_folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr


def test_the_tokenizer_of_the_folder_is_that_of_the_auto_class(tiny_folder, tiny_model, tmp_path):
    export_model(tmp_path / "out", model=tiny_folder)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = tiny_model.processor.tokenizer
    for text in [*PROMPTS, "<loc0000><loc1023> star ; <seg127>", "\n", "a  b\tc", "🙂"]:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (ours.pad_id, ours.eos_id, ours.bos_id)
    assert theirs.convert_tokens_to_ids("<image>") == ours.image_id


# vLLM: names and keys as its public source has them (vllm/model_executor/models/paligemma.py, gemma.py, siglip.py)

VLLM_RENAMES = (  # its hf_to_vllm_mapper; the hub's older spelling needs none
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
VLLM_LAYER = {f"self_attn.{name}_proj.weight" for name in "qkvo"} | {
    f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")
}
VLLM_NORMS = {
    False: ("input", "post_attention"),
    True: ("input", "post_attention", "pre_feedforward", "post_feedforward"),
}
VLLM_BLOCK = {"layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"} | {
    f"self_attn.{n}_proj" for n in ("q", "k", "v", "out")
}


def vllm_names(config: dict) -> set[str]:
    """What the modules of vLLM's PaliGemma ask a checkpoint for: q, k, v and gate, up are stored apart, and joined there."""
    text, vision = config["text_config"], config["vision_config"]
    names = {"language_model.model.embed_tokens.weight", "language_model.model.norm.weight"}
    for layer in range(text["num_hidden_layers"]):
        norms = {f"{norm}_layernorm.weight" for norm in VLLM_NORMS[text["model_type"] == "gemma2"]}
        names |= {f"language_model.model.layers.{layer}.{name}" for name in VLLM_LAYER | norms}
    names |= {f"multi_modal_projector.linear.{end}" for end in ("weight", "bias")}
    tower = "vision_tower.vision_model."
    names |= {f"{tower}embeddings.patch_embedding.{end}" for end in ("weight", "bias")}
    names |= {f"{tower}embeddings.position_embedding.weight"}
    names |= {f"{tower}post_layernorm.{end}" for end in ("weight", "bias")}
    for layer in range(vision["num_hidden_layers"]):
        names |= {f"{tower}encoder.layers.{layer}.{name}.{end}" for name in VLLM_BLOCK for end in ("weight", "bias")}
    return names


def test_names_and_keys_are_those_that_vllm_asks_for(folder, tmp_path):
    export_model(tmp_path / "out", model=folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    renamed = set()
    for name in stored:
        new = next((theirs + name[len(ours) :] for ours, theirs in VLLM_RENAMES if name.startswith(ours)), name)
        renamed.add(new)
    expected = vllm_names(config)
    if not config["tie_word_embeddings"]:
        expected.add("language_model.lm_head.weight")  # vLLM's Gemma takes tied embeddings only: it skips this one
    assert renamed == expected
    assert config["architectures"] == ["PaliGemmaForConditionalGeneration"] and config["model_type"] == "paligemma"
    text, vision = config["text_config"], config["vision_config"]
    assert config["image_token_index"] == load(folder, device="cpu").config.image_token_id
    assert config["hidden_size"] == config["projection_dim"] == vision["projection_dim"] == text["hidden_size"]
    assert text["num_image_tokens"] == (vision["image_size"] // vision["patch_size"]) ** 2
    assert text["model_type"] in ("gemma", "gemma2")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(tokenizer.encode("\n", add_special_tokens=False)) == 1  # it appends this one token to a prompt


# masks


@pytest.mark.parametrize("mask", PREFIX_MASKS)
def test_types_make_the_mask_that_their_name_says(mask):
    ids = torch.tensor([[9, 9, 9, 2, 5, 6, 3, 7, 7]])  # three places of a picture, four of a prompt, two of an answer
    allowed = prefix_mask(torch.ones_like(ids), prefix_types(ids, 7, 9, mask))[0, 0]
    open_until = {"whole": 7, "picture": 3, "causal": 0}[mask]
    for row in range(9):
        for column in range(9):
            expected = column <= row or (row < open_until and column < open_until)
            assert allowed[row, column] == expected


@pytest.mark.parametrize("mask", PREFIX_MASKS)
def test_logprobs_under_a_mask_are_those_of_transformers(mask, folder, pictures):
    """The reference is handed the mask as types; with a picture's open places alone, as a mask of its own."""
    ours = load(folder, device="cpu")
    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    batch = ours.processor.prepare([pictures[2]], ["detect ring"])
    answer = [20, 31, 42, 7, 1]
    ids = torch.cat([batch.input_ids, torch.tensor([answer])], dim=1)
    start = batch.input_ids.shape[1]
    types = prefix_types(ids, start, ours.config.image_token_id, mask)
    with torch.no_grad():
        scores = reference(
            input_ids=ids, pixel_values=batch.pixel_values, attention_mask=torch.ones_like(ids), token_type_ids=types
        ).logits
    expected = scores[0, start - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
    found = torch.tensor(answer_logprobs(ours, pictures[2], "detect ring", answer, mask))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_under_the_whole_mask_they_are_those_of_generate(pictures):
    model = load()
    for picture, prompt in zip(pictures, ("caption en", "detect red star", "count", "x")):
        _, tokens, logprobs = generate(picture, prompt, model=model, return_logprobs=True)
        found = answer_logprobs(model, picture, prompt, tokens)
        assert max(abs(one - other) for one, other in zip(found, logprobs, strict=True)) < 1e-4


@pytest.mark.parametrize(
    ("distances", "mask", "words"),
    [
        ((0.0, 0.02, 0.03), "whole", "both directions, as PaliGemma was trained"),
        ((0.03, 0.001, 0.02), "picture", "but not the prompt"),
        ((0.3, 0.3, 0.01), "causal", "from left to right"),
        ((0.02, 0.03, 0.05), None, "too close to tell"),
        ((0.5, 0.6, 0.7), None, "no mask explains"),
        ((math.nan, math.nan, math.nan), None, "no mask explains"),
    ],
)
def test_what_a_report_says(distances, mask, words):
    report = EngineReport(dict(zip(PREFIX_MASKS, distances)), 10, 0.1, 4, 0)
    assert report.mask == mask and words in report.verdict()


def test_equal_distances_tell_nothing():
    report = EngineReport(dict.fromkeys(PREFIX_MASKS, 0.0), 10, 0.1, 4, 0)
    assert report.mask is None and "too close" in report.verdict()


def test_a_report_on_few_of_the_answers_tells_nothing():
    distances = dict(zip(PREFIX_MASKS, (0.0, 0.02, 0.03)))
    half, few = EngineReport(distances, 10, 0.1, 8, 4), EngineReport(distances, 10, 0.1, 8, 5)
    assert half.mask == "whole" and "4 of 8 answers were left out" in "\n".join(half.lines())
    assert few.mask is None and "too few of its answers" in few.verdict()


# engines over HTTP: our own server, and the same with a fault


class CausalPaliGemma(PaliGemma):
    """The fault: every token reads what came before it, and nothing else."""

    def hidden_states(self, input_ids, image_features, attention_mask, token_type_ids, caches=None):
        types = torch.ones_like(token_type_ids)
        return super().hidden_states(input_ids, image_features, attention_mask, types, caches)


class PictureOnlyPaliGemma(PaliGemma):
    """The lesser fault: a picture sees itself whole, the prompt is read from left to right."""

    def hidden_states(self, input_ids, image_features, attention_mask, token_type_ids, caches=None):
        types = (input_ids != self.config.image_token_id).long()
        return super().hidden_states(input_ids, image_features, attention_mask, types, caches)


FAULTS = {"whole": PaliGemma, "picture": PictureOnlyPaliGemma, "causal": CausalPaliGemma}


def with_fault(model: PaliGemma, mask: str) -> PaliGemma:
    model.__class__ = FAULTS[mask]
    return model


@pytest.mark.parametrize("mask", PREFIX_MASKS)
@pytest.mark.parametrize("which", ["pocket", "tiny"])
def test_our_server_passes_and_a_faulty_one_is_caught(mask, which, start_server, tiny_folder):
    source = None if which == "pocket" else tiny_folder
    server = start_server(with_fault(load(source, device="cpu"), mask))
    report = compare(f"{server.url}/v1", model=source, device="cpu", questions=4)
    assert report.tokens >= 12
    assert report.mask == mask, report.lines()
    assert report.distances[mask] < 1e-3


def test_the_command_says_so_and_exits(start_server, tiny_folder, capsys):
    for mask, code in (("whole", 0), ("causal", 2)):
        server = start_server(with_fault(load(tiny_folder, device="cpu"), mask), api_keys=("secret",))
        arguments = ["compare", "--url", f"{server.url}/v1", "--model", str(tiny_folder)]
        arguments += ["--key", "secret", "--questions", "4", "--device", "cpu"]
        assert main(arguments) == code
        said = capsys.readouterr()
        assert len(re.findall(r"^(?:whole|picture|causal) +\d", said.out, re.MULTILINE)) == 3
        assert ("from left to right" in said.err) == (mask == "causal")


def test_an_engine_with_other_weights_is_not_taken_for_one_with_a_fault(start_server, make_tiny, tiny_model, tmp_path):
    server = start_server(load(make_tiny(tmp_path / "other", seed=9), device="cpu"))
    report = compare(f"{server.url}/v1", model=tiny_model, questions=3)
    assert report.mask is None and "no mask explains" in report.verdict()


def test_an_engine_in_sixteen_bits_still_passes(start_server, tmp_path):
    """Weights rounded to bfloat16 (the sums here stay in float32): the pocket model's are stored so, ours are moved first."""
    model = load()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter * (1 + 1e-3 * torch.randn(parameter.shape, generator=generator))
    save_model(model, tmp_path / "ours")
    model.processor.save(tmp_path / "ours")
    export_model(tmp_path / "theirs", model=tmp_path / "ours", dtype="bfloat16")
    server = start_server(load(tmp_path / "theirs", device="cpu", dtype="float32"))
    report = compare(f"{server.url}/v1", model=tmp_path / "ours", device="cpu", questions=8)
    assert report.mask == "whole", report.lines()


def test_engines_that_are_not_there_refuse_or_say_something_else(start_server, tiny_model):
    picture = draw_scene(make_scene(0))
    with pytest.raises(RuntimeError, match="is the engine running there"):
        compare_engine("http://127.0.0.1:9/v1", tiny_model, [(picture, "x")])
    with pytest.raises(RuntimeError, match="is the engine running there"):
        compare_engine("no address", tiny_model, [(picture, "x")])
    server = start_server(tiny_model, api_keys=("secret",))
    with pytest.raises(RuntimeError, match="answered 401"):
        compare_engine(f"{server.url}/v1", tiny_model, [(picture, "x")])
    with pytest.raises(RuntimeError, match="answered 404"):
        ask_engine(f"{server.url}/v1", picture, "x", name="another", key="secret")
    with pytest.raises(RuntimeError, match="answered 404"):
        compare_engine(f"{server.url}/v2", tiny_model, [(picture, "x")], key="secret")
    with pytest.raises(ValueError, match="no question|no token"):
        compare_engine(f"{server.url}/v1", tiny_model, [], key="secret")


# engines that misbehave: a server whose reply is given, byte for byte


@pytest.fixture
def replies():
    """Start a server that answers every request with these bytes, or with what a function makes of the body; give its URL."""
    with ExitStack() as stack:

        def start(reply) -> str:
            class Handler(socketserver.StreamRequestHandler):
                def handle(self):
                    length = 0
                    while (line := self.rfile.readline().strip().lower()) != b"":
                        length = int(line.partition(b":")[2]) if line.startswith(b"content-length") else length
                    self.wfile.write(reply(self.rfile.read(length)) if callable(reply) else reply)

            server = stack.enter_context(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler))
            threading.Thread(target=server.serve_forever, daemon=True).start()
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}/v1"

        yield start


def reply_of(values: object, status: str = "200 OK") -> bytes:
    body = json.dumps(values).encode()
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    "raw",
    [
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 500 Oh\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(200)) + b"\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n" + b"[" * 50_000,
        b"",
    ],
    ids=[
        "no HTTP",
        "short body",
        "bad chunk",
        "bad chunk of an error",
        "long line",
        "200 headers",
        "deep JSON",
        "nothing",
    ],
)
def test_replies_that_are_none(raw, replies, tiny_folder, capsys):
    assert main(["compare", "--url", replies(raw), "--model", str(tiny_folder), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and ("is the engine running there" in said or "answered 500" in said)


@pytest.mark.parametrize("url", ["http://127.0.0.1:x/v1", "http://a b/v1"])
def test_addresses_that_are_none(url, tiny_folder, capsys):
    assert main(["compare", "--url", url, "--model", str(tiny_folder), "--device", "cpu"]) == 2
    assert "is the engine running there" in capsys.readouterr().err


@pytest.mark.parametrize("token", [None, 7, ["a"]])
def test_a_token_that_is_no_text(token, replies):
    content = [{"token": token, "logprob": -1.0}]
    url = replies(reply_of({"choices": [{"logprobs": {"content": content}}]}))
    with pytest.raises(RuntimeError, match="no logprobs.content"):
        ask_engine(url, draw_scene(make_scene(0)), "x", name="m")


def test_answers_that_are_wrong_are_not_left_out(replies):
    """Right for most questions, far off for one whose first tokens can be no others: no mask explains that."""
    model = load()
    said = [
        generate(draw_scene(make_scene(seed)), "caption en", model=model, return_logprobs=True) for seed in range(5)
    ]

    def answer(body: bytes) -> bytes:
        place = next(asked)
        _, tokens, logprobs = said[place]
        pieces = [model.processor.tokenizer.decode([token], skip_special_tokens=False) for token in tokens]
        told = [-9.0] * len(pieces) if wrong and place == 2 else logprobs
        content = [{"token": piece, "logprob": value} for piece, value in zip(pieces, told)]
        return reply_of({"choices": [{"logprobs": {"content": content}}]})

    questions = [(draw_scene(make_scene(seed)), "caption en") for seed in range(5)]
    for wrong in (False, True):
        asked = iter(range(5))
        report = compare_engine(replies(answer), model, questions, name="pocket")
        assert report.left_out == 0 and report.mask == (None if wrong else "whole"), report.lines()
