"""How the planner decides: candidates, placements, preferences, and the words for it."""
