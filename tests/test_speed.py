"""The bill of an answer: operations against torch's own counter, bytes against the tensors themselves."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sigma_book.gemma import GemmaConfig
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.qlora import nf4_bytes
from sigma_book.siglip import SiglipConfig
from sigma_book.speed import (
    Machine,
    Part,
    Product,
    gpu_machine,
    inference_bill,
    median_machine,
    product_rates,
    wait_for,
)

TOWERS = {
    "plain": SiglipConfig(48, 100, 3, 4, image_size=56, patch_size=14),
    "one head": SiglipConfig(40, 72, 2, 1, image_size=42, patch_size=7),
}
GEMMA_2 = {
    "query_pre_attn_scalar": 20.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 7,
    "layer_types": ("sliding_attention", "full_attention", "sliding_attention"),
    "four_norms": True,
}
VOICES = {
    "gemma 1": GemmaConfig(64, 160, 3, 4, 1, 24, 301),
    "groups": GemmaConfig(56, 90, 2, 6, 3, 10, 130),
    "gemma 2": GemmaConfig(64, 160, 3, 4, 2, 16, 301, **GEMMA_2),
    "own head": GemmaConfig(64, 160, 3, 2, 2, 24, 301, tie_word_embeddings=False),
}
CASES = [
    (tower, voice, batch, pictures) for tower in TOWERS for voice in VOICES for batch, pictures in ((1, 1), (3, 5))
]


class Traffic(TorchDispatchMode):
    """Bytes that every operation reads and writes, apart from those that only look at memory in another way."""

    def __init__(self):
        super().__init__()
        self.bytes = self.look_ups = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if not function.is_view and "view" not in str(function) and "empty" not in str(function):
            touched = tree_leaves((arguments, options, result))
            self.bytes += (count := sum(tensor.nbytes for tensor in touched if isinstance(tensor, torch.Tensor)))
            self.look_ups += count * ("embedding" in str(function))  # the whole table, of which a row is read
        return result


class Held(TorchDispatchMode):
    """The most bytes that what operations made held at once."""

    def __init__(self):
        super().__init__()
        self.bytes = self.most = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        def stores(tree) -> list[torch.UntypedStorage]:
            return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

        result = function(*arguments, **(options or {}))
        given = {store._cdata for store in stores((arguments, options))}
        for store in stores(result):
            if store._cdata not in given | self.alive:
                self.alive.add(store._cdata)
                self.bytes += store.nbytes()
                weakref.finalize(store, self.free, store._cdata, store.nbytes())
        self.most = max(self.most, self.bytes)
        return result

    def free(self, store: int, size: int) -> None:
        self.alive.discard(store)
        self.bytes -= size


def build(tower: str, voice: str) -> PaliGemma:
    with torch.device("meta"):
        return PaliGemma(PaliGemmaConfig(TOWERS[tower], VOICES[voice], image_token_id=300)).eval()


def flops(function, *arguments) -> int:
    """On the meta device attention falls into plain products, which the counter knows."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def prompt_of(model: PaliGemma, batch: int, pictures: int) -> tuple[int, list]:
    """A prompt's length and the arguments of `hidden_states`; pictures are spread over the rows as they come."""
    length = -(-pictures // batch) * model.config.num_image_tokens + 5
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    ones = torch.ones_like(ids)
    features = torch.empty(pictures, model.config.num_image_tokens, model.config.text.hidden_size, device="meta")
    return length, [ids, features, ones, torch.zeros_like(ids)]


@pytest.mark.parametrize(
    ("tower", "voice", "batch", "pictures"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case[2] == 1)) for case in CASES],
)
def test_operations_are_those_that_torch_counts(tower, voice, batch, pictures):
    """Exact: the same integers."""
    model = build(tower, voice)
    length, arguments = prompt_of(model, batch, pictures)
    vision = model.config.vision
    bill = inference_bill(model.config, batch, length, 9, pictures=pictures)
    shown = torch.empty(pictures, 3, vision.image_size, vision.image_size, device="meta")
    assert bill.vision.flops == flops(model.vision_tower, shown)
    features = torch.empty(pictures, vision.num_patches, vision.hidden_size, device="meta")
    assert bill.projector.flops == flops(model.multi_modal_projector, features)
    caches = model.language_model.new_caches(batch, length + 9)
    assert bill.prefill.flops == flops(model.hidden_states, *arguments, caches)
    assert bill.head.flops == flops(model.logits, torch.empty(batch, model.config.text.hidden_size, device="meta"))
    token = torch.zeros(batch, 1, dtype=torch.long, device="meta")
    for seen in range(length + 1, length + 9):
        blocks, head = bill.step(seen)
        mask = torch.ones(batch, seen, dtype=torch.long, device="meta")
        assert blocks.flops + head.flops == flops(model.decode, token, mask, caches)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("voice", VOICES)
@pytest.mark.parametrize("tower", TOWERS)
def test_weights_are_those_of_the_state_dict(tower, voice, precision):
    """Exact, part by part."""
    model = build(tower, voice).to(getattr(torch, precision))
    bill = inference_bill(model.config, 2, 100, 9, precision)

    def held(module) -> int:
        return sum(tensor.nbytes for tensor in module.state_dict().values())

    table = model.language_model.embed_tokens.weight.nbytes
    assert bill.vision.weight_bytes == held(model.vision_tower)
    assert bill.projector.weight_bytes == held(model.multi_modal_projector)
    assert bill.prefill.weight_bytes == bill.step()[0].weight_bytes == held(model.language_model) - table
    assert bill.head.weight_bytes == table
    assert bill.weights_held == held(model)
    caches = model.language_model.new_caches(2, 109)
    assert bill.cache_held == sum(cache.key.nbytes + cache.value.nbytes for cache in caches)


@pytest.mark.parametrize("voice", VOICES)
def test_few_bits(voice):
    """int8: a byte a weight and four a row, but for patches and projector; nf4: the decoder's maps in four; int4: those
    that divide into groups of 32 columns and 16 rows, queries, keys and values as one."""
    model = build("plain", voice)
    maps = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    table = model.language_model.embed_tokens.weight
    maps = {name: module for name, module in maps.items() if not name.startswith("multi_modal_projector")}
    byte = whole - sum(4 * m.weight.numel() - m.weight.numel() - 4 * len(m.weight) for m in maps.values())
    if model.config.text.tie_word_embeddings:
        byte += table.numel() + 4 * len(table)
    assert inference_bill(model.config, 1, 30, 9, "int8").weights_held == byte
    named = {name: module.weight for name, module in maps.items() if name.startswith("language_model")}
    decoder = list(named.values())
    looking = ("q_proj", "k_proj", "v_proj")
    joint = sum(len(named[f"language_model.layers.0.self_attn.{part}"]) for part in looking)
    rows = {name: joint if name.endswith(looking) else len(weight) for name, weight in named.items()}
    fits = [weight for name, weight in named.items() if weight.shape[1] % 32 == 0 and rows[name] % 16 == 0]
    four = byte - sum(w.numel() + 4 * len(w) - w.numel() // 2 - 4 * len(w) * (w.shape[1] // 32) for w in fits)
    assert inference_bill(model.config, 1, 30, 9, "int4").weights_held == four
    short = inference_bill(model.config, 1, 30, 9, head="int8")  # chapter 21b's ShortlistHead beside a float32 table
    assert short.head.weight_bytes == short.step()[1].weight_bytes == table.numel() + 4 * len(table)
    assert short.weights_held == whole + (
        short.head.weight_bytes if model.config.text.tie_word_embeddings else -3 * table.numel() + 4 * len(table)
    )
    inside = [weight.numel() for weight in decoder]
    four = whole - sum(4 * count - nf4_bytes(count) for count in inside)
    assert inference_bill(model.config, 1, 30, 9, "nf4").weights_held == four
    halves = inference_bill(model.config, 1, 30, 9, "nf4", exact=2)
    assert halves.weights_held == whole // 2 - sum(2 * count - nf4_bytes(count) for count in inside)


@pytest.mark.parametrize("voice", ["gemma 1", "gemma 2"])
def test_bytes_moved_are_near_those_that_the_operations_touch(voice):
    """Within a tenth of what a count over all operations finds: the bill leaves small vectors and indices out."""
    tower = SiglipConfig(96, 400, 4, 4, image_size=112, patch_size=14)
    text = VOICES[voice]
    model = PaliGemma(PaliGemmaConfig(tower, text, image_token_id=300)).eval()
    ids = torch.tensor([[300] * 64 + [2, 5, 6, 7]] * 2)
    ones, features = torch.ones_like(ids), torch.randn(2, 64, text.hidden_size)
    bill = inference_bill(model.config, 2, 68, 9)
    with torch.no_grad(), Traffic() as traffic:
        model.vision_tower(torch.zeros(2, 3, 112, 112))
    assert traffic.bytes == pytest.approx(bill.vision.bytes, rel=0.1)
    caches = model.language_model.new_caches(2, 80)
    with torch.no_grad(), Traffic() as traffic:
        model.hidden_states(ids, features, ones, torch.zeros_like(ids), caches)
    assert traffic.bytes == pytest.approx(bill.prefill.bytes, rel=0.1)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_bytes_of_a_step_with_a_long_cache(rows, kv_heads):
    """Within a twentieth of the count over all operations; of eight rows' bytes most are those of the cache."""
    text = GemmaConfig(256, 1024, 3, 4, kv_heads, 64, 2000)
    model = PaliGemma(PaliGemmaConfig(TOWERS["plain"], text, image_token_id=1999)).eval()
    ids = torch.full((rows, 600), 2)
    caches = model.language_model.new_caches(rows, 608)
    seen = torch.ones(rows, 601, dtype=torch.long)
    bill = inference_bill(model.config, rows, 600, 9)
    with torch.no_grad():
        model.hidden_states(ids, None, seen[:, :600], torch.zeros_like(ids), caches)
        with Traffic() as traffic:
            model.decode(ids[:, -1:], seen, caches)
    step = sum(part.bytes for part in bill.step(601))
    assert traffic.bytes - traffic.look_ups == pytest.approx(step, rel=0.05)
    if rows == 8 and kv_heads == 4:
        assert sum(part.cache_bytes for part in bill.step(601)) > step / 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_capped_scores_are_held(precision):
    """Within a tenth of what a count of all that is alive finds; masks and streams are left out."""
    tower = SiglipConfig(32, 64, 1, 2, image_size=280, patch_size=14)
    text = GemmaConfig(32, 64, 3, 8, 4, 16, 301, **GEMMA_2)
    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig(tower, text, image_token_id=300)).eval().to(getattr(torch, precision))
    length, arguments = prompt_of(model, 2, 2)
    arguments[1] = arguments[1].to(getattr(torch, precision))
    caches = model.language_model.new_caches(2, length)
    with torch.no_grad(), Held() as held:
        model.hidden_states(*arguments, caches)
    assert held.most == pytest.approx(inference_bill(model.config, 2, length, 1, precision).activations_held, rel=0.1)


def test_the_full_size():
    """PaliGemma 3B: 11.69 GB in float32, and the sixteen bits that fit 6.6 GB."""
    config = PaliGemmaConfig.from_dict(
        {
            "model_type": "paligemma",
            "text_config": {"hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "head_dim": 256}
            | {"num_attention_heads": 8, "num_key_value_heads": 1, "vocab_size": 257_216},
            "vision_config": {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
            | {"num_attention_heads": 16, "image_size": 224, "patch_size": 14},
        }
    )
    assert inference_bill(config, 1, 264, 20).weights_held == 4 * 2_923_466_480
    half = inference_bill(config, 1, 264, 20, "bfloat16")
    assert half.weights_held == 2 * 2_923_466_480
    assert half.held < 6.6e9


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"prompt_length": True}, "prompt_length is True"),
        ({"new_tokens": 2.0}, "new_tokens is 2.0"),
        ({"precision": "int7"}, "precision is 'int7'"),
        ({"pictures": -1}, "pictures is -1"),
        ({"exact": -3}, "exact is -3: expected 2 or 4"),
        ({"exact": 2.0}, "exact is 2.0"),
        ({"head": "int3"}, "head is 'int3': expected 'int8'"),
        ({"head": "bfloat16"}, "head is 'bfloat16'"),
        ({"prompt_length": 15}, "1 pictures take 16 tokens"),
    ],
)
def test_what_cannot_be_billed_is_said(changes, words):
    model = build("plain", "gemma 1")
    arguments = {"batch": 1, "prompt_length": 30, "new_tokens": 4} | changes
    with pytest.raises(ValueError, match=words):
        inference_bill(model.config, **arguments)


@pytest.mark.parametrize(
    ("driver", "card"),
    [
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM4 80 GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_cards_by_the_name_that_the_driver_gives(driver, card):
    found = gpu_machine(driver)
    assert found.name == f"{card}, computed" and not found.measured
    assert gpu_machine(card) == found


@pytest.mark.parametrize(
    "driver",
    [
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "Voodoo 2",
    ],
)
def test_unknown_cards_are_said(driver):
    with pytest.raises(ValueError, match="no published peaks of"):
        gpu_machine(driver)


def test_a_card_takes_the_longer_of_arithmetic_and_memory():
    """By hand: T4, 65e12 operations and 320e9 bytes a second."""
    much = Part("x", (Product(1000, 1000, 1000),), weight_bytes=1000)
    little = Part("x", (Product(1, 1000, 1000),), weight_bytes=2_000_000)
    assert gpu_machine("T4", "float16").seconds(much) == 2e9 / 65e12
    assert gpu_machine("T4", "float16").seconds(little) == 2e6 / 320e9
    assert gpu_machine("T4", "float32").seconds(much) == 2e9 / 8.1e12
    assert gpu_machine("T4", "bfloat16") == gpu_machine("T4", "float32")  # its tensor units do not know bfloat16
    assert gpu_machine("L4", "bfloat16") == gpu_machine("L4", "float16")


MEASURED = Machine("m", peak=100.0, read=10.0, stream=20.0, begin=0.5, curve=0.25, score=0.125, tower_block=3.0)
MEASURED_RATES = ((1, 8.0, 8.0), (4, 10.0, 20.0), (16, 40.0, 20.0))


def test_a_prediction_by_hand():
    """Every term alone, then all together, on a machine of round numbers."""
    machine = Machine(
        **(vars(MEASURED) | {"rates": MEASURED_RATES, "decoder_block": 7.0, "busy_block": 15.0, "measured": True})
    )
    assert machine.rate(4, widens=True) == 10 and machine.rate(4, widens=False) == 20
    assert machine.rate(8, widens=True) == pytest.approx(20)  # half way on both logarithms
    assert machine.rate(99, widens=True) == 40
    one_row = Part("x", (Product(1, 3, 5, 2),), weight_bytes=120)
    assert machine.seconds(one_row) == 120 / 10 + 0.5 * 10
    rows = Part("x", (Product(4, 3, 5, 2), Product(4, 5, 3)), weight_bytes=120)
    assert machine.seconds(rows) == pytest.approx(2 * 4 * 15 * 2 / 10 + 2 * 4 * 15 / 20)
    looks = (Product(4, 2, 6), Product(4, 6, 2))
    attention = Part("x", (Product(4, 3, 5),), looks, cache_bytes=30)
    assert attention.scores == 24
    assert machine.seconds(attention) == pytest.approx(12 + max(192 / 100, 3) + 24 * 0.125)
    rest = Part("x", (Product(4, 3, 5),), between_bytes=40, curved=8, decoder_blocks=1)
    assert machine.seconds(rest) == pytest.approx(12 + 40 / 20 + 8 * 0.25 + 7)
    assert machine.overhead(Part("x", (), tower_blocks=2)) == 6
    for megabytes, block in ((0, 7), (16, 11), (32, 15), (99, 15)):  # of weights in each of two blocks
        assert machine.overhead(Part("x", (), weight_bytes=2 * megabytes * 2**20, decoder_blocks=2)) == 2 * block


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_devices_that_work_beside_are_waited_for(monkeypatch, kind):
    waited = []
    monkeypatch.setattr(getattr(torch, kind), "synchronize", lambda *device: waited.append(device))
    wait_for(kind)
    wait_for("cpu")
    assert len(waited) == 1


def test_the_median_of_looks():
    looks = [Machine("m", peak, 1.0, 1.0, rates=((1, peak, 1.0),)) for peak in (5.0, 1.0, 2.0)]
    assert median_machine(looks).peak == 2.0
    assert median_machine(looks).rates == ((1, 2.0, 1.0),)


@pytest.mark.slow
def test_rates_are_of_the_map_that_is_given():
    """A map that does nothing is faster than torch's, by far; rows and places are those asked for."""
    rates = product_rates((1, 64), inner=256, outer=512)
    idle = product_rates((1, 64), inner=256, outer=512, make_map=lambda inner, outer: lambda rows: rows)
    assert [row[0] for row in rates] == [row[0] for row in idle] == [1, 64]
    assert idle[1][1] > 5 * rates[1][1]
