"""`deconvnet occlusion`, from a checkout: python scripts/occlusion.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("occlusion")
