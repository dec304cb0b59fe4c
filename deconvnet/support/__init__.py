"""What all else stands on: argument checks, units, autograd modes, processes, compiled code."""
