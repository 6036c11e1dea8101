"""The command ``torchreg``: "L1 or L2?" on data, the zeros of a checkpoint, a linear model's path, a run as a page."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torchreg.cli import compare, doctor, inspect, path, report
from torchreg.cli.arguments import Parser
from torchreg.cli.output import CommandError, discard_output, print_error

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status.

    Args:
        argv: the arguments without the program's name; by default those of the process.

    Returns:
        0 for success, 2 for bad input (with one line on stderr), 130 after Ctrl-C, 141 when the reader of the
        output has gone.

    >>> main(["--version"])  # doctest: +ELLIPSIS
    torchreg ...
    0
    """
    parser = _parser()
    name = parser.prog
    try:
        if sys.stdout is None:
            raise CommandError("standard output is closed")
        arguments = parser.parse_args(argv)
        if arguments.run is None:
            parser.print_help()
        else:
            name = f"{name} {arguments.command}"
            arguments.run(arguments)
    except SystemExit as stop:  # argparse, after --help, --version or an error
        return stop.code if isinstance(stop.code, int) else 0
    except CommandError as error:
        print_error(name, str(error))
        return 2
    except MemoryError:
        print_error(name, "out of memory")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        discard_output()
        return 141
    return 0


def _parser() -> Parser:
    from torchreg import __version__

    parser = Parser(
        prog="torchreg",
        description="L1, L2, Elastic Net and exact zeros for any PyTorch module.",
        epilog="`torchreg COMMAND --help` explains a command.",
    )
    parser.add_argument("--version", action="version", version=f"torchreg {__version__}")
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    compare.add_parser(commands)
    inspect.add_parser(commands)
    path.add_parser(commands)
    report.add_parser(commands)
    doctor.add_parser(commands)
    return parser
