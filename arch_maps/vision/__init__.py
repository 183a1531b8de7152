"""Vision-tower parts."""
