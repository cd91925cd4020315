"""The `lathe` command."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, NoReturn

import click
import typer

import flows.commands
from flows.terminal import ExitCode, complain, end_at_once, err, leave, on_interrupt

app = typer.Typer(
    name="lathe",
    help="Makes a language model fit where it has to run: one YAML spec, a tracked and gated run, a smaller file.",
    epilog="Exit codes: 0 passed, 1 a gate failed or is inconclusive, 2 the spec is wrong, 3 a step failed, or Lathe "
    "did, 130 interrupted.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _module in iter_modules(flows.commands.__path__):
    import_module(f"{flows.commands.__name__}.{_module.name}").register(app)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    return None


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code; a traceback is shown only with `--debug`.

    Args:
        arguments: the words behind `lathe`; default: those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words  # taken wherever it stands: people add it to the end of the command that failed
    with on_interrupt(end_at_once):
        code = _run([word for word in words if word != "--debug"], debug)
    if code == ExitCode.INTERRUPTED:
        complain("interrupted")
        leave(code)
    sys.exit(code)


def _run(words: list[str], debug: bool) -> int:
    try:
        code = app(words or ["--help"], prog_name="lathe", standalone_mode=False)
        return code if isinstance(code, int) else ExitCode.PASSED
    except (KeyboardInterrupt, click.Abort):
        return ExitCode.INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        complain(error.format_message())
        return ExitCode.SPEC
    except click.ClickException as error:
        hint = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "lathe"
        complain(f"{error.format_message()}\nHelp: {hint} --help")
        return ExitCode.SPEC
    except Exception as error:
        if debug:
            err.print(traceback.format_exc(), markup=False, soft_wrap=True)
        return _explain(error, debug)


def _explain(error: Exception, debug: bool) -> int:
    """Say in a line what went wrong; the exit code."""
    from flows.errors import PlanError
    from specs.schema.graph import GraphError
    from specs.schema.mistakes import SpecErrors
    from tasks.context import StepError

    if isinstance(error, SpecErrors):
        count = len(error.mistakes)
        complain(f"{error}\n{count} {'mistake' if count == 1 else 'mistakes'}")
        return ExitCode.SPEC
    if isinstance(error, (GraphError, PlanError)):
        complain(str(error))
        return ExitCode.SPEC
    if isinstance(error, StepError):
        complain(f"error: {error}")
        return ExitCode.STEP
    reason = " ".join(str(error).split()) or "no message"
    complain(f"unexpected error: {type(error).__name__}: {reason}" + ("" if debug else "; run again with --debug"))
    return ExitCode.STEP


if __name__ == "__main__":
    main()
