"""Run `accelerate launch` and keep its processes' exit status: `python -m train.launch [OPTIONS] train/sft.py ...`.

The arguments are those of `accelerate launch`. accelerate (1.15) always exits with status 1, whatever the status of its
process. Both accelerate and torchrun add a traceback after an error and after Ctrl-C. This command exits with the
status of the first process that failed, or with 130 after Ctrl-C, and leaves the error message to that process.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from contextlib import suppress

import psutil


def main(argv: list[str]) -> int:
    """Launch the processes, wait for them, and return their exit status as a shell would."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args(argv)
    options.quiet = False  # with --quiet, accelerate would hide the status
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The handler is set here because a signal during the imports must end this process. The started processes do not
    # inherit a handler, and torchrun replaces it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _pass_on)
    try:
        launch_command(options)
    except subprocess.CalledProcessError as error:
        return _shell_status(error.returncode)
    except ChildFailedError as error:
        _, first = error.get_first_failure()
        return _shell_status(first.exitcode)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _pass_on(number: int, _: object) -> None:
    """Send a signal to the process that accelerate waits for. Without such a process, end this one.

    After Ctrl-C in a terminal, that process gets the signal twice. `echo_ft.processes` counts both as one. accelerate
    depends on psutil.
    """
    children = psutil.Process().children()
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.send_signal(number)
    if not children:
        sys.exit(128 + number)


def _shell_status(code: int) -> int:
    # For a process that a signal ended, Python gives the negative number of the signal.
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
