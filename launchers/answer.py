"""Answers inputs under an instruction: compiles the task once, then answers each input without the instruction."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

DEFAULT_MODEL = Path("runs/quickstart/convert/model")
USER_ERROR_STATUS = 2


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    from tagi_ds.errors import UserError

    arguments = _parser().parse_args(argv)
    try:
        _answer(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR_STATUS
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python launchers/answer.py",
        description="Compiles an instruction into a task once, then answers bare inputs. Without --input and --file "
        "it reads inputs line by line: from a prompt on a terminal, else from the standard input.",
        epilog='example: python launchers/answer.py --instruction "Reverse the words." --input "big red box"',
    )
    parser.add_argument(
        "--model", type=Path, help=f"folder of a converted TAGI model (default: {DEFAULT_MODEL}, of `make quickstart`)"
    )
    parser.add_argument(
        "--backbone", metavar="FOLDER", help="where the backbone lies now, if --model holds a hypernetwork alone"
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--instruction", metavar="TEXT", help="what is to be done with the inputs")
    task.add_argument("--task", type=Path, metavar="FILE", help="a compiled task (*.safetensors) instead")
    parser.add_argument("--input", action="append", default=[], metavar="TEXT", help="an input; may be repeated")
    parser.add_argument("--file", type=Path, metavar="INPUTS.txt", help="a file with one input a line")
    parser.add_argument(
        "--max_new_tokens", type=_positive, metavar="N", help="longest answer in tokens (default: as in training)"
    )
    parser.add_argument("--beams", type=_positive, default=1, metavar="N", help="beams; 1 (default) is greedy")
    parser.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="auto (default) is bf16 on a GPU that computes in it, elsewhere the type that the folder has",
    )
    parser.add_argument("--save_task", type=Path, metavar="FILE", help="write the compiled task there")
    return parser


def _answer(arguments: argparse.Namespace) -> None:
    from tagi_ds.errors import UserError

    folder = arguments.model or DEFAULT_MODEL
    if not folder.is_dir():
        mend = "run `make quickstart`, or name a converted model: --model FOLDER"
        raise UserError(f"the model folder {folder} is missing", mend)
    lines = None if arguments.file is None else _lines_of(arguments.file)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from tagi_ds.answering import Answerer

    answerer = Answerer.open(folder, arguments.instruction, arguments.task, arguments.backbone, arguments.precision)
    did = "compiled" if arguments.task is None else "read"
    print(f"task {did} in {1000 * answerer.seconds:.0f} ms", flush=True)
    if arguments.save_task is not None:
        answerer.task.save(arguments.save_task)
        print(f"compiled task in {arguments.save_task}", flush=True)
    how = arguments.max_new_tokens, arguments.beams
    if arguments.input or lines is not None:
        answers = answerer.answer_all([*arguments.input, *(lines or [])], *how)
    else:
        answers = (answerer.answer(text, *how) for text in _typed())
    seconds = []
    for answer in answers:
        seconds.append(answer.seconds)
        print(f"{answer.given} -> {answer.text}   ({1000 * answer.seconds:.0f} ms)", flush=True)
    if len(seconds) > 1:
        print(f"{len(seconds)} answers, {1000 * sum(seconds) / len(seconds):.0f} ms each", flush=True)


def _lines_of(file: Path) -> list[str]:
    from tagi_ds.errors import UserError

    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the inputs in {file}: {error}", "give a text file, one input a line") from error
    if not lines:
        raise UserError(f"{file} holds no inputs", "write one input a line")
    return lines


def _typed() -> Iterator[str]:
    """Inputs from a prompt on a terminal, or line by line from a pipe, until the end."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401  # input() then edits its line

    print("one input a line; Ctrl-D ends", flush=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        if line.strip():
            yield line


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("give a number above 0")
    return number


if __name__ == "__main__":
    sys.exit(main())
