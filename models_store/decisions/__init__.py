"""Decisions derived from an ensemble's answers, and the calibration that gives them their guarantees."""
