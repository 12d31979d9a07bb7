"""What every command needs: output, colours, debugging, hints about extras, Ctrl-C."""
