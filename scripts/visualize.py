"""`deconvnet visualize`, from a checkout: python scripts/visualize.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("visualize")
