"""Defences: what a party does to its tensors before they leave.

`specs` and `kinds` say, without torch, how a defence is written and which there are; `stack` and `network` apply them.
Nothing is imported here, so that settings can read a defence's text on a machine without torch.
"""
