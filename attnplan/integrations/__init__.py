"""Bridges from other libraries to attnplan; each imports its library only when it is used."""
