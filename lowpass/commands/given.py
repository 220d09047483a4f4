"""What was given on the command line: nothing that is empty, and nothing that would be passed over in silence."""

from collections.abc import Collection, Iterable
from typing import Any

import typer
from typer.core import TyperCommand

from lowpass.pipeline.base.errors import InputError


class Command(TyperCommand):
    """A command whose options and arguments are refused where they are empty. No option means anything then, and an
    empty path, as an unset variable of a script leaves it, would be the present folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """What typer makes of the words, once none of the values is empty.

        Raises:
            InputError: one is.
        """
        values, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.params:
            value = values.get(parameter.name or "")
            if value == "" or (isinstance(value, (list, tuple)) and "" in value):
                other = "" if parameter.required else ", or leave it out"
                raise InputError(f"{_spelled(parameter)} is empty; give it a value{other}")
        return super().parse_args(ctx, args)


def given(context: typer.Context) -> dict[str, str]:
    """The parameters that stand on the command line, by name: how they are spelled."""
    found = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            found[parameter.name or ""] = _spelled(parameter)
    return found


def refuse(context: typer.Context, names: Iterable[str], sentence: str) -> None:
    """Refuse parameters that would have no effect.

    Args:
        context: of the command.
        names: the parameters, as the command's function calls them.
        sentence: what is said of those that were given, `{}` in their place.

    Raises:
        InputError: some of them were given; all are named.
    """
    wanted = set(names)
    idle = [spelled for name, spelled in given(context).items() if name in wanted]
    if idle:
        raise InputError(sentence.format(", ".join(idle)))


def refuse_all_but(context: typer.Context, names: Collection[str], sentence: str) -> None:
    """Refuse every parameter but those named.

    Raises:
        InputError: others were given; all are named.
    """
    refuse(context, given(context).keys() - set(names), sentence)


def _spelled(parameter: Any) -> str:
    """As the help calls it."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper()).strip("[].")
    return str(max(parameter.opts, key=len))
