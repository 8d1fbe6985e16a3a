"""Preferences, rewards and teachers on text of this repository: each loss from hidden states beside the stock one."""
