"""A run's log, screen, trackers, alarms and report, independent of the algorithm."""
