"""A whole PaliGemma, taught from nothing.

Can a laptop teach eyes and a voice, from random numbers to true answers?

Tangled from chapters/17_pocket.py: edit there, then run python -m sigma_book.tangle.
"""

import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import sentencepiece
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sigma_book.gemma import GemmaConfig
from sigma_book.generation import generate_answers
from sigma_book.locate import compare_boxes, encode_boxes, parse
from sigma_book.paligemma import PaliGemma, PaliGemmaConfig
from sigma_book.processor import Processor, pixels
from sigma_book.siglip import SiglipConfig
from sigma_book.training import train
from sigma_book.weights import load_model, save_model
from sigma_book.world import COLOURS, NUMBERS, SHAPES, SIZE, TASKS, Question, Scene, ask, draw_scene, make_scene

__all__ = [
    "EYE_STEPS",
    "LOCS",
    "LOC_WEIGHT",
    "PACK_STEPS",
    "PLAN",
    "POCKET",
    "SEGS",
    "SPECIAL",
    "EyeTeacher",
    "Muon",
    "Packer",
    "answer_text",
    "evaluate_pocket",
    "eye_batches",
    "first_scenes",
    "named_pairs",
    "new_pocket",
    "optimizers_for",
    "pack_batches",
    "packed_loss",
    "patch_truth",
    "picture_tensor",
    "questions_about",
    "quick_report",
    "teach_eyes",
    "teach_speech",
    "train_pocket",
    "write_tokenizer",
]

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
LOCS = [f"<loc{index:04d}>" for index in range(1024)]
SEGS = [f"<seg{index:03d}>" for index in range(128)]


def write_tokenizer(folder: Path) -> None:
    """Train a SentencePiece model on the words of the world, and write it in the files of the Hugging Face layout.

    Every word of the world is one piece, with and without a space before it; any other text falls back to
    letters and bytes. The pieces of text make up a byte-pair encoding of 1,850 tokens, `<image>` stands behind them.

    Parameters
    ----------
    folder : Path
        Gets `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`.
    """
    words = _world_words()
    lines = [form for word in sorted(words) for form in [word, f" {word}"] * 200]
    lines += [chr(code) for code in range(33, 127)] * 3
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=1850,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["<mask>", "\n", *LOCS, *SEGS],
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        **{f"{name}_id": index for index, name in enumerate(("pad", "eos", "bos", "unk"))},
        **{f"{piece[1:-1]}_piece": piece for piece in SPECIAL},
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    text = json.dumps(_fast_tokenizer(model.getvalue()), ensure_ascii=False, indent=1)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    names = {f"{piece[1:-1]}_token": piece for piece in [*SPECIAL, "<mask>"]}
    settings = names | {"tokenizer_class": "GemmaTokenizer", "extra_special_tokens": ["<image>"]}
    settings["processor_class"] = "PaliGemmaProcessor"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True))


def _world_words() -> set[str]:
    words = {*SHAPES, *SHAPES.values(), *COLOURS, *NUMBERS}
    rng = random.Random(0)
    for seed in range(3000):
        scene = make_scene(seed)
        for task in TASKS:
            question = ask(scene, task, rng)
            if question is not None:
                text = f"{question.prompt} {question.answer} {question.label}"
                words.update(text.replace("?", " ").replace(",", " ").split())
    return words


def _fast_tokenizer(model: bytes) -> dict:
    """The same pieces as `tokenizer.json` spells them: a vocabulary, and merges in the order of their rank."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for piece in pieces[pieces.index(SEGS[-1]) + 1 :]:
        if not processor.is_byte(vocabulary[piece]):
            splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            splits = [split for split in splits if split[0] in vocabulary and split[1] in vocabulary]
            merges += sorted(splits, key=lambda split: (vocabulary[split[0]], vocabulary[split[1]]))
    added = [
        {"id": vocabulary[piece], "content": piece, "special": piece in SPECIAL or piece == "<mask>"}
        for piece in [*SPECIAL, "<mask>", "\n", *LOCS, *SEGS]
    ] + [{"id": len(pieces), "content": "<image>", "special": True}]
    for token in added:
        token |= {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": space,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }


POCKET = PaliGemmaConfig(
    vision=SiglipConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=14,
    ),
    text=GemmaConfig(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=1856,
        max_position_embeddings=2048,
    ),
    image_token_id=1850,
)


def new_pocket(seed: int) -> PaliGemma:
    """A pocket model of random weights, with a start in which similar vectors attend to each other.

    References
    ----------
    Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers": there the product of value and output
    maps is negative, here it is positive.
    """
    torch.manual_seed(seed)
    model = PaliGemma(POCKET)
    with torch.no_grad():
        _start_tower(model)
        _start_decoder(model)
    return model


def _start_tower(model: PaliGemma) -> None:
    tower = model.vision_tower
    for module in tower.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.8 * module.in_features**-0.5)
            nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(tower.embeddings.patch_embedding.weight, std=588**-0.5)
    nn.init.zeros_(tower.embeddings.patch_embedding.bias)
    for layer in tower.encoder.layers:
        layer.self_attn.out_proj.weight *= 0.5
        layer.mlp.fc2.weight *= 0.5
    side = SIZE // POCKET.vision.patch_size
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    halves = [_waves(place.flatten(), POCKET.vision.hidden_size // 2, 2.0, 100) for place in (row, column)]
    tower.embeddings.position_embedding.weight.copy_(0.5 * torch.cat(halves, dim=1))
    linear = model.multi_modal_projector.linear
    nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    nn.init.zeros_(linear.bias)


def _start_decoder(model: PaliGemma) -> None:
    text = POCKET.text
    width, kv_width = text.hidden_size, text.num_key_value_heads * text.head_dim
    groups = text.num_attention_heads // text.num_key_value_heads
    for layer in model.language_model.layers:
        attention = layer.self_attn
        nn.init.normal_(attention.k_proj.weight, std=width**-0.5)
        nn.init.normal_(attention.v_proj.weight, std=width**-0.5)
        key, value = (
            weight.view(-1, text.head_dim, width).repeat_interleave(groups, dim=0).flatten(0, 1)
            for weight in (attention.k_proj.weight, attention.v_proj.weight)
        )
        attention.q_proj.weight.copy_(0.6 * key + 0.8 * width**-0.5 * torch.randn_like(key))
        attention.o_proj.weight.copy_(0.25 * value.T + 0.1 * (groups * kv_width) ** -0.5 * torch.randn_like(value.T))
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)
        nn.init.normal_(layer.mlp.down_proj.weight, std=0.2 * text.intermediate_size**-0.5)
    nn.init.normal_(model.language_model.embed_tokens.weight, std=width**-0.5)


def _waves(positions: torch.Tensor, width: int, step: float, base: float) -> torch.Tensor:
    """Sines and cosines of positions, (N, width): near positions look alike."""
    frequencies = base ** -(torch.arange(width // 2) / (width // 2))
    angles = step * positions[:, None].float() * frequencies
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class _InFloat32(TorchFunctionMode):
    """While this is open, whoever asks for bfloat16 gets a copy in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0].float().clone()
        return function(*args, **(kwargs or {}))


class Muon(torch.optim.Muon):
    """PyTorch's Muon, its products in float32 in place of bfloat16."""

    def step(self, closure: Callable | None = None):
        with _InFloat32():
            return super().step(closure)


def optimizers_for(blocks: list[nn.Module], modules: nn.Module, matrix_rate: float, rate: float) -> list:
    """Muon for the matrices of the blocks, AdamW for all else that may learn.

    References
    ----------
    Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    learning = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]
    chosen = {id(parameter) for parameter in matrices}
    rest = [parameter for parameter in learning if id(parameter) not in chosen]
    optimizers = [torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0)]
    if matrices:
        optimizers.append(Muon(matrices, lr=matrix_rate, weight_decay=0.01))
    return optimizers


def picture_tensor(scenes: list[Scene]) -> torch.Tensor:
    """Draw scenes and turn them into (B, 3, S, S)."""
    return torch.stack([pixels(draw_scene(scene), SIZE) for scene in scenes])


def patch_truth(scene: Scene) -> torch.Tensor:
    """What each patch should know of the thing that it belongs to, (P, 13), -1 where there is none.

    A patch belongs to the thing whose box covers most of it, and at least 12 %, also where it shows only ground inside
    the box. The columns: shape and colour (numbers in `SHAPES` and `COLOURS`); the four edges of its box as loc bins;
    how many things are of its kind, of its shape, of its colour, and in all (this one for every patch); its place from
    the left; how many kinds come before and after.
    """
    size = POCKET.vision.patch_size
    side = SIZE // size
    truth = torch.full((side, side, 13), -1)
    truth[..., 9] = len(scene.things)
    shown = torch.full((side, side), 0.12)
    start = torch.arange(side) * size
    kinds = [thing.kind for thing in scene.things]
    order = list(dict.fromkeys(kinds))
    for index, thing in enumerate(scene.things):
        top, left, bottom, right = thing.box
        rows = (start + size).clamp(max=bottom) - start.clamp(min=top)
        columns = (start + size).clamp(max=right) - start.clamp(min=left)
        share = rows.clamp(min=0)[:, None] * columns.clamp(min=0)[None, :] / size**2
        most = share >= shown
        shown = torch.where(most, share, shown)
        truth[most] = torch.tensor(
            [
                list(SHAPES).index(thing.shape),
                list(COLOURS).index(thing.colour),
                *(round(edge / SIZE * 1023) for edge in thing.box),
                kinds.count(thing.kind),
                sum(other.shape == thing.shape for other in scene.things),
                sum(other.colour == thing.colour for other in scene.things),
                len(scene.things),
                index,
                order.index(thing.kind),
                len(order) - 1 - order.index(thing.kind),
            ]
        )
    return truth.flatten(0, 1)


class EyeTeacher(nn.Module):
    """What is learned beside the eyes while they learn to see, and is thrown away or moved into the vocabulary after.

    Sixteen word vectors (eight shapes, eight colours), 1,024 loc vectors, four maps to box edges, seven small counters.
    """

    def __init__(self, model: PaliGemma):
        super().__init__()
        width = POCKET.text.hidden_size
        self.model = model
        self.words = nn.Parameter(torch.randn(len(SHAPES) + len(COLOURS), width) * width**-0.5)
        self.locs = nn.Parameter(_waves(torch.arange(1024), width, 0.3, 1000) * width**-0.5)
        self.edges = nn.ModuleList(nn.Linear(width, width) for _ in range(4))
        self.counters = nn.ModuleList(nn.Linear(width, 6) for _ in range(7))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(-4.0))

    def features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Projected patches of all pictures in one row, (B * P, D), at the length that the decoder's norm gives."""
        features = self.model.encode_images(pixel_values).flatten(0, 1)
        return F.rms_norm(features, features.shape[-1:])

    def judge(self, features: torch.Tensor, truth: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and for each thing to know whether the likeliest answer is right, patch by patch of things."""
        logits = self.scale * features @ F.normalize(self.words, dim=-1).T + self.bias  # (B*P, 16)
        things = truth[:, 0] >= 0
        shape, colour = truth[things, 0], truth[things, 1]
        matches = torch.zeros_like(logits)
        matches[things] = F.one_hot(shape, len(logits[0])).float() + F.one_hot(len(SHAPES) + colour, len(logits[0]))
        loss = F.binary_cross_entropy_with_logits(logits, matches, reduction="none").sum(-1).mean()
        right = {
            "shape": logits[things, : len(SHAPES)].argmax(-1) == shape,
            "colour": logits[things, len(SHAPES) :].argmax(-1) == colour,
        }
        shown, known = features[things], truth[things]
        locs = 4 * F.normalize(self.locs, dim=-1)
        for name, edge, target in zip(("top", "left", "bottom", "right"), self.edges, known.T[2:6], strict=True):
            scores = edge(shown) @ locs.T
            loss = loss + 0.1 * F.cross_entropy(scores, target)
            right[name] = scores.argmax(-1) == target
        names = ("of its kind", "of its shape", "of its colour", "in all", "place", "kinds before", "kinds after")
        for name, counter, target in zip(names, self.counters, known.T[6:], strict=True):
            scores = counter(shown)
            loss = loss + 0.25 * F.cross_entropy(scores, target)
            right[name] = scores.argmax(-1) == target
        return loss, right

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        pixel_values, truth = batch
        return self.judge(self.features(pixel_values), truth.flatten(0, 1))[0]

    @torch.no_grad()
    def accuracy(self, scenes: list[Scene]) -> dict[str, float]:
        """The share of patches that know, by what they should know."""
        truth = torch.cat([patch_truth(scene) for scene in scenes])
        right = self.judge(self.features(picture_tensor(scenes)), truth)[1]
        return {name: values.float().mean().item() for name, values in right.items()}

    @torch.no_grad()
    def hand_over(self, processor: Processor) -> None:
        """Move what the eyes learned into the vocabulary: words and loc tokens start where the pictures put them.

        Features are brought to the size of word embeddings, a root mean square of 1.
        """
        rows = self.model.language_model.embed_tokens.weight
        width = rows.shape[1]
        for vector, word in zip(F.normalize(self.words, dim=-1), [*SHAPES, *COLOURS], strict=True):
            forms = [word, f" {word}"] + ([SHAPES[word], f" {SHAPES[word]}"] if word in SHAPES else [])
            for form in forms:
                (token,) = processor.tokenizer.encode(form)
                rows[token] = vector + 0.15 * width**-0.5 * torch.randn(width)
        rows[[processor.tokenizer.token_id(piece) for piece in LOCS]] = F.normalize(self.locs, dim=-1)
        sample = self.model.encode_images(picture_tensor([make_scene(seed) for seed in range(64)]))
        linear = self.model.multi_modal_projector.linear
        size = sample.square().mean(-1).sqrt().mean()
        linear.weight /= size
        linear.bias /= size


def eye_batches(seed: int, size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures and what their patches should know, new scenes for ever: (B, 3, S, S) and (B, P, 13)."""
    while True:
        scenes = [make_scene(seed + index) for index in range(size)]
        seed += size
        yield picture_tensor(scenes), torch.stack([patch_truth(scene) for scene in scenes])


PLAN = {"caption": 1, "colour": 3, "count": 3, "yes_no": 2, "left_of": 2, "detect": 3}


def questions_about(scene: Scene, plan: dict[str, int], rng: random.Random) -> list[Question]:
    """Up to so many different questions of each task."""
    asked: dict[str, Question] = {}
    for task, times in plan.items():
        for _ in range(times):
            question = ask(scene, task, rng)
            if question is not None:
                asked.setdefault(question.prompt, question)
    return list(asked.values())


def named_pairs(scene: Scene, rng: random.Random) -> list[tuple[str, str]]:
    """Prompts and answers that say a thing's name right before what is to be known of it: its colour, or its boxes.

    The name stands where the answer is looked up, which makes the first look-up a single step.
    """
    shapes = [thing.shape for thing in scene.things]
    single = [thing for thing in scene.things if shapes.count(thing.shape) == 1]
    rng.shuffle(single)
    pairs = [(f"caption {thing.shape}", f"the {thing.shape} {thing.colour}") for thing in single[:2]]
    for kind in list(dict.fromkeys(thing.kind for thing in scene.things))[:2]:
        boxes = [thing.box for thing in scene.things if thing.kind == kind]
        locs = encode_boxes(boxes, [kind] * len(boxes), SIZE, SIZE).replace(f" {kind}", "")
        pairs.append((f"caption {kind}", f"the {kind}{locs}"))
    return pairs


def answer_text(question: Question) -> str:
    """The answer as PaliGemma writes it: boxes as loc tokens, a label behind each."""
    if question.task != "detect":
        return question.answer
    return encode_boxes(question.boxes, [question.label] * len(question.boxes), SIZE, SIZE)


class Packer:
    """Many questions behind one picture, in one sequence: the picture is read once, each question sees only it and itself.

    Positions start again behind the picture for every question, so each stands where it would stand alone.

    Parameters
    ----------
    processor : Processor
    """

    def __init__(self, processor: Processor):
        self.processor = processor
        self._ids: dict[str, list[int]] = {}

    def pack(self, scenes: list[Scene], asked: list[list[tuple[str, str]]]) -> tuple[torch.Tensor, ...]:
        """Pictures (B, 3, S, S); ids, positions of the whole and labels, (B, T), (B, P + T), (B, T); mask (B, 1, P+T, P+T)."""
        patches = self.processor.num_image_tokens
        rows = [self._row(pairs) for pairs in asked]
        length = max(len(row[0]) for row in rows)
        empty = (0, 1, -1, 1, -100)
        ids, places, groups, answers, labels = (
            torch.tensor([row[k] + [empty[k]] * (length - len(row[k])) for row in rows]) for k in range(5)
        )

        def behind_picture(values: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
            return torch.cat((start.expand(len(rows), patches), values), dim=1)  # (B, P + T)

        zeros = torch.zeros(1, patches, dtype=torch.long)
        positions = behind_picture(places + patches, torch.arange(1, patches + 1)[None])
        groups, answers = behind_picture(groups, zeros), behind_picture(answers, zeros)
        order = torch.arange(patches + length)
        past = order[:, None] >= order[None, :]
        own = groups[:, :, None] == groups[:, None, :]
        prefix = answers[:, None, :] == 0
        mask = (groups[:, None, :] == 0) | own & (prefix | past & (answers[:, :, None] == 1))
        return picture_tensor(scenes), ids, positions, labels, (mask & (groups[:, None, :] >= 0))[:, None]

    def _row(self, pairs: list[tuple[str, str]]) -> tuple[list[int], ...]:
        """Of one picture: ids, places within a question (from 1), number of the question, 1 in answers, labels."""
        tokenizer = self.processor.tokenizer
        ids, places, groups, answers, labels = [], [], [], [], []
        for number, (prompt, answer) in enumerate(pairs, start=1):
            prefix = [tokenizer.bos_id, *self._encode(f"{prompt}\n")]
            suffix = [*self._encode(answer), tokenizer.eos_id]
            ids += prefix + suffix
            places += range(1, len(prefix) + len(suffix) + 1)
            groups += [number] * (len(prefix) + len(suffix))
            answers += [0] * len(prefix) + [1] * len(suffix)
            labels += [-100] * (len(prefix) - 1) + suffix + [-100]  # each place is asked for the token behind it
        return ids, places, groups, answers, labels

    def _encode(self, text: str) -> list[int]:
        if text not in self._ids:
            self._ids[text] = self.processor.tokenizer.encode(text)
        return self._ids[text]


LOC_WEIGHT = 0.7  # so that four loc tokens a box do not drown the words


def packed_loss(model: PaliGemma, packed: tuple[torch.Tensor, ...], locs: range) -> torch.Tensor:
    """Cross-entropy over the answers of a pack, loc tokens weighed less."""
    pixel_values, ids, positions, labels, mask = packed
    features = model.encode_images(pixel_values)
    embeddings = torch.cat((features, model.language_model.embed(ids)), dim=1)  # (B, P + T, D)
    hidden_states = model.language_model(embeddings, positions, {None: mask})[:, features.shape[1] :]
    wanted = labels != -100
    targets = labels[wanted]
    losses = F.cross_entropy(model.logits(hidden_states[wanted]), targets, reduction="none")
    weights = torch.where((targets >= locs.start) & (targets < locs.stop), LOC_WEIGHT, 1.0)
    return (losses * weights).sum() / weights.sum()


def pack_batches(
    processor: Processor, seed: int, size: int, stages: Sequence[tuple[int, int]], named: int
) -> Iterator[tuple]:
    """Packs of new scenes for ever, few things first.

    Parameters
    ----------
    stages : sequence of (int, int)
        For so many batches, scenes of at most so many things; five after the last.
    named : int
        For so many batches, `named_pairs` join the questions.
    """
    packer, rng, count = Packer(processor), random.Random(seed), 0
    while True:
        most = next((things for until, things in stages if count < until), 5)
        scenes = [make_scene(seed + count * size + index, most) for index in range(size)]
        asked = [[(q.prompt, answer_text(q)) for q in questions_about(scene, PLAN, rng)] for scene in scenes]
        if count < named:
            asked = [pairs + named_pairs(scene, rng) for pairs, scene in zip(asked, scenes, strict=True)]
        yield packer.pack(scenes, asked)
        count += 1


def evaluate_pocket(model: PaliGemma, processor: Processor, scenes: int = 2000, seed: int = 90_000_000) -> dict:
    """Ask unseen scenes one question of each task, greedily, and compare with the truth.

    Parameters
    ----------
    scenes : int
        How many; their seeds begin at `seed`, where no training scene lies (see `first_scenes`).

    Returns
    -------
    dict
        For each task: `asked`, `right` (share of exact answers; for `detect` all boxes at IoU 0.5 or more and none too
        many), for `detect` also `mean_iou`, and `confusions`: the ten commonest (truth, answer, times).
    """
    rng = random.Random(seed)
    pool = [(question, index) for index in range(scenes) for question in _one_of_each(make_scene(seed + index), rng)]
    pool.sort(key=lambda pair: (TASKS.index(pair[0].task), len(pair[0].prompt)))  # rows of one length together
    results: dict[str, list] = {task: [] for task in TASKS}
    for start in range(0, len(pool), 64):
        part = pool[start : start + 64]
        pictures = [draw_scene(make_scene(seed + index)) for _, index in part]
        batch = processor.prepare(pictures, [question.prompt for question, _ in part])
        answers = generate_answers(model, batch, processor.tokenizer.decode, max_new_tokens=64)
        for (question, _), answer in zip(part, answers, strict=True):
            results[question.task].append((question, answer.text))
    return {task: _score(task, pairs) for task, pairs in results.items() if pairs}


def _one_of_each(scene: Scene, rng: random.Random) -> list[Question]:
    return [question for task in TASKS if (question := ask(scene, task, rng)) is not None]


def _score(task: str, pairs: list[tuple[Question, str]]) -> dict:
    wrong: dict[tuple[str, str], int] = {}
    right, overlaps = 0, []
    for question, answer in pairs:
        if task == "detect":
            found, _ = parse(answer, SIZE, SIZE)
            good, overlap = compare_boxes([detection.box for detection in found], question.boxes)
            good = good and all(detection.label == question.label for detection in found)
            overlaps.append((overlap, len(question.boxes)))
            truth, said = f"{len(question.boxes)} boxes", f"{len(found)} boxes"
        else:
            truth, said = question.answer, answer
            good = truth == said
        right += good
        if not good:
            wrong[truth, said] = wrong.get((truth, said), 0) + 1
    score: dict = {"asked": len(pairs), "right": right / len(pairs)}
    if overlaps:
        score["mean_iou"] = sum(o * n for o, n in overlaps) / sum(n for _, n in overlaps)
    common = sorted(wrong.items(), key=lambda item: -item[1])[:10]
    return score | {"confusions": [(truth, said, times) for (truth, said), times in common]}


EYE_STEPS, PACK_STEPS = 1700, 4200


def train_pocket(out: str | Path, seed: int = 0, scale: float = 1.0) -> dict:
    """Teach a pocket model from random weights: eyes first, then many questions behind each picture.

    Parameters
    ----------
    out : path
        Becomes a folder in the Hugging Face layout, with the logs of the two stages and `results.json`.
    seed : int
        Of weights and data.
    scale : float
        All numbers of steps are multiplied by it: 0.01 is a rehearsal of a minute.

    Returns
    -------
    dict
        What `evaluate_pocket` says of the weights as they were written, rounded to 16 bits.
    """
    out = Path(out)
    with tempfile.TemporaryDirectory() as work:
        write_tokenizer(Path(work))
        (Path(work) / "config.json").write_text(json.dumps(POCKET.to_dict()))
        processor = Processor.from_folder(work)
    model = new_pocket(seed).train()
    teach_eyes(model, processor, round(EYE_STEPS * scale), seed, out / "eyes.csv")
    teach_speech(model, processor, round(PACK_STEPS * scale), seed, out / "speech.csv")
    save_model(model, out, dtype=torch.bfloat16)
    processor.save(out)
    results = evaluate_pocket(load_model(out, "cpu", torch.float32), processor, max(20, round(2000 * scale)))
    (out / "results.json").write_text(json.dumps(results, indent=2))
    return results


def first_scenes(seed: int) -> tuple[int, int]:
    """Where the scenes of the two stages begin; reports and exam have those from 80 to 98 million, which no stage reaches."""
    return 10_000_000 + 1_000_000_000 * seed, 20_000_000 + 1_000_000_000 * seed


def teach_eyes(model: PaliGemma, processor: Processor, steps: int, seed: int, log: Path | None = None) -> list[float]:
    """Stage 1: tower and projector learn what each patch shows, in the words of the decoder. Gives the losses."""
    teacher = EyeTeacher(model)
    eyes = nn.ModuleList([model.vision_tower, model.multi_modal_projector])
    beside = [parameter for name, parameter in teacher.named_parameters() if not name.startswith("model.")]
    learning = nn.ParameterList([*eyes.parameters(), *beside])
    optimizers = optimizers_for([model.vision_tower.encoder], learning, 0.02, 1e-3)
    held_out = [make_scene(80_000_000 + index) for index in range(40)]

    def report(_: int) -> str:
        return ", ".join(f"{name} {share:.1%}" for name, share in teacher.accuracy(held_out).items())

    batches = eye_batches(first_scenes(seed)[0], 64)
    losses = train(
        learning, teacher.loss, batches, optimizers, steps=steps, log=log, label="eyes", report=report, report_every=200
    )
    teacher.hand_over(processor)
    return losses


def teach_speech(model: PaliGemma, processor: Processor, steps: int, seed: int, log: Path | None = None) -> list[float]:
    """Stage 2: the decoder learns to answer, many questions a picture; the tower is left as it is. Gives the losses."""
    model.vision_tower.requires_grad_(False)
    optimizers = optimizers_for(list(model.language_model.layers), model, 0.01, 1e-3)
    stages = [(steps // 50, 2), (steps // 25, 3)]
    batches = pack_batches(processor, first_scenes(seed)[1], 8, stages, named=steps // 4)
    first = processor.tokenizer.token_id(LOCS[0])
    locs = range(first, first + len(LOCS))
    losses = train(
        model,
        lambda packed: packed_loss(model, packed, locs),
        batches,
        optimizers,
        steps=steps,
        hold=0.4,
        log=log,
        label="speech",
        report_every=700,
        report=lambda _: quick_report(model, processor),
    )
    model.vision_tower.requires_grad_(True)
    return losses


def quick_report(model: PaliGemma, processor: Processor) -> str:
    """A line on sixty unseen scenes."""
    results = evaluate_pocket(model, processor, 60, seed=85_000_000)
    return ", ".join(f"{task} {score['right']:.0%}" for task, score in results.items())
