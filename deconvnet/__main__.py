"""python -m deconvnet: the command line, where its console command is not installed."""

from deconvnet.cli.commands import main

if __name__ == "__main__":
    main()
