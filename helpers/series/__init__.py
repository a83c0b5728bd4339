"""What a series of notebooks needs around the measuring: run, report, planner, processes."""
