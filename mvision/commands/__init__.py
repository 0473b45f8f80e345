"""One file per command of the command line, without its parsing. Only ``mvision.cli`` imports them."""
