"""`deconvnet inpaint`, from a checkout: python scripts/inpaint.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("inpaint")
