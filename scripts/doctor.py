"""`deconvnet doctor`, from a checkout: python scripts/doctor.py key=value ..."""

from deconvnet.cli.commands import run

if __name__ == "__main__":
    run("doctor")
