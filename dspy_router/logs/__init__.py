"""Decisions and their rewards on disk: logs that many processes append to, rotated, with rewards that come later."""
