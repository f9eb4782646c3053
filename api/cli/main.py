"""The `halyard` command. Imports nothing heavy before it knows which subcommand is meant."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from halyard import __version__
from halyard.hal.errors import HalyardError

__all__ = ["main"]

# name -> (module, one line of help)
COMMANDS = {
    "serve": ("serve", "serve a model over HTTP, in OpenAI's API"),
    "generate": ("generate", "complete a prompt"),
    "chat": ("chat", "chat with a model in the terminal"),
    "batch": ("batch", "answer a file of requests; goes on where it was stopped"),
    "models": ("models", "mirror models for use without the hub, verify and list them"),
    "keys": ("keys", "make, list and revoke API keys"),
    "plan": ("plan", "what would run, on what, with how much memory, and why"),
    "devices": ("devices", "what hardware is here and which backends can use it"),
    "bench": ("bench", "measure a model"),
    "export": ("export", "write a model's graphs and weights for use elsewhere"),
    "conformance": ("conformance", "prove a backend, or find where two part"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 0, 2 for what a user can mend, 130 for Ctrl-C."""
    # Read by the OpenMP runtime when torch loads it: threads that wait give their core up soon, for
    # the event loop and other processes need cores too.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="halyard", description="Serves large language models on whatever hardware there is."
    )
    parser.add_argument("--version", action="version", version=f"halyard {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    try:
        modules = {}
        for name, (module, text) in COMMANDS.items():
            command = commands.add_parser(
                name, help=text, description=f"{text[0].upper()}{text[1:]}."
            )
            if name == chosen:  # the others' options need not be built
                modules[name] = importlib.import_module(f"halyard.api.cli.{module}")
                modules[name].add_arguments(command)
        args = parser.parse_args(arguments)
        if args.command is None:
            parser.print_help()
            return 0
        status: int = modules[args.command].run(args)
        sys.stdout.flush()  # here, where a reader that went away is expected
    except HalyardError as error:
        print(f"halyard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


if __name__ == "__main__":
    sys.exit(main())
