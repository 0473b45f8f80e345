"""Poses from queries: a head that finds people, animals or parts and their points together, without a dense map."""
