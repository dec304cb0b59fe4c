"""`deconvnet suggest`, from a checkout: python scripts/suggest.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("suggest")
