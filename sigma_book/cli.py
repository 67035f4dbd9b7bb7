"""The `sigma-book` command: arguments to calls of the package.

The answer alone goes to standard output, remarks go to standard error. A wrong input prints one sentence and exits 2.
"""

import argparse
import gc
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

from sigma_book import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a wrong input, 130 when interrupted."""
    options = build_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or file may know fewer letters than an answer has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _import_torch()
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{_speaker()}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"{_speaker()}: {interrupt or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


def _import_torch() -> None:
    """Import torch with the garbage collector off, and keep what came with it out of later collections.

    These objects live as long as the process. To look through them again and again while they come, and once more at the
    end, takes a quarter of a short command's time.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401

        gc.freeze()
    finally:
        gc.enable()


def _speaker() -> str:
    """Who says a sentence: under torchrun, which of the processes."""
    return f"sigma-book, rank {os.environ['RANK']}" if "RANK" in os.environ else "sigma-book"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sigma-book", description="PaliGemma from the book: ask about a picture.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"sigma-book {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, summary, add_arguments, run in COMMANDS:
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def _generate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE", help="path of a picture")
    command.add_argument("prompt", metavar="PROMPT", help='such as "caption en"')
    _model_arguments(command)
    command.add_argument("--max-new-tokens", metavar="N", type=int, default=100, help="longest answer (default: 100)")
    command.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (default: 0)")
    command.add_argument("--top-p", metavar="P", type=float, default=1.0, help="in (0, 1] (default: 1)")
    command.add_argument("--top-k", metavar="K", type=int, help="draw from the K best tokens (default: all)")
    command.add_argument("--repetition-penalty", metavar="R", type=float, default=1.0, help="above 0 (default: 1)")
    command.add_argument("--num-beams", metavar="N", type=int, default=1, help="beam search with N beams (default: 1)")
    command.add_argument("--length-penalty", metavar="A", type=float, default=1.0, help="of beams (default: 1)")
    command.add_argument("--seed", metavar="S", type=int, help="makes drawn answers repeatable")
    command.add_argument(
        "--grammar", metavar="TASK", help="detect or segment: allow only well-formed answers of this kind"
    )
    command.add_argument("--stop", metavar="TEXT", action="append", help="end the answer before TEXT; may be repeated")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--stream", action="store_true", help="print the answer while it grows")
    form.add_argument("--json", action="store_true", help="print boxes in pixels as one JSON object")
    command.add_argument(
        "--save", metavar="FILE", type=Path, help="write the picture with boxes, masks and labels drawn on it"
    )
    command.add_argument(
        "--masks", metavar="FILE", type=Path, help="big_vision's vae-oid.npz (default: what SIGMA_BOOK_MASKS names)"
    )
    command.add_argument(
        "--quantize", metavar="Q", help="int8, int4 or nf4: weights in 8 or 4 bits (default: as stored)"
    )
    command.add_argument("--compile", action="store_true", help="lay the weights out for speed first")


def _generate(options: argparse.Namespace) -> None:
    from sigma_book.assemble import generate, load, read_settings
    from sigma_book.locate import MASKS_VARIABLE, describe, draw, load_mask_vae, parse
    from sigma_book.processor import encode_picture, file_beside, load_image

    settings = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "repetition_penalty": options.repetition_penalty,
        "num_beams": options.num_beams,
        "length_penalty": options.length_penalty,
        "stop": options.stop,
        "seed": options.seed,
        "grammar": options.grammar,
    }
    read_settings(**settings)  # what is wrong is said before a model is loaded
    image = load_image(options.image)
    if options.save is not None:
        _check_picture_name(options.save)
    vae = load_mask_vae(options.masks) if options.masks or os.environ.get(MASKS_VARIABLE) else None
    model = load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        adapter=options.adapter,
        compile=options.compile,
    )
    answer = generate(image, options.prompt, model=model, stream=options.stream, **settings)
    if options.stream:
        pieces = []
        for piece in answer:
            print(piece, end="", flush=True)
            pieces.append(piece)
        print()
        answer = "".join(pieces)
    elif options.json:
        described = describe(answer, image.height, image.width, vae)
        print(json.dumps({"prompt": options.prompt, "answer": answer} | described, ensure_ascii=False))
    else:
        print(answer)
    if options.save is not None:
        with file_beside(options.save) as fresh:
            fresh.write_bytes(encode_picture(draw(image, answer, vae), PICTURES[options.save.suffix.lower()]))
        for remark in parse(answer, image.height, image.width)[1]:
            print(f"sigma-book: {remark}", file=sys.stderr)


PICTURES = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".tiff": "TIFF", ".webp": "WEBP"}


def _check_picture_name(path: Path) -> None:
    if path.suffix.lower() not in PICTURES:
        raise ValueError(f"--save {path}: expected a name that ends in one of {', '.join(PICTURES)}")
    if path.is_dir():
        raise ValueError(f"--save {path} is a folder: give the name of a picture in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"--save {path}: no such folder: {path.parent}")


FORM_HELP = "what FILE is, in place of looking: auto, text, prefix, vqa, vqav2, coco-captions"
FORM_MASKS = ", coco-detect or coco-segment, which needs SIGMA_BOOK_MASKS (default: auto)"


def _evaluate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", metavar="T", required=True, help="caption, vqa, count or detect")
    command.add_argument("--data", metavar="FILE", required=True, help="JSONL or JSON: rows, COCO, or VQAv2 questions")
    command.add_argument("--out", metavar="DIR", required=True, help="folder of this run; the same again goes on")
    command.add_argument("--model", metavar="DIR", help="folder or hub id of a PaliGemma (default: the pocket model)")
    command.add_argument("--annotations", metavar="FILE", help="the answers of VQAv2")
    command.add_argument("--root", metavar="DIR", help="where paths of pictures begin (default: the file's folder)")
    command.add_argument("--form", metavar="F", default="auto", help=f"{FORM_HELP} or coco-detect (default: auto)")
    command.add_argument("--answers", metavar="FILE", help="score these answers, in the official form, without a model")
    command.add_argument("--official", action="store_true", help="also write results.json in the official form")
    command.add_argument("--batch-size", metavar="N", type=int, default=16, help="answered together (default: 16)")
    command.add_argument("--max-new-tokens", metavar="N", type=int, default=100, help="longest answer (default: 100)")
    command.add_argument("--num-beams", metavar="N", type=int, default=1, help="width of beam search (default: 1)")
    penalty = "of beams (default: 1; the scores published for COCO: 2 beams and 0)"
    command.add_argument("--length-penalty", metavar="A", type=float, default=1.0, help=penalty)
    command.add_argument("--num-examples", metavar="N", type=int, help="take the first N only (default: all)")
    command.add_argument("--device", metavar="D", default="auto", help="auto, cuda, cuda:0, mps or cpu (default: auto)")
    command.add_argument(
        "--dtype", metavar="T", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)"
    )


def _evaluate(options: argparse.Namespace) -> None:
    from sigma_book.answers import score_table
    from sigma_book.runs import evaluate

    settings = {name: value for name, value in vars(options).items() if name not in ("run", "task", "data", "out")}
    print(score_table(options.task, evaluate(options.task, options.data, options.out, **settings)))
    print(f"written: {', '.join(str(Path(options.out) / name) for name in EVALUATION_FILES)}", file=sys.stderr)


EVALUATION_FILES = ("answers.jsonl", "scores.json", "worst.html")


def _pocket_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder that the model is written to")
    command.add_argument("--seed", metavar="S", type=int, default=0, help="of data and weights (default: 0)")


def _pocket(options: argparse.Namespace) -> None:
    from sigma_book.pocket import train_pocket

    train_pocket(options.out, seed=options.seed)


def _data_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", metavar="FILE", help="JSONL or JSON: rows, COCO, or the questions of VQAv2")
    command.add_argument("--root", metavar="DIR", help="where paths of pictures begin (default: the file's folder)")
    command.add_argument("--annotations", metavar="FILE", help="the answers of VQAv2")
    command.add_argument("--form", metavar="F", default="auto", help=FORM_HELP + FORM_MASKS)
    command.add_argument("--model", metavar="DIR", help="whose tokens and context count (default: the pocket model)")
    command.add_argument("--out", metavar="DIR", type=Path, help="where pictures and lists go (default: NAME_survey)")


def _data(options: argparse.Namespace) -> None:
    from sigma_book.assemble import POCKET
    from sigma_book.batches import survey, write_survey
    from sigma_book.data import read_examples
    from sigma_book.locate import load_mask_vae
    from sigma_book.processor import Processor
    from sigma_book.weights import find_folder, read_config

    sources = {"form": options.form, "root": options.root, "annotations": options.annotations}
    if options.form == "coco-segment":
        sources["encode_mask"] = load_mask_vae().codes_of
    examples = read_examples(options.file, **sources)
    out = options.out or Path(f"{Path(options.file).stem}_survey")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    how = "found by looking" if options.form == "auto" else "as asked"
    print(f"{options.file}: form {examples.form}, {how}", file=sys.stderr)
    for remark in examples.remarks:
        print(f"{options.file}: {remark}", file=sys.stderr)
    folder = POCKET if options.model is None else find_folder(options.model)
    context = read_config(folder).text.max_position_embeddings
    found = survey(examples, Processor.from_folder(folder), context)
    print("\n".join(found.lines()))
    for path in write_survey(found, examples, out):
        print(f"written: {path}", file=sys.stderr)


# options of `train` that are fields of TrainingConfig: flag, field, its type (None: a switch), help
TRAINING_OPTIONS = (
    ("--method", "method", str, "full, lora or qlora (default: full)"),
    ("--max-steps", "max_steps", int, "stop after N steps"),
    ("--epochs", "epochs", int, "show every example N times (default: once, if --max-steps says nothing)"),
    ("--batch-size", "batch_size", int, "examples in a batch, of all ranks together (default: 8)"),
    ("--accumulate", "accumulate", int, "batches in a step (default: 1)"),
    ("--learning-rate", "learning_rate", float, "the highest (default: 1e-5, with lora and qlora 2e-4)"),
    ("--vision-rate", "vision_rate", float, "the same for the vision tower alone"),
    ("--projector-rate", "projector_rate", float, "the same for the projector alone"),
    ("--decoder-rate", "decoder_rate", float, "the same for the decoder alone"),
    ("--schedule", "schedule", str, "how the rate falls: cosine or linear (default: cosine)"),
    ("--warmup", "warmup", float, "steps in which it rises; below 1 a share of all steps (default: 0.05)"),
    ("--weight-decay", "weight_decay", float, "of AdamW (default: 0)"),
    ("--clip", "clip", float, "longest gradient (default: 1)"),
    ("--optimizer", "optimizer", str, "adamw or adamw8bit (default: adamw)"),
    ("--dtype", "dtype", str, "of products: float32, bfloat16, float16 (default: auto, bfloat16 on cuda)"),
    ("--recompute", "recompute", None, "keep no activations inside blocks: less memory, more time"),
    ("--rank", "rank", int, "width of the adapters of lora and qlora (default: 64)"),
    ("--alpha", "alpha", float, "their scale times their rank (default: 16)"),
    ("--dropout", "dropout", float, "in the adapters (default: 0)"),
    ("--seed", "seed", int, "of the order of the data and of dropout (default: 0)"),
)


def _train_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", metavar="FILE", required=True, help="what to learn: JSONL, COCO or VQAv2")
    command.add_argument("--out", metavar="DIR", type=Path, help="folder of the run; needed unless --dry-run")
    command.add_argument("--model", metavar="DIR", help="folder or hub id to begin from (default: the pocket model)")
    command.add_argument("--form", metavar="F", default="auto", help=FORM_HELP + FORM_MASKS)
    command.add_argument("--root", metavar="DIR", help="where paths of pictures begin (default: the file's folder)")
    command.add_argument("--annotations", metavar="FILE", help="the answers of VQAv2")
    for flag, field, kind, text in TRAINING_OPTIONS:
        kinds = {"action": "store_true"} if kind is None else {"type": kind, "metavar": "X" if kind is float else "N"}
        if kind is str:
            kinds["metavar"] = "NAME"
        command.add_argument(flag, dest=field, default=argparse.SUPPRESS, help=text, **kinds)
    command.add_argument("--freeze", metavar="PART", nargs="+", default=[], help="vision, projector or decoder")
    command.add_argument("--evaluate", metavar="FILE", help="examples that are not learned from")
    command.add_argument("--evaluate-annotations", metavar="FILE", help="their answers, for the questions of VQAv2")
    command.add_argument(
        "--evaluate-every", metavar="N", type=int, help="ask them every N steps, not at both ends alone"
    )
    command.add_argument("--evaluate-limit", metavar="N", type=int, default=200, help="ask so many (default: 200)")
    command.add_argument("--save-every", metavar="N", type=int, default=500, help="steps between saves (default: 500)")
    command.add_argument("--keep", metavar="N", type=int, default=3, help="checkpoints that stay (default: 3)")
    command.add_argument("--workers", metavar="N", type=int, default=0, help="processes that read ahead (default: 0)")
    command.add_argument(
        "--on-error", metavar="DO", default="stop", help="at a broken row: stop or skip (default: stop)"
    )
    command.add_argument(
        "--truncate", action="store_true", help="cut rows that are too long, in place of refusing them"
    )
    command.add_argument("--device", metavar="D", default="auto", help="auto, cuda, cuda:0, mps or cpu (default: auto)")
    command.add_argument(
        "--parallel", metavar="WAY", help="under torchrun: ddp or fsdp (default: ddp where the model fits, else fsdp)"
    )
    command.add_argument("--wandb", metavar="PROJECT", help="follow the run with Weights & Biases")
    command.add_argument("--dry-run", action="store_true", help="print what a step would cost, and write nothing")


def _train(options: argparse.Namespace) -> None:
    from sigma_book.runs import estimate, finetune
    from sigma_book.training import TrainingConfig

    given = {field: getattr(options, field) for _, field, _, _ in TRAINING_OPTIONS if hasattr(options, field)}
    config = TrainingConfig(freeze=tuple(options.freeze), **given)
    common = ("model", "form", "root", "annotations", "on_error", "truncate", "device")
    arguments = {name: getattr(options, name) for name in common}
    if options.dry_run:
        bill, seconds = estimate(options.data, config, **arguments)
        print("\n".join(bill.lines()))
        print(f"a step       {'more memory than is free' if seconds is None else f'{seconds:.2f} s'}")
        return
    if options.out is None:
        raise ValueError("--out is missing: give the folder of the run, or --dry-run to write nothing")
    rest = (
        "evaluate",
        "evaluate_annotations",
        "evaluate_every",
        "evaluate_limit",
        "save_every",
        "keep",
        "workers",
        "parallel",
        "wandb",
    )
    final = finetune(options.data, options.out, config, **arguments, **{name: getattr(options, name) for name in rest})
    if os.environ.get("RANK", "0") == "0":  # torchrun gives each process its number
        print(final)


def _bench_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="DIR", help="folder or hub id of a PaliGemma (default: the pocket model)")
    command.add_argument("--size", metavar="S", help="pocket; or, with --random, 300m, 1b or 3b")
    command.add_argument("--random", action="store_true", help="weights of that size are random, written once")
    command.add_argument(
        "--against", metavar="NAME", action="append", default=[], help="transformers: measure it beside this package"
    )
    command.add_argument("--quantize", metavar="Q", help="as in generate")
    command.add_argument("--compile", action="store_true", help="load with compile=True")
    command.add_argument(
        "--dtype", metavar="T", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)"
    )
    command.add_argument("--device", metavar="D", default="cpu", help="cpu, cuda, mps or auto (default: cpu)")
    command.add_argument("--batch", metavar="N", type=int, default=1, help="pictures answered together (default: 1)")
    command.add_argument("--prompt", metavar="TEXT", default="caption en", help="what is asked (default: caption en)")
    command.add_argument("--prompt-tokens", metavar="N", type=int, help="repeat or cut the prompt to N tokens")
    command.add_argument("--new-tokens", metavar="N", type=int, default=16, help="of each answer (default: 16)")
    command.add_argument("--warmup", metavar="N", type=int, default=1, help="turns that do not count (default: 1)")
    command.add_argument("--repeat", metavar="N", type=int, default=5, help="turns that count (default: 5)")
    command.add_argument(
        "--bill", action="store_true", help="predict each part beside its measurement (on a card: always)"
    )
    command.add_argument("--growth", dest="grow", action="store_true", help="time larger pictures, batches and answers")
    command.add_argument("--json", dest="json_file", metavar="FILE", type=Path, help="write all that was measured")
    command.add_argument("--save", dest="picture", metavar="FILE", type=Path, help="write a picture, FILE.png")


def _bench(options: argparse.Namespace) -> None:
    from sigma_book.bench import run_bench

    print("\n".join(run_bench(**{name: value for name, value in vars(options).items() if name != "run"})))


def _serve_arguments(command: argparse.ArgumentParser) -> None:
    _model_arguments(command)
    command.add_argument("--quantize", metavar="Q", help="int8, int4 or nf4, as in generate")
    command.add_argument(
        "--compile",
        action="store_true",
        help="lay the weights out for speed first; steps are not compiled, even on a GPU",
    )
    command.add_argument("--name", metavar="NAME", help="what requests call the model (default: its folder's name)")
    command.add_argument("--host", metavar="H", default="127.0.0.1", help="0.0.0.0 for all (default: 127.0.0.1)")
    command.add_argument("--port", metavar="N", type=int, default=8000, help="0 is any free one (default: 8000)")
    command.add_argument("--max-rows", metavar="N", type=int, default=8, help="answered together (default: 8)")
    command.add_argument(
        "--max-length", metavar="N", type=int, help="tokens of picture, prompt and answer (default: the model's)"
    )
    command.add_argument(
        "--queue", metavar="N", type=int, default=64, help="that wait, or 0; more get a 429 (default: 64)"
    )
    command.add_argument(
        "--max-tokens",
        metavar="N",
        type=int,
        help="most tokens that a request may ask for (default: what a row holds); one that asks for none gets 100",
    )
    command.add_argument(
        "--max-body",
        metavar="BYTES",
        type=int,
        default=20_000_000,
        help="largest body of a request, in bytes (default: 20000000)",
    )
    command.add_argument(
        "--max-pixels",
        metavar="N",
        type=int,
        default=50_000_000,
        help="largest picture, in pixels, looked at before it is unpacked (default: 50000000)",
    )
    command.add_argument(
        "--deadline", metavar="S", type=float, default=60.0, help="seconds an answer has (default: 60)"
    )
    command.add_argument(
        "--grace", metavar="S", type=float, help="seconds to finish after SIGTERM; not with --replicas (default: 30)"
    )
    command.add_argument("--replicas", metavar="N", type=int, default=1, help="of the model, by Ray Serve (default: 1)")
    command.add_argument("--max-replicas", metavar="N", type=int, help="under load, up to N (default: as --replicas)")
    command.add_argument("--api-keys", metavar="FILE", help="keys, one a line (default: SIGMA_BOOK_API_KEYS, or none)")
    command.add_argument("--image-root", metavar="DIR", type=Path, help="folder whose pictures may be named by path")
    command.add_argument(
        "--cors", metavar="ORIGIN", action="append", default=[], help="a site that may ask; repeatable"
    )
    command.add_argument("--log-prompts", action="store_true", help="write prompts into the log")


def _serve(options: argparse.Namespace) -> None:
    from sigma_book.assemble import load

    try:
        from sigma_book.server import ServerConfig
        from sigma_book.serving import read_api_keys, serve
    except ImportError as error:
        raise RuntimeError(f"serve needs more packages ({error}): pip install 'sigma-book[serve]'") from error
    config = ServerConfig(
        model_name=options.name or (Path(os.path.abspath(options.model)).name if options.model else "pocket"),
        max_body=options.max_body,
        max_pixels=options.max_pixels,
        max_new_tokens=options.max_tokens,
        deadline=options.deadline,
        api_keys=read_api_keys(options.api_keys),
        cors_origins=tuple(options.cors),
        image_root=options.image_root,
        log_prompts=options.log_prompts,
    )
    sizes = {"max_rows": options.max_rows, "max_length": options.max_length, "queue_size": options.queue}
    address = {"host": options.host, "port": options.port}
    source = (
        options.model if options.model is None or not Path(options.model).exists() else Path(options.model).resolve()
    )
    make_model = partial(
        load,
        source,
        device=options.device,
        dtype=options.dtype,
        quantize=options.quantize,
        adapter=options.adapter,
        compile=options.compile,
    )
    if options.replicas == 1 and options.max_replicas is None:
        serve(make_model, config, grace=30.0 if options.grace is None else options.grace, **address, **sizes)
        return
    if options.grace is not None:
        raise ValueError(
            "--grace is for one process, and Ray Serve has a time of its own: leave it out with --replicas"
        )
    from sigma_book.replicas import serve_replicas, share

    shared = share(options.replicas, options.max_replicas, options.max_rows, options.device)
    serve_replicas(make_model, config, shared, **address, **sizes)


def _answer_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", metavar="FILE", required=True, help="JSON lines or Parquet with image and prompt")
    command.add_argument("--out", metavar="DIR", required=True, help="folder of this run; the same again goes on")
    _model_arguments(command)
    command.add_argument("--root", metavar="DIR", help="where paths of pictures begin (default: the file's folder)")
    command.add_argument("--actors", metavar="N", type=int, default=1, help="processes with the model (default: 1)")
    command.add_argument("--batch-size", metavar="N", type=int, default=16, help="answered together (default: 16)")
    command.add_argument("--max-new-tokens", metavar="N", type=int, default=100, help="longest answer (default: 100)")
    command.add_argument("--quantize", metavar="Q", help="int8, int4 or nf4, as in generate")
    command.add_argument(
        "--form", metavar="F", default="jsonl", help="of the answers: jsonl or parquet (default: jsonl)"
    )
    command.add_argument(
        "--rows-per-part", metavar="N", type=int, default=10_000, help="rows in a file (default: 10000)"
    )


def _model_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--model", metavar="DIR", help="folder or hub id of a PaliGemma (default: the pocket model)")
    command.add_argument("--adapter", metavar="DIR", help="folder or hub id of a LoRA adapter for the model")
    command.add_argument("--device", metavar="D", default="auto", help="auto, cuda, cuda:0, mps or cpu (default: auto)")
    command.add_argument(
        "--dtype", metavar="T", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)"
    )


def _answer(options: argparse.Namespace) -> None:
    from sigma_book.fleet import answer_file

    settings = {name: value for name, value in vars(options).items() if name not in ("run", "data", "out")}
    with redirect_stdout(sys.stderr):  # Ray prints what its daemons have to tell
        counts = answer_file(options.data, options.out, **settings)
    print(f"{counts.total():,} rows: {counts['answered']:,} answered, {counts['error']:,} with an error")


def _export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", metavar="DIR", required=True, help="folder that the model is written to")
    command.add_argument("--model", metavar="DIR", help="what to write (default: the pocket model)")
    command.add_argument("--adapter", metavar="DIR", help="LoRA adapter that is added to the weights")
    command.add_argument("--dtype", metavar="T", default="auto", help="of the numbers (default: as stored)")


def _export(options: argparse.Namespace) -> None:
    from sigma_book.fleet import export_model

    print(export_model(options.out, model=options.model, adapter=options.adapter, dtype=options.dtype))


def _compare_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--url", metavar="URL", required=True, help="such as http://localhost:8000/v1")
    _model_arguments(command)
    command.add_argument("--questions", metavar="N", type=int, default=8, help="about drawn scenes (default: 8)")
    command.add_argument("--key", metavar="KEY", help="sent to the engine (default: what OPENAI_API_KEY holds)")


def _compare(options: argparse.Namespace) -> None:
    from sigma_book.fleet import compare

    settings = {name: value for name, value in vars(options).items() if name not in ("run", "url", "key")}
    report = compare(options.url, key=options.key or os.environ.get("OPENAI_API_KEY"), **settings)
    print("\n".join(report.lines()))
    if report.mask != "whole":
        raise RuntimeError(f"{options.url}: {report.verdict()}")


# name, one line of help, what adds its arguments, what runs it
COMMANDS = (
    ("generate", "answer a prompt about a picture", _generate_arguments, _generate),
    ("data", "look at a file of examples before training on it", _data_arguments, _data),
    ("train", "teach a model what a file of examples says", _train_arguments, _train),
    ("evaluate", "ask a model a whole data set and score its answers", _evaluate_arguments, _evaluate),
    ("bench", "measure how fast a model answers, and predict it", _bench_arguments, _bench),
    ("serve", "answer over HTTP on a port", _serve_arguments, _serve),
    ("answer", "answer a file of pictures and prompts with many processes", _answer_arguments, _answer),
    ("export", "write a model as a folder that other engines read", _export_arguments, _export),
    ("compare", "find out whether an engine reads picture and prompt as it must", _compare_arguments, _compare),
    ("pocket", "teach the pocket model from nothing", _pocket_arguments, _pocket),
)


if __name__ == "__main__":
    sys.exit(main())
