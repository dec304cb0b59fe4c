"""`deconvnet classify`, from a checkout: python scripts/classify.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("classify")
