"""Flags, their defaults and the registries: from a command line or Python to settings that rest."""
