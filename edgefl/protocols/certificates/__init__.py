"""A device's or a region's next certificate: who asks for it (`requests`), and how it is installed (`own`, `pair`)."""
