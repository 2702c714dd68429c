"""Arguments of commands: places without a name, fields of dataclasses, and YAML files of both."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from ..checking import checked


class CommandParser(HfArgumentParser):
    """`HfArgumentParser` whose `--help` is short, and whose errors are `ValueError`s of one sentence.

    The first argument can be a YAML file, whose values other arguments replace.

    Args:
        name (`str`): the command, `"mmap-peft predict"`.
        types: the dataclasses.
        text (`str`): what the command does; the first line is its summary.
        places (`Mapping[str, str]`): help of the arguments without a name. The last one takes several if its name is
            in the plural, `"files"`.
        shown (`Mapping[str, str]`, *optional*): the arguments that `--help` shows, with a short help, or `""` for the
            first sentence of their own; `--help-all` shows all. `None`: all.
        optional (`Collection[str]`): the `places` that may be left out.
    """

    def __init__(
        self,
        name: str,
        types: Sequence[type],
        text: str,
        places: Mapping[str, str] | None = None,
        shown: Mapping[str, str] | None = None,
        optional: Collection[str] = (),
    ) -> None:
        self.places, self.optional, self.settings = dict(places or {}), optional, {}
        self.list = next((place for place in self.places if place.endswith("s")), None)
        words = " ".join(f"{place.upper()}{' ...' if place == self.list else ''}" for place in self.places)
        usage = f"{name} {words}{' ' * bool(words)}[options]"
        own = {"formatter_class": Lines, "add_help": False, "allow_abbrev": False}
        super().__init__(types, prog=name, description=text.strip(), usage=usage, **own)
        for place, meaning in self.places.items():
            self.add_argument(place, nargs="*" if place == self.list else "?", help=meaning, metavar=place.upper())
        self.add_argument("-h", "--help", action="help", help="show this page")
        self._shown = None if shown is None else {**dict.fromkeys([*self.places, "help", "help_all"], ""), **shown}
        if shown is not None:
            self.add_argument(
                "--help-all",
                nargs=0,
                action=_HelpAll,
                default=argparse.SUPPRESS,
                help="show all arguments, of training as well",
            )

    def format_help(self) -> str:
        texts = [each.help for each in self._actions]
        for each in self._actions if self._shown is not None else ():
            first = (each.help or "").partition(". ")[0]
            each.help = self._shown[each.dest] or first if each.dest in self._shown else argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            for each, text in zip(self._actions, texts):
                each.help = text

    def show_all(self) -> None:
        """Let `--help` show all arguments."""
        self._shown = None

    def error(self, message: str) -> None:
        raise ValueError(f"{message[:1].upper()}{message[1:]}; {self.prog} --help shows the arguments.")

    def parse(self, argv: Sequence[str]) -> tuple[Any, ...]:
        """Read the arguments.

        Returns:
            An object of each dataclass; with `places`, a namespace of these; and the names of the arguments that were
            given.

        Raises:
            ValueError: an unknown or missing argument, or a value that a dataclass refuses.
        """
        argv, given = list(argv), set()
        if argv and argv[0].endswith((".yaml", ".yml")):
            self.parse_yaml_file(argv.pop(0))
            given |= self.settings.keys()
        given |= {each.split("=")[0][2:].replace("-", "_") for each in argv if each.startswith("--")}
        *found, rest = self.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        more = [each for each in rest if not each.startswith("-")]
        if self.list:  # argparse takes those that come after an option for unknown
            getattr(found[-1], self.list).extend(more)
            rest = [each for each in rest if each not in more]
        if rest:
            self._refuse(rest[0])
        for place in self.places:
            if not getattr(found[-1], place) and place not in self.optional:
                raise ValueError(f"{place.upper()} is missing; {self.prog} --help shows the arguments.")
        return (*found, given)

    def parse_dict(self, args: Any, allow_extra_keys: bool = False) -> tuple[Any, ...]:
        """What `parse_yaml_file` does with a file's content: it becomes the default of the arguments."""
        self.settings = checked(args, dict[str, Any], "settings", "expected names of arguments with their values")
        known = {each.dest for each in self._actions} - {"help", "help_all"}
        for name in self.settings.keys() - known:
            self._refuse(name)
        self.set_defaults(**self.settings)
        return ()

    def _refuse(self, name: str) -> None:
        options = [option for each in self._actions for option in each.option_strings]
        close = difflib.get_close_matches(f"--{name.lstrip('-').split('=')[0]}", options, n=1)
        instead = f"did you mean {close[0]}?" if close else f"{self.prog} --help shows those that there are."
        raise ValueError(f"There is no argument {name}; {instead}")


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        parser.show_all()
        parser.print_help()
        parser.exit()


class Lines(argparse.RawDescriptionHelpFormatter):
    """One line for short arguments: an option by its first spelling, and its default only if that says something."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        super().__init__(prog, max_help_position=28, **kwargs)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else f" {self._format_args(action, action.dest.split('_')[-1].upper())}"
        return action.option_strings[0] + ("" if isinstance(action.default, bool) else value)

    def _get_help_string(self, action: argparse.Action) -> str:
        unset = action.default in (None, False, "", argparse.SUPPRESS) or not action.option_strings
        return (action.help or "") + ("" if unset else " [%(default)s]")
