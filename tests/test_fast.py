"""Prepared models: fused and packed maps, eight and four bits, remembered pictures, a step of fixed shapes.

Eight bits are held against whole numbers multiplied in int64 by torch itself, which is exact; the factors behind them
are float32, so 1e-6 of the largest term is allowed. Answers in float32 are compared with `transformers`, token by token.
"""

import json
import os
import subprocess
import sys
import textwrap
import time
import weakref
from concurrent.futures import wait

import pytest
import torch
from torch.nn import functional as F

from sigma_book import generate, load
from sigma_book.cli import main
from sigma_book.fast import (
    GROUP,
    PIECE_ROWS,
    FastPaliGemma,
    FusedNorm,
    Int4Linear,
    Int8Linear,
    PackedLinear,
    PictureCache,
    Preparation,
    ShortlistHead,
    compile_step,
    dense_map,
    int8_levels,
    int8_libraries,
    map_groups,
    prepare,
    quantize_groups,
    quantize_rows,
    reach_of_rows,
    static_step,
    torchao_map,
)
from sigma_book.lora import LoraConfig, add_lora, save_adapter
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.speed import inference_bill
from sigma_book.weights import load_model, save_model

GEMMA_2 = {
    "four_norms": True,
    "query_pre_attn_scalar": 16,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 5,
    "layer_types": ("sliding_attention", "full_attention"),
}
KINDS = {"gemma": {}, "gemma2": GEMMA_2, "tied": {"tie_word_embeddings": True}, "odd": {"intermediate_size": 45}}
PROMPTS = ["caption en", "", "how many red stars are there?", "detect circle ; heart", "x y", "is there a blue ring?"]
ROWS = [*range(1, 18), 264]
SHAPES = [(1, 1), (3, 5), (17, 33), (100, 37), (64, 256), (2048, 192)]  # out, in: whole vectors and odd remainders


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory, make_tiny):
    return make_tiny(tmp_path_factory.mktemp("fast") / "model", seed=1, **KINDS[request.param])


def spread(*shape: int) -> torch.Tensor:
    """Random numbers of very different sizes, row by row."""
    return torch.randn(*shape) * torch.logspace(-2, 1, shape[0])[:, None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_is_linear(shape, bias):
    torch.manual_seed(0)
    weight, shift = torch.randn(shape), torch.randn(shape[0]) if bias else None
    layer = PackedLinear(weight)
    layer.bias = shift
    for rows in ROWS:
        given = torch.randn(rows, shape[1])
        allowed = 1e-6 * (1 + given.abs() @ weight.abs().T)  # sums in another order: some roundings of the magnitudes
        assert ((layer(given) - F.linear(given, weight, shift)).abs() <= allowed).all()
    deep = torch.randn(2, 3, shape[1])
    torch.testing.assert_close(layer(deep), F.linear(deep, weight, shift), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_weight_is_further_off_than_half_a_step(shape):
    torch.manual_seed(0)
    for levels in (127, 63):
        weight = spread(*shape)
        codes, steps = quantize_rows(weight, levels)
        assert codes.dtype == torch.int8 and codes.abs().max() == levels
        error = (codes.double() * steps.double()[:, None] - weight.double()).abs()
        assert (error <= steps.double()[:, None] * (0.5 + 1e-5)).all()


def test_a_row_of_zeros_and_one_that_is_not_finite():
    weight = torch.randn(4, 6)
    weight[2] = 0
    assert (quantize_rows(weight)[0][2] == 0).all()
    assert torch.equal(Int8Linear(*quantize_rows(weight))(torch.zeros(2, 6)), torch.zeros(2, 4))
    for value in (float("inf"), float("nan")):
        weight[1, 3] = value
        for quantize in (quantize_rows, lambda wide: quantize_groups(F.pad(wide, (0, GROUP - 6)))):
            with pytest.raises(ValueError, match="a weight is not finite"):
                quantize(weight)


def eight_bits_plainly(given: torch.Tensor, codes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Rounded inputs times codes, in whole numbers; then the steps, in float64."""
    step = (given.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    whole = (given / step + 128).round().long().sub(128) @ codes.long().T
    return whole.double() * step.double() * steps.double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("library", int8_libraries())
def test_eight_bits_are_whole_numbers_multiplied(shape, bias, library):
    torch.manual_seed(0)
    codes, steps = quantize_rows(spread(*shape), int8_levels())
    shift = torch.randn(shape[0]) if bias else None
    layer = Int8Linear(codes, steps, shift, library)
    for rows in ROWS:
        given = spread(rows, shape[1])
        expected = eight_bits_plainly(given, codes, steps) + (0 if shift is None else shift.double())
        torch.testing.assert_close(layer(given).double(), expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


needs_both = pytest.mark.skipif(len(int8_libraries()) < 2, reason="this torch has one library for bytes")


@needs_both
@pytest.mark.parametrize("rows", [1, 16, 17, 300, 2 * PIECE_ROWS + 5])
def test_both_libraries_say_the_same_to_the_bit(rows):
    """Heights up to, at and beyond a piece of FBGEMM's; one token, several, and a prompt."""
    torch.manual_seed(0)
    codes, steps = quantize_rows(spread(rows, 96), int8_levels())
    maps = [Int8Linear(codes, steps, library=library) for library in ("fbgemm", "onednn")]
    for count in (1, 7, 264):
        given = spread(count, 96)
        first, second = (layer(given) for layer in maps)
        assert first.shape == (count, rows) and torch.equal(first, second)


@pytest.mark.parametrize("library", int8_libraries())
def test_the_worst_codes_do_not_saturate(library):
    for width in (64, 2048):
        codes = torch.full((16, width), int8_levels(), dtype=torch.int8)
        layer = Int8Linear(codes, torch.ones(16), library=library)
        assert (layer(torch.full((3, width), 127.0)) == 127 * int8_levels() * width).all()
        assert (layer(torch.full((3, width), -127.0)) == -127 * int8_levels() * width).all()


def test_a_cpu_without_units_for_bytes_gets_seven_bits():
    """oneDNN told to use AVX2 alone: pairs of products are added in 16 bits there, and 127 would overflow."""
    code = """
        import torch
        import sigma_book.fast
        from sigma_book.fast import Int8Linear, int8_levels, quantize_rows
        sigma_book.fast.int8_libraries = lambda: ["onednn"]
        torch.manual_seed(0)
        codes, steps = quantize_rows(torch.randn(96, 200), int8_levels())
        given = torch.full((5, 200), 127.0)  # all at the largest code
        whole = given.long() @ codes.long().T
        torch.testing.assert_close(Int8Linear(codes, steps)(given), whole.float() * steps, rtol=1e-6, atol=1e-6)
    """
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("library", int8_libraries())
def test_a_row_in_a_batch_is_the_row_alone(library):
    """To the bit: each token has a scale of its own, and sums of whole numbers have no order."""
    torch.manual_seed(0)
    layer = Int8Linear(*quantize_rows(torch.randn(50, 70), int8_levels()), torch.randn(50), library)
    given = spread(33, 70)
    together = layer(given)
    for row in range(33):
        assert torch.equal(layer(given[row : row + 1])[0], together[row])


def shortlist(weight: torch.Tensor, table: torch.Tensor | None = None) -> ShortlistHead:
    codes, steps = quantize_rows(weight, int8_levels())
    return ShortlistHead(codes, steps, reach_of_rows(weight, codes, steps), weight if table is None else table)


HEADS = {
    "even": lambda: torch.randn(3000, 96),
    "odd": lambda: torch.randn(2049, 37),
    "one number": lambda: torch.randn(7, 1),
    "of many sizes": lambda: spread(500, 64),
    "a giant in each row": lambda: torch.randn(400, 64).index_fill_(1, torch.tensor([3]), 50.0),
    "nearly the same rows": lambda: torch.randn(1, 80) + 1e-3 * torch.randn(600, 80),
    "twins": lambda: torch.randn(300, 48).repeat(2, 1),
    "zeros": lambda: torch.zeros(40, 16),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_shortlist_holds_the_best(kind, monkeypatch):
    """Against float64: no score is further off than it says, and none that was left rounded could be the best."""
    torch.manual_seed(0)
    weight = HEADS[kind]()
    head = shortlist(weight)
    given = torch.randn(20, weight.shape[1])
    given[5:10] *= torch.logspace(-3, 3, weight.shape[1])  # some numbers far larger than others
    given[10:15, 0] = 1000.0
    given[15] = 0
    exact = given.double() @ weight.double().T
    rough, reach = head.rough(given)
    assert ((rough - exact).abs() <= reach).all()
    whole = []  # how many rows each time that the list was too long, and the whole table was read
    read_all = head.all_exact
    monkeypatch.setattr(head, "all_exact", lambda rows: whole.append(len(rows)) or read_all(rows))
    for rows in (given, given[:5], given[:1], given[10:11], given[15:16]):
        expected, found = rows.double() @ weight.double().T, head(rows).double()
        rounding = 1e-5 * rows.double().norm(dim=1) * weight.double().norm(dim=1).max()  # of float32 sums
        chosen = found.argmax(1, keepdim=True)
        best = expected.amax(1)
        assert (expected.gather(1, chosen)[:, 0] >= best - rounding).all()
        assert ((found.amax(1) - best).abs() <= rounding).all()
    assert whole[0] == 20 and whole[-1] == 1  # with a state of zeros no score is better than another
    none_is_short = kind in ("one number", "nearly the same rows", "zeros")
    assert (len(whole) == 5) == none_is_short
    torch.testing.assert_close(head.all_exact(given).double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


def test_a_shortlist_is_short_and_reads_no_other_row():
    """Rows of the table that cannot be the best hold nan here: nobody looks."""
    torch.manual_seed(0)
    weight, given = torch.randn(5000, 256), torch.randn(3, 256)
    exact = given @ weight.T
    bad = exact.amax(0) < 1.75 * 16  # the spread of scores is 16
    assert 0.8 < bad.float().mean() < 0.99
    head = shortlist(weight, weight.masked_fill(bad[:, None], float("nan")))
    found = head(given)
    assert found.isfinite().all() and torch.equal(found.argmax(1), exact.argmax(1))
    table = shortlist(weight, weight.bfloat16())  # exact rows are those of the table, cast
    torch.testing.assert_close(
        table(given).amax(1), (given @ weight.bfloat16().float().T).amax(1), rtol=1e-5, atol=1e-4
    )


def test_a_shortlist_of_damaged_numbers():
    head = shortlist(torch.randn(50, 8))
    given = torch.randn(3, 8)
    given[1, 2], clean = float("nan"), given.clone()
    found = head(given)
    assert not found[1].isfinite().any() and torch.equal(found[[0, 2]], head(clean[[0, 2]]))


def test_only_the_best_is_exact_where_only_the_best_counts(folder, pictures, shortlists):
    plain, ready = load(folder, device="cpu"), load(folder, device="cpu", compile=True)
    assert isinstance(ready.head, ShortlistHead)
    batch = plain.processor.prepare(pictures, PROMPTS)
    scores = {}
    for model, best_only in ((plain, True), (ready, False), (ready, True)):
        caches = model.language_model.new_caches(6, batch.input_ids.shape[1] + 1)
        given = (batch.input_ids, model.encode_images(batch.pixel_values), batch.attention_mask, caches)
        first = model.prefill(*given, best_only)
        mask = F.pad(batch.attention_mask, (0, 1), value=1)
        second = model.decode(first.argmax(1, keepdim=True), mask, caches, best_only)
        scores[model is ready, best_only] = torch.cat([first, second])
    exact, rounded = scores[False, True], scores[True, True]
    torch.testing.assert_close(scores[True, False], exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(rounded.argmax(1), exact.argmax(1))
    torch.testing.assert_close(rounded.amax(1), exact.amax(1), rtol=1e-4, atol=1e-4)
    assert 1e-4 < (rounded - exact).norm() / exact.norm() < (0.012 if int8_levels() == 127 else 0.024)
    off = (rounded.log_softmax(1).amax(1) - exact.log_softmax(1).amax(1)).abs().max()
    assert off < 0.01  # nats, of what an answer reports


def test_who_asks_for_more_than_the_best(tiny_folder, pictures, monkeypatch, shortlists):
    model = load(tiny_folder, device="cpu", compile=True)
    plain = load(tiny_folder, device="cpu")
    asked = []
    inner = FastPaliGemma.next_token_logits

    def listen(self, hidden_states, best_only=False):
        asked.append(best_only)
        return inner(self, hidden_states, best_only)

    monkeypatch.setattr(FastPaliGemma, "next_token_logits", listen)
    for options, expected in (
        ({}, True),
        ({"return_logprobs": True}, False),
        ({"temperature": 1.0, "seed": 3}, False),
        ({"repetition_penalty": 1.5}, False),
        ({"num_beams": 3}, False),
        ({"grammar": "detect"}, False),
    ):
        asked.clear()
        found, wanted = (
            generate(pictures[:2], "detect star", model=one, max_new_tokens=12, **options) for one in (model, plain)
        )
        assert set(asked) == {expected}, options
        if "return_logprobs" not in options:
            assert found == wanted, options
            continue
        for one, other in zip(found, wanted):
            assert one.tokens == other.tokens and one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_what_eight_bits_lose():
    torch.manual_seed(0)
    weight, given = torch.randn(512, 2048), torch.randn(16, 2048)
    exact = given @ weight.T
    error = (Int8Linear(*quantize_rows(weight, int8_levels()))(given) - exact).norm() / exact.norm()
    assert error < (0.013 if int8_levels() == 127 else 0.02)


def test_four_bits_against_codes_spelled_out():
    """The kernel takes bfloat16 in and gives it out: 2**-8 of the sum of magnitudes is allowed."""
    torch.manual_seed(0)
    for rows, columns in ((16, 32), (48, 96), (192, 512)):
        weight = spread(rows, columns)
        codes, steps = quantize_groups(weight)
        step, offset = steps.float().transpose(0, 1).repeat_interleave(GROUP, 1).unbind(-1)  # (out, in)
        spelled = (codes.float() - 8) * step + offset
        assert ((spelled - weight).abs() <= 0.55 * step + 2**-8 * offset.abs()).all()
        layer = Int4Linear(codes, steps)
        for count in ROWS:
            given = torch.randn(count, columns).bfloat16()
            allowed = given.float().abs() @ (spelled.abs() + offset.abs()).T * 2**-8
            assert ((layer(given).float() - given.float() @ spelled.T).abs() <= allowed).all()


def ask_reference(folder, batch, **options) -> list[list[int]]:
    from transformers import AutoModelForImageTextToText

    reference = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "pixel_values": batch.pixel_values}
    output = reference.generate(**given, token_type_ids=batch.token_type_ids, do_sample=False, **options)
    return output[:, batch.input_ids.shape[1] :].tolist()


@pytest.fixture
def shortlists(monkeypatch):
    """As if every head were a large one."""
    monkeypatch.setattr("sigma_book.fast.LARGE_HEAD", 0)


@pytest.mark.parametrize("head", ["shortlist", "whole"])
def test_tokens_are_those_of_transformers(folder, pictures, head, request):
    if head == "shortlist":
        request.getfixturevalue("shortlists")
    model = load(folder, device="cpu", compile=True)
    assert isinstance(model.head, ShortlistHead) == (head == "shortlist")
    assert type(model) is FastPaliGemma and not model.training
    batch = model.processor.prepare(pictures, PROMPTS)
    expected = ask_reference(folder, batch, max_new_tokens=20, eos_token_id=1)
    answers = generate(pictures, PROMPTS, model=model, max_new_tokens=20, return_logprobs=True)
    for answer, theirs in zip(answers, expected):
        assert answer.tokens == theirs[: len(answer.tokens)] and (len(answer.tokens) == 20 or answer.tokens[-1] == 1)
    alone = [generate(one, text, model=model, max_new_tokens=20) for one, text in zip(pictures, PROMPTS)]
    assert alone == [answer.text for answer in answers] and len({tuple(answer.tokens) for answer in answers}) > 3


def test_the_pocket_prepared_says_what_transformers_says(pictures, tokenizer_folder, shortlists):
    model = load(compile=True)
    batch = model.processor.prepare(pictures, ["caption en"] * 6)
    expected = ask_reference(tokenizer_folder, batch, max_new_tokens=24)
    answers = generate(pictures, "caption en", model=model, max_new_tokens=24, return_logprobs=True)
    for answer, theirs in zip(answers, expected):
        assert answer.tokens == theirs[: len(answer.tokens)]


@pytest.mark.parametrize(
    "quantize, allowed",
    [(None, 1e-4), ("int8", 0.06), ("int4", 0.35)],  # random tiny models lose 26 % in four bits
)
def test_scores_of_all_parts(folder, quantize, allowed, pictures, shortlists):
    """Encoder, decoder with caches and head, called one by one as an engine does, with 1 to 32 rows."""
    plain, ready = load(folder, device="cpu"), load(folder, device="cpu", quantize=quantize, compile=True)
    for rows in (1, 2, 5, 32):
        batch = plain.processor.prepare(
            [pictures[row % 6] for row in range(rows)], [PROMPTS[row % 6] for row in range(rows)]
        )
        found = []
        for model in (plain, ready):
            caches = model.language_model.new_caches(rows, batch.input_ids.shape[1] + 8)
            features = model.encode_images(batch.pixel_values)
            scores = [model.prefill(batch.input_ids, features, batch.attention_mask, caches)]
            mask = batch.attention_mask
            for token in range(5, 11):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                scores.append(model.decode(torch.full((rows, 1), token), mask, caches))
            found.append(torch.stack(scores))
        assert (found[1] - found[0]).norm() / found[0].norm() < allowed


def test_a_static_step_is_a_step(folder, pictures, shortlists):
    """With fixed shapes, rows padded on the left, and rings that have gone round."""
    model = load(folder, device="cpu", compile=True)
    plain = generate(pictures, PROMPTS, model=model, max_new_tokens=20, return_logprobs=True)
    shapes = set()

    def step(*inputs):
        shapes.add(tuple(mask.shape for mask in inputs[3].values()))
        return static_step(model, *inputs)

    model.compiled_step = step
    fixed = generate(pictures, PROMPTS, model=model, max_new_tokens=20, return_logprobs=True)
    assert [answer.tokens for answer in fixed] == [answer.tokens for answer in plain] and len(shapes) == 1
    batch = model.processor.prepare(pictures[:1], ["x"])
    caches = model.language_model.new_caches(1, batch.input_ids.shape[1])
    model.prefill(batch.input_ids, model.encode_images(batch.pixel_values), batch.attention_mask, caches)
    with pytest.raises(ValueError, match="the cache has room for"):
        model.decode(torch.tensor([[5]]), F.pad(batch.attention_mask, (0, 1), value=1), caches)


@pytest.mark.slow
def test_a_compiled_step_is_a_step_and_when_it_pays(pictures, monkeypatch):
    """On this CPU, with the pocket model: what compiling takes, what a token takes, and from where on it pays."""
    monkeypatch.setattr("torch._inductor.config.freezing", True)  # it takes packed weights as constants alone
    plain, compiled = load(compile=True), load(compile=True)
    compile_step(compiled)
    seconds = {}
    for name, model in (("plain", plain), ("compiled", compiled)):
        for again in range(3):
            start = time.perf_counter()
            said = generate(pictures[0], "caption en", model=model, return_logprobs=True)
            seconds[name, again] = time.perf_counter() - start
            seconds[name, "tokens"] = said.tokens
    assert seconds["plain", "tokens"] == seconds["compiled", "tokens"]
    count = len(seconds["plain", "tokens"])
    compiling = seconds["compiled", 0] - seconds["compiled", 2]
    saved = (seconds["plain", 2] - seconds["compiled", 2]) / count
    print(
        f"compiling {compiling:.1f} s; an answer {seconds['plain', 2]:.3f} s, compiled {seconds['compiled', 2]:.3f} s"
    )
    print(f"pays from {compiling / saved:.0f} tokens on" if saved > 0 else "never pays")
    many = generate(pictures, "caption en", model=compiled)
    assert many == generate(pictures, "caption en", model=plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_on_a_gpu(tiny_folder, pictures, quantize):
    if quantize is not None:
        pytest.importorskip("torchao")
    model = load(tiny_folder, device="cuda", dtype="bfloat16", quantize=quantize, compile=True)
    assert model.compiled_step is not None
    exact = scores_of_two_tokens(load(tiny_folder, device="cpu", dtype="float32"), pictures)
    found = scores_of_two_tokens(model, pictures)
    assert (found - exact).norm() / exact.norm() < (0.3 if quantize == "int4" else 0.1)
    answers = generate(pictures, "caption en", model=model, max_new_tokens=16)
    assert generate(pictures, "caption en", model=model, max_new_tokens=16) == answers


@torch.no_grad()
def scores_of_two_tokens(model, pictures) -> torch.Tensor:
    """(2, 6, V): behind the prompts, and behind a token more, in float32 on the CPU."""
    batch = model.processor.prepare(pictures, PROMPTS).to(model.device)
    length = batch.input_ids.shape[1]
    caches = model.language_model.new_caches(len(PROMPTS), length + 1)
    features = model.encode_images(batch.pixel_values)
    first = model.prefill(batch.input_ids, features, batch.attention_mask, caches).float().cpu()
    seen = torch.nn.functional.pad(batch.attention_mask, (0, 1), value=1)
    second = model.decode(torch.full_like(batch.input_ids[:, :1], 5), seen, caches)
    return torch.stack([first, second.float().cpu()])


@needs_both
def test_bytes_held(folder):
    """Every weight of tower, decoder and head in a byte or less; the table of look-ups is a window into the file."""
    for quantize in ("int8", "int4"):
        model = load(folder, device="cpu", dtype="float32", quantize=quantize)
        for name, module in model.named_modules():
            if isinstance(module, Int8Linear):
                codes = torch.cat([packed.unpack()[0].int_repr() for packed in module.packed])
                assert codes.dtype == torch.int8 and codes.shape == (module.out_width, module.in_width)
                assert not [*module.parameters()] and all(t.ndim == 1 for t in module.buffers())
            elif isinstance(module, Int4Linear):
                assert quantize == "int4" and name.startswith("language_model")
                assert 2 * module.packed.nbytes == module.in_width * module.out_width
                assert module.steps.nbytes * GROUP == 4 * module.in_width * module.out_width
        with torch.device("meta"):
            groups = map_groups(PaliGemma(model.config))
        for group in groups:
            assert isinstance(model.get_submodule(group), Int8Linear | Int4Linear)
        four = sum(isinstance(module, Int4Linear) for module in model.modules())
        inside = list(model.language_model.modules())
        stored = sum(m.packed.nbytes + m.steps.nbytes for m in inside if isinstance(m, Int4Linear))
        stored += sum(m.out_width * (m.in_width + 4) for m in inside if isinstance(m, Int8Linear))
        stored += sum(m.weight.nbytes for m in inside if isinstance(m, FusedNorm))
        assert stored == inference_bill(model.config, 1, 30, 1, quantize).prefill.weight_bytes
        fitting = 4 if model.config.text.intermediate_size == 45 else 8  # 48 and 45 columns divide into no groups
        assert four == (fitting if quantize == "int4" else 0)


PEAK = """
    import json, sys
    import torch
    from sigma_book.fast import Int8Linear, Preparation, int8_levels, quantize_rows
    from sigma_book.weights import load_model, open_tensor

    torch.set_num_threads(1)

    def held(key):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

    Int8Linear(*quantize_rows(torch.randn(64, 64), int8_levels()))(torch.randn(1, 64))  # torch's first use is not the model's
    start = held("VmRSS")
    quantize = "int8" if sys.argv[2] == "int8" else None
    ready = Preparation(quantize, lambda name: open_tensor(sys.argv[1], name))
    model = ready.finish(load_model(sys.argv[1], "cpu", "float32", ready))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    rest = sum(t.numel() * t.itemsize for n, t in tensors if "embed_tokens" not in n and n != "head.table")
    rest += sum(m.in_width * m.out_width for m in model.modules() if isinstance(m, Int8Linear))  # FBGEMM's own
    print(json.dumps({"peak": held("VmHWM") - start, "held": held("VmRSS") - start, "counted": rest}))
"""


@pytest.mark.parametrize("kind", ["int8", pytest.param("float32", marks=pytest.mark.slow)])
def test_peak_while_loading(tmp_path, kind):
    """63 million numbers, 251 MB in the file: in int8 the full model is never there, in float32 its embedding is not."""
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = dict(zip(keys, (384, 1536, 6, 6))) | {"patch_size": 14}
    text = dict(zip((*keys, "num_key_value_heads"), (512, 3072, 8, 4, 1))) | {"vocab_size": 17_000, "head_dim": 128}
    config = {"model_type": "paligemma", "vision_config": vision, "text_config": text, "image_token_index": 16_999}
    torch.manual_seed(0)
    model = PaliGemma(PaliGemmaConfig.from_dict(config))
    total = sum(parameter.numel() for parameter in model.parameters())
    save_model(model, tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(tmp_path / "model"), kind],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # else what the allocator keeps outweighs this model
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(total, found)
    embedding = 17_000 * 512
    assert found["counted"] < 1.1 * (total if kind == "int8" else 4 * (total - embedding) + embedding)
    assert found["held"] < 1.15 * found["counted"] + 8e6
    if kind == "float32":  # of the embedding, only what was looked up
        assert found["held"] < found["counted"] + 2 * embedding, "half of the embedding and more is there"
    assert found["peak"] <= 1.3 * found["held"]


def test_only_what_is_looked_up_is_exact(folder, pictures):
    plain, ready = load(folder, device="cpu"), load(folder, device="cpu", quantize="int8")
    ids = torch.arange(50)[None]
    assert torch.equal(plain.embed(ids), ready.embed(ids))
    sixteen = load(folder, device="cpu", dtype="bfloat16", quantize="int8")
    assert torch.equal(sixteen.embed(ids), load(folder, device="cpu", dtype="bfloat16").embed(ids))


def test_a_file_in_16_bits_keeps_its_table(folder, tmp_path):
    save_model(load(folder, device="cpu"), tmp_path / "sixteen", dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            (tmp_path / "sixteen" / name).write_bytes((folder / name).read_bytes())
    plain = load(tmp_path / "sixteen", device="cpu", dtype="float32")
    for quantize in (None, "int8"):
        ready = load(tmp_path / "sixteen", device="cpu", dtype="float32", quantize=quantize, compile=True)
        table = ready.language_model.embed_tokens
        assert table.weight.dtype == torch.bfloat16
        assert torch.equal(ready.embed(torch.arange(9)[None]), plain.embed(torch.arange(9)[None]))
        assert ready.language_model.new_caches(1, 4)[0].key.dtype == torch.float32


class Counting:
    """An encoder that says how many pictures it was shown."""

    def __init__(self):
        self.seen = 0

    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.seen += len(pixel_values)
        return pixel_values.flatten(1)[:, None, :4].float() + 1


def test_a_picture_is_encoded_once():
    encoder, store = Counting(), PictureCache()
    pictures = torch.randn(3, 3, 4, 4)
    batch = pictures[[0, 1, 0, 2, 1]]
    assert torch.equal(store.encode(encoder, batch), Counting()(batch)) and encoder.seen == 3
    assert torch.equal(store.encode(encoder, batch.clone()), Counting()(batch)) and encoder.seen == 3
    other = pictures.clone()
    other[1, 2, 3, 3] += 1e-6  # one number of one picture
    assert torch.equal(store.encode(encoder, other), Counting()(other)) and encoder.seen == 4
    store.encode(encoder, pictures.bfloat16())
    assert encoder.seen == 7
    store.clear()
    assert store.bytes_held == 0
    store.encode(encoder, pictures[:1])
    assert encoder.seen == 8


def test_what_a_failure_left_is_not_kept():
    store, pictures = PictureCache(), torch.randn(2, 3, 4, 4)
    factor = torch.tensor([1.0, float("nan")])
    encoder = lambda given: given.flatten(1)[:, None] * factor[: len(given), None, None]  # noqa: E731
    assert store.encode(encoder, pictures)[1].isnan().all()
    factor[:] = 1
    assert torch.equal(store.encode(encoder, pictures), pictures.flatten(1)[:, None])
    assert store.bytes_held == pictures.nbytes


def test_the_store_is_bounded_and_forgets_the_longest_unused():
    encoder, store = Counting(), PictureCache(most_bytes=2 * 16)  # features of 16 bytes
    one, two, three = torch.randn(3, 1, 3, 4, 4)
    for shown, seen in ((one, 1), (two, 2), (one, 2), (three, 3), (one, 3), (two, 4)):
        store.encode(encoder, shown)
        assert encoder.seen == seen and store.bytes_held <= 32
    assert torch.equal(PictureCache(most_bytes=0).encode(encoder, one), Counting()(one))


def test_the_second_question_skips_the_tower(pictures):
    model = load(compile=True)
    calls = []
    model.vision_tower.register_forward_hook(lambda module, given, output: calls.append(len(output)))
    first = generate(pictures[0], "caption en", model=model)
    again = generate(pictures[0], ["caption en", "how many circles are there?"], model=model)
    assert calls == [1] and again[0] == first
    generate(pictures[1], "caption en", model=model)
    assert calls == [1, 1]
    plain = load()
    plain.vision_tower.register_forward_hook(lambda module, given, output: calls.append(len(output)))
    generate(pictures[0], ["caption en"] * 2, model=plain)
    assert calls == [1, 1, 2]  # a model that may still learn keeps nothing


def test_each_matrix_is_freed_when_its_copy_is_made(tiny_folder, monkeypatch):
    given, late, take = {}, [], Preparation.__call__

    def watched(self, model, name, tensor):
        wait(self._packing.values())
        late.extend(old for old, matrix in given.items() if matrix() is not None and old not in self._parts)
        kept = take(self, model, name, tensor)
        if not kept:
            given[name.rpartition(".")[0]] = weakref.ref(tensor)
        return kept

    monkeypatch.setattr(Preparation, "__call__", watched)
    model = load_model(tiny_folder, "cpu")
    prepare(model)
    assert "lm_head" in given and len(given) > 10 and not late


def test_parts_are_freed_before_the_whole_is_packed(monkeypatch):
    parts = [(torch.ones(2, 2),), (torch.ones(2, 2),)]
    matrices = [weakref.ref(part) for (part,) in parts]
    monkeypatch.setattr("sigma_book.fast.dense_map", lambda whole, quantize: [matrix() for matrix in matrices])
    assert Preparation()._build(parts) == [None, None]


def test_what_a_prepared_model_refuses(tiny_folder, tmp_path):
    model = load(tiny_folder, device="cpu", quantize="int8")
    for act, kind, words in (
        (model.train, RuntimeError, "packed for answering and cannot learn: load it without quantize and compile"),
        (lambda: model.to("cpu"), RuntimeError, "stays where it is: load it with the device and dtype"),
        (model.half, RuntimeError, "stays where it is"),
        (lambda: add_lora(model, LoraConfig(rank=2)), ValueError, "matches no linear map"),
        (lambda: save_model(model, tmp_path / "out"), ValueError, "not a plain PaliGemma"),
        (lambda: prepare(model), ValueError, "has an adapter or quantized maps"),
        (lambda: prepare(load(tiny_folder, quantize="nf4")), ValueError, "has an adapter or quantized maps"),
    ):
        with pytest.raises(kind, match=words):
            act()
    assert not (tmp_path / "out").exists()
    for options, words in (
        ({"quantize": "int3"}, "quantize is 'int3': expected 'nf4', 'int8' or 'int4', or nothing"),
        ({"quantize": "nf4", "compile": True}, "cannot lay out maps in nf4"),
        ({"compile": "yes"}, "compile is 'yes': expected True or False"),
        ({"quantize": "int8", "adapter": tmp_path}, "merge it"),
    ):
        with pytest.raises(ValueError, match=words):
            load(tiny_folder, device="cpu", **options)


def test_an_adapter_is_merged_before_maps_are_packed(tiny_folder, tmp_path, pictures):
    taught = load(tiny_folder, device="cpu")
    add_lora(taught, LoraConfig(rank=3))
    for name, parameter in taught.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    save_adapter(taught, tmp_path / "adapter", base=tiny_folder)
    ready = load(tmp_path / "adapter", device="cpu", compile=True)
    assert type(ready) is FastPaliGemma
    said = [generate(pictures, PROMPTS, model=model, max_new_tokens=12) for model in (ready, taught.eval())]
    assert said[0] == said[1] != generate(pictures, PROMPTS, model=load(tiny_folder), max_new_tokens=12)
    with pytest.raises(ValueError, match="int8 rounds the base alone"):
        load(tmp_path / "adapter", device="cpu", quantize="int8")


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_on_arrival_is_afterwards(folder, quantize, pictures, shortlists):
    """Quantizing as the tensors come from the file gives what quantizing a loaded model gives, to the bit."""
    arrived = load(folder, device="cpu", quantize=quantize, compile=True)
    afterwards = prepare(load_model(folder, "cpu"), quantize)
    batch = arrived.processor.prepare(pictures, PROMPTS)
    given = (batch.input_ids, batch.pixel_values, batch.attention_mask, torch.zeros_like(batch.input_ids))
    with torch.no_grad():
        assert torch.equal(arrived(*given), afterwards(*given))


def test_a_weight_that_is_not_finite_is_named(tiny_folder):
    model = load(tiny_folder, device="cpu")
    with torch.no_grad():
        model.language_model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    for quantize in ("int8", "int4"):
        with pytest.raises(ValueError, match=r"language_model.layers.1.mlp.up_proj: a weight is not finite"):
            prepare(load_damaged(model), quantize)


def load_damaged(model: PaliGemma) -> PaliGemma:
    copy = PaliGemma(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def test_numbers_that_overflow_are_still_noticed():
    layer = Int8Linear(*quantize_rows(torch.randn(8, 8), int8_levels()))
    for value in (float("inf"), float("nan")):
        given = torch.ones(1, 8)
        given[0, 3] = value
        assert not layer(given).isfinite().any()


def test_torchao_makes_maps_for_accelerators(monkeypatch):
    """Its eight-bit weights work on a CPU too, so they are tried here; four bits want a GPU and bfloat16."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48, bias=False).requires_grad_(False)
    given = torch.randn(3, 64)
    exact = linear(given)
    error = (torchao_map(linear, "int8")(given) - exact).norm() / exact.norm()
    assert 0 < error < 0.02
    assert not torch._inductor.config.coordinate_descent_tuning  # settings of the whole process stay as they were
    with pytest.raises(
        RuntimeError, match="cannot keep a float32 weight on cpu in int4 .*: take int8, or load without"
    ):
        torchao_map(torch.nn.Linear(64, 48, bias=False), "int4")
    for quantize in ("int8", "int4"):
        with pytest.raises(RuntimeError, match=f"quantize='{quantize}' on this device may overflow in float16"):
            torchao_map(torch.nn.Linear(64, 48, bias=False).half(), quantize)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(RuntimeError, match="needs torchao: pip install torchao"):
        torchao_map(torch.nn.Linear(64, 48), "int4")


@needs_both
def test_without_kernels_it_still_answers(tiny_folder, monkeypatch, pictures, shortlists):
    expected = generate(pictures, PROMPTS, model=load(tiny_folder, device="cpu"), max_new_tokens=8)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert isinstance(dense_map(torch.randn(3, 4)), torch.nn.Linear)
    model = load(tiny_folder, device="cpu", compile=True)
    assert generate(pictures, PROMPTS, model=model, max_new_tokens=8) == expected
    assert int8_libraries() == ["fbgemm"]
    monkeypatch.delattr(torch, "qint8")
    int8_levels.cache_clear()
    with pytest.raises(RuntimeError, match="no kernels for bytes, which int8 and int4 need"):
        load(tiny_folder, device="cpu", quantize="int8")
    int8_levels.cache_clear()
    model = load(tiny_folder, device="cpu", compile=True)
    assert not isinstance(model.head, ShortlistHead)
    assert generate(pictures, PROMPTS, model=model, max_new_tokens=8) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_on_any_cpu(tiny_folder, pictures, dtype, monkeypatch):
    """oneDNN lays out bfloat16 only where the CPU has AVX-512 or the like; elsewhere the maps are plain."""
    exact = scores_of_two_tokens(load(tiny_folder, device="cpu", dtype="float32"), pictures)
    for as_it_is in (True, False):
        if not as_it_is:
            monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
            assert isinstance(dense_map(torch.randn(3, 4).bfloat16()), torch.nn.Linear)
        found = scores_of_two_tokens(load(tiny_folder, device="cpu", dtype=dtype, compile=True), pictures)
        assert (found - exact).norm() / exact.norm() < 0.05


@needs_both
def test_a_torch_without_fbgemm_answers_the_same(tiny_folder, monkeypatch, pictures):
    """A later torch may come without the tensors that FBGEMM packs; oneDNN gives the same numbers to the bit."""
    expected = generate(pictures, PROMPTS, model=load(tiny_folder, device="cpu", quantize="int8"), max_new_tokens=8)
    monkeypatch.delattr(torch, "qint8")
    assert int8_libraries() == ["onednn"]
    int8_levels.cache_clear()
    model = load(tiny_folder, device="cpu", quantize="int8")
    int8_levels.cache_clear()
    assert model.head.library == "onednn"
    assert generate(pictures, PROMPTS, model=model, max_new_tokens=8) == expected


def test_the_command(picture_file, capsys):
    for options in (["--quantize", "int8"], ["--quantize", "int4"], ["--compile"]):
        assert main(["generate", str(picture_file), "caption en", *options]) == 0
        assert len(capsys.readouterr().out.split()) >= 3
    assert main(["generate", str(picture_file), "caption en", "--quantize", "int3"]) == 2
    assert "expected 'nf4', 'int8' or 'int4'" in capsys.readouterr().err


def test_the_plain_way_loads_nothing_more():
    code = "import sys, sigma_book.assemble; print([m for m in ('torchao', 'torch._inductor', 'openvino') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_memory_in_16_bits_at_224_pixels():
    """By accounting: weights, caches, scores and the largest activations of the 3B model answering one picture."""
    text = {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8}
    text |= {"num_key_value_heads": 1, "vocab_size": 257_216}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision |= {"patch_size": 14, "image_size": 224}
    sizes = {"model_type": "paligemma", "text_config": text, "vision_config": vision, "image_token_index": 257_152}
    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig.from_dict(sizes))
        weights = 2 * sum(parameter.numel() for parameter in model.parameters())
        length = 256 + 32 + 100
        caches = model.bfloat16().language_model.new_caches(1, length)
    held = sum(cache.key.nbytes + cache.value.nbytes for cache in caches)
    assert weights == 2 * 2_923_466_480
    assert held == 18 * 2 * length * 256 * 2
    activations = (
        2 * length * (4 * 2048 + 3 * 16_384) + 4 * 8 * length * length
    )  # streams, GeGLU, float32 scores of heads
    scores = 4 * 257_216 * 4  # logits in float32, and what choosing makes of them
    assert weights + held + activations + scores <= 6.6e9
