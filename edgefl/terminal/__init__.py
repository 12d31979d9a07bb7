"""Tools for every command: output, colours, debugging, hints about extras, Ctrl-C."""
