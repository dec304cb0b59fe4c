"""Files that outlive a process: which of them may be replaced, and what they contain."""
