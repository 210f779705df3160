"""Defences of gradients: what the label holder does to what it sends back."""
