"""The bill before the run.

How long must an answer take on this machine, and what decides it?

Tangled from chapters/21_speed.py: edit there, then run python -m sigma_book.tangle.
"""

import math
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from sigma_book.gemma import Gemma, GemmaBlock, GemmaConfig
from sigma_book.gqa import cache_bytes
from sigma_book.paligemma import PaliGemmaConfig
from sigma_book.qlora import nf4_bytes
from sigma_book.rope import rotary_angles
from sigma_book.siglip import SiglipBlock, SiglipConfig

__all__ = [
    "EXACT_BYTES",
    "GPUS",
    "OUTSIDE",
    "Gpu",
    "InferenceBill",
    "Machine",
    "Part",
    "Product",
    "gpu_machine",
    "inference_bill",
    "matrix_bytes",
    "measure_machine",
    "median_machine",
    "median_seconds",
    "product_rates",
    "vision_bill",
    "wait_for",
]


@dataclass(frozen=True)
class Product:
    """`count` products of (rows, inner) with (inner, outer), each with matrices of its own."""

    rows: int
    inner: int
    outer: int
    count: int = 1

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.outer * self.count

    @property
    def numbers(self) -> int:
        """What goes in and comes out, the matrix apart."""
        return self.rows * (self.inner + self.outer) * self.count


EXACT_BYTES = {  # of a number that is not in few bits
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int8": 4,
    "int4": 4,
    "nf4": 4,
}
OUTSIDE = {"nf4": "exact", "int4": "int8"}  # how tower and head are stored while the decoder's maps are so


def matrix_bytes(outer: int, inner: int, precision: str, exact: int) -> int:
    """Bytes of a stored matrix.

    Parameters
    ----------
    outer, inner : int
        Rows and columns, as `torch.nn.Linear` stores them.
    precision : str
        int8: a byte a weight and 4 a row; int4: half a byte and 4 for each 32 weights, but as int8 if columns are no
        multiple of 32 or rows none of 16; nf4: as `nf4_bytes` counts; else `exact` bytes a weight.
    exact : int
        Bytes of a number that is not in few bits.
    """
    if precision == "int8" or (precision == "int4" and (inner % 32 or outer % 16)):
        return outer * inner + 4 * outer
    if precision == "int4":
        return outer * inner // 2 + 4 * outer * inner // 32
    return nf4_bytes(outer * inner) if precision == "nf4" else outer * inner * exact


@dataclass(frozen=True)
class Part:
    """What one part of an answer costs.

    Parameters
    ----------
    name : str
    products : tuple of Product
        Rows of activations with stored matrices.
    attention : tuple of Product
        Queries with keys, weights with values.
    weight_bytes : int
        Of all that is stored for this part and read once, norms and biases included.
    cache_bytes : int
        Keys and values that are written or read.
    between_bytes : int
        What the work between products reads and writes.
    product_bytes : int
        What goes into the products and comes out, the stored matrices apart.
    curved : int
        Numbers that pass a GELU.
    tower_blocks, decoder_blocks : int
        How many blocks Python runs through.
    """

    name: str
    products: tuple[Product, ...]
    attention: tuple[Product, ...] = ()
    weight_bytes: int = 0
    cache_bytes: int = 0
    between_bytes: int = 0
    product_bytes: int = 0
    curved: int = 0
    tower_blocks: int = 0
    decoder_blocks: int = 0

    @property
    def flops(self) -> int:
        """Multiplications and additions of all products, as torch's `FlopCounterMode` counts them."""
        return sum(product.flops for product in self.products + self.attention)

    @property
    def scores(self) -> int:
        """How often a query is held against a key; in `attention` every second product makes them."""
        return sum(product.rows * product.outer * product.count for product in self.attention[::2])

    @property
    def bytes(self) -> int:
        """Bytes moved."""
        return self.weight_bytes + self.cache_bytes + self.between_bytes + self.product_bytes


def vision_bill(config: PaliGemmaConfig, pictures: int, precision: str, exact: int) -> Part:
    """The tower over some pictures."""
    sizes = config.vision
    width, inner, layers, patches = (
        sizes.hidden_size,
        sizes.intermediate_size,
        sizes.num_hidden_layers,
        sizes.num_patches,
    )
    few = OUTSIDE.get(precision, precision)
    pixels = sizes.num_channels * sizes.patch_size**2
    rows, heads = pictures * patches, pictures * sizes.num_attention_heads * layers
    products = (
        Product(rows, pixels, width),
        Product(rows, width, width, 4 * layers),
        Product(rows, width, inner, layers),
        Product(rows, inner, width, layers),
    )
    head_dim = width // sizes.num_attention_heads
    attention = (Product(patches, head_dim, patches, heads), Product(patches, patches, head_dim, heads))
    maps = 4 * matrix_bytes(width, width, few, exact)
    maps += matrix_bytes(inner, width, few, exact) + matrix_bytes(width, inner, few, exact)
    vectors = layers * (4 * width + inner + width + 4 * width)  # biases, and two norms with two vectors each
    vectors += pixels * width + width + patches * width + 2 * width  # patch map, positions, last norm
    passes = layers * (2 * 2 + 2 * 3 + 2) * width + 2 * layers * inner  # norms, sums, heads; GELU
    passes += 5 * width + 2 * pixels  # positions added (3) and the last norm (2); pixels laid out as patches
    return Part(
        name="vision",
        products=products,
        attention=attention,
        weight_bytes=layers * maps + exact * vectors,
        between_bytes=exact * rows * passes,
        # of attention: queries, keys and values go in, one result comes out
        product_bytes=exact * (sum(product.numbers for product in products) + layers * rows * 4 * width),
        curved=rows * inner * layers,
        tower_blocks=layers,
    )


def _decoder_bill(
    config: PaliGemmaConfig, batch: int, length: int, seen: list[int], precision: str, exact: int, name: str
) -> Part:
    """The blocks over `length` new tokens in each of `batch` rows; layer l looks at `seen[l]` columns."""
    text = config.text
    width, inner, layers, head_dim = text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.head_dim
    asking, answering = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    rows = batch * length
    shapes = (width, asking, 1), (width, answering, 2), (asking, width, 1), (width, inner, 2), (inner, width, 1)
    products = tuple(Product(rows, i, o, count * layers) for i, o, count in shapes)
    attention = []
    for columns in sorted(set(seen)):
        heads = seen.count(columns) * batch * text.num_attention_heads
        attention += [Product(length, head_dim, columns, heads), Product(length, columns, head_dim, heads)]
    # in int4 queries, keys and values are one map (chapter 21b), and its rows decide whether it suits the kernel
    stored = ((width, asking + 2 * answering, 1), *shapes[2:]) if precision == "int4" else shapes
    maps = sum(count * matrix_bytes(o, i, precision, exact) for i, o, count in stored)
    norms = (4 if text.four_norms else 2) * layers + 1
    passes = 7 * norms * width + 6 * width  # and at the entrance: looked up, scaled, pictures put in, 2 each
    # in a block: two sums of 3, rotation of queries and keys, heads laid out anew, GELU (2) and gate times up (3)
    passes += layers * (6 * width + 9 * (asking + answering) + 2 * asking + 5 * inner)
    scores = batch * text.num_attention_heads * length * sum(seen)
    capped = text.attn_logit_softcapping is not None
    # bytes: with a cap the scores themselves, and 3 of the mask; else the mask alone, laid out for each group, made
    # numbers, and read
    a_score = 14 * exact + 3 if capped else 6 + exact
    per_token = 2 * text.num_key_value_heads * head_dim * exact
    return Part(
        name=name,
        products=products,
        attention=tuple(attention),
        weight_bytes=layers * maps + exact * norms * width,
        cache_bytes=batch * per_token * (length * layers + sum(seen)),  # written once, read once
        between_bytes=exact * rows * passes + a_score * scores,
        # of attention: queries go in, results come out; keys and values are on the cache's line
        product_bytes=exact * (sum(product.numbers for product in products) + 2 * layers * rows * asking),
        curved=rows * inner * layers,
        decoder_blocks=layers,
    )


@dataclass(frozen=True)
class InferenceBill:
    """What an answer costs, part by part; `step` gives each token after the first.

    Parameters
    ----------
    config : PaliGemmaConfig
    batch : int
        B, rows.
    prompt_length : int
        T, tokens of a row, those of its pictures included.
    new_tokens : int
        Of each answer, the first included.
    precision : str
    exact : int
        Bytes of a number that is not in few bits.
    head_precision : str
        Of the head: a dtype, int8, or exact beside nf4.
    pictures : int
        N, of all rows together.
    vision, projector, prefill, head : Part
        What the first token takes. Each step takes a head of the same size.
    """

    config: PaliGemmaConfig
    batch: int
    prompt_length: int
    new_tokens: int
    precision: str
    exact: int
    head_precision: str
    pictures: int
    vision: Part
    projector: Part
    prefill: Part
    head: Part

    @property
    def first(self) -> tuple[Part, ...]:
        """The parts of the first token."""
        return self.vision, self.projector, self.prefill, self.head

    def step(self, cache_length: int | None = None) -> tuple[Part, Part]:
        """Blocks and head of one token that looks at `cache_length` columns, itself included.

        By default the token in the middle of the answer.
        """
        text = self.config.text
        length = self.prompt_length + self.new_tokens // 2 if cache_length is None else cache_length
        seen = [min(length, text.window(layer) or length) for layer in range(text.num_hidden_layers)]
        blocks = _decoder_bill(self.config, self.batch, 1, seen, self.precision, self.exact, "step")
        return blocks, replace(self.head, name="step head")

    @property
    def weights_held(self) -> int:
        """Bytes of all weights. A tied head in few bits is a second copy of the embedding."""
        text = self.config.text
        parts = self.vision.weight_bytes + self.projector.weight_bytes + self.prefill.weight_bytes
        rows = text.vocab_size * text.hidden_size * self.exact
        second = self.head_precision == "int8" or not text.tie_word_embeddings
        return parts + rows + (self.head.weight_bytes if second else 0)

    @property
    def cache_held(self) -> int:
        """Bytes of keys and values with room for the whole answer."""
        text, room = self.config.text, self.prompt_length + self.new_tokens
        slots = [min(room, text.window(layer) or room) for layer in range(text.num_hidden_layers)]
        return sum(
            cache_bytes(1, text.num_key_value_heads, text.head_dim, length, self.batch, self.exact) for length in slots
        )

    @property
    def activations_held(self) -> int:
        """Bytes at the largest moment of reading, nearly.

        That is in the tower, in a GeGLU of the decoder, at the head, or, if scores of attention are capped, in their
        tables: (B, H, T, T) stands in memory three times in float32, five times in 16 bits.
        """
        vision, text = self.config.vision, self.config.text
        tower = self.pictures * vision.num_patches * (2 * vision.hidden_size + 2 * vision.intermediate_size)
        decoder = self.batch * self.prompt_length * (2 * text.hidden_size + 4 * text.intermediate_size)
        scores = 0
        if text.attn_logit_softcapping is not None:
            table = self.batch * text.num_attention_heads * self.prompt_length**2
            scores = table * (12 if self.exact == 4 else 10)
        return max(self.exact * tower, self.exact * decoder, scores, 2 * 4 * self.batch * text.vocab_size)

    @property
    def held(self) -> int:
        """Bytes that must be there at once."""
        return self.weights_held + self.cache_held + self.activations_held


def inference_bill(
    config: PaliGemmaConfig,
    batch: int,
    prompt_length: int,
    new_tokens: int,
    precision: str = "float32",
    *,
    pictures: int | None = None,
    exact: int | None = None,
    head: str | None = None,
) -> InferenceBill:
    """Count what an answer costs before it is given.

    Parameters
    ----------
    config : PaliGemmaConfig
    batch : int
        B, rows that are answered together.
    prompt_length : int
        T, tokens of a row, those of its pictures included.
    new_tokens : int
        Of each answer.
    precision : str
        float32, bfloat16, float16, int8, int4 or nf4.
    pictures : int, optional
        N, of all rows together; one for each row by default.
    exact : int, optional
        Bytes of numbers that are not in few bits: 4 beside int8, int4 and nf4, unless you say 2.
    head : str, optional
        int8, if the head is in eight bits whatever the precision.

    Raises
    ------
    ValueError
        If a count is no whole number of 1 or more, `precision`, `exact` or `head` is none of those above, or the
        pictures do not fit the prompt.

    References
    ----------
    Williams, Waterman and Patterson 2009, "Roofline"; Pope et al. 2022, "Efficiently Scaling Transformer Inference".
    """
    pictures = batch if pictures is None else pictures
    for key, value in (("batch", batch), ("prompt_length", prompt_length), ("new_tokens", new_tokens)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{key} is {value!r}: expected a whole number, 1 or more")
    if type(pictures) is not int or pictures < 0:
        raise ValueError(f"pictures is {pictures!r}: expected a whole number, 0 or more")
    if precision not in EXACT_BYTES:
        raise ValueError(f"precision is {precision!r}: expected one of {', '.join(EXACT_BYTES)}")
    if exact is not None and (type(exact) is not int or exact not in (2, 4)):
        raise ValueError(f"exact is {exact!r}: expected 2 or 4, the bytes of a number")
    if head not in (None, "int8"):
        raise ValueError(f"head is {head!r}: expected 'int8', or nothing if it is stored as the precision says")
    if pictures * config.num_image_tokens > batch * prompt_length:
        raise ValueError(
            f"{pictures} pictures take {pictures * config.num_image_tokens} tokens, but {batch} rows of prompt_length "
            f"{prompt_length} have only {batch * prompt_length}: prompt_length counts the pictures' tokens too"
        )
    exact = EXACT_BYTES[precision] if exact is None else exact
    text, width = config.text, config.vision.hidden_size
    few = head or OUTSIDE.get(precision, precision)
    rows = pictures * config.num_image_tokens
    project, score = Product(rows, width, text.hidden_size), Product(batch, text.hidden_size, text.vocab_size)
    capped = 0 if text.final_logit_softcapping is None else 6 * score.outer * batch
    prompt = [prompt_length] * text.num_hidden_layers
    return InferenceBill(
        config,
        batch,
        prompt_length,
        new_tokens,
        precision,
        exact,
        few,
        pictures,
        vision=vision_bill(config, pictures, precision, exact),
        projector=Part(
            "projector",
            (project,),
            weight_bytes=matrix_bytes(text.hidden_size, width, "exact", exact) + exact * text.hidden_size,
            product_bytes=exact * project.numbers,
        ),
        prefill=_decoder_bill(config, batch, prompt_length, prompt, precision, exact, "prefill"),
        head=Part(
            "head",
            (score,),
            weight_bytes=matrix_bytes(text.vocab_size, text.hidden_size, few, exact),
            between_bytes=exact * capped,
            product_bytes=exact * score.numbers,
        ),
    )


def median_seconds(function: Callable[[], object], least: float = 0.05, device: str = "cpu") -> float:
    """Median time of a call, after one that is not counted: at least three calls, and `least` seconds of them."""
    function()
    wait_for(device)
    times = []
    while len(times) < 3 or sum(times) < least:
        started = time.perf_counter()
        function()
        wait_for(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def wait_for(device: str | torch.device) -> None:
    """Wait until a device has done what it was asked to; a CPU always has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.device(device).type == "mps":
        torch.mps.synchronize()


def product_rates(
    rows: tuple[int, ...], inner: int = 2048, outer: int = 8192, make_map: Callable | None = None
) -> tuple[tuple[int, float, float], ...]:
    """Operations a second of linear maps, by how many rows they are given.

    Parameters
    ----------
    rows : tuple of int
    inner, outer : int
        Of the widening map; the narrowing one has them the other way round.
    make_map : callable, optional
        Takes (inner, outer) and gives a function of rows (R, inner); torch's float32 map by default.

    Returns
    -------
    tuple of (rows, rate of the widening map, rate of the narrowing map)
    """
    make_map = make_map or _plain_map
    rates = []
    maps = [[make_map(i, o) for _ in range(2)] for i, o in ((inner, outer), (outer, inner))]
    for count in rows:
        measured = []
        for (first, second), width in zip(maps, (inner, outer), strict=True):
            given = torch.randn(count, width)
            least = 0.3 if count == 1 else 0.05  # one row is what bandwidth is taken from
            seconds = median_seconds(lambda a=first, b=second, x=given: (a(x), b(x)), least) / 2
            measured.append(2 * count * inner * outer / seconds)
        rates.append((count, *measured))
    return tuple(rates)


def _plain_map(inner: int, outer: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """A float32 map whose weight is a window into a file, as `load` leaves it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weight"
        torch.randn(outer, inner).numpy().tofile(path)
        weight = torch.from_file(str(path), size=outer * inner).view(outer, inner)
    return lambda rows: F.linear(rows, weight)


@dataclass(frozen=True)
class Machine:
    """What a processor can do.

    Parameters
    ----------
    name : str
    peak : float
        Operations a second, of products with many rows.
    read : float
        Bytes a second, of weights on their way into a product with one row.
    begin : float
        Seconds that each number which comes out of a product with one row takes besides.
    stream : float
        Bytes a second that the work between products reads and writes.
    copy : float
        Bytes a second, read and written, of copying more than a cache holds; no prediction uses it.
    curve : float
        Seconds for each number that passes a GELU.
    score : float
        Seconds for each score of attention, its multiplications apart: the softmax.
    rates : tuple
        As `product_rates` gives them; none: the roofline alone.
    tower_block, decoder_block : float
        Seconds of a block with nothing in it.
    busy_block : float
        The same of the decoder, while weights rush by.
    measured : bool
        False: from published peaks, so it predicts a run that reaches them.
    """

    name: str
    peak: float
    read: float
    stream: float
    copy: float = 0.0
    begin: float = 0.0
    curve: float = 0.0
    score: float = 0.0
    rates: tuple[tuple[int, float, float], ...] = ()
    tower_block: float = 0.0
    decoder_block: float = 0.0
    busy_block: float = 0.0
    measured: bool = False

    def rate(self, rows: int, widens: bool) -> float:
        """Operations a second of a product with so many rows: between two measured ones on a line of logarithms."""
        known = [(count, wide if widens else narrow) for count, wide, narrow in self.rates]
        lower = max((pair for pair in known if pair[0] <= rows), default=known[0])
        upper = min((pair for pair in known if pair[0] >= rows), default=known[-1])
        if lower[0] == upper[0]:
            return lower[1]
        share = math.log(rows / lower[0]) / math.log(upper[0] / lower[0])
        return lower[1] ** (1 - share) * upper[1] ** share

    def seconds(self, part: Part) -> float:
        """How long a part takes.

        Each product takes its operations over the rate for its rows, or, with one row, its bytes over bandwidth and
        a little for each number that comes out. Attention runs at the peak, or as fast as the cache is read. Work
        between products, GELU and empty blocks come on top, since they wait for each other. Without measured rates
        the whole part takes the longer of operations over peak and bytes over bandwidth.
        """
        if not self.rates:
            return max(part.flops / self.peak, part.bytes / self.read)
        if all(one.rows == 1 for one in part.products):
            products = part.weight_bytes / self.read + self.begin * sum(one.outer * one.count for one in part.products)
        else:
            products = sum(one.flops / self.rate(one.rows, one.outer >= one.inner) for one in part.products)
        attention = max(sum(one.flops for one in part.attention) / self.peak, part.cache_bytes / self.read)
        attention += part.scores * self.score
        between = part.between_bytes / self.stream + part.curved * self.curve
        return products + attention + between + self.overhead(part)

    def overhead(self, part: Part) -> float:
        """Seconds in which a part computes nothing: Python's time, and torch's for each operation.

        A decoder block is as busy as its own weights make it: wholly so from 32 MB on.
        """
        if not part.decoder_blocks:
            return part.tower_blocks * self.tower_block
        share = min(1.0, part.weight_bytes / part.decoder_blocks / 2**25)
        return part.decoder_blocks * (self.decoder_block + share * (self.busy_block - self.decoder_block))


def _tower_block_seconds() -> float:
    block = SiglipBlock(SiglipConfig(32, 32, 1, 4)).eval()
    token = torch.randn(1, 4, 32)
    return median_seconds(lambda: block(token))


def _decoder_block_seconds(passing_bytes: int) -> float:
    """A decoder block with Gemma's heads and next to no weights, while others rush by.

    In front of each of its maps one row goes through a matrix of `passing_bytes`, with the clock stopped: if it fills
    the caches, Python and torch find nothing where they left it, and the other threads have gone to sleep.
    """
    config = GemmaConfig(32, 32, 1, 8, 1, 256, vocab_size=8)
    block, (cache,) = GemmaBlock(config).eval(), Gemma(config).new_caches(1, 512)
    token, mask = torch.randn(1, 1, 32), torch.ones(1, 1, 1, 257, dtype=torch.bool)
    row, passing = torch.randn(1, 2048), torch.zeros(passing_bytes // 8192, 2048)
    angles = rotary_angles(torch.ones(1, 1), 256, 10_000.0)
    away = []

    def interrupt(*_) -> None:
        started = time.perf_counter()
        F.linear(row, passing)
        away.append(time.perf_counter() - started)

    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(interrupt)
    times = []
    for _ in range(16):
        away.clear()
        cache.length = 256
        started = time.perf_counter()
        block(token, angles, mask, cache)
        times.append(time.perf_counter() - started - sum(away))
    return statistics.median(times[1:])


def measure_machine(make_map: Callable | None = None, name: str = "this machine", weight_bytes: float = 4.0) -> Machine:
    """Time what this processor can do, in some seconds.

    Parameters
    ----------
    make_map : callable, optional
        As in `product_rates`: a linear map in another precision.
    name : str
    weight_bytes : float
        Of a weight in those maps.
    """
    inner, outer = 2048, 8192
    with torch.no_grad():
        rates = product_rates((1, 2, 3, 4, 8, 16, 32, 64, 256), inner, outer, make_map)
        wide, narrow = (2 * inner * outer / rate for rate in rates[0][1:])  # seconds of one row
        # the difference of the two equations; noise must not make it negative, nor more than half of the time
        begin = min(max(0.0, (wide - narrow) / (outer - inner)), 0.5 * narrow / inner)
        numbers = torch.randn(256, 8192)
        passing = median_seconds(lambda: numbers * numbers)
        bending = median_seconds(lambda: F.gelu(numbers, approximate="tanh"))
        heads = torch.randn(1, 16, 256, 72)
        looking = median_seconds(lambda: F.scaled_dot_product_attention(heads, heads, heads))
        peak = max(max(row[1:]) for row in rates)
        large, other = torch.zeros(2, 2**25)
        copying = median_seconds(lambda: other.copy_(large))
        return Machine(
            name=name,
            peak=peak,
            read=weight_bytes * inner * outer / (narrow - inner * begin),
            stream=3 * numbers.nbytes / passing,
            copy=2 * large.nbytes / copying,
            begin=begin,
            curve=max(0.0, bending - passing * 2 / 3) / numbers.numel(),  # GELU passes two numbers, not three
            score=max(0.0, looking / (16 * 256**2) - 4 * 72 / peak),  # without its two products over 72 numbers
            rates=rates,
            tower_block=_tower_block_seconds(),
            decoder_block=_decoder_block_seconds(2**13),
            busy_block=_decoder_block_seconds(2**24),
            measured=True,
        )


def median_machine(looks: Sequence[Machine]) -> Machine:
    """Of several measurements of one machine, the median of each number."""
    numbers = (
        "peak",
        "read",
        "stream",
        "copy",
        "begin",
        "curve",
        "score",
        "tower_block",
        "decoder_block",
        "busy_block",
    )
    middle = {key: statistics.median(getattr(look, key) for look in looks) for key in numbers}
    rates = [tuple(map(statistics.median, zip(*rows))) for rows in zip(*(look.rates for look in looks))]
    return replace(looks[0], rates=tuple((int(rows), wide, narrow) for rows, wide, narrow in rates), **middle)


@dataclass(frozen=True)
class Gpu:
    """Published peaks of a card.

    Parameters
    ----------
    name : str
    words : tuple of str
        That occur in the name which the driver gives it.
    tensor, plain : float
        Operations a second: 16-bit numbers summed in float32 on tensor units, without sparsity; and float32.
    bandwidth : float
        Bytes a second of its memory.
    memory : float
        Bytes.
    source : str
        Where the maker says so.
    bfloat16 : bool
        Whether its tensor units know bfloat16, as all do since Ampere. Without them it is computed in float32.
    """

    name: str
    words: tuple[str, ...]
    tensor: float
    plain: float
    bandwidth: float
    memory: float
    source: str
    bfloat16: bool = True


_ADA = "NVIDIA Ada GPU Architecture, V2.01, appendices"
GPUS = (
    Gpu(
        "H200 SXM",
        ("H200",),
        989e12,
        67e12,
        4800e9,
        141e9,
        "NVIDIA H200 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu(
        "H100 PCIe",
        ("H100", "PCIe"),
        756e12,
        51e12,
        2000e9,
        80e9,
        "NVIDIA H100 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu(
        "H100 NVL",
        ("H100", "NVL"),
        835e12,
        60e12,
        3900e9,
        94e9,
        "NVIDIA H100 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu(
        "H100 SXM",
        ("H100",),
        989e12,
        67e12,
        3350e9,
        80e9,
        "NVIDIA H100 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu(
        "A100 SXM4 80 GB",
        ("A100", "SXM4", "80GB"),
        312e12,
        19.5e12,
        2039e9,
        80e9,
        "NVIDIA A100 Tensor Core GPU, datasheet",
    ),
    Gpu("A100 PCIe 80 GB", ("A100", "80GB"), 312e12, 19.5e12, 1935e9, 80e9, "NVIDIA A100 Tensor Core GPU, datasheet"),
    Gpu("A100 40 GB", ("A100",), 312e12, 19.5e12, 1555e9, 40e9, "NVIDIA A100 Tensor Core GPU Architecture, table 1"),
    Gpu("L40S", ("L40S",), 362e12, 91.6e12, 864e9, 48e9, "NVIDIA L40S, datasheet (without sparsity)"),
    Gpu(
        "L4",
        ("L4",),
        121e12,
        30.3e12,
        300e9,
        24e9,
        "NVIDIA L4 Tensor Core GPU, datasheet (half of its figure with sparsity)",
    ),
    Gpu("T4", ("T4",), 65e12, 8.1e12, 320e9, 16e9, "NVIDIA T4 Tensor Core GPU, product page", bfloat16=False),
    Gpu(
        "V100 SXM2",
        ("V100", "SXM2"),
        125e12,
        15.7e12,
        900e9,
        16e9,
        "NVIDIA V100 Tensor Core GPU, datasheet",
        bfloat16=False,
    ),
    Gpu("RTX 4090", ("RTX 4090",), 165.2e12, 82.6e12, 1008e9, 24e9, _ADA),
    Gpu("RTX 3090", ("RTX 3090",), 71e12, 35.6e12, 936e9, 24e9, "NVIDIA Ampere GA102 GPU Architecture, table 9"),
)


def gpu_machine(name: str, dtype: str = "bfloat16") -> Machine:
    """The limits of a card by the name that its driver gives, from published peaks.

    Raises
    ------
    ValueError
        If the card is not in `GPUS`.
    """
    spelled = name.replace(" GB", "GB").replace("-", " ").lower()
    # other chips, or parts of one, under the same number
    other = {"laptop", "mig", "ti", "d", "super", "nvl"} & set(re.findall(r"\w+", spelled))
    for card in GPUS:
        words = [word.lower() for word in card.words]
        if other <= set(words) and all(re.search(rf"\b{word}\b", spelled) for word in words):
            on_tensor_units = dtype == "float16" or (dtype == "bfloat16" and card.bfloat16)
            peak = card.tensor if on_tensor_units else card.plain
            return Machine(f"{card.name}, computed", peak, card.bandwidth, card.bandwidth, card.bandwidth)
    raise ValueError(
        f"no published peaks of {name!r} are known here: expected one of {', '.join(g.name for g in GPUS)}"
    )
