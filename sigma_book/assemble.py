"""The public face: ideas of several chapters put together. Thin; the ideas stay in the chapters."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from sigma_book.fast import Preparation, compile_step, prepare
from sigma_book.generation import (
    Answer,
    Sampling,
    answer_limits,
    check_beams,
    generate_answers,
    read_stop_ids,
    read_stop_strings,
    stream_answer,
    whole_number,
)
from sigma_book.locate import AnswerGrammar
from sigma_book.lora import CONFIG_FILE, POCKET_BASE, adapter_base, is_adapter, load_adapter, merge_lora
from sigma_book.npz import load_npz
from sigma_book.paligemma import PaliGemma
from sigma_book.processor import Batch, Processor, Tokenizer, load_image
from sigma_book.qlora import nf4_on_arrival, quantize_nf4
from sigma_book.weights import find_folder, load_model, open_tensor, pick_device, read_config

__all__ = ["POCKET", "base_folder", "generate", "load", "read_settings"]

POCKET = Path(__file__).parent / "pocket_model"
ROWS_AT_ONCE = 32  # longer lists are answered in several batches; a beam counts as a row
WATCHED = ("*.json", "*.safetensors", "tokenizer.model")  # the files that make a model

_loading = threading.Lock()
_kept: dict[str, tuple[object, PaliGemma]] = {}  # the pocket model and the last other one, for `generate`


def check_quantize(quantize: str | None) -> None:
    """Raise a `ValueError` if `load` knows no weights of this kind."""
    if quantize not in (None, "nf4", "int8", "int4"):
        raise ValueError(f"quantize is {quantize!r}: expected 'nf4', 'int8' or 'int4', or nothing")


def load(
    path_or_hub_id: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    adapter: str | Path | None = None,
    compile: bool = False,
) -> PaliGemma:
    """Load a model with its processor.

    Parameters
    ----------
    path_or_hub_id : path, optional
        A PaliGemma folder in the Hugging Face layout, or the id of one on the hub, or big_vision's `.npz` file with
        a tokenizer in the same folder; None is the pocket model that comes with this package. An adapter's folder is
        its base with the adapter on it.
    device : str or torch.device
        `auto` is cuda, mps or cpu, in this order.
    dtype : str or torch.dtype
        float32, bfloat16 or float16. `auto` is the file's, but float32 on a CPU without bf16 units, and for the
        pocket model.
    quantize : str, optional
        "nf4" stores the decoder's linear maps in four bits as they come from the file; `dtype` is what it computes in.
        "int8" (tower, decoder and head in eight bits) and "int4" (the decoder in four) make a model that answers
        faster and cannot learn; on a GPU they need torchao.
    adapter : path, optional
        A LoRA adapter in PEFT's format, a folder or an id on the hub. It stays beside the weights: `merge_lora` of
        `sigma_book.lora` adds it to them.
    compile : bool
        Make the model ready to answer, at the cost that it cannot learn: on the CPU its maps are laid out for the
        kernels and fused, and a large head is read in eight bits where only the best token is asked for, which stays the
        best of the full scores; on a GPU the decoding step is compiled too. An adapter is merged.

    Returns
    -------
    PaliGemma
        In eval mode; `model.processor` is its `Processor`, `model.stop_ids` the tokens that end an answer.

    Raises
    ------
    FileNotFoundError
        If the folder or one of its files is missing.
    ValueError
        If a file is damaged, or describes another model; if device, dtype or `quantize` is unknown; if the adapter is
        for another model, or is to go onto "int8" or "int4".
    RuntimeError
        If the device is not there, or the hub does not give the files.
    """
    check_quantize(quantize)
    if type(compile) is not bool:
        raise ValueError(f"compile is {compile!r}: expected True or False")
    if compile and quantize == "nf4":
        raise ValueError("compile=True cannot lay out maps in nf4: take quantize='int4', or leave one of the two out")
    for given, what in ((path_or_hub_id, "a model"), (adapter, "an adapter")):
        if given is not None and not isinstance(given, str | Path):
            raise ValueError(f"{what} is a path or a hub id, got {type(given).__name__}")
    folder = POCKET if path_or_hub_id is None else find_folder(path_or_hub_id)
    if is_adapter(folder):
        if adapter is not None:
            raise ValueError(f"{folder} is an adapter itself: give its base as the model, and one adapter")
        folder, adapter = base_folder(folder), folder
    in_few_bits = quantize in ("int8", "int4")
    if in_few_bits and adapter is not None:
        raise ValueError(
            f"{quantize} rounds the base alone, so the adapter would be added to other weights than it was taught on: "
            "merge it (merge_lora), save that (save_model), then load the result with quantize"
        )
    if folder == POCKET and dtype == "auto":
        dtype = "float32"
    if folder.suffix == ".npz" and folder.is_file():
        model = load_npz(folder, device, dtype)
        folder, vision = folder.parent, model.config.vision
        processor = Processor(Tokenizer.from_folder(folder), vision.image_size, vision.num_patches)
        if quantize == "nf4":
            quantize_nf4(model)
        elif in_few_bits or (compile and adapter is None):
            model = prepare(model, quantize)
    else:
        read_config(folder)  # a folder of another model is told first
        processor = Processor.from_folder(folder)
        if in_few_bits or (compile and adapter is None):
            on_cpu = pick_device(device).type == "cpu"
            ready = Preparation(quantize, (lambda name: open_tensor(folder, name)) if on_cpu else None)
            model = ready.finish(load_model(folder, device, dtype, ready))
        else:
            model = load_model(folder, device, dtype, nf4_on_arrival() if quantize else None)
    if adapter is not None:
        load_adapter(model, find_folder(adapter))
        if compile:
            merge_lora(model)
            model = prepare(model)
    if compile and model.device.type == "cuda":
        # both record a GPU's kernels; the second also makes one kernel of unpacking bytes and multiplying
        compile_step(model, "max-autotune" if in_few_bits else "reduce-overhead")
    if processor.tokenizer.image_id != model.config.image_token_id:
        raise ValueError(
            f"{folder}: <image> is token {processor.tokenizer.image_id} for the tokenizer and "
            f"{model.config.image_token_id} in config.json: these files are not of one model"
        )
    model.processor = processor
    model.stop_ids = read_stop_ids(folder, model.config.eos_token_id)
    return model


def base_folder(adapter: Path) -> Path:
    """The folder of the model that an adapter was made for."""
    name = adapter_base(adapter)
    if name is None:
        raise ValueError(f"{adapter / CONFIG_FILE} names no base model: load that, with this folder as its adapter")
    if name == POCKET_BASE:
        return POCKET
    try:
        return find_folder(name)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{adapter / CONFIG_FILE} was made for {name}: {error}; or give its base yourself"
        ) from error


def generate(
    image,
    prompt: str | Sequence[str],
    *,
    model: PaliGemma | str | Path | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    stop: str | Sequence[str] | None = None,
    seed: int | None = None,
    grammar: str | None = None,
    stream: bool = False,
    return_logprobs: bool = False,
) -> str | list[str] | Answer | list[Answer] | Iterator[str]:
    """Answer prompts about pictures.

    Parameters
    ----------
    image : path, bytes, array, PIL image, or a list
        One picture; or a list with, for each prompt, one picture or a list of pictures: `[[a, b]]` is two pictures
        for one prompt.
    prompt : str or list of str
        One prompt with a list of pictures is asked about each; one picture with a list of prompts answers each.
    model : PaliGemma or path, optional
        What `load` returned, or what it takes; the pocket model by default. Paths are loaded once and kept until
        another path is given or the files change.
    max_new_tokens : int
        At least 1. An answer ends earlier at the end-of-sequence token, at a stop string, or where prompt and answer
        together fill the model's context.
    temperature : float
        0 takes the best token always; above, tokens are drawn.
    top_p : float
        In (0, 1]: draw from the fewest tokens that have this probability together.
    top_k : int, optional
        Draw from this many tokens, at least 1.
    repetition_penalty : float
        Above 1 makes tokens of prompt and answer less likely to come again.
    num_beams : int
        Above 1 looks for the most likely answer along so many beginnings at once; temperature must be 0.
    length_penalty : float
        Beams are compared by log-probability divided by length to this power; one beam does not use it.
    stop : str or list of str, optional
        Strings that end the answer and are left out of it.
    seed : int, optional
        Row i of a list draws as a call of its own would with `seed + i`. None draws anew each time, or as
        `torch.manual_seed` says.
    grammar : str, optional
        `detect` or `segment` allows only tokens that make a well-formed answer of that kind, one box or more.
    stream : bool
        Give an iterator over pieces of the answer; for one picture and one prompt.
    return_logprobs : bool
        Give `Answer(text, tokens, logprobs)` in place of the text. Log-probabilities are those of the model's own
        distribution, before temperature, top-k, top-p and penalty; tokens include the one that ended the answer.

    Returns
    -------
    str, or list of str
        A list if pictures or prompts came as one.

    Raises
    ------
    ValueError
        If an argument is out of its range or of another kind; if lists differ in length or are empty; if a prompt
        contains `<image>` or is longer than the model's context; if a picture cannot be read.
    FileNotFoundError, RuntimeError
        As `load`; or if there is no such picture.

    Notes
    -----
    A list gives what one call for each row gives: in float32 token for token. In 16 bits sums round differently in
    batches of other sizes, so where two tokens are about equally good, either may come.
    """
    sampling, stop = read_settings(
        max_new_tokens, temperature, top_p, top_k, repetition_penalty, num_beams, length_penalty, stop, seed, grammar
    )
    pictures, prompts = _rows(image, prompt)
    if sampling.seed > (most := 2**63 - len(prompts)):  # before the first answer, not in the middle
        raise ValueError(
            f"seed is {sampling.seed}: row i draws with seed + i, so expected {most} at most for {len(prompts)} rows"
        )
    if stream and (len(prompts) > 1 or return_logprobs or num_beams > 1):
        asked = "log-probabilities" if return_logprobs else f"{len(prompts)} prompts"
        asked = f"the best of {num_beams} beams, which is known at the end" if num_beams > 1 else asked
        raise ValueError(f"stream=True gives the text of one picture and one prompt, not {asked}: leave it out")
    model = _model(model)
    rows_at_once = max(1, ROWS_AT_ONCE // num_beams)
    batches = _batches(
        model, pictures, prompts, max_new_tokens, rows_at_once
    )  # all are read before the first is answered
    stop_ids = tuple(getattr(model, "stop_ids", None) or [model.config.eos_token_id])
    options = {"max_new_tokens": max_new_tokens, "stop_ids": stop_ids, "stop": stop}
    if grammar is not None:
        options["allow"] = _grammar(model.processor.tokenizer, model.config.text.vocab_size, stop_ids, grammar)
    decode = model.processor.tokenizer.decode
    if stream:
        return stream_answer(model, batches[0], decode, sampling=sampling, **options)
    options |= {"num_beams": num_beams, "length_penalty": length_penalty, "logprobs": return_logprobs}
    answers: list[Answer] = []
    for batch in batches:
        shifted = replace(sampling, seed=sampling.seed + len(answers))
        answers += generate_answers(model, batch, decode, sampling=shifted, **options)
    results = answers if return_logprobs else [answer.text for answer in answers]
    one = not isinstance(image, list | tuple) and isinstance(prompt, str)
    return results[0] if one else results


@lru_cache(maxsize=4)  # it looks at every piece of a vocabulary
def _grammar(tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...], task: str) -> AnswerGrammar:
    return AnswerGrammar(tokenizer, vocab_size, stop_ids, task)


def read_settings(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    repetition_penalty: float,
    num_beams: int,
    length_penalty: float,
    stop: str | Sequence[str] | None,
    seed: int | None,
    grammar: str | None = None,
) -> tuple[Sampling, list[str]]:
    """Check the arguments of `generate` that need no model.

    Returns
    -------
    Sampling, list of str
        How to choose, with a seed in any case, and where to stop.

    Raises
    ------
    ValueError
        If one is out of its range or of another kind.
    """
    whole_number("max_new_tokens", max_new_tokens, least=1)
    sampling = Sampling(temperature, top_p, top_k, repetition_penalty, seed)
    check_beams(num_beams, length_penalty, sampling)
    if grammar not in (None, "detect", "segment"):
        raise ValueError(f"grammar is {grammar!r}: expected 'detect' or 'segment', or none")
    if seed is None:
        sampling = replace(sampling, seed=int(torch.randint(2**62, ())))
    return sampling, read_stop_strings(stop)


def _rows(image, prompt) -> tuple[list, list[str]]:
    """Pictures and prompts as two lists of one length."""
    prompts = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    pictures = list(image) if isinstance(image, list | tuple) else [image]
    for name, rows in (("image", pictures), ("prompt", prompts)):
        if not rows:
            raise ValueError(f"{name} is an empty list: give at least one")
    for text in prompts:
        if not isinstance(text, str):
            raise ValueError(f"a prompt is a string, got {type(text).__name__}")
    if not isinstance(image, list | tuple):
        pictures = pictures * len(prompts)
    elif isinstance(prompt, str):
        prompts = prompts * len(pictures)
    if len(pictures) != len(prompts):
        raise ValueError(
            f"{len(pictures)} pictures for {len(prompts)} prompts: give as many of each, or one picture, not in "
            "a list, for all prompts; several pictures for one prompt are a list of their own: image=[[a, b]]"
        )
    if any(isinstance(shown, list | tuple) and not shown for shown in pictures):
        raise ValueError("a prompt has an empty list of pictures: give at least one")
    return pictures, prompts


def _model(model: PaliGemma | str | Path | None) -> PaliGemma:
    if isinstance(model, PaliGemma):
        if not isinstance(getattr(model, "processor", None), Processor):
            raise ValueError("this model has no processor: take one from sigma_book.load, or set model.processor")
        return model
    if model is None:
        with _loading:
            if "pocket" not in _kept:
                _kept["pocket"] = (None, load())
            return _kept["pocket"][1]
    if not isinstance(model, str | Path):
        raise ValueError(f"model is a path, a hub id or a loaded PaliGemma, got {type(model).__name__}")
    with _loading:  # two threads that ask at once wait for one model
        folder = find_folder(model)
        files = [folder] if folder.is_file() else sorted(path for pattern in WATCHED for path in folder.glob(pattern))
        state = (folder.resolve(), [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])
        if "last" not in _kept or _kept["last"][0] != state:
            _kept.pop("last", None)  # two models may not fit into memory
            _kept["last"] = (state, load(folder))
        return _kept["last"][1]


def _batches(
    model: PaliGemma, pictures: list, prompts: list[str], max_new_tokens: int, rows_at_once: int
) -> list[Batch]:
    """Pictures and prompts as batches, each no longer than `rows_at_once`; the context is checked for all of them."""
    opened: dict[int, Image.Image] = {}
    batches = []
    for start in range(0, len(prompts), rows_at_once):
        chunk = pictures[start : start + rows_at_once]
        shown = [list(row) if isinstance(row, list | tuple) else [row] for row in chunk]
        images = [[_open(source, opened) for source in row] for row in shown]
        batch = model.processor.prepare(images, prompts[start : start + rows_at_once])
        answer_limits(batch.attention_mask, max_new_tokens, model.config.text.max_position_embeddings)
        batches.append(batch)
        last = shown[-1][-1]
        opened = {id(last): opened[id(last)]}  # one picture may go on for thousands of prompts
    return batches


def _open(source, opened: dict[int, Image.Image]) -> Image.Image:
    """A picture, opened once even if it stands in several rows."""
    if id(source) not in opened:
        opened[id(source)] = load_image(source)
    return opened[id(source)]
