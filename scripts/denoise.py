"""`deconvnet denoise`, from a checkout: python scripts/denoise.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("denoise")
