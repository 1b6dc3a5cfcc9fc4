"""Declining what is too risky, with a promise on the program's metric, and watching whether it holds."""
