"""`deconvnet reconstruct`, from a checkout: python scripts/reconstruct.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("reconstruct")
