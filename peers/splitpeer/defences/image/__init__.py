"""Defences of images: what a site does to a window before its encoder sees it."""
