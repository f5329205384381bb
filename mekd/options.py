"""The options of commands that take no settings: a mistake in them is the user's to mend."""

import argparse
from typing import NoReturn

from mekd.errors import UsageError


class Parser(argparse.ArgumentParser):
    """What reads a command's options; a mistake is a UsageError."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ")
        raise UsageError(f"{message}; `{self.prog} --help` lists the options and what they may be")
