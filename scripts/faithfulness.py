"""`deconvnet faithfulness`, from a checkout: python scripts/faithfulness.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("faithfulness")
