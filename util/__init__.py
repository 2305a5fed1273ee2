"""Utilities that know nothing about models or datasets. `util` imports neither."""
