"""One module per command: what every rank does for it. ``cli.py`` starts them."""
