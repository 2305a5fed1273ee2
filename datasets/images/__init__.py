"""Unlabelled images: folders, lists and tar shards."""
