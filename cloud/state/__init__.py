"""What a cloud keeps: its home, database, blobs, spool, and the rows of jobs, models and devices."""
