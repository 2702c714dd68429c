"""What the Hub shows of a classifier."""
