"""`deconvnet export`, from a checkout: python scripts/export.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("export")
