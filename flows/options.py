"""Arguments that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

SpecFile = Annotated[Path, typer.Argument(metavar="SPEC", help="The YAML spec.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Lay a value over the spec, for example steps.slim.sparsity=50%."),
]
OfSpec = Annotated[
    Path | None, typer.Option("--spec", metavar="SPEC", help="The spec whose runs are meant; default: this folder's.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


@dataclass(frozen=True)
class Selection:
    """What `lathe plan` and `lathe run` are asked for: a spec, the values laid over it, and which steps are meant."""

    spec: Path
    overrides: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    from_step: tuple[str, ...] = ()
    no_cache: bool = False
    as_json: bool = False


def selecting(command: Callable[[Selection], None]) -> Callable[..., None]:
    """The command as Typer reads it: with an argument or an option for each part of the selection."""

    def parsed(
        spec: SpecFile,
        set_: Set = None,
        only: Annotated[
            list[str] | None,
            typer.Option(metavar="STEP", help="Make this step and what it needs, nothing else; may be given again."),
        ] = None,
        from_step: Annotated[
            list[str] | None,
            typer.Option("--from", metavar="STEP", help="Make this step and all after it anew; may be given again."),
        ] = None,
        no_cache: Annotated[bool, typer.Option("--no-cache", help="Make every step anew.")] = False,
        as_json: AsJson = False,
    ) -> None:
        command(Selection(spec, tuple(set_ or ()), tuple(only or ()), tuple(from_step or ()), no_cache, as_json))

    parsed.__doc__ = command.__doc__
    return parsed
