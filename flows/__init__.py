"""The stories: each flow reads as the README tells it."""
