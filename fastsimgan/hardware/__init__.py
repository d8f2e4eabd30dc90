"""Devices, number types, memory and threads."""
