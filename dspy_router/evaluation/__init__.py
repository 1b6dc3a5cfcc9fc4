"""Judging decisions: tables and pictures."""
