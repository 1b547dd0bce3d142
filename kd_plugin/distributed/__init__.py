"""Collectives with names; which part of a weight is here; torch's private names."""
