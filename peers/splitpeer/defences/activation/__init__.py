"""Defences of activations: what a site does to what its encoder found, before it leaves."""
