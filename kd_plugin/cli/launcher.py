"""Starting a run from a command line: what the scripts in launch/ and `kd-plugin train` share.

Notable decisions:
- a user's mistake is one line on stderr (`-v` adds the traceback), printed once however many ranks make it;
- nothing here imports torch until the configuration is known to be good;
- Ctrl-C and SIGTERM end a run with one line of rank 0 and exit codes 130 and 143. A program of the user's own that
  calls `kd_plugin.train` keeps its own handlers.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kd_plugin.cli.recipes import config_path
from kd_plugin.settings.run import RunConfig
from kd_plugin.settings.yaml_file import ConfigError, load_config
from kd_plugin.training.interrupt import Ended, last_step, one_line_end
from kd_plugin.training.preflight import SetupError

__all__ = ["Stop", "launch", "one_line_errors", "run_training"]

_VERBOSE = ("-v", "--verbose")
_PATIENCE_S = 20
"""torchrun and deepspeed end the other ranks within a second or two after one, on a busy machine later."""


class Stop(SystemExit):
    """The error has been reported; `code` is the exit code."""


def launch(argv: Sequence[str], *, script: str, default: str, allowed: Sequence[str]) -> int:
    """Run training for a script in launch/ and return its exit code: 0; 2 if it could not be started
    or came to nothing; 130 or 143 if SIGINT or SIGTERM ended it.

    `argv` is `CONFIG [section.key=value ...]`. `--local_rank=N` or `--local_rank N` in it is ignored (LOCAL_RANK
    says the same), `-v` shows tracebacks. Where the file's `train.parallel` is not among `allowed`, `default`
    replaces it; an override on the command line stands, unless it is `auto`.
    """
    rest = [arg for arg in _without_local_rank(argv) if arg not in _VERBOSE]
    if not rest or rest[0] in ("-h", "--help"):
        usage = f"usage: {script} CONFIG [section.key=value ...] [-v]"
        print(usage, file=sys.stdout if rest else sys.stderr)
        return 0 if rest else 2
    try:
        with one_line_errors(verbose=any(arg in _VERBOSE for arg in argv), exit_code=2):
            config = load_config(config_path(rest[0]), rest[1:])
            overridden = any(arg.startswith("train.parallel=") for arg in rest[1:])
            stands = overridden and config.train.parallel != "auto"
            run_training(config if stands else _with_parallel(config, script, default, allowed))
    except (Stop, Ended) as stop:
        return int(str(stop.code))
    return 0


def _without_local_rank(argv: Sequence[str]) -> Iterator[str]:
    arguments = iter(argv)
    for argument in arguments:
        if argument in ("--local_rank", "--local-rank"):
            next(arguments, None)
        elif not argument.startswith(("--local_rank=", "--local-rank=")):
            yield argument


def run_training(config: RunConfig) -> None:
    """Call `kd_plugin.train`, imported only now; SIGINT and SIGTERM end the run with one line of rank 0."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    with one_line_end(lambda what: None if _rank() else _last_words(config, what), several=several):
        from kd_plugin.training.run import train

        train(config)


def _last_words(config: RunConfig, what: str) -> str:
    """Where the run was, what is left of it and how it goes on."""
    step = last_step()
    where = f"{what} in step {step[0]} of {step[1]}" if step else f"{what} before the first step"
    # What is loaded by now is used: a process that is ending starts no import of torch.
    checkpoint = sys.modules.get("kd_plugin.training.checkpoint")
    newest = None if checkpoint is None else checkpoint.latest_finite(Path(config.log.output_dir))
    if newest is not None:
        return f"{where}; saved: {newest}; train.resume=true continues from there"
    if step is None:
        return f"{where}; nothing was trained; the same command starts again"
    cure = "" if config.train.save_every else " (train.save_every: N saves one every N steps)"
    return f"{where}; saved: no checkpoint{cure}; the same command starts again at step 1"


@contextmanager
def one_line_errors(verbose: bool, exit_code: int) -> Iterator[None]:
    """Report what a user can cure (ValueError, missing file, model, package) in one line, then raise Stop."""
    try:
        yield
    except BrokenPipeError:  # `| head` is no mistake
        raise
    except KeyboardInterrupt:
        if _rank() == 0:
            print("interrupted", file=sys.stderr)
        raise Stop(130) from None
    except (ValueError, OSError, ImportError) as error:
        if verbose:
            raise
        _report(error)
        raise Stop(exit_code) from None


def _with_parallel(config: RunConfig, script: str, default: str, allowed: Sequence[str]) -> RunConfig:
    given = config.train.parallel
    if given in allowed:
        return config
    if given != "auto" and _rank() == 0:
        print(f"train.parallel: {given} -> {default} ({script} was started; `train.parallel={given}` keeps it)")
    return config.model_copy(update={"train": config.train.model_copy(update={"parallel": default})})


def _report(error: Exception) -> None:
    if _rank() > 0:
        if isinstance(error, ConfigError):  # every rank has read the same file, and rank 0 speaks for all
            return
        # Rank 0 most likely says the same. Launchers end all ranks when one has failed, which is waited for.
        time.sleep(_PATIENCE_S)
    who = f"[rank {_rank()}] " if _rank() else ""
    if isinstance(error, (ConfigError, SetupError)):  # one fault per line
        print("\n".join(who + line for line in str(error).splitlines()), file=sys.stderr)
        return
    name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    print(f"{who}error: {name}{' '.join(str(error).split())} (-v shows where)", file=sys.stderr)


def _rank() -> int:
    return int(os.environ.get("RANK", 0))
