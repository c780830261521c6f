"""Published figures as functions, one file a system; prove.py runs them. Nothing imports this."""
