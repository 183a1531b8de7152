"""Model cards rendered from sandboxed templates."""
