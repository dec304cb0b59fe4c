"""`deconvnet ablate`, from a checkout: python scripts/ablate.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("ablate")
