"""`deconvnet train-cnn`, from a checkout: python scripts/train_cnn.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("train-cnn")
