"""Example configs, as package data. Imports nothing."""
