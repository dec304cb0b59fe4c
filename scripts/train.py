"""`deconvnet train`, from a checkout: python scripts/train.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("train")
