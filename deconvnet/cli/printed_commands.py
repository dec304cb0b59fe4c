"""Commands printed for the user to type, in the form in which the current one was typed."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from deconvnet.cli.arguments import has_meaning, quoted

# What the user typed: the call, such as ("deconvnet", "train"), and the arguments after it.
_call: tuple[str, ...] = ("deconvnet", "train")
_typed: list[str] = []


def remember(call: tuple[str, ...], arguments: list[str]) -> None:
    """Keep what the user typed, before the arguments are rewritten for Hydra."""
    global _call, _typed
    _call, _typed = call, list(arguments)


def setting(key: str, value: object) -> str:
    """`key=value` quoted for the shell and for Hydra, so that the value arrives unchanged."""
    text = str(value)
    if isinstance(value, str | Path) and has_meaning(text):
        text = quoted(text.replace("${", r"\${"))
    return shlex.quote(f"{key}={text}")


def sibling(command: str) -> str:
    """Another command in the form in which the user called this one, for the shell."""
    if _call[-1].endswith(".py"):
        script = Path(_call[-1]).with_name(f"{command.replace('-', '_')}.py")
        return shlex.join([*_call[:-1], str(script)])
    return shlex.join([*_call[:-1], command])


def typed(*groups: str) -> list[str]:
    """The settings of these groups that the user typed, for the shell."""
    names = [a.lstrip("+").partition("=")[0] for a in _typed]
    return [
        shlex.quote(argument)
        for argument, name in zip(_typed, names, strict=True)
        if name.partition(".")[0] in groups
    ]


def again(*without: str) -> str:
    """The command that the user typed, for the shell, without some of its settings."""
    typed = [a for a in _typed if a.lstrip("+").partition("=")[0] not in without]
    return shlex.join([*_launcher(), *typed])


def _launcher() -> list[str]:
    """The call, through torchrun if it started several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return list(_call)
    torchrun = ["torchrun", f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE', '1')}"]
    if _call[0] == "python":
        return [*torchrun, *_call[1:]]
    return [*torchrun, "--no-python", *_call]
