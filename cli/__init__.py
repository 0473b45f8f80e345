"""The command line, one file per command: parse, call one function of ``mvision.commands``, print.

Nothing here imports torch before a command runs.
"""
