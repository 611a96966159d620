"""Every HTML page, and the tables of a terminal. Pages take plain values; what they show is computed by the caller."""
