"""Which devices take part in a round: by an expression over what is known of them, by lot, or by their utility.

It imports no module here, because the configuration checks expressions with `edgefl.choosing.expression`.
"""
