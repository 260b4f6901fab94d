"""The built-in data set emoji_v1: its five files, the rules behind them, and their builder."""
