"""Procedural eyes and hands, with labels."""
