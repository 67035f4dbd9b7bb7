"""The `sigma-book` command: arguments to calls of the package.

The answer alone goes to standard output, remarks go to standard error. A wrong input prints one sentence and exits 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sigma_book import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 2 for a wrong input, 130 when interrupted."""
    options = build_parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sigma-book: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sigma-book: interrupted", file=sys.stderr)
        return 130
    return 0


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
    command.add_argument("--model", metavar="DIR", help="folder or hub id of a PaliGemma (default: the pocket model)")
    command.add_argument("--max-new-tokens", metavar="N", type=int, default=100, help="longest answer (default: 100)")
    command.add_argument("--temperature", metavar="T", type=float, default=0.0, help="0 is greedy (default: 0)")
    command.add_argument("--top-p", metavar="P", type=float, default=1.0, help="in (0, 1] (default: 1)")
    command.add_argument("--top-k", metavar="K", type=int, help="draw from the K best tokens (default: all)")
    command.add_argument("--repetition-penalty", metavar="R", type=float, default=1.0, help="above 0 (default: 1)")
    command.add_argument("--seed", metavar="S", type=int, help="makes drawn answers repeatable")
    command.add_argument("--stop", metavar="TEXT", action="append", help="end the answer before TEXT; may be repeated")
    command.add_argument("--stream", action="store_true", help="print the answer while it grows")
    command.add_argument("--device", metavar="D", default="auto", help="auto, cuda, cuda:0, mps or cpu (default: auto)")
    command.add_argument(
        "--dtype", metavar="T", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)"
    )


def _generate(options: argparse.Namespace) -> None:
    from sigma_book.assemble import generate, load, read_settings
    from sigma_book.processor import load_image

    settings = {
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k,
        "repetition_penalty": options.repetition_penalty,
        "stop": options.stop,
        "seed": options.seed,
    }
    read_settings(**settings)  # what is wrong is said before a model is loaded
    image = load_image(options.image)
    model = load(options.model, device=options.device, dtype=options.dtype)
    answer = generate(image, options.prompt, model=model, stream=options.stream, **settings)
    if options.stream:
        for piece in answer:
            print(piece, end="", flush=True)
        print()
    else:
        print(answer)


def _evaluate_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--task", metavar="T", required=True, help="caption, vqa, count or detect")
    command.add_argument("--data", metavar="FILE", required=True, help="JSONL or JSON: rows, COCO, or VQAv2 questions")
    command.add_argument("--out", metavar="DIR", required=True, help="folder of this run; the same again goes on")
    command.add_argument("--model", metavar="DIR", help="folder or hub id of a PaliGemma (default: the pocket model)")
    command.add_argument("--annotations", metavar="FILE", help="the answers of VQAv2")
    command.add_argument("--root", metavar="DIR", help="where paths of pictures begin (default: the file's folder)")
    command.add_argument(
        "--form", metavar="F", default="auto", help="what FILE is, in place of looking (default: auto)"
    )
    command.add_argument("--answers", metavar="FILE", help="score these answers, in the official form, without a model")
    command.add_argument("--official", action="store_true", help="also write results.json in the official form")
    command.add_argument("--batch-size", metavar="N", type=int, default=16, help="answered together (default: 16)")
    command.add_argument("--max-new-tokens", metavar="N", type=int, default=100, help="longest answer (default: 100)")
    command.add_argument("--num-examples", metavar="N", type=int, help="take the first N only (default: all)")
    command.add_argument("--device", metavar="D", default="auto", help="auto, cuda, cuda:0, mps or cpu (default: auto)")
    command.add_argument(
        "--dtype", metavar="T", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)"
    )


def _evaluate(options: argparse.Namespace) -> None:
    from sigma_book.assemble import evaluate
    from sigma_book.evaluation import score_table

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
    command.add_argument(
        "--form", metavar="F", default="auto", help="what FILE is, in place of looking (default: auto)"
    )
    command.add_argument("--model", metavar="DIR", help="whose tokens and context count (default: the pocket model)")
    command.add_argument("--out", metavar="DIR", type=Path, help="where pictures and lists go (default: NAME_survey)")


def _data(options: argparse.Namespace) -> None:
    from sigma_book.assemble import POCKET
    from sigma_book.data import read_examples, survey, write_survey
    from sigma_book.processor import Processor
    from sigma_book.weights import find_folder, read_config

    examples = read_examples(options.file, form=options.form, root=options.root, annotations=options.annotations)
    how = "found by looking" if options.form == "auto" else "as asked"
    print(f"{options.file}: form {examples.form}, {how}", file=sys.stderr)
    for remark in examples.remarks:
        print(f"{options.file}: {remark}", file=sys.stderr)
    folder = POCKET if options.model is None else find_folder(options.model)
    context = read_config(folder).text.max_position_embeddings
    found = survey(examples, Processor.from_folder(folder), context)
    print("\n".join(found.lines()))
    out = options.out or Path(f"{Path(options.file).stem}_survey")
    for path in write_survey(found, examples, out):
        print(f"written: {path}", file=sys.stderr)


# name, one line of help, what adds its arguments, what runs it
COMMANDS = (
    ("generate", "answer a prompt about a picture", _generate_arguments, _generate),
    ("data", "look at a file of examples before training on it", _data_arguments, _data),
    ("evaluate", "ask a model a whole data set and score its answers", _evaluate_arguments, _evaluate),
    ("pocket", "teach the pocket model from nothing", _pocket_arguments, _pocket),
)


if __name__ == "__main__":
    sys.exit(main())
