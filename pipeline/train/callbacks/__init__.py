"""Callbacks that check, log, report and stop a run of stage 2."""
