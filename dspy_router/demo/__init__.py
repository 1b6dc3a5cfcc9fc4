"""The program that `make demo` runs: a voice assistant over seven tools, on the SNIPS requests."""
