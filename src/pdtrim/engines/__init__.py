"""Serving engines that run an exported pair."""
