"""A run with frozen encoders: releases are collected into a bank, and the decoder is trained from it."""
