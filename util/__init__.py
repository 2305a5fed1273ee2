"""Utilities that know nothing about models or datasets. `util` imports neither."""

from util.moved_names import name_moved_modules

name_moved_modules()
