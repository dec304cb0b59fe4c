"""The commands: their settings, command lines, error messages and launch."""
