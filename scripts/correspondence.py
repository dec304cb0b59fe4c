"""`deconvnet correspondence`, from a checkout: python scripts/correspondence.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("correspondence")
