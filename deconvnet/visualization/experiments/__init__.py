"""The experiments of Zeiler and Fergus (ECCV 2014)."""
