"""The commands: their settings, their arguments, and how they are launched."""
