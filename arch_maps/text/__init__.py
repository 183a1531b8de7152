"""Language-model parts."""
