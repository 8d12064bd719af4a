"""Figures, tables and sample folders, from arrays alone."""
