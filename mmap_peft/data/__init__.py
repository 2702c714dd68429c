"""Data sets from files, from the Hub or drawn, and tasks made from them."""
