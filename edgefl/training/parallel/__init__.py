"""Local training by several processes that share each batch, on one machine or on the machines of a site."""
