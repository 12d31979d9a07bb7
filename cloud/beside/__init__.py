"""What the servers beside a cloud share: split models, language models, training in parts."""
