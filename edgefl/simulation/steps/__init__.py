"""Training steps made cheap: recorded, simplified, over flat buffers and cached samples."""
