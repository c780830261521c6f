"""Tests of the search for stacks within limits of quality."""
