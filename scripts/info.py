"""`deconvnet info`, from a checkout: python scripts/info.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("info")
