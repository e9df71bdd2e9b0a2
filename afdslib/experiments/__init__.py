"""The runs: each is a frozen configuration that knows how to compute itself, and names the runs it needs."""
