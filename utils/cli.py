"""The command-line side of every script: exit codes, log, --help, signals, ranks, the API key."""
import argparse
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from utils.jsonl import DataError
from utils.latent_families import PRESETS

LONGEST_ERROR = 8000  # characters shown of a message that quotes its input
API_KEY = "OPENAI_API_KEY"  # environment variable


class ErrorRateError(RuntimeError):
    """Too many calls fail, or no server answers."""


def rank_world() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as torchrun sets them, else (0, 1, 0)."""
    return tuple(int(os.environ.get(name, default))
                 for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))


def log(message: str) -> None:
    """Write a line to stderr, from rank 0 only, without breaking a progress bar."""
    if rank_world()[0] == 0:
        tqdm.write(message, file=sys.stderr)


def cli(main: Callable[[], int]) -> int:
    """Run `main`; return its exit code: 2 after a DataError, 4 an ErrorRateError, 130 Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    gc.set_threshold(50_000, 20, 100)  # many rows, none in a cycle: 10 % faster
    try:
        return main()
    except DataError as error:
        print(f"error: {shorten(str(error))}", file=sys.stderr)
        return 2
    except ErrorRateError as error:
        print(f"stopped: {shorten(str(error))}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print("interrupted; run the same command again, a stage with a journal resumes", file=sys.stderr)
        return 130


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the unwrapped description, and the default of every flag whose text lacks it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        empty = action.default is False or action.default in (None, "", [], {}, argparse.SUPPRESS)
        if action.required or empty or "default" in text:
            return text
        default = " ".join(action.default) if isinstance(action.default, list) else "%(default)s"
        return f"{text} (default: {default})"


def parse_number(low: float, high: float = 2**31 - 1, kind: type = int) -> Callable[[str], float]:
    """Return the type of a flag that takes numbers from `low` to `high`, none of them NaN."""
    def parse(text: str) -> float:
        with suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text[:40]!r}: expected {kind.__name__} from {low} to {high}")
    return parse


parse_count, parse_seed = parse_number(1), parse_number(0)
parse_temperature, parse_seconds = parse_number(0, 10, float), parse_number(0.1, 10**8, float)


def add_fresh_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fresh", action="store_true", help="move an earlier run's journal aside first")


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--latent", choices=("off", *sorted(PRESETS)), default="off",
        help="family of the latent tokens; off: text imaginations")
    add("--force_start", action="store_true",
        help="replies begin with the start of latents: another policy than the model's")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
        help="auto: bfloat16 on a GPU, else float32")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="checkpoint folder or hub name")
    add_decoding_flags(parser)
    add("--image_root", help="folder of the images (default: that of the items file)")
    add("--options", choices=("letter", "text"), default="letter", help="what R0 scores")
    add("--system", help="system prompt (default: the chat template's own)")
    add("--suffix", default="", help="text after the question")
    add("--max_new_tokens", type=parse_count, default=1024, help="a reply's, with latents")
    add("--batch_size", type=parse_count, default=8, help="items per batch, with donors")
    add("--max_pixels", type=parse_count, help="area to which an image is shrunk")
    add("--seed", type=parse_seed, default=0, help="of all random numbers")
    add_fresh_flag(parser)


def shorten(message: str) -> str:
    """Return a message without a long middle, its control characters escaped."""
    if len(message) > LONGEST_ERROR:
        message = f"{message[:LONGEST_ERROR // 2]} [...] {message[-LONGEST_ERROR // 2:]}"
    return "".join(char if char.isprintable() or char in "\n " else ascii(char)[1:-1] for char in message)


def read_api_key(path: str | None, flag: str = "--api_key_file") -> str | None:
    """Return the key from the file, or without a file from the environment, if set."""
    if path is None:
        return os.environ.get(API_KEY) or None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flag} {path}: cannot be read ({error})") from error
    if not key:
        raise DataError(f"{flag} {path}: the file is empty; expected the key")
    return key


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; a second signal ends the process at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(130)  # as safe as SIGKILL, which journals and checkpoints survive
        stop.set()
        os.write(2, b"\nstopping after the running calls; press again to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
