"""Every command in the README, the guides and the help pages is one: its settings are read."""

import copy
import functools
import re
import shlex
import warnings
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from deconvnet.cli.arguments import for_hydra
from deconvnet.cli.commands import COMMANDS
from deconvnet.cli.errors import one_line
from deconvnet.cli.launch import CONFIGS, OWN_FOLDER, PACKAGE
from deconvnet.cli.read_settings import read_settings, register
from deconvnet.cli.settings import SCHEMAS

ROOT = Path(__file__).parents[2]
# Where commands are documented, and a number of them that each part has at least.
PAGES = {"README.md": 3, "docs/*.md": 50, "configs/*.yaml": 30, "deconvnet/cli/*.yaml": 10}
# A command with settings, at the beginning of a line or of a code span, or after &&; what follows
# two spaces or a # is a remark.
COMMAND = re.compile(
    r"(?:^ *|`|&& )(?:torchrun [^\n`]*?|python )?(?:(?:-m )?deconvnet (?P<command>[a-z][a-z-]+)|"
    r"scripts/(?P<script>\w+)\.py)(?P<rest> [^\n`]*=[^\n`]*)",
    re.MULTILINE,
)


def documented(pattern):
    """(page, command, arguments) of the commands in the pages of a pattern."""
    for path in sorted(ROOT.glob(pattern)):
        text = re.sub(r"\\\n *", "", path.read_text())
        for match in COMMAND.finditer(text):
            command = match["command"] or match["script"].replace("_", "-")
            rest = re.split("  |#", match["rest"])[0]
            if command in COMMANDS and not re.search(r"[.…]{3}|COMMAND", rest):
                yield path.relative_to(ROOT), command, tuple(shlex.split(rest))


@functools.cache
def composed(name, files):
    folder = PACKAGE / "cli" if name in OWN_FOLDER else CONFIGS
    with initialize_config_dir(str(folder), version_base="1.3"):
        return compose(name, list(files))


def refusal(name, arguments):
    """The one-line error for settings that are refused, if they are."""
    register()
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    try:
        words = for_hydra(list(arguments), SCHEMAS[name])
        settings = [word for word in words if not word.startswith("-")]
        parsed = OverridesParser.create().parse_overrides(settings)
        of_files = [o for o in parsed if o.key_or_group in groups and name not in OWN_FOLDER]
        if any(o.is_sweep_override() for o in of_files):
            return None
        cfg = copy.deepcopy(composed(name, tuple(o.input_line for o in of_files)))
        values = [o for o in parsed if o not in of_files and not o.is_sweep_override()]
        ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        read_settings(cfg)
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        return one_line(error)
    return None


@pytest.mark.parametrize("pattern", PAGES)
def test_the_settings_of_every_documented_command_are_accepted(pattern):
    commands = list(documented(pattern))
    assert len(commands) >= PAGES[pattern]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of renamed settings
        wrong = [
            f"{page}: deconvnet {command} {shlex.join(arguments)}: {message}"
            for page, command, arguments in dict.fromkeys(commands)
            if not set(arguments) & {"--config-dir", "--help", "-h"}
            and (message := refusal(command.replace("-", "_"), arguments))
        ]
    assert not wrong, "\n".join(wrong)
