"""What a run leaves behind and shows: log, screen, trackers, alarms, report. It knows no algorithm."""
