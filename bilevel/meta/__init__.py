"""Meta-learning: what adapts, from where, how, how the outer gradient is estimated, and how x moves."""
