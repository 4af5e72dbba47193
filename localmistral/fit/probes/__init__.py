"""Looks at the machine: one module a source, and what the findings mean together."""
