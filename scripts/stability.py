"""`deconvnet stability`, from a checkout: python scripts/stability.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("stability")
