"""JSON rows: read with checks, write by rename, describe the run beside its output.

No torch here: a script that only reads rows starts at once.
"""
import argparse
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from utils.jsonl import DataError

LONGEST_ERROR = 8000  # characters shown of a message that quotes what it found
API_KEY = "OPENAI_API_KEY"  # the environment variable that every client of OpenAI-compatible servers reads


def rank_world() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as torchrun sets them; (0, 1, 0) in a plain process."""
    return tuple(int(os.environ.get(name, default))
                 for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")))


def log(message: str) -> None:
    """Write one line for people to stderr, from rank 0 only, without breaking a progress bar."""
    if rank_world()[0] == 0:
        tqdm.write(message, file=sys.stderr)


def cli(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code: 2 after a DataError, 130 after Ctrl-C or SIGTERM, told in one
    line."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # hundreds of thousands of rows without a cycle: looked at less often, -10 % time
    gc.set_threshold(50_000, 20, 100)
    try:
        return main()
    except DataError as error:
        print(f"error: {shorten(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here where the stage keeps a journal",
              file=sys.stderr)
        return 130


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the description as it stands, and with every default that a flag's own words do not tell.
    """

    def _get_help_string(self, action: argparse.Action) -> str:
        told = action.help or ""
        empty = action.default is False or action.default in (None, "", [], {}, argparse.SUPPRESS)
        if action.required or empty or "default" in told:
            return told
        listed = isinstance(action.default, list)
        return f"{told} (default: {' '.join(action.default) if listed else '%(default)s'})"


def parse_count(text: str) -> int:
    """Return what a flag counts, for argparse to refuse anything below 1."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of at least 1")
    return count


def shorten(message: str) -> str:
    """Return a message without control characters (an id or a path may hold them), and without its middle if
    it is long."""
    if len(message) > LONGEST_ERROR:
        message = f"{message[:LONGEST_ERROR // 2]} [...] {message[-LONGEST_ERROR // 2:]}"
    return "".join(char if char.isprintable() or char in "\n " else ascii(char)[1:-1] for char in message)


def read_api_key(path: str | None, flag: str = "--api_key_file") -> str | None:
    """Return the key from a file or, without one, from the environment; None if there is neither."""
    if path is None:
        return os.environ.get(API_KEY) or None
    try:
        key = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{flag} {path}: cannot be read ({error})") from error
    if not key:
        raise DataError(f"{flag} {path}: is empty; expected the key and nothing else")
    return key


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets; the second one ends the process at once."""
    stop = threading.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(130)  # as safe as SIGKILL, which journals and checkpoints survive
        stop.set()
        os.write(2, b"\nstopping: waiting for what is under way; once more to stop at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
