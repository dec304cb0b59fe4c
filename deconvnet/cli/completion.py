"""Tab completion of commands and settings in bash and zsh: `deconvnet --completion`.

The script contains all names, so that completing needs no Python and takes no time.
"""

from __future__ import annotations

from typing import get_type_hints

from deconvnet import __version__
from deconvnet.cli.commands import COMMANDS
from deconvnet.cli.launch import CONFIGS, OWN_FOLDER
from deconvnet.cli.setting_keys import annotation_of, keys_of, without_none
from deconvnet.cli.settings import SCHEMAS

# Bash passes words that it has split at "=", and replaces only what follows the last one.
SCRIPT = """\
# Tab completion of deconvnet {version} in bash and zsh: save this script, and `source` it.
[[ -n $ZSH_VERSION ]] && autoload -U +X compinit bashcompinit && compinit && bashcompinit
_deconvnet() {{
    [[ -n $ZSH_VERSION ]] && emulate -L ksh && setopt bash_rematch
    local line=${{COMP_LINE:0:$COMP_POINT}} typed word command keys before values each
    local IFS=$' \\t\\n'
    typed=($line)
    [[ $line == *" " ]] && typed+=("")
    word=${{typed[${{#typed[@]}}-1]}}
    command=${{typed[1]}}
    COMPREPLY=()
    if (( ${{#typed[@]}} == 2 )); then
        for each in {commands} --help --version --completion; do
            [[ $each == "$word"* ]] && COMPREPLY+=("$each ")
        done
        return
    fi
    case $command in
{keys}
    esac
    if [[ $word == *=* ]]; then
        before=${{word%%=*}}=
        word=${{word#*=}}
        values=()
        case $command:${{before#+}} in
{values}
            *) values=("$word"*) ;;
        esac
        [[ $COMP_WORDBREAKS == *=* ]] && before=""
        for each in "${{values[@]}}"; do
            [[ $each == "$word"* && $each != *"*" ]] || continue
            [[ -d $each ]] && each+=/ || each+=" "
            COMPREPLY+=("$before$each")
        done
        return
    fi
    # The settings of layer2, layer3, ... are those of layer1.
    local layer="" asked=$word shown="" rest
    if [[ $word =~ model\\.(layer[0-9]+)\\. ]]; then
        layer=${{BASH_REMATCH[1]}}
        asked=${{word/$layer/layer1}}
    fi
    for each in $keys; do
        [[ $each == "$asked"* ]] || continue
        # Up to the next dot.
        rest=${{each#"$asked"}}
        [[ $rest == *.* ]] && rest=${{rest%%.*}}.
        [[ " $shown " == *" $rest "* ]] || COMPREPLY+=("$word$rest")
        shown+=" $rest"
    done
}}
complete -o nospace -F _deconvnet deconvnet
"""


def script() -> str:
    """The script for the shell."""
    keys, values = [], []
    for command in COMMANDS:
        name = command.replace("-", "_")
        groups = [] if name in OWN_FOLDER else _groups(SCHEMAS[name])
        names = [*keys_of(SCHEMAS[name]), *groups]
        words = [f"{key}=" for key in names]
        words += ["+experiment=", "+layers="] if command == "train" else []
        keys.append(f'        {command}) keys="{" ".join(sorted(words))} --help" ;;')
        for key in names:
            annotation = annotation_of(SCHEMAS[name], key)
            if key in groups:
                values.append((f"{command}:{key}", _choices(key)))
            elif annotation and without_none(annotation[0])[0] is bool:
                values.append((f"{command}:{key}", ["true", "false"]))
    values.append(("train:experiment", _choices("experiment")))
    cases = [f"            {key}=) values=({' '.join(words)}) ;;" for key, words in values]
    return SCRIPT.format(
        version=__version__,
        commands=" ".join(COMMANDS),
        keys="\n".join(keys),
        values="\n".join(cases),
    )


def _groups(schema: type) -> list[str]:
    """The settings of a command for which configs/ has a folder of files to choose from."""
    return [name for name in get_type_hints(schema) if _choices(name)]


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in CONFIGS.glob(f"{group}/*.yaml"))
