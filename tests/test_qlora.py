"""Maps in four bits: what they keep, what they refuse, and that memory is what the chapter says, measured."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sigma_book import generate
from sigma_book.assemble import load
from sigma_book.cli import main
from sigma_book.lora import DECODER_LINEARS, LoraConfig, add_lora, find_linears, load_adapter, merge_lora, save_adapter
from sigma_book.paligemma import PaliGemma
from sigma_book.qlora import NF4Linear, dequantize_blocks, nf4_bytes, quantize_blocks, quantize_nf4
from sigma_book.weights import load_model, save_model


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def model(tiny_folder):
    return load(tiny_folder, device="cpu", dtype="float32")


def inputs(model, pictures, answers=None):
    batch = model.processor.prepare(pictures[:2], ["caption en", "what is it?"], answers)
    names = ("input_ids", "pixel_values", "attention_mask", "token_type_ids", *(["labels"] if answers else []))
    return {name: getattr(batch, name) for name in names}


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (48, 32), (65, 64), (130, 320)])
def test_bytes_are_counted_rightly(rows, columns):
    layer = NF4Linear(torch.randn(rows, columns))
    assert nf4_bytes(rows * columns) == sum(buffer.nbytes for buffer in layer.buffers())


def test_a_block_far_from_the_others_keeps_its_own_scale():
    weight = torch.randn(64, 64)
    weight[10] *= 1000
    back = dequantize_blocks(*quantize_blocks(weight), weight.shape)
    error = (back - weight).abs().amax(1) / weight.abs().amax(1)
    assert error.max() <= 0.1520  # half the widest gap between levels, -1 and -0.696


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_weight_that_is_not_finite(model, value):
    with torch.no_grad():
        model.language_model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(ValueError, match=r"language_model.layers.1.mlp.up_proj: a weight is not finite"):
        quantize_nf4(model)


def test_numbers_do_not_depend_on_the_parts_they_are_read_in(monkeypatch):
    values = torch.randn(1000, 7)
    whole = quantize_blocks(values)
    monkeypatch.setattr("sigma_book.qlora.PART", 640)
    assert all(torch.equal(one, other) for one, other in zip(whole, quantize_blocks(values)))


def test_what_is_quantized_and_what_never(model):
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_nf4(model)
    quantized = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert len(quantized) == 14 and all(name.startswith("language_model") and name.endswith(ends) for name in quantized)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, kept[name]) and not parameter.requires_grad
    assert {name.rpartition(".")[0] for name in kept.keys() - dict(model.named_parameters()).keys()} == quantized


def test_a_bias_stays_as_it_is(model):
    bias = model.vision_tower.encoder.layers[0].mlp.fc1.bias
    quantize_nf4(model, ("fc1",))
    assert model.vision_tower.encoder.layers[0].mlp.fc1.bias is bias is not None


def test_moving_and_casting_keep_the_scales(model):
    quantize_nf4(model)
    layer = model.language_model.layers[0].mlp.up_proj
    exact = layer.weight
    model.bfloat16()
    assert layer.scales.dtype == layer.mean_scale.dtype == torch.float32 and layer.codes.dtype == torch.uint8
    assert torch.equal(layer.weight, exact.bfloat16())
    assert torch.equal(model.double().language_model.layers[0].mlp.up_proj.weight, exact.double())


def test_gradients_pass_through_exactly():
    torch.manual_seed(0)
    layer = NF4Linear(torch.randn(6, 10, dtype=torch.float64), nn.Parameter(torch.randn(6, dtype=torch.float64)))
    rows = torch.randn(2, 3, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (rows,))
    torch.testing.assert_close(layer(rows), rows @ layer.weight.T + layer.bias)


def test_the_way_back_keeps_no_weight():
    """What a forward pass leaves for the backward pass is smaller than the weight by far."""
    kept = []
    layer, rows = NF4Linear(torch.randn(512, 512)), torch.randn(2, 512, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda t: t):
        layer(rows).sum().backward()
    assert sum(kept) < 0.1 * 4 * 512 * 512


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_the_adapters_only_and_the_base_the_same_to_the_bit(model, pictures, checkpointing):
    quantize_nf4(model)
    add_lora(model, LoraConfig())
    assert (model.lora_config.rank, model.lora_config.alpha) == (64, 16)
    model.train()
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    if checkpointing:
        for block in model.language_model.layers:
            block.forward = lambda *given, forward=block.forward: checkpoint(forward, *given, use_reentrant=False)
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-2)
    given = inputs(model, pictures, ["a star", "two rings"])
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.loss(**given)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learning) == ("lora_" in name)
        assert parameter.grad is None or parameter.grad.isfinite().all()
    assert losses[-1] < 0.7 * losses[0]
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in frozen.items())


def test_checkpointing_changes_no_gradient(model, pictures):
    quantize_nf4(model)
    add_lora(model, LoraConfig(rank=4))
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        nn.init.normal_(parameter, std=0.1)
    given = inputs(model, pictures, ["a star", "two rings"])
    found = []
    for _ in range(2):
        model.zero_grad()
        model.loss(**given).backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad])
        for block in model.language_model.layers:
            block.forward = lambda *args, forward=block.forward: checkpoint(forward, *args, use_reentrant=False)
    assert all(torch.equal(one, other) for one, other in zip(*found))


def test_loading_quantized_is_quantizing_what_was_loaded(tiny_folder, pictures):
    for dtype in ("float32", "bfloat16"):
        afterwards = load(tiny_folder, device="cpu", dtype=dtype)
        quantize_nf4(afterwards)
        at_once = load(tiny_folder, device="cpu", dtype=dtype, quantize="nf4")
        ours, theirs = at_once.state_dict(), afterwards.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert not at_once.training and not any(p.requires_grad for p in at_once.parameters())
        assert generate(pictures[0], "caption en", model=at_once, max_new_tokens=6) == generate(
            pictures[0], "caption en", model=afterwards, max_new_tokens=6
        )


def test_no_full_matrix_is_there_when_the_next_one_comes(tiny_folder):
    """Each tensor that the loader hands over is freed or in codes before the next is read."""
    import weakref

    from sigma_book.qlora import nf4_on_arrival

    place, waiting, seen = nf4_on_arrival(), [], 0

    def watch(model: PaliGemma, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        nonlocal seen
        assert all(reference() is None for reference in waiting)
        placed = place(model, name, tensor)
        if name not in placed:
            seen += 1
            waiting.append(weakref.ref(tensor))
        return placed

    load_model(tiny_folder, "cpu", "bfloat16", watch)
    assert seen == 14 and all(reference() is None for reference in waiting)


def test_the_pocket_answers_in_four_bits(picture_file, capsys):
    assert main(["generate", str(picture_file), "caption en", "--quantize", "nf4"]) == 0
    answer = capsys.readouterr().out
    assert (
        answer == f"{generate(picture_file, 'caption en', model=load(quantize='nf4'))}\n" and len(answer.split()) >= 3
    )


def test_bytes_of_the_pocket_model():
    """What a whole model takes, counted over all its tensors: in 16 bits, and with its decoder in NF4."""
    plain, packed = load(dtype="bfloat16"), load(dtype="bfloat16", quantize="nf4")
    quantized = [linear.weight.numel() for linear in find_linears(plain, DECODER_LINEARS).values()]
    taken = [sum(t.nbytes for t in [*one.parameters(), *one.buffers()]) for one in (plain, packed)]
    assert taken[1] == taken[0] - 2 * sum(quantized) + sum(map(nf4_bytes, quantized))
    print(f"pocket: {taken[0]:,} bytes in 16 bits, {taken[1]:,} with NF4: {1 - taken[1] / taken[0]:.0%} less")
    assert 0.40 < 1 - taken[1] / taken[0] < 0.46  # not 75 %: four tenths of it are never quantized


def test_adapters_on_a_quantized_base(tiny_folder, tmp_path, pictures):
    taught = load(tiny_folder, device="cpu", dtype="float32", quantize="nf4")
    add_lora(taught, LoraConfig(rank=3))
    for name, parameter in taught.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    save_adapter(taught, tmp_path / "adapter", base=tiny_folder)
    again = load(tmp_path / "adapter", device="cpu", dtype="float32", quantize="nf4")
    given = inputs(taught, pictures)
    with torch.no_grad():
        expected = taught(**given)
        assert torch.equal(again(**given), expected)
        on_full = load(tiny_folder, device="cpu", adapter=tmp_path / "adapter")(**given)
        assert not torch.allclose(on_full, expected, atol=1e-3)
        merge_lora(again)
        torch.testing.assert_close(again(**given), expected, rtol=1e-4, atol=1e-4)
    save_model(again, tmp_path / "merged")  # a plain model: no codes are left
    assert torch.equal(load_model(tmp_path / "merged", "cpu")(**given), again(**given))


def test_steps_out_of_order(model, tmp_path):
    add_lora(model, LoraConfig(rank=2))
    with pytest.raises(ValueError, match="quantize first, once, then add an adapter"):
        quantize_nf4(model)
    save_adapter(model, tmp_path / "adapter")
    fresh = load(quantize="nf4")
    with pytest.raises(ValueError, match="has an adapter or NF4 weights already"):
        quantize_nf4(fresh)
    with pytest.raises(ValueError, match="not a plain PaliGemma"):
        save_model(fresh, tmp_path / "model")
    with pytest.raises(ValueError, match="has the shape"):
        load_adapter(fresh, tmp_path / "adapter")
    with pytest.raises(ValueError, match="'head' matches no linear map"):
        quantize_nf4(load(), ("head",))
    with pytest.raises(ValueError, match="'lm_head' matches no linear map"):
        quantize_nf4(load(), ("up_proj", "lm_head"))
    assert not (tmp_path / "model").exists()


# One step of teaching in a process of its own. Blocks come one by one, as from a file: the 16-bit model is never whole.
STEP = """
    import json, sys
    import torch
    from torch import nn
    from torch.utils.checkpoint import checkpoint
    from sigma_book.lora import DECODER_LINEARS, LoraConfig, add_lora, find_linears
    from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
    from sigma_book.qlora import NF4Linear, nf4_on_arrival

    torch.set_num_threads(1)
    sizes, quantize, rank = json.loads(sys.argv[1]), sys.argv[2] == "nf4", int(sys.argv[3])

    def held(key):  # VmRSS: now; VmHWM: the most so far, of this process alone
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig.from_dict(sizes))
    torch.empty(256, 256, dtype=torch.bfloat16).normal_()  # what torch loads at its first use is not the model's
    NF4Linear(torch.randn(64, 64)).weight
    start = held("VmRSS")
    place, tensors = nf4_on_arrival(), {}
    for name, shape in [(name, tensor.shape) for name, tensor in model.state_dict().items()]:
        tensor = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)
        tensors |= place(model, name, tensor) if quantize else {name: tensor}
    del tensor
    model.load_state_dict(tensors, assign=True)
    tensors.clear()
    stored = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    weights = held("VmRSS") - start
    add_lora(model, LoraConfig(rank=rank))
    for block in model.language_model.layers:
        block.forward = lambda *given, forward=block.forward: checkpoint(forward, *given, use_reentrant=False)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    ids = torch.randint(4, 1000, (1, 4))  # products of 16 bits crawl on many CPUs
    ones = torch.ones_like(ids)
    types = (torch.arange(4) >= 2).long()[None]
    model.loss(ids, None, ones, types, torch.where(types == 1, ids, -100)).backward()
    optimizer.step()
    state = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    print(json.dumps({
        "stored": stored, "weights": weights, "adapters": sum(p.nbytes for p in learning),
        "gradients": sum(p.grad.nbytes for p in learning), "optimizer": state,
        "frozen_gradients": sum(p.grad is not None for p in model.parameters() if not p.requires_grad),
        "taught": held("VmRSS") - start, "peak": held("VmHWM"),
    }))
"""


def sizes_of(vision: tuple, text: tuple, vocabulary: int) -> dict:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision_config = dict(zip(keys, vision)) | {"patch_size": 14}
    text_config = dict(zip((*keys, "num_key_value_heads"), text)) | {"vocab_size": vocabulary}
    whole = {"vision_config": vision_config, "text_config": text_config, "image_token_index": vocabulary - 1}
    return {"model_type": "paligemma"} | whole


def step_in_a_process(sizes: dict, kind: str, rank: int) -> dict:
    command = [sys.executable, "-c", textwrap.dedent(STEP), json.dumps(sizes), kind, str(rank)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_memory_of_a_step_at_300_million_measured():
    """The middle model of chapter 19, a step of LoRA on 16 bits and of QLoRA. Stored bytes are exact, resident within 2 %."""
    from sigma_book.paligemma import PaliGemmaConfig

    sizes = sizes_of((768, 3072, 12, 12), (1024, 4096, 12, 4, 1), 32_000)
    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig.from_dict(sizes))
    linears = find_linears(model, DECODER_LINEARS).values()
    total = sum(parameter.numel() for parameter in model.parameters())
    quantized = [linear.weight.numel() for linear in linears]
    adapters = sum(64 * (linear.in_features + linear.out_features) for linear in linears)
    assert 295e6 < total < 310e6
    expected = {"16 bits": 2 * total, "nf4": 2 * (total - sum(quantized)) + sum(map(nf4_bytes, quantized))}
    measured = {kind: step_in_a_process(sizes, kind, rank=64) for kind in expected}
    for kind, found in measured.items():
        print(kind, {name: f"{value / 1e6:.0f} MB" for name, value in found.items()})
        assert found["stored"] == expected[kind] and found["frozen_gradients"] == 0
        assert found["adapters"] == found["gradients"] == 4 * adapters
        assert found["optimizer"] == pytest.approx(8 * adapters, rel=1e-3)
        assert found["weights"] == pytest.approx(expected[kind], rel=0.02)
        assert found["peak"] < 2e9
    saved = 1 - measured["nf4"]["weights"] / measured["16 bits"]["weights"]
    of_matrices = 1 - sum(map(nf4_bytes, quantized)) / (2 * sum(quantized))
    print(f"of all weights {saved:.0%} saved, measured; of the quantized matrices {of_matrices:.1%}")
    assert 0.38 < saved < 0.50
