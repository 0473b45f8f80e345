"""The command line: one file a command. Each parses, calls the package and prints; no torch at import time."""
