"""One file per release type: parts mounted at their places, and the config map."""
