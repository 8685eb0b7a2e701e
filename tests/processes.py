"""Scripts run as commands: in this process, as processes of their own or under torchrun, and its ranks."""
import argparse
import signal
import socket
import sys
from pathlib import Path

import evaluate
import filter_data
import intervene
import probe
import rewrite_captions
import train_sft
from utils.cli import cli

ROOT = Path(__file__).parents[1]
MAINS = {script.__name__: script.main
         for script in (rewrite_captions, filter_data, train_sft, evaluate, intervene, probe)}


def run_here(script: str, flags: list[str]) -> int:
    """Run a script in this process as its command would; return the exit code."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return cli(lambda: MAINS[script](flags))
    except SystemExit as stop:
        return stop.code
    finally:
        signal.signal(signal.SIGTERM, handler)


def words(**flags: object) -> list[str]:
    """Return flags as words of a command; True stands for a flag without a value, False for none."""
    values = {name: value if isinstance(value, list) else [] if value is True else [value]
              for name, value in flags.items() if value is not False}
    return [word for name in values for word in (f"--{name}", *map(str, values[name]))]


def parsed(words: list[str]) -> argparse.Namespace:
    """Return the flags of a command that runs a script, as the script reads them."""
    place = next(n for n, word in enumerate(words) if word.removesuffix(".py") in MAINS)
    return sys.modules[words[place].removesuffix(".py")].parse_args(words[place + 1:])


def command(script: str, flags: list[str], processes: int = 1) -> list[str]:
    """Return the command that runs a script, under torchrun where it is to be several processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / f"{script}.py"), *flags]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_of(launcher: int, rank: int) -> int | None:
    """Return the process id of a rank, a child of torchrun's."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    return None
