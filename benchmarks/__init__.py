"""Side-by-side measurements of this converter, the stock ones, and the disk itself."""
