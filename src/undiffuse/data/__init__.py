"""Data sets: what every source becomes (`dataset`), the sources (`sources/`), the map to x (`transform`)."""
